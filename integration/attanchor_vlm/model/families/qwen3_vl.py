"""Qwen3-VL: as Qwen2.5-VL, with further image features that are added in the first layers (deepstack)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attanchor_vlm.model.families.qwen2_vl import Qwen2VLAdapter


class Qwen3VLAdapter(Qwen2VLAdapter):
    """`inputs_embeds` has no place for the deepstack features, and without them the logits are wrong: ids only."""

    model_types = ("qwen3_vl",)
    routes: tuple[str, ...] = ("ids",)

    def regroup(self, encoded: Any, rows: Tensor, order: Tensor, per_sample: list[int]) -> Any:
        deepstack = [
            [part for part in torch.cat(list(layer))[order].split(per_sample) if len(part)]
            for layer in encoded.deepstack_features
        ]
        images = super().regroup(encoded, rows, order, per_sample)
        return type(encoded)(pooler_output=images.pooler_output, deepstack_features=deepstack)
