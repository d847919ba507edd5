"""LLaVA-OneVision: LLaVA-NeXT's tiles and line ends, with the number of images per sample and bounded tiles."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attanchor_vlm.model.families.grid import Grid, squared, whole
from attanchor_vlm.model.families.llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    model_types = ("llava_onevision",)

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        """As LLaVA-NeXT's; but several images in a sample have one padded tile each, with one newline behind it."""
        counts = batch.get("batch_num_images")
        if counts is None or int(counts.repeat_interleave(counts)[index]) == 1:
            return super().grids(model, processor, batch, index, size)
        vision = model.config.vision_config
        cells = vision.image_size // vision.patch_size
        return [Grid(cells, cells, squared(size), ends=True)]

    def shape_of_tiles(
        self, model: Any, batch: Mapping[str, Tensor], rows: int, columns: int, cells: int
    ) -> tuple[int, int]:
        """The features are shrunk to what `vision_aspect_ratio` allows, such as nine tiles' worth."""
        most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * cells**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def frame_grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int], frames: int
    ) -> list[Grid]:
        """Every frame pooled two by two, and one newline behind the last."""
        grid = Grid(*_pooled(model), whole(size))
        return [grid] * (frames - 1) + [dataclasses.replace(grid, ends=True)]

    def video_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        rows, columns = _pooled(model)
        return [[(rows, columns)]] * (count // (rows * columns))


def _pooled(model: Any) -> tuple[int, int]:
    vision = model.config.vision_config
    return (math.ceil(vision.image_size // vision.patch_size / 2),) * 2
