"""Training settings, and the ones that the paper used as presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attanchor_vlm.analysis.calibrate import check_fraction


@dataclass(frozen=True)
class Preset:
    """What a run depends on beside its model and its data. Defaults are those of `tinyllava-1b`.

    Attributes:
        dtype: "float16", "bfloat16" or "float32": what the frozen weights are loaded in and what autocast computes in.
            Adapters are always kept in float32. Where the device cannot do it, float32 is taken.
        tau, direction, positions, max_anchors, route, content_words, pause_tokens: As in `AttAnchorConfig`.
        pause_token: The token of think mode, by name; `pause_tokens` needs it.
        fraction: Wanted anchors per text token; tau is then measured at the start, and `tau` above is not used.
        keep_fraction: None keeps that tau; "epoch" measures it anew before every epoch; "quantile" lets it follow the
            scores of the latest steps.
        warmup: Share of all steps.
        patience: Stop when validation loss has not improved for so many steps; None = never.
    """

    dtype: str = "float16"
    tau: float = 0.12
    direction: str | None = None
    positions: str | None = None
    max_anchors: int | None = None
    route: str | None = None
    content_words: bool | tuple[str, ...] = False
    pause_tokens: int = 0
    pause_token: str | None = None
    fraction: float | None = None
    keep_fraction: str | None = None
    lora_rank: int = 32
    lora_alpha: int = 64
    lora_dropout: float = 0.05
    batch_size: int = 4
    accumulation: int = 4
    lr: float = 1e-4
    scheduler: str = "cosine"
    warmup: float = 0.03
    weight_decay: float = 0.003
    optimizer: str = "adamw_torch"
    epochs: float = 4.0
    patience: int | None = 10_000


# The paper's settings (arXiv 2509.23109, its table of training configurations), and one for the demo.
PRESETS: dict[str, Preset] = {
    "tinyllava-1b": Preset(),
    "llava-7b": Preset(
        lora_rank=8,
        lora_alpha=16,
        batch_size=8,
        lr=2e-4,
        weight_decay=0.0,
        optimizer="paged_adamw_8bit",
        epochs=2.0,
        patience=5_000,
    ),
    "qwen2.5-vl-3b": Preset(
        dtype="bfloat16",
        tau=0.08,
        batch_size=8,
        warmup=0.1,
        weight_decay=0.03,
        optimizer="paged_adamw_8bit",
        epochs=2.0,
        patience=4_500,
    ),
    "small-llava": Preset(
        dtype="float32",
        lora_rank=16,
        lora_alpha=32,
        lora_dropout=0.0,
        batch_size=32,
        accumulation=1,
        lr=2e-3,
        weight_decay=0.0,
        epochs=2.0,
        patience=None,
    ),
}


# Those of transformers that need no further numbers.
SCHEDULERS = (
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "constant",
    "constant_with_warmup",
    "inverse_sqrt",
    "reduce_lr_on_plateau",
)


@dataclass(frozen=True)
class TrainSettings:
    """Everything about one run of `attanchor train`. `preset` holds the method's and the optimiser's settings.

    Attributes:
        model: A folder, or a Hub id.
        data: LLaVA-Instruct rows: a .json or .jsonl file; with `stream`, .jsonl, .parquet or a folder of such.
        images: The folder that rows' images are in; None if they are inside the rows, as in parquet.
        output: For adapter, checkpoints and log.
        val_data, val_fraction: Rows to validate on; otherwise that part of `data`, by image: 0.02, or 0 with `stream`.
        turns: "each" (a sample for each answer) or "all" (one for a row).
        skip_bad: Leave bad rows out.
        max_steps: Optimiser steps, instead of epochs; `stream` needs it.
        eval_steps, save_steps: Steps between validations, and between checkpoints; a validation saves one too.
        calibration_samples: What tau is measured on if there is a `fraction`.
        group_by_length: Batches of samples of like lengths, in tokens with those of their images.
        stream, shuffle_buffer: Read rows as training goes, shuffled in a buffer of so many.
        fsdp: Shard the model over the GPUs (FSDP2) instead of copying it to each (DDP).
        workers: Processes that make batches, for each GPU.
        align_weight: Of the alignment loss, beside that of the answers (`training.alignment`); None or 0 for none.
        align_labels: What images show: "captions" (the content words of their answers), or a file of captions.
        align_clip, align_words: What image tokens show: folder of a CLIP model, and the file of words it chooses from.
        align_temperature: Of the contrast.
    """

    model: str
    data: Path
    images: Path | None
    output: Path
    preset: Preset = field(default_factory=Preset)
    val_data: Path | None = None
    val_fraction: float | None = None
    turns: str = "each"
    skip_bad: bool = False
    max_steps: int | None = None
    eval_steps: int | None = None
    eval_batch_size: int | None = None
    save_steps: int | None = None
    calibration_samples: int = 256
    group_by_length: bool = False
    stream: bool = False
    shuffle_buffer: int = 1000
    fsdp: bool = False
    gradient_checkpointing: bool = False
    workers: int = 0
    seed: int = 0
    resume: bool = False
    align_weight: float | None = None
    align_labels: str = "captions"
    align_clip: Path | None = None
    align_words: Path | None = None
    align_temperature: float = 0.1

    def __post_init__(self) -> None:
        """Refuse settings that cannot be trained with, before anything is read.

        Raises:
            ValueError: naming the setting, what it is and what it should be.
        """
        preset = self.preset
        positive = {"epochs": preset.epochs, "lr": preset.lr, "batch_size": preset.batch_size}
        positive |= {
            "accumulation": preset.accumulation,
            "lora_rank": preset.lora_rank,
            "lora_alpha": preset.lora_alpha,
        }
        optional: dict[str, float | None] = {
            "max_steps": self.max_steps,
            "eval_steps": self.eval_steps,
            "patience": preset.patience,
        }
        optional |= {"eval_batch_size": self.eval_batch_size, "save_steps": self.save_steps}
        optional |= {"calibration_samples": self.calibration_samples, "shuffle_buffer": self.shuffle_buffer}
        positive |= {name: value for name, value in optional.items() if value is not None}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it should be greater than 0")
        if preset.fraction is not None:
            check_fraction(preset.fraction, preset.direction or "text_into_image")
        for name, share in {
            "val_fraction": self.held_out,
            "warmup": preset.warmup,
            "lora_dropout": preset.lora_dropout,
        }.items():
            if not 0 <= share < 1:
                raise ValueError(f"{name} is {share}; it should be at least 0 and less than 1")
        if self.workers < 0:
            raise ValueError(f"workers is {self.workers}; it should be 0 or more")
        for name, chosen, choices in (
            ("turns", self.turns, ("each", "all")),
            ("dtype", preset.dtype, ("float16", "bfloat16", "float32")),
            ("scheduler", preset.scheduler, SCHEDULERS),
            ("keep_fraction", preset.keep_fraction or "epoch", ("epoch", "quantile")),
        ):
            if chosen not in choices:
                raise ValueError(f"{name} is {chosen!r}; it should be one of {', '.join(choices)}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; it should be at least 0 and less than 2**32")
        _check_pauses(preset)
        _check_alignment(self)
        if preset.keep_fraction and preset.fraction is None:
            raise ValueError(f"keep_fraction is {preset.keep_fraction!r}, but there is no fraction; say which to keep")
        if self.stream:
            _check_stream(self)
        _check_used(self)

    @property
    def held_out(self) -> float:
        """The part of `data` that is validated on."""
        if self.val_fraction is not None:
            return self.val_fraction
        return 0.0 if self.stream or self.val_data is not None else 0.02


def _check_stream(settings: TrainSettings) -> None:
    if settings.max_steps is None:
        raise ValueError("max_steps is not set; a stream has no end, so say how many steps to train")
    if settings.held_out:
        raise ValueError(f"val_fraction is {settings.val_fraction} with stream; give val_data, a file held in memory")
    if settings.group_by_length:
        raise ValueError("group_by_length is set with stream; lengths are known of rows in memory only, leave one out")
    if settings.preset.keep_fraction == "epoch":
        raise ValueError("keep_fraction is 'epoch' with stream, which has no epochs; use 'quantile'")


def _check_used(settings: TrainSettings) -> None:
    """Refuse what would have no effect beside the other settings."""
    if settings.val_data is not None and settings.val_fraction:
        raise ValueError(
            f"val_fraction is {settings.val_fraction} with val_data; rows to validate on come from the one or the other"
        )
    if settings.preset.scheduler == "reduce_lr_on_plateau" and settings.val_data is None and not settings.held_out:
        raise ValueError("scheduler is 'reduce_lr_on_plateau', but there is no validation; give val_data or another")
    for name, needed, has in (
        ("shuffle_buffer", "stream", settings.stream),
        ("calibration_samples", "fraction", settings.preset.fraction is not None),
        ("align_temperature", "align_weight", settings.align_weight is not None),
    ):
        value = getattr(settings, name)
        if not has and value != TrainSettings.__dataclass_fields__[name].default:
            raise ValueError(f"{name} is {value}, but there is no {needed}; leave it out, or say {needed}")


def _check_alignment(settings: TrainSettings) -> None:
    weight, labels = settings.align_weight, settings.align_labels
    if weight is None:
        given = {"align_clip": settings.align_clip, "align_words": settings.align_words}
        given["align_labels"] = Path(labels) if labels != "captions" else None
        for name, value in given.items():
            if value is not None:
                raise ValueError(f"{name} is {value}, but there is no align_weight; say how much the alignment counts")
        return
    if not 0 <= weight < float("inf"):
        raise ValueError(f"align_weight is {weight}; it should be a number of at least 0")
    if not settings.align_temperature > 0:
        raise ValueError(f"align_temperature is {settings.align_temperature}; it should be greater than 0")
    if (settings.align_clip is None) != (settings.align_words is None):
        raise ValueError("align_clip and align_words belong together: a CLIP model, and the words that it chooses from")
    if settings.align_clip is not None and labels != "captions":
        raise ValueError(f"align_labels is {labels} with align_clip; labels come from the one or the other")
    if settings.images is None and (settings.align_clip is not None or labels != "captions"):
        raise ValueError("the alignment needs the names of images, but images are inside the rows; use 'captions'")
    if weight and settings.align_clip is None and settings.preset.batch_size < 2:
        raise ValueError(
            f"batch_size is {settings.preset.batch_size} with align_labels; a word is set against the other images of "
            "its batch, so it should be 2 or more"
        )


def _check_pauses(preset: Preset) -> None:
    if preset.pause_tokens < 0:
        raise ValueError(f"pause_tokens is {preset.pause_tokens}; it should be 0 or more")
    if preset.pause_tokens and preset.direction != "image_into_text":
        raise ValueError(
            f"pause_tokens is {preset.pause_tokens}, but direction is {preset.direction or 'text_into_image'}; think "
            "mode belongs to image_into_text"
        )
    if preset.pause_tokens and not preset.pause_token:
        raise ValueError(
            f"pause_tokens is {preset.pause_tokens}, but there is no pause_token; name a token of the model's "
            "vocabulary that means nothing else, such as a reserved one"
        )
    if preset.pause_token and not preset.pause_tokens:
        raise ValueError(f"pause_token is {preset.pause_token!r}, but pause_tokens is 0; say how many there should be")


def preset(name: str, **overrides: Any) -> Preset:
    """A preset by name, with every override that is not None put in its place.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it should be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **{k: v for k, v in overrides.items() if v is not None})
