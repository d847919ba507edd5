"""`attanchor serve`, and the exports: the whole model, or the language model alone for engines without anchors."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import ADAPTER, IN_USE, MODEL, Dtype, Options, quiet, takes
from attanchor_vlm.model.config import AnchorOptions

_OUTPUT = Annotated[Path, typer.Option(help="Folder for the checkpoint; should not exist.")]
_DTYPE = Annotated[Dtype | None, typer.Option(help="Of the weights; by default as saved.")]
_JSON = Annotated[bool, typer.Option("--json", help="Print what was written as a JSON object.")]
_SETTINGS = Options(AnchorOptions, (*IN_USE, "max_anchors"), unsaid="as stored")


@app.command()
@takes(_SETTINGS)
def export(
    changes: dict[str, Any],
    *,
    model: MODEL,
    output: _OUTPUT,
    adapter: ADAPTER = None,
    dtype: _DTYPE = None,
    head_dim: Annotated[
        int | None, typer.Option(help="Fill attention heads up with zeros: on a CPU, vLLM has none below 32.")
    ] = None,
    as_json: _JSON = False,
) -> None:
    """Write the whole model with its adapter merged and its settings in config.json, for `attanchor serve`.

    transformers loads it as any other model; `attanchor generate` and `load` attach it with what it was saved with.
    """
    quiet()
    from attanchor_vlm.inference import export as exporting
    from attanchor_vlm.model.load import load, settings_for

    exporting.check_output(output)
    settings_for(model, adapter, **changes)
    loaded, processor = load(model, adapter, dtype=dtype or "auto", device="cpu", **changes)
    exporting.export_model(loaded, processor, output, head_dim)
    _tell(output, as_json, settings="config.json")


@app.command("export-lm")
@takes(Options(AnchorOptions, ("tau",), unsaid="as stored"))
def export_lm(
    changes: dict[str, Any],
    *,
    model: MODEL,
    output: _OUTPUT,
    adapter: ADAPTER = None,
    dtype: _DTYPE = None,
    as_json: _JSON = False,
) -> None:
    """Write the language model alone, for engines that take prompts as embeddings.

    A plain causal checkpoint, the adapter merged: LlamaForCausalLM, Qwen2ForCausalLM or what the language half is.
    Prompts with their images and anchors come from attanchor_vlm.inference.export.prompt_embeds.
    """
    quiet()
    from attanchor_vlm.inference import export as exporting
    from attanchor_vlm.model.adapter_files import FILE_NAME
    from attanchor_vlm.model.load import load, settings_for

    exporting.check_output(output)
    settings_for(model, adapter, **changes)
    exporting.check_family(model)
    loaded, processor = load(model, adapter, dtype=dtype or "auto", device="cpu", need_settings=False, **changes)
    exporting.export_language_model(loaded, processor, output)
    _tell(output, as_json, settings=FILE_NAME if (output / FILE_NAME).is_file() else None)


def _tell(output: Path, as_json: bool, settings: str | None) -> None:
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    said = {
        "output": str(output),
        "architecture": config["architectures"][0],
        "hidden_size": config.get("text_config", config)["hidden_size"],
        "dtype": config["dtype"],
        "settings": settings,
    }
    typer.echo(json.dumps(said) if as_json else f"{said['architecture']} in {said['dtype']}: {output}")


@app.command()
@takes(_SETTINGS)
def serve(
    changes: dict[str, Any],
    *,
    model: MODEL,
    adapter: ADAPTER = None,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for every one of the machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen at.")] = 8000,
    options: Annotated[list[str] | None, typer.Argument(help="Behind --: options of vLLM's server.")] = None,
) -> None:
    """Serve a model with its anchors by vLLM, behind the OpenAI API.

    Needs vLLM, in an environment of its own. An adapter is merged into a copy of the model, in a temporary folder.
    """
    from attanchor_vlm.inference.vllm import launch

    launch.check_vllm()
    quiet()
    from attanchor_vlm.errors import SetupError
    from attanchor_vlm.inference.export import export_model
    from attanchor_vlm.model.load import load, settings_for

    settings = settings_for(model, adapter, **changes)
    if settings is None:
        raise SetupError(f"model {model} has no AttAnchor settings; give --tau, or an --adapter with its own")
    overrides = launch.check_model(model, settings)
    address, name, header = launch.announced(model, host, port, options or ())
    with tempfile.TemporaryDirectory(prefix="attanchor-") as folder:
        source = model
        if adapter is not None:
            loaded, processor = load(model, adapter, dtype="auto", device="cpu", **changes)
            source = str(export_model(loaded, processor, Path(folder) / "model"))
            del loaded
        command = launch.server_command(source, model, overrides, host, port, options or ())
        said = f"{name} at {address}\n{launch.curl_line(address, name, header)}"
        code = launch.run_server(command, address, lambda: typer.echo(said))
    raise typer.Exit(code)
