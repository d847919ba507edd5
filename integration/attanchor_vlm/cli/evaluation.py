"""`attanchor eval`: the paper's fifteen metrics of a model, with or without a trained adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import ADAPTER, DTYPE, IN_USE, MODEL, Options, quiet, takes
from attanchor_vlm.evaluation.config import EvalConfig
from attanchor_vlm.model.config import AnchorOptions


@app.command("eval")
@takes(Options(EvalConfig), Options(AnchorOptions, (*IN_USE, "direction"), unsaid="as stored"))
def evaluate(
    given: dict[str, Any],
    changes: dict[str, Any],
    *,
    model: MODEL,
    adapter: ADAPTER = None,
    dtype: DTYPE = None,
    output: Annotated[Path | None, typer.Option(help="Folder for results.json and predictions.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as a JSON object.")] = False,
) -> None:
    """Measure a model: loss and text metrics on your rows, benchmarks through lmms-eval (the extra `eval`)."""
    quiet()
    from attanchor_vlm.evaluation import run

    config = EvalConfig(**given)
    config.check()
    if output is not None:
        run.check_output(output)
    from attanchor_vlm.model.load import load
    from attanchor_vlm.provenance import environment

    loaded, processor = load(model, adapter, dtype=dtype, default_tau=1.0, **changes)
    report = run.evaluate(loaded, processor, config, output, progress=True)
    about = {
        "model": model,
        "adapter": adapter and str(adapter),
        "anchors": run.anchors(loaded),
        "predictions": config.predictions if config.metrics else None,
        "limit": config.limit,
        "seed": config.seed,
        **environment(),
    }
    written = run.write(report, output, about) if output is not None else []
    if as_json:
        typer.echo(json.dumps(run.as_dict(report, about), ensure_ascii=False, allow_nan=False))
        return
    for line in run.lines(report):
        typer.echo(line)
    for path in written:
        typer.echo(f"written: {path}")
