"""The configuration of a run: at once the options of `attanchor train`, the Python API and what `run.json` records."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from attanchor_vlm.data.config import DataConfig
from attanchor_vlm.model.config import AnchorOptions, AttAnchorConfig
from attanchor_vlm.settings import REQUIRED, check_fraction, redefined, setting

_SMALL: dict[str, Any] = {
    "lora_rank": 16,
    "lora_alpha": 32,
    "lora_dropout": 0.0,
    "accumulation": 1,
    "weight_decay": 0.0,
    "patience": 0,
}
# The paper's settings (arXiv 2509.23109, its table of training configurations), and those of the laboratory's two
# models: what differs from the defaults of `Method`, which are those of tinyllava-1b.
PRESETS: dict[str, dict[str, Any]] = {
    "tinyllava-1b": {},
    "llava-7b": {
        "lora_rank": 8,
        "lora_alpha": 16,
        "batch_size": 8,
        "lr": 2e-4,
        "weight_decay": 0.0,
        "optimizer": "paged_adamw_8bit",
        "epochs": 2.0,
        "patience": 5_000,
    },
    "qwen2.5-vl-3b": {
        "dtype": "bfloat16",
        "tau": 0.08,
        "batch_size": 8,
        "warmup": 0.1,
        "weight_decay": 0.03,
        "optimizer": "paged_adamw_8bit",
        "epochs": 2.0,
        "patience": 4_500,
    },
    "small-llava": _SMALL | {"dtype": "float32", "batch_size": 32, "lr": 2e-3, "epochs": 2.0},
    "small-vlm": _SMALL | {"dtype": "bfloat16", "batch_size": 8, "lr": 1e-3, "epochs": 1.0},
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


@dataclass(frozen=True, kw_only=True)
class Method(AnchorOptions):
    """What is inserted, the adapters and the optimiser: what a preset sets. Every field says what it means."""

    tau: float = redefined(AnchorOptions, "tau", 0.12)
    fraction: float | None = setting(
        None, "Instead of --tau: measure the one that inserts this part of the text tokens, when training starts."
    )
    hold_fraction: str | None = setting(
        None,
        "Hold it there while the model changes: tau measured every epoch, or by a running quantile of the scores.",
        choices=("epoch", "quantile"),
        needs="fraction",
    )
    pause_token: str | None = setting(
        None, "The token of think mode that pauses: one of the vocabulary that means nothing else."
    )
    dtype: str = setting(
        "float16",
        "Of the frozen weights and of autocast; float32 where the device cannot. Adapters are float32 always.",
        choices=("float16", "bfloat16", "float32"),
    )
    lora_rank: int = setting(32, "Rank of the adapters.", above=0)
    lora_alpha: int = setting(64, "Their scale.", above=0)
    lora_dropout: float = setting(0.05, "Their dropout.", at_least=0, below=1)
    batch_size: int = setting(4, "Samples per device and forward pass.", above=0)
    accumulation: int = setting(4, "Forward passes per optimiser step.", above=0)
    lr: float = setting(1e-4, "Learning rate.", above=0)
    scheduler: str = setting("cosine", "Learning-rate schedule of transformers.", choices=SCHEDULERS, metavar="NAME")
    warmup: float = setting(0.03, "Share of the steps that warm up.", at_least=0, below=1)
    weight_decay: float = setting(0.003, "Weight decay.")
    optimizer: str = setting("adamw_torch", "Optimizer of transformers.")
    epochs: float = setting(4.0, "Passes over the data.", above=0, resumable=True)
    patience: int = setting(
        10_000, "Stop after so many steps without a better validation loss; 0 never.", at_least=0, resumable=True
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fraction is not None:
            check_fraction(self.fraction, self.direction)
        if self.pause_tokens and not self.pause_token:
            raise ValueError(
                f"pause_tokens is {self.pause_tokens}, but there is no pause_token; name a token of the model's "
                "vocabulary that means nothing else, such as a reserved one"
            )
        if self.pause_token and not self.pause_tokens:
            raise ValueError(
                f"pause_token is {self.pause_token!r}, but pause_tokens is 0; say how many there should be"
            )

    @classmethod
    def from_preset(cls, preset: str, /, **settings: Any) -> Self:
        """A preset with every one of `settings` that is not None in the place of its own.

        Raises:
            ValueError: there is no such preset, or a setting has no meaning.
        """
        if preset not in PRESETS:
            raise ValueError(f"preset is {preset!r}; it should be one of {', '.join(PRESETS)}")
        return cls(**PRESETS[preset] | {name: value for name, value in settings.items() if value is not None})

    def anchors(self) -> AttAnchorConfig:
        """What to attach before anything is measured, less the pause tokens, which only the model's tokenizer knows."""
        chosen = {field.name: getattr(self, field.name) for field in dataclasses.fields(AnchorOptions)}
        return AttAnchorConfig(**chosen | {"pause_tokens": 0})


@dataclass(frozen=True, kw_only=True)
class TrainConfig(DataConfig, Method):
    """Everything about one run of `attanchor train`. Every field says what it means.

    Raises:
        TypeError, ValueError: naming the setting, what it is and what it should be.
    """

    model: str = setting(REQUIRED, "Folder of a saved model, or a Hugging Face Hub id.")
    preset: str | None = setting(
        None, f"{', '.join(PRESETS)}; by default that of the model's family.", metavar="NAME", resumable=True
    )
    resume: bool = setting(False, "Go on from the last checkpoint in --output.", resumable=True)
    max_steps: int | None = setting(None, "Optimiser steps, instead of epochs.", above=0, resumable=True)
    eval_steps: int | None = setting(
        None, "Validate and save every so many steps; by default 8 times, or every 500.", above=0, resumable=True
    )
    eval_batch_size: int | None = setting(
        None, "Samples per device in validation; by default as in training.", above=0, resumable=True
    )
    save_steps: int | None = setting(None, "Save every so many steps besides.", above=0, resumable=True)
    calibration_samples: int = setting(256, "Samples that --fraction measures on.", above=0, needs="fraction")
    align_weight: float | None = setting(
        None, "Also align image tokens with words: weight of that loss.", at_least=0, below=math.inf
    )
    align_labels: str = setting(
        "captions", "What images show: captions (their answers), or a file of captions.", needs="align_weight"
    )
    align_clip: Path | None = setting(
        None, "Instead: folder of a CLIP model, which says what image tokens show.", needs="align_weight"
    )
    align_words: Path | None = setting(None, "The words that CLIP chooses from, one a line.", needs="align_weight")
    align_temperature: float = setting(0.1, "Of the alignment's contrast.", above=0, needs="align_weight")
    fsdp: bool = setting(False, "Under torchrun: shard the model over the GPUs, instead of copying it.")
    gradient_checkpointing: bool = setting(False, "Less memory, slower.", resumable=True)

    def __post_init__(self) -> None:
        Method.__post_init__(self)
        DataConfig.__post_init__(self)
        _check_alignment(self)
        if self.stream and self.max_steps is None:
            raise ValueError("max_steps is not set; a stream has no end, so say how many steps to train")
        if self.stream and self.hold_fraction == "epoch":
            raise ValueError("hold_fraction is 'epoch' with stream, which has no epochs; use 'quantile'")
        if self.scheduler == "reduce_lr_on_plateau" and self.val_data is None and not self.held_out:
            raise ValueError(
                "scheduler is 'reduce_lr_on_plateau', but there is no validation; give val_data or another"
            )

    @classmethod
    def from_preset(cls, preset: str | None = None, /, **settings: Any) -> Self:
        """A preset, or that of the model's family, with every one of `settings` that is not None in its place.

        Raises:
            ValueError: there is no such preset, or a setting has no meaning; a `SetupError` if there is no such model.
        """
        if preset is None:
            cls(**settings)  # what has no meaning whatever the preset says is told before the model is looked at
            preset = preset_for(settings["model"])
        return super().from_preset(preset, **settings, preset=preset)


def preset_for(model: str) -> str:
    """The preset of a model's family, as far as its configuration tells.

    The paper trained TinyLLaVA, LLaVA-1.5 and Qwen2.5-VL. A LLaVA's width tells the first two apart, and the small
    ones; all other families train as Qwen2.5-VL does, in bfloat16.
    """
    from transformers import AutoConfig

    from attanchor_vlm.model import load as loading

    with loading.source(model) as source:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        width = config.get_text_config().hidden_size
    if config.model_type not in ("llava", "llava_next"):
        return "qwen2.5-vl-3b"
    widths = {"small-llava": 512, "small-vlm": 1024, "tinyllava-1b": 4096}
    return next((name for name, bound in widths.items() if width < bound), "llava-7b")


def _check_alignment(config: TrainConfig) -> None:
    weight, labels = config.align_weight, config.align_labels
    if weight is None:
        return
    if (config.align_clip is None) != (config.align_words is None):
        raise ValueError("align_clip and align_words belong together: a CLIP model, and the words that it chooses from")
    if config.align_clip is not None and labels != "captions":
        raise ValueError(f"align_labels is {labels} with align_clip; labels come from the one or the other")
    if config.images is None and (config.align_clip is not None or labels != "captions"):
        raise ValueError("the alignment needs the names of images, but images are inside the rows; use 'captions'")
    if weight and config.align_clip is None and config.batch_size < 2:
        raise ValueError(
            f"batch_size is {config.batch_size} with align_labels; a word is set against the other images of "
            "its batch, so it should be 2 or more"
        )
