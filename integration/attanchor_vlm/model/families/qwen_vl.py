"""Qwen-VL and whatever else takes an image as a strip of patches of any size, with its grid in `image_grid_thw`."""

from __future__ import annotations

from typing import Any

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.grid import Grid, Shape, Size, whole
from attanchor_vlm.model.plan import Call


class QwenVLAdapter(FamilyAdapter):
    """With M-RoPE anchors take their host's place in the image's grid, and nothing that was pretrained moves."""

    def token_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        return [[(rows, columns)] * steps for steps, rows, columns in _merged(model, arguments, "image")]

    def video_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        merged = _merged(model, arguments, "video")
        return [[(rows, columns)] for steps, rows, columns in merged for _ in range(steps)]

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        _, rows, columns = _merged(model, batch, "image")[index]
        return [Grid(rows, columns, whole(size))]

    def frame_grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size, frames: int) -> list[Grid]:
        steps, rows, columns = _merged(model, batch, "video")[index]
        return [Grid(rows, columns, whole(size))] * steps


def _merged(model: Any, batch: Call, kind: str) -> list[tuple[int, int, int]]:
    """(steps of time, rows, columns) of the tokens of each image or video; empty without their grids."""
    grids, side = batch.get(f"{kind}_grid_thw"), model.config.vision_config.spatial_merge_size
    return [] if grids is None else [(steps, high // side, wide // side) for steps, high, wide in grids.tolist()]
