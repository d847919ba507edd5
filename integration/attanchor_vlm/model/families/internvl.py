"""InternVL: patches pooled two by two; tiles are images of their own."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attanchor_vlm.model.families.grid import Grid
from attanchor_vlm.model.families.tiles import TileAdapter


class InternVLAdapter(TileAdapter):
    model_types = ("internvl",)

    def pooling(self, model: Any) -> float:
        return 1 / model.config.downsample_ratio

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        images = processor.image_processor
        # The processor crops unless it is told not to, whatever the image processor's own default is.
        crops = {**getattr(processor, "images_kwargs", {})}.get("crop_to_patches", images.crop_to_patches)
        rows = columns = 1
        if crops and images.max_patches > 1:
            tile = (images.size["height"], images.size["width"])
            columns, rows = _canvas_of(images)(size, tile, images.min_patches, images.max_patches)
        return self.tiled(model, batch, size, rows, columns)


def _canvas_of(image_processor: Any) -> Any:
    """The function by which an image processor chooses (columns, rows) of tiles."""
    for base in type(image_processor).__mro__:
        if hasattr(inspect.getmodule(base), "get_optimal_tiled_canvas"):
            return inspect.getmodule(base).get_optimal_tiled_canvas  # type: ignore[union-attr]
    raise ValueError(f"{type(image_processor).__name__} cuts images into tiles in an unknown way")
