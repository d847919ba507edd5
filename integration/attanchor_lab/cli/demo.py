"""`attanchor demo`, `demo-stage1` and `sample`: everything here runs offline on the small model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import quiet


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, runs and pictures; replaces an earlier demo.")],
    model: Annotated[Path | None, typer.Option(help="A small LLaVA made by demo-stage1.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Optimiser steps of each of the three runs.")] = 200,
    seed: Annotated[int, typer.Option(help="For data, order and adapters.")] = 0,
) -> None:
    """Fine-tune a small LLaVA on rendered scenes with and without anchors, and show what came out: a few minutes."""
    quiet()
    from attanchor_lab import demo as demonstration

    demonstration.run(output, str(model) if model else None, demonstration.Size(steps=steps), seed, typer.echo)


@app.command("demo-photographs")
def demo_photographs(
    output: Annotated[Path, typer.Option(help="Folder for data, models and the picture; replaces an earlier demo.")],
    seed: Annotated[int, typer.Option(help="For data, order and adapters.")] = 0,
) -> None:
    """Teach a pretrained language model to see photographs, and let it answer with anchors and without: minutes.

    Needs Debian's tuxpaint-stamps-default and the packages that build-small-vlm names.
    """
    quiet()
    from attanchor_lab import demo_photographs

    demo_photographs.run(output, seed=seed, say=typer.echo)


@app.command("demo-stage1")
def demo_stage1(
    output: Annotated[Path, typer.Option(help="Folder for model and processor; should not exist.")],
    seed: Annotated[int, typer.Option(help="For weights and scenes.")] = 0,
) -> None:
    """Make the small LLaVA's weights anew, as those in the package were made: some minutes on one core."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists; take another folder")
    quiet()
    import torch

    from attanchor_lab.small_llava import pretrain as stage1

    torch.set_num_threads(1)  # as fast as two for a model this small, and the same figures everywhere
    stage1.make(output, stage1.Recipe(seed=seed), typer.echo)


@app.command()
def sample(
    output: Annotated[Path, typer.Option(help="Folder to make.")],
    seed: Annotated[int, typer.Option(help="For the scenes.")] = 0,
) -> None:
    """Write the small model and a little data to disk, to try every other command with."""
    from attanchor_lab.sample import write_sample

    quiet()
    for path in write_sample(output, seed):
        typer.echo(path)
