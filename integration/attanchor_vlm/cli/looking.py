"""`attanchor show`: one image, one question, and where the anchors went."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import MODEL, has_gpu, quiet, to_gpu


@app.command()
def show(
    model: MODEL,
    image: Annotated[Path, typer.Option(help="A picture.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    output: Annotated[Path, typer.Option(help="The picture with its anchors, .png or .pdf.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a trained adapter; brings its own tau.")] = None,
    tau: Annotated[float | None, typer.Option(help="Cosine threshold.")] = None,
) -> None:
    """Ask about an image, and draw each anchor at the patch that it was copied behind."""
    quiet()
    from attanchor_vlm import AttAnchorConfig, attach, load_adapter, loading, with_tokens_of
    from attanchor_vlm.data import load_image
    from attanchor_vlm.evaluate import explain
    from attanchor_vlm.mixin import base_of, is_attached

    if adapter is None and tau is None:
        raise typer.BadParameter("give --tau, or an --adapter that was trained with one", param_hint="--tau")
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{output} should end in .png, .pdf or .svg", param_hint="--output")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"adapter {adapter} holds no adapter_config.json; give the folder that train wrote to")
    picture = load_image(image)
    loaded, processor = loading.load(model, loading.choose_dtype("bfloat16" if has_gpu() else "float32", typer.echo))
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    if tau is not None:
        import dataclasses

        config: Any = base_of(loaded).attanchor_config if is_attached(loaded) else AttAnchorConfig(tau=tau)
        attach(loaded, with_tokens_of(dataclasses.replace(config, tau=tau), processor))
    elif not is_attached(loaded):
        raise ValueError(f"adapter {adapter} has no attanchor.json, so it was trained without anchors; give --tau")
    result = explain(to_gpu(loaded), processor, picture, question)
    from attanchor_vlm.plots import anchor_picture

    used: Any = base_of(loaded).attanchor_config
    anchor_picture(output, [result], used.tau, f"Anchors in {image.name}")
    for match in result.matches:
        where = (
            "not inserted"
            if match.patch is None
            else "behind patch row {}, column {}".format(*divmod(match.patch, result.grid[1]))
        )
        typer.echo(f"{match.text:>16}  {match.score:6.3f}  {where}")
    typer.echo(f"answer: {result.answer}")
    typer.echo(f"picture: {output}")
