"""LlavaForConditionalGeneration: LLaVA-1.5, TinyLLaVA and whatever else is saved as this class."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attanchor_vlm.model.families.clip import clip_attention
from attanchor_vlm.model.families.grid import Grid, whole
from attanchor_vlm.model.families.tiles import TileAdapter


class LlavaAdapter(TileAdapter):
    """One feature row per patch, one position per token, nothing per token besides."""

    model_types = ("llava",)

    def token_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        if arguments.get("image_sizes") is None:
            return super().token_shapes(model, arguments, count)
        patch = model.config.vision_config.patch_size
        return [[(height // patch, width // patch)] for height, width in arguments["image_sizes"].tolist()]

    def class_token_attention(self, model: Any, arguments: Mapping[str, Any], encoded: Any) -> Tensor | None:
        attention = clip_attention(model, arguments, encoded)
        return None if attention is None else attention.flatten()

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        if "image_sizes" not in batch:
            return super().grids(model, processor, batch, index, size)
        # Pixtral's encoder: images keep their shape, and `image_sizes` says what they were resized to.
        patch = model.config.vision_config.patch_size
        height, width = batch["image_sizes"][index].tolist()
        return [Grid(height // patch, width // patch, whole(size))]
