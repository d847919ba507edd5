"""Idefics3 and SmolVLM: the tiles of a sample in one row of pixel_values, short samples filled with zeros."""

from __future__ import annotations

from typing import Any

from torch import nn

from attanchor_vlm.adapters.base import FamilyAdapter


class Idefics3Adapter(FamilyAdapter):
    model_types = ("idefics3", "smolvlm")
    image_arguments = ("pixel_values", "pixel_attention_mask")

    def vision_tower(self, model: Any) -> nn.Module | None:
        return model.base_model.vision_model
