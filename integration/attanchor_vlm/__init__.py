"""AttAnchor in vision-language models of transformers: `attach` a model, then use it as before.

Names are imported when first used, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from attanchor_vlm.errors import missing

if TYPE_CHECKING:  # the table below, for type checkers and editors
    from attanchor_vlm.analysis.calibrate import threshold_for_share  # noqa: F401
    from attanchor_vlm.chat.encode import encode_chat, split_turns  # noqa: F401
    from attanchor_vlm.data.batches import Collator  # noqa: F401
    from attanchor_vlm.data.dataset import some_samples  # noqa: F401
    from attanchor_vlm.data.rows import read_rows, samples  # noqa: F401
    from attanchor_vlm.evaluation.config import EvalConfig  # noqa: F401
    from attanchor_vlm.evaluation.run import evaluate  # noqa: F401
    from attanchor_vlm.inference.ask import answer, answers  # noqa: F401
    from attanchor_vlm.inference.explain import describe, explain  # noqa: F401
    from attanchor_vlm.inference.export import prompt_embeds  # noqa: F401
    from attanchor_vlm.inference.picture import anchor_picture  # noqa: F401
    from attanchor_vlm.model.adapter_files import load_adapter, load_settings, save_settings  # noqa: F401
    from attanchor_vlm.model.attach import attach, detach, is_attached, prepare_inputs  # noqa: F401
    from attanchor_vlm.model.candidates import with_tokens_of  # noqa: F401
    from attanchor_vlm.model.config import AttAnchorConfig  # noqa: F401
    from attanchor_vlm.model.guard import expect_anchors  # noqa: F401
    from attanchor_vlm.model.load import load, load_pretrained  # noqa: F401
    from attanchor_vlm.model.plan import AnchorPlan, AnchorStats  # noqa: F401
    from attanchor_vlm.training.config import TrainConfig  # noqa: F401
    from attanchor_vlm.training.lora import add_lora, lora_targets  # noqa: F401
    from attanchor_vlm.training.run import run as train  # noqa: F401

_PUBLIC = {
    "analysis.calibrate": ("threshold_for_share",),
    "chat.encode": ("encode_chat", "split_turns"),
    "data.batches": ("Collator",),
    "data.dataset": ("some_samples",),
    "data.rows": ("read_rows", "samples"),
    "evaluation.config": ("EvalConfig",),
    "evaluation.run": ("evaluate",),
    "inference.ask": ("answer", "answers"),
    "inference.explain": ("describe", "explain"),
    "inference.export": ("prompt_embeds",),
    "inference.picture": ("anchor_picture",),
    "model.adapter_files": ("load_adapter", "load_settings", "save_settings"),
    "model.attach": ("attach", "detach", "is_attached", "prepare_inputs"),
    "model.candidates": ("with_tokens_of",),
    "model.config": ("AttAnchorConfig",),
    "model.guard": ("expect_anchors",),
    "model.load": ("load", "load_pretrained"),
    "model.plan": ("AnchorPlan", "AnchorStats"),
    "training.config": ("TrainConfig",),
    "training.lora": ("add_lora", "lora_targets"),
    "training.run": ("train",),
}
_THERE = {"train": "run"}  # what a public name is called at home, where that differs
_HOMES = {name: home for home, names in _PUBLIC.items() for name in names}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        home = importlib.import_module(f"{__name__}.{_HOMES[name]}")
    except ImportError as error:
        if (hint := missing(error)) is None:
            raise
        raise ImportError(hint, name=error.name) from error
    value = getattr(home, _THERE.get(name, name))
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
