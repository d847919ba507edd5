"""Families whose images, or tiles of images, are grids of one shape: one place says it for pictures and for `keep`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.grid import Grid, kept, split, whole


class TileAdapter(FamilyAdapter):
    """One grid over what a processor like CLIP's keeps of an image, unless a subclass says otherwise."""

    routes: tuple[str, ...] = ("embeds", "ids")

    def token_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        rows, columns = self.tile_shape(model, arguments)
        return [[(rows, columns)]] * (count // (rows * columns))

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        return [Grid(*self.tile_shape(model, batch), kept(processor.image_processor, size))]

    def frame_grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int], frames: int
    ) -> list[Grid]:
        """Processors that take videos make an image of every frame, which is not cut into tiles."""
        return [Grid(*self.tile_shape(model, batch), whole(size))] * frames

    def tile_shape(self, model: Any, batch: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, columns) of the tokens of one tile, or of one image where images have no tiles."""
        pixels, size = batch.get("pixel_values"), model.config.vision_config.image_size
        sides = (size if isinstance(size, (list, tuple)) else (size, size)) if pixels is None else pixels.shape[-2:]
        height, width = sides
        patch, pooled = model.config.vision_config.patch_size, self.pooling(model)
        patch_height, patch_width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        return int(height // patch_height / pooled), int(width // patch_width / pooled)

    def pooling(self, model: Any) -> float:
        """How many patches of the image encoder lie along the side of a token."""
        return 1

    def tiled(self, model: Any, batch: Mapping[str, Any], size: tuple[int, int], rows: int, columns: int) -> list[Grid]:
        """Tiles in reading order, if there are several, then the whole image."""
        shape, tiles = self.tile_shape(model, batch), split(whole(size), rows, columns) if rows * columns > 1 else []
        return [*(Grid(*shape, region, tile) for tile, region in enumerate(tiles)), Grid(*shape, whole(size))]
