"""`attanchor lab` and `attanchor report`: does it help, tested with controls, on any machine, offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import quiet


@app.command()
def lab(
    output: Annotated[Path, typer.Option(help="Folder for plan and rows. One that was cut short is gone on with.")],
    size: Annotated[
        Literal["smoke", "cpu", "gpu"] | None,
        typer.Option(help="smoke: a minute; cpu: ten on two quiet cores; gpu: nine of one H200."),
    ] = None,
    own: Annotated[Path | None, typer.Option("--plan", help="A plan of your own, made from a plan.json.")] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes side by side; default: the plan's, one a core on a CPU.")
    ] = None,
    rehearse: Annotated[bool, typer.Option(help="The same plan with toy models and few steps.")] = False,
    minutes: Annotated[float | None, typer.Option(min=0, help="Start no run after so many minutes.")] = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar.")] = True,
) -> None:
    """Train and test the arms of a plan: plain concatenation, anchors, and controls that differ in one thing."""
    from attanchor_lab.synthetic import plans

    if (size is None) == (own is None):
        raise typer.BadParameter("give --size or --plan, and not both")
    plan, device = plans.chosen(size, own, rehearse, workers, minutes)
    quiet()
    from attanchor_lab.synthetic import checks, laboratory

    rows = laboratory.run(plan, output, device, typer.echo, progress)
    if size == "smoke" and not rehearse:
        checks.run(plan, rows, device, typer.echo)
    typer.echo(f"rows are in {output / laboratory.ROWS}; read them with: attanchor report {output} --output PAGE.md")


@app.command()
def report(
    rows: Annotated[list[Path], typer.Argument(help="Folders of `attanchor lab`, or their rows.jsonl.")],
    output: Annotated[Path, typer.Option(help="The page, a .md file; its pictures go beside it.")],
) -> None:
    """Turn rows of the laboratory into one page: a table with verdicts, three pictures, what was measured."""
    from attanchor_lab.synthetic.report import write

    for path in write(rows, output):
        typer.echo(str(path))
