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
        return [[(rows, columns)] * steps for steps, rows, columns in _merged(model, arguments, "image")]

    def video_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        merged = _merged(model, arguments, "video")
        return [[(rows, columns)] for steps, rows, columns in merged for _ in range(steps)]

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        _, rows, columns = _merged(model, batch, "image")[index]
        return [Grid(rows, columns, whole(size))]

    def frame_grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int], frames: int
    ) -> list[Grid]:
        steps, rows, columns = _merged(model, batch, "video")[index]
        return [Grid(rows, columns, whole(size))] * steps


def _merged(model: Any, batch: Mapping[str, Any], kind: str) -> list[tuple[int, int, int]]:
    """(steps of time, rows, columns) of the tokens of each image or video; empty without their grids."""
    grids, side = batch.get(f"{kind}_grid_thw"), model.config.vision_config.spatial_merge_size
    return [] if grids is None else [(steps, high // side, wide // side) for steps, high, wide in grids.tolist()]
