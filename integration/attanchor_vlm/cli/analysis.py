"""`attanchor check`: are anchors right in a model? And `probe`: will they work, by its cosines, before any training?"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import ADAPTER, DATA, DTYPE, IMAGES, MODEL, SKIP_BAD, check_picture, note, quiet


@app.command()
def check(
    model: MODEL,
    adapter: ADAPTER = None,
    image: Annotated[
        list[Path] | None, typer.Option(metavar="<path>", help="A picture to check with; by default one of colours.")
    ] = None,
    question: Annotated[str, typer.Option(help="The question about it.")] = "What is there to see in this picture?",
    dtype: DTYPE = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was found as a JSON object.")] = False,
) -> None:
    """Show that anchors are right in a model, rule by rule, or what is wrong.

    By four runs of its vision tower and three of its language model. Exit code 1 if a rule is broken.
    """
    quiet()
    from PIL import Image

    from attanchor_vlm.data.batches import message
    from attanchor_vlm.inference import ask
    from attanchor_vlm.model import load as loading
    from attanchor_vlm.model.attach import base_of
    from attanchor_vlm.model.check import findings
    from attanchor_vlm.model.families import adapter_for
    from attanchor_vlm.model.rules import RULES

    down, round_ = Image.linear_gradient("L"), Image.radial_gradient("L")
    colours = Image.merge("RGB", (down, down.rotate(90), round_)).resize((448, 336))
    pictures = [ask.open_image(path) for path in image or []] or [colours]
    text = ask.with_placeholders(question, len(pictures))
    chosen = None if dtype is None else loading.choose_dtype(dtype, note)
    loaded, processor = loading.load(model, adapter, dtype=chosen, default_tau=0)
    target = base_of(loaded)
    batch = ask.encode_questions(loaded, processor, [[message("user", text)]], [pictures])
    mask = batch.pop("anchor_mask")
    found = findings(target, adapter_for(target), target.attanchor_config, batch, mask)
    if not found:
        raise typer.BadParameter("has no token that could be copied", param_hint="--question")
    if as_json:
        rules = {one.rule: {"found": one.found, "note": one.note} for one in found}
        typer.echo(json.dumps({"model": model, "ok": not any(one.found for one in found), "rules": rules}))
    else:
        for one in found:
            typer.echo(f"{'BROKEN' if one.found else 'ok':6}  {one.rule:9}  {RULES[one.rule]}")
            for said in filter(None, (one.found, one.note)):
                typer.echo(f"{'':19}{said}")
    if any(one.found for one in found):
        raise typer.Exit(1)


@app.command()
def probe(
    model: MODEL,
    data: DATA,
    images: IMAGES,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a trained adapter, to probe the model with it.")
    ] = None,
    samples: Annotated[int, typer.Option(min=2, help="Questions to measure on, about different images first.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per pass of the vision tower.")] = 4,
    tau: Annotated[
        list[float] | None, typer.Option(help="Threshold to give the inserted share for; several times for several.")
    ] = None,
    function_words: Annotated[
        Path | None, typer.Option(help="A file of words, one a line, that are no content words: for other languages.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Picture of the figures, .png, .pdf or .svg.")] = None,
    save_control: Annotated[
        Path | None,
        typer.Option(help="Also write the model with its projector's output features permuted, which matches nothing."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as a JSON object.")] = False,
    skip_bad: SKIP_BAD = False,
    seed: Annotated[int, typer.Option(min=0, help="For the choice of samples, and of permutations.")] = 0,
) -> None:
    """Say whether matching follows the content of images, with reasons, from best cosines alone; trains nothing."""
    if plot is not None:
        check_picture(plot, "--plot")
    if save_control is not None and save_control.exists():
        raise typer.BadParameter(f"{save_control} exists; take another folder", param_hint="--save-control")
    if save_control is not None and adapter is not None:
        raise typer.BadParameter("belongs to a model without --adapter", param_hint="--save-control")
    quiet()
    from attanchor_vlm.chat.words import FUNCTION_WORDS, read_words
    from attanchor_vlm.data.rows import read_rows
    from attanchor_vlm.data.rows import samples as make_samples
    from attanchor_vlm.errors import DataError
    from attanchor_vlm.model import load as loading
    from attanchor_vlm.model.attach import detach

    words = FUNCTION_WORDS if function_words is None else read_words(function_words)
    # That there is no such model or adapter is said before images are checked.
    loading.settings_for(model, adapter, tau=1.0)
    loading.source_of(model)
    rows, bad = read_rows(data, images, skip_bad, progress=not as_json)
    every = [sample for sample in make_samples(rows, "each") if sample.images]
    if len({sample.images for sample in every}) < 2:
        raise DataError(
            f"{data} has rows about fewer than two images; the probe compares a question's image with others"
        )
    loaded, processor = loading.load(model, adapter, tau=1.0)
    from attanchor_vlm.analysis import probe
    from attanchor_vlm.analysis.probe_control import permute_projector
    from attanchor_vlm.analysis.probe_scores import choose, prompt_scores

    chosen = choose(every, samples, seed)
    prompts = list(prompt_scores(loaded, processor, chosen, batch_size, seed, not as_json, words))
    result = probe.measure(prompts, tau or probe.TAUS)
    if plot is not None:
        from attanchor_vlm.analysis.probe_plot import probe_plot

        probe_plot(plot, result, prompts, Path(model).name)
    if save_control is not None:
        loading.save_pretrained(permute_projector(detach(loaded).cpu(), seed), processor, save_control)
    if as_json:
        said = {"model": model, "adapter": None if adapter is None else str(adapter), **result.to_dict()}
        typer.echo(json.dumps({**said, "bad_rows": len(bad)}, ensure_ascii=False, allow_nan=False))
        return
    for line in probe.lines(result):
        typer.echo(line)
    for name, path in (("picture", plot), ("control", save_control)):
        if path is not None:
            typer.echo(f"{name}: {path}")
    if bad:
        typer.echo(f"{len(bad)} bad rows left out")
