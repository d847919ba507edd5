"""AttAnchor in vision-language models of transformers: `attach` a model, then use it as before.

Names are imported when first used, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attanchor_vlm.config import AttAnchorConfig
    from attanchor_vlm.fallback import with_tokens_of
    from attanchor_vlm.guard import expect_anchors
    from attanchor_vlm.masks import encode_chat, split_turns
    from attanchor_vlm.mixin import attach, detach, is_attached, prepare_inputs
    from attanchor_vlm.plan import AnchorPlan, AnchorStats
    from attanchor_vlm.settings import load_adapter, load_settings, save_settings

_HOMES = {
    "attach": "mixin",
    "detach": "mixin",
    "is_attached": "mixin",
    "AttAnchorConfig": "config",
    "with_tokens_of": "fallback",
    "expect_anchors": "guard",
    "encode_chat": "masks",
    "split_turns": "masks",
    "AnchorPlan": "plan",
    "AnchorStats": "plan",
    "prepare_inputs": "mixin",
    "load_adapter": "settings",
    "load_settings": "settings",
    "save_settings": "settings",
}

__all__ = [
    "AnchorPlan",
    "AnchorStats",
    "AttAnchorConfig",
    "attach",
    "detach",
    "encode_chat",
    "expect_anchors",
    "is_attached",
    "load_adapter",
    "load_settings",
    "prepare_inputs",
    "save_settings",
    "split_turns",
    "with_tokens_of",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
