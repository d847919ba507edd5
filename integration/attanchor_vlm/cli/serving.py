"""`attanchor export-lm`: the language model alone, for engines that take prompts as rows of embeddings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import ADAPTER, MODEL, Dtype, Options, quiet, takes
from attanchor_vlm.model.config import AnchorOptions


@app.command("export-lm")
@takes(Options(AnchorOptions, ("tau",), unsaid="as stored"))
def export_lm(
    changes: dict[str, Any],
    *,
    model: MODEL,
    output: Annotated[Path, typer.Option(help="Folder for the checkpoint; should not exist.")],
    adapter: ADAPTER = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the weights; by default as saved.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was written as a JSON object.")] = False,
) -> None:
    """Write the language model alone, for engines that take prompts as embeddings.

    A plain causal checkpoint, the adapter merged: LlamaForCausalLM, Qwen2ForCausalLM or what the language half is.
    Prompts with their images and anchors come from attanchor_vlm.inference.export.prompt_embeds.
    """
    quiet()
    from attanchor_vlm.inference import export
    from attanchor_vlm.model.adapter_files import FILE_NAME
    from attanchor_vlm.model.load import load, settings_for

    export.check_output(output)
    settings_for(model, adapter, **changes)
    export.check_family(model)
    weights = "auto" if dtype is None else dtype.value
    loaded, processor = load(model, adapter, dtype=weights, device="cpu", need_settings=False, **changes)
    export.export_language_model(loaded, processor, output)
    config = json.loads((output / "config.json").read_text(encoding="utf-8"))
    said = {
        "output": str(output),
        "architecture": config["architectures"][0],
        "hidden_size": config["hidden_size"],
        "dtype": config["dtype"],
        "settings": FILE_NAME if (output / FILE_NAME).is_file() else None,
    }
    typer.echo(json.dumps(said) if as_json else f"{said['architecture']} in {said['dtype']}: {output}")
