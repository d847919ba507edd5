"""`attanchor train` and `calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import (
    DATA,
    IMAGES,
    MODEL,
    SKIP_BAD,
    Direction,
    Dtype,
    Positions,
    Route,
    Turns,
    has_gpu,
    quiet,
    to_gpu,
)

if TYPE_CHECKING:
    from attanchor_vlm.presets import TrainSettings


@app.command()
def train(
    model: MODEL,
    data: DATA,
    images: IMAGES,
    output: Annotated[Path, typer.Option(help="Folder for adapter, checkpoints and log.")],
    preset: Annotated[str, typer.Option(help="tinyllava-1b, llava-7b, qwen2.5-vl-3b or small-llava.")] = "tinyllava-1b",
    val_data: Annotated[Path | None, typer.Option(help="Rows to validate on, instead of a part of --data.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Part of --data to validate on, by image; 0 for none.")] = 0.02,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    skip_bad: SKIP_BAD = False,
    turns: Annotated[Turns, typer.Option(help="A sample for each answer, or one for all of a row.")] = Turns.each,
    tau: Annotated[float | None, typer.Option(help="Cosine threshold; 1 trains by plain concatenation.")] = None,
    direction: Annotated[Direction | None, typer.Option(help="What is copied where.")] = None,
    positions: Annotated[Positions | None, typer.Option(help="Positions of the new sequence.")] = None,
    max_anchors: Annotated[int | None, typer.Option(help="At most so many anchors a sample.")] = None,
    route: Annotated[Route | None, typer.Option(help="How the model is given the new sequence.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per device and forward pass.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes per optimiser step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Learning-rate schedule of transformers, such as cosine.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps that warm up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Optimizer of transformers, such as adamw_torch.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the frozen weights; float32 where the device cannot.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Their scale.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Their dropout.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many steps without a better validation loss; 0 never.")
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Validate and save every so many steps.")] = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="Samples per device in validation.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that load and prepare data.")] = 0,
    seed: Annotated[int, typer.Option(help="For the split, the order and the adapters.")] = 0,
) -> None:
    """Fine-tune a model's language model and projector with LoRA, with anchors in its sequences."""
    import dataclasses

    from attanchor_vlm import presets

    chosen = presets.preset(
        preset,
        tau=tau,
        direction=direction and direction.value,
        positions=positions and positions.value,
        max_anchors=max_anchors,
        route=route and route.value,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        lr=lr,
        scheduler=scheduler,
        warmup=warmup,
        weight_decay=weight_decay,
        optimizer=optimizer,
        dtype=dtype and dtype.value,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        patience=patience or None,
    )
    if patience == 0:
        chosen = dataclasses.replace(chosen, patience=None)
    settings = presets.TrainSettings(
        model=model,
        data=data,
        images=images,
        output=output,
        preset=chosen,
        val_data=val_data,
        val_fraction=val_fraction,
        turns=turns.value,
        skip_bad=skip_bad,
        max_steps=max_steps,
        eval_steps=eval_steps,
        eval_batch_size=eval_batch_size,
        gradient_checkpointing=gradient_checkpointing,
        workers=workers,
        seed=seed,
        resume=resume,
    )
    if _train(settings):
        raise typer.Exit(130)


def _train(settings: TrainSettings) -> bool:
    """Whether the run was interrupted."""
    quiet()
    from attanchor_vlm import train as training

    return training.run(settings, typer.echo).interrupted


@app.command()
def calibrate(
    model: MODEL,
    data: DATA,
    images: IMAGES,
    share: Annotated[float, typer.Option(help="Wanted anchors per text token that takes part.")] = 0.1,
    samples: Annotated[int, typer.Option(help="Samples to measure on.")] = 256,
    direction: Annotated[Direction, typer.Option(help="What is copied where.")] = Direction.text_into_image,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 4,
    skip_bad: SKIP_BAD = False,
    seed: Annotated[int, typer.Option(help="For the choice of samples.")] = 0,
) -> None:
    """Measure the threshold that inserts a wanted share of the text tokens. The paper's rule is about a tenth."""
    quiet()
    import random

    from attanchor_vlm import AttAnchorConfig, loading, with_tokens_of
    from attanchor_vlm.data import read_rows
    from attanchor_vlm.data import samples as make_samples
    from attanchor_vlm.evaluate import threshold_for_share

    rows, bad = read_rows(data, images, skip_bad, progress=True)
    loaded, processor = loading.load(model, loading.choose_dtype("bfloat16" if has_gpu() else "float32", typer.echo))
    chosen = [sample for sample in make_samples(rows, "each") if sample.images]
    chosen = random.Random(seed).sample(chosen, min(samples, len(chosen)))
    config = with_tokens_of(AttAnchorConfig(tau=1.0, direction=direction.value), processor)
    tau, scores = threshold_for_share(to_gpu(loaded), processor, chosen, share, config, batch_size)
    typer.echo(f"--tau {tau:.4f} inserts {share:.1%} of the text tokens, measured on {len(chosen)} samples")
    quantiles = ", ".join(
        f"{q:.0%} {scores[min(int((1 - q) * len(scores)), len(scores) - 1)]:.3f}" for q in (0.05, 0.5, 0.95)
    )
    typer.echo(f"best cosines, quantiles: {quantiles}" + (f"; {len(bad)} bad rows left out" if bad else ""))
