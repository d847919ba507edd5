"""Which image tokens are whose: the projected features of a batch, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attanchor_vlm.model.families import FamilyAdapter


def rows_by_sample(model: Any, adapter: FamilyAdapter, rows: Tensor, arguments: Mapping[str, Any]) -> list[Tensor]:
    """B tensors (M_b, D): the image tokens of every sample that are image content, which newline rows are not.

    Args:
        model: The transformers model itself.
        rows: (T, D), of the whole batch, as `FamilyAdapter.feature_rows` returns them.
        arguments: The call's, with `input_ids` and `attention_mask`.
    """
    held = adapter.placeholders(model, arguments["input_ids"]) & arguments["attention_mask"].bool()
    counts = held.sum(-1).tolist()
    parts = rows.split(counts)
    silent = adapter.silent_features(model, rows)
    if silent is None:
        return list(parts)
    return [part[~hidden] for part, hidden in zip(parts, silent.split(counts), strict=True)]
