"""`attanchor build-small-vlm` and `lab-photographs`: a real VLM of pretrained parts, and the experiment on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_lab.small_vlm.config import BuildConfig
from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import Options, quiet, takes


@app.command("build-small-vlm")
@takes(Options(BuildConfig))
def build_small_vlm(given: dict[str, Any]) -> None:
    """Make a small VLM of pretrained parts, SmolLM2-135M behind EfficientNet-Lite0: minutes, and stage 1's time."""
    config = BuildConfig(**given)
    quiet()
    from attanchor_lab.small_vlm.build import make

    typer.echo(f"written: {make(config, typer.echo)}")


@app.command("lab-photographs")
def lab_photographs(
    plan: Annotated[Path, typer.Option(help="The plan, such as docs/lab/photographs-plan.json.")],
    output: Annotated[
        Path, typer.Option(help="Folder for plan, rows and tables; one that was cut short is gone on with.")
    ],
    work: Annotated[Path, typer.Option(help="Folder for data, model and adapters.")],
) -> None:
    """Train and test the arms of a plan on photographs: the small VLM, plain, with anchors and with controls."""
    quiet()
    from attanchor_lab.small_vlm import experiment
    from attanchor_vlm.records import write_text

    chosen = experiment.read_plan(plan)
    rows = experiment.run(chosen, output, work, typer.echo)
    lines = "\n".join(experiment.as_markdown(rows, chosen, work)) + "\n"
    write_text(output / "tables.md", lines)
    typer.echo(lines)
