"""What the rooms share and nobody may redefine."""

from __future__ import annotations

from typing import Any

IGNORE_INDEX = -100  # the label that losses skip, as in PyTorch and transformers


def context_of(config: Any) -> int | None:
    """How many tokens the language model of a transformers config takes; None where it does not say."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)
