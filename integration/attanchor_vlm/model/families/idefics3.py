"""Idefics3 and SmolVLM: the tiles of a sample in one row of pixel_values, short samples filled with zeros."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from attanchor_vlm.model.families.grid import Grid
from attanchor_vlm.model.families.tiles import TileAdapter


class Idefics3Adapter(TileAdapter):
    model_types = ("idefics3", "smolvlm")

    def pooling(self, model: Any) -> float:
        return model.config.scale_factor

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        blank = Image.new("RGB", (size[1], size[0]))
        # How many there are depends on several roundings: asked of the processor itself.
        encoded = processor.image_processor(blank, return_row_col_info=True)
        return self.tiled(model, batch, size, encoded["rows"][0][0], encoded["cols"][0][0])
