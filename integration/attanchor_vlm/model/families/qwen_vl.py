"""Qwen-VL and whatever else takes an image as a strip of patches of any size, with its grid in `image_grid_thw`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.grid import Grid, whole


class QwenVLAdapter(FamilyAdapter):
    """With M-RoPE anchors take their host's place in the image's grid, and nothing that was pretrained moves."""

    def token_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        grids, merged = arguments.get("image_grid_thw"), model.config.vision_config.spatial_merge_size
        if grids is None:
            return []
        return [[(height // merged, width // merged)] * frames for frames, height, width in grids.tolist()]

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        _, height, width = batch["image_grid_thw"][index].tolist()
        merged = model.config.vision_config.spatial_merge_size
        return [Grid(height // merged, width // merged, whole(size))]

    def frame_grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int], frames: int
    ) -> list[Grid]:
        steps, height, width = batch["video_grid_thw"][index].tolist()
        merged = model.config.vision_config.spatial_merge_size
        return [Grid(height // merged, width // merged, whole(size))] * steps

    def video_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        grids, merged = arguments.get("video_grid_thw"), model.config.vision_config.spatial_merge_size
        if grids is None:
            return []
        return [[(high // merged, wide // merged)] for steps, high, wide in grids.tolist() for _ in range(steps)]
