"""`attanchor check`: are anchors right in a model? What its first call with an image would find, asked for by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import ADAPTER, DTYPE, MODEL, note, quiet


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
    chosen = None if dtype is None else loading.choose_dtype(dtype.value, note)
    loaded, processor = loading.load(model, adapter, dtype=chosen, default_tau=0)
    target: Any = base_of(loaded)
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
