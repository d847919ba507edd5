"""`attanchor train` and `calibrate`."""

from __future__ import annotations

import dataclasses
import json
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import (
    CONTENT_WORDS,
    FUNCTION_WORDS,
    MODEL,
    SKIP_BAD,
    Direction,
    Dtype,
    Positions,
    Route,
    Turns,
    check_picture,
    content_words,
    quiet,
)

if TYPE_CHECKING:
    from attanchor_vlm.training.config import TrainSettings

TRAIN_DATA = Annotated[
    Path,
    typer.Option(help="LLaVA-Instruct rows: a .json list or .jsonl; as a stream .jsonl, .parquet or a folder of such."),
]
OWN_IMAGES = Annotated[
    Path | None, typer.Option(help="Folder that the rows' images are in, unless the rows hold them.")
]


class Keep(str, Enum):
    epoch = "epoch"
    quantile = "quantile"


@app.command()
def train(
    model: MODEL,
    data: TRAIN_DATA,
    output: Annotated[Path, typer.Option(help="Folder for adapter, checkpoints and log.")],
    images: OWN_IMAGES = None,
    preset: Annotated[str, typer.Option(help="tinyllava-1b, llava-7b, qwen2.5-vl-3b or small-llava.")] = "tinyllava-1b",
    val_data: Annotated[Path | None, typer.Option(help="Rows to validate on, instead of a part of --data.")] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Part of --data to validate on, by image: 0.02 if not said, none of a stream; 0 for none."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    skip_bad: SKIP_BAD = False,
    turns: Annotated[Turns, typer.Option(help="A sample for each answer, or one for all of a row.")] = Turns.each,
    tau: Annotated[float | None, typer.Option(help="Cosine threshold; 1 trains by plain concatenation.")] = None,
    fraction: Annotated[
        float | None, typer.Option(help="Instead of --tau: measure the one that inserts this part of the text tokens.")
    ] = None,
    keep_fraction: Annotated[
        Keep | None, typer.Option(help="Keep it while the model changes: measured every epoch, or a running quantile.")
    ] = None,
    calibration_samples: Annotated[int, typer.Option(help="Samples that --fraction measures on.")] = 256,
    direction: Annotated[Direction | None, typer.Option(help="What is copied where.")] = None,
    positions: Annotated[Positions | None, typer.Option(help="Positions of the new sequence.")] = None,
    max_anchors: Annotated[int | None, typer.Option(help="At most so many anchors a sample.")] = None,
    route: Annotated[Route | None, typer.Option(help="How the model is given the new sequence.")] = None,
    english_content_words: CONTENT_WORDS = False,
    function_words: FUNCTION_WORDS = None,
    pause_tokens: Annotated[
        int | None, typer.Option(help="Think mode of image_into_text: so many pause tokens in front of the answer.")
    ] = None,
    pause_token: Annotated[
        str | None, typer.Option(help="The token that pauses: one of the vocabulary that means nothing else.")
    ] = None,
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
    save_steps: Annotated[int | None, typer.Option(help="Save every so many steps besides.")] = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="Samples per device in validation.")] = None,
    align_weight: Annotated[
        float | None, typer.Option(help="Also align image tokens with words: weight of that loss.")
    ] = None,
    align_labels: Annotated[
        str, typer.Option(help="What images show: captions (their answers), or a file of captions.")
    ] = "captions",
    align_clip: Annotated[
        Path | None, typer.Option(help="Instead: folder of a CLIP model, which says what image tokens show.")
    ] = None,
    align_words: Annotated[Path | None, typer.Option(help="The words that CLIP chooses from, one a line.")] = None,
    align_temperature: Annotated[float, typer.Option(help="Of the alignment's contrast.")] = 0.1,
    group_by_length: Annotated[
        bool, typer.Option("--group-by-length", help="Batches of samples of like lengths, images included.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="Read data as training goes; it need not fit into memory.")
    ] = False,
    shuffle_buffer: Annotated[int, typer.Option(help="With --stream: rows that the next one is drawn from.")] = 1000,
    fsdp: Annotated[
        bool, typer.Option("--fsdp", help="Under torchrun: shard the model over the GPUs, instead of copying it.")
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that load and prepare data.")] = 0,
    seed: Annotated[int, typer.Option(help="For the split, the order and the adapters.")] = 0,
) -> None:
    """Fine-tune a model's language model and projector with LoRA, with anchors in its sequences.

    On several GPUs: torchrun --nproc-per-node 8 -m attanchor_vlm.cli train, with the same options.
    """
    from attanchor_vlm.training import config as presets

    if tau is not None and fraction is not None:
        raise typer.BadParameter("give one of --tau and --fraction", param_hint="--fraction")
    words = content_words(english_content_words, function_words)
    if tau is None and fraction is None:
        tau, stored_bound, words = _stored(model, direction or Direction.text_into_image, words)
        max_anchors = stored_bound if max_anchors is None else max_anchors
    chosen = presets.preset(
        preset,
        tau=tau,
        fraction=fraction,
        keep_fraction=keep_fraction and keep_fraction.value,
        direction=direction and direction.value,
        positions=positions and positions.value,
        max_anchors=max_anchors,
        route=route and route.value,
        content_words=words,
        pause_tokens=pause_tokens,
        pause_token=pause_token,
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
        save_steps=save_steps,
        calibration_samples=calibration_samples,
        group_by_length=group_by_length,
        stream=stream,
        shuffle_buffer=shuffle_buffer,
        fsdp=fsdp,
        gradient_checkpointing=gradient_checkpointing,
        align_weight=align_weight,
        align_labels=align_labels,
        align_clip=align_clip,
        align_words=align_words,
        align_temperature=align_temperature,
        workers=workers,
        seed=seed,
        resume=resume,
    )
    if _train(settings):
        raise typer.Exit(130)


def _train(settings: TrainSettings) -> bool:
    """Whether the run was interrupted."""
    quiet()
    from attanchor_vlm.training import run as training

    return training.run(settings, typer.echo).interrupted


def _stored(
    model: str, direction: Direction, words: bool | tuple[str, ...] | None
) -> tuple[float | None, int | None, bool | tuple[str, ...] | None]:
    """tau, max_anchors and content_words that `calibrate --save` left beside the model, for this direction; if `words`
    are given, only a tau that was measured with the same."""
    path = Path(model).expanduser() / "attanchor.json"
    if not path.is_file():
        return None, None, words
    from attanchor_vlm import distributed, load_settings

    stored = load_settings(path)
    if stored.direction != direction.value or (words is not None and words != stored.content_words):
        return None, None, words
    bound = "" if stored.max_anchors is None else f" and max_anchors {stored.max_anchors}"
    bound += ", of content words" if stored.content_words else ""
    if distributed.is_main():
        typer.echo(f"tau {stored.tau:g}{bound}, from {path}")
    return stored.tau, stored.max_anchors, stored.content_words


@app.command()
def calibrate(
    model: MODEL,
    data: TRAIN_DATA,
    images: OWN_IMAGES = None,
    fraction: Annotated[float, typer.Option(help="Wanted anchors per text token that takes part.")] = 0.1,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a trained adapter, to measure the model with.")
    ] = None,
    max_anchors: Annotated[int | None, typer.Option(help="At most so many anchors a sample.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distribution of the scores: .png, .pdf or .svg.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Store tau in attanchor.json in this folder of an adapter or a model.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to measure on.")] = 256,
    direction: Annotated[
        Direction | None, typer.Option(help="What is copied where: by default as stored, or text_into_image.")
    ] = None,
    english_content_words: CONTENT_WORDS = False,
    function_words: FUNCTION_WORDS = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 4,
    skip_bad: SKIP_BAD = False,
    seed: Annotated[int, typer.Option(help="For the choice of samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as a JSON object.")] = False,
) -> None:
    """Measure the threshold that inserts a wanted fraction of the text tokens. The paper's rule is about a tenth."""
    words = content_words(english_content_words, function_words)
    if plot is not None:
        check_picture(plot, "--plot")
    quiet()
    from attanchor_vlm import save_settings
    from attanchor_vlm.analysis import calibrate as calibration
    from attanchor_vlm.analysis.calibrate import check_fraction
    from attanchor_vlm.data.batches import Collator
    from attanchor_vlm.data.dataset import some_samples
    from attanchor_vlm.model.attach import attach
    from attanchor_vlm.model.load import load
    from attanchor_vlm.records import check_parent

    check_fraction(fraction, direction and direction.value)
    if save is not None and not save.is_dir():
        raise ValueError(f"{save} is not a folder; --save should name that of an adapter or of a model")
    if save is not None:
        check_parent(save / "attanchor.json")
    chosen = some_samples(data, images, samples, seed, skip_bad)
    loaded, processor = load(model, adapter, tau=calibration.HIGHEST_TAU)
    config = calibration.settings_of(
        loaded, direction=direction and direction.value, content_words=words, max_anchors=max_anchors
    )
    check_fraction(fraction, config.direction)
    if save is not None:
        calibration.check_storable(save, config)
    attach(loaded, config)
    collate = Collator(processor, "each", config.content_words)
    scores = calibration.measure_scores(loaded, collate, chosen, batch_size, progress=not as_json)
    tau = scores.threshold(fraction)
    found = calibration.summary(scores, tau, fraction, config.max_anchors)
    if plot is not None:
        calibration.score_plot(plot, scores, tau, config.max_anchors, f"{model}: {config.direction.replace('_', ' ')}")
    if save is not None:
        save_settings(dataclasses.replace(config, tau=tau), save)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"--tau {tau:.4f} inserts {found['fraction']:.1%} of the text tokens, measured on {found['samples']} samples"
    )
    counts = found["anchors_per_sample"]
    bound = "" if config.max_anchors is None else f", bounded by --max-anchors {config.max_anchors}"
    typer.echo(f"anchors a sample: {counts['mean']:.1f} in the mean, at most {counts['max']}{bound}")
    quantiles = ", ".join(f"{share} {score:.3f}" for share, score in found["quantiles"].items())
    typer.echo(f"best cosines, quantiles: {quantiles}")
    for what, path in (("plot", plot), ("settings", save and save / "attanchor.json")):
        if path is not None:
            typer.echo(f"{what}: {path}")
