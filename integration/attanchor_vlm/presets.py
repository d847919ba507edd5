"""Training settings, and the ones that the paper used as presets."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a run depends on beside its model and its data. Defaults are those of `tinyllava-1b`.

    Attributes:
        dtype: "float16", "bfloat16" or "float32": what the frozen weights are loaded in and what autocast computes in.
            Adapters are always kept in float32. Where the device cannot do it, float32 is taken.
        tau, direction, positions, max_anchors, route: As in `AttAnchorConfig`.
        warmup: Share of all steps.
        patience: Stop when validation loss has not improved for so many steps; None = never.
    """

    dtype: str = "float16"
    tau: float = 0.12
    direction: str | None = None
    positions: str | None = None
    max_anchors: int | None = None
    route: str | None = None
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


@dataclass(frozen=True)
class TrainSettings:
    """Everything about one run of `attanchor train`. `preset` holds the method's and the optimiser's settings."""

    model: str
    data: Path
    images: Path
    output: Path
    preset: Preset = field(default_factory=Preset)
    val_data: Path | None = None
    val_fraction: float = 0.02
    turns: str = "each"
    skip_bad: bool = False
    max_steps: int | None = None
    eval_steps: int | None = None
    eval_batch_size: int | None = None
    gradient_checkpointing: bool = False
    workers: int = 0
    seed: int = 0
    resume: bool = False

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
        optional = {"max_steps": self.max_steps, "eval_steps": self.eval_steps, "patience": preset.patience}
        optional |= {"eval_batch_size": self.eval_batch_size}
        positive |= {name: value for name, value in optional.items() if value is not None}
        for name, value in positive.items():
            if not value > 0:
                raise ValueError(f"{name} is {value}; it should be greater than 0")
        for name, share in {
            "val_fraction": self.val_fraction,
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
        ):
            if chosen not in choices:
                raise ValueError(f"{name} is {chosen!r}; it should be one of {', '.join(choices)}")


def preset(name: str, **overrides: Any) -> Preset:
    """A preset by name, with every override that is not None put in its place.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset is {name!r}; it should be one of {', '.join(PRESETS)}")
    return dataclasses.replace(PRESETS[name], **{k: v for k, v in overrides.items() if v is not None})
