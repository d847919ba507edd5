"""AttAnchor in vision-language models of transformers: `attach` a model, then use it as before.

Names are imported when first used, so that the command line answers `--help` without loading torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attanchor_vlm.chat.encode import encode_chat, split_turns
    from attanchor_vlm.model.adapter_files import load_adapter, load_settings, save_settings
    from attanchor_vlm.model.attach import attach, detach, is_attached, prepare_inputs
    from attanchor_vlm.model.candidates import with_tokens_of
    from attanchor_vlm.model.config import AttAnchorConfig
    from attanchor_vlm.model.guard import expect_anchors
    from attanchor_vlm.model.plan import AnchorPlan, AnchorStats

_HOMES = {
    "attach": "model.attach",
    "detach": "model.attach",
    "is_attached": "model.attach",
    "AttAnchorConfig": "model.config",
    "with_tokens_of": "model.candidates",
    "expect_anchors": "model.guard",
    "encode_chat": "chat.encode",
    "split_turns": "chat.encode",
    "AnchorPlan": "model.plan",
    "AnchorStats": "model.plan",
    "prepare_inputs": "model.attach",
    "load_adapter": "model.adapter_files",
    "load_settings": "model.adapter_files",
    "save_settings": "model.adapter_files",
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
