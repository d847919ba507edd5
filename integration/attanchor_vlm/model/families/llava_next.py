"""LLaVA-NeXT and LLaVA-OneVision: images in tiles, with a learned row after every line of patches."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor
from transformers.image_processing_utils import select_best_resolution

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.clip import clip_attention
from attanchor_vlm.model.families.grid import Grid, Shape, Size, squared, whole
from attanchor_vlm.model.plan import Call


class LlavaNextAdapter(FamilyAdapter):
    """Feature rows that are line ends are the same learned vector everywhere: no image content, so no hosts."""

    model_types = ("llava_next",)
    routes = ("embeds", "ids")

    def token_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        if arguments.get("image_sizes") is None:
            return []
        images = enumerate(arguments["image_sizes"].tolist())
        found = [self.grids(model, None, arguments, index, tuple(size)) for index, size in images]
        return [[(grid.rows, grid.columns) for grid in own if grid.rows and grid.columns] for own in found]

    def class_token_attention(self, model: Any, arguments: Call, encoded: Any) -> Tensor | None:
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        attention = clip_attention(model, arguments, encoded)
        if attention is None:
            return None
        sizes = arguments["image_sizes"]
        tiles = [
            image_size_to_num_patches(size, model.config.image_grid_pinpoints, model.config.vision_config.image_size)
            for size in sizes
        ]
        # As the model lays out the features themselves, with a number in place of each.
        packed, _ = model.base_model.pack_image_features(
            attention[..., None].split(tiles), sizes, "default", image_newline=attention.new_zeros(1)
        )
        return torch.cat(packed).flatten()

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        """The whole image, then the tiles as one grid, less what they have of padding, with line ends."""
        vision = model.config.vision_config
        side, cells = vision.image_size, vision.image_size // vision.patch_size
        height, width = size
        canvas_height, canvas_width = select_best_resolution(size, model.config.image_grid_pinpoints)
        # Fitted into the canvas in its own shape, with as much padding on both sides.
        scale = min(canvas_width / width, canvas_height / height)
        fitted_height = min(math.ceil(height * scale), canvas_height)
        fitted_width = min(math.ceil(width * scale), canvas_width)
        top, left = (canvas_height - fitted_height) // 2, (canvas_width - fitted_width) // 2
        scale_y, scale_x = height / fitted_height, width / fitted_width
        # As the model takes padding away: whole lines of cells, of one direction.
        rows, columns = canvas_height // side * cells, canvas_width // side * cells
        pad_rows = pad_columns = 0
        if width / height > columns / rows:
            pad_rows = (rows - int(round(height * (columns / width), 7))) // 2
        else:
            pad_columns = (columns - int(round(width * (rows / height), 7))) // 2

        def place(x: float, y: float) -> tuple[float, float]:
            return (x - left) * scale_x, (y - top) * scale_y

        cell_height, cell_width = canvas_height / rows, canvas_width / columns
        region = (
            *place(pad_columns * cell_width, pad_rows * cell_height),
            *place(canvas_width - pad_columns * cell_width, canvas_height - pad_rows * cell_height),
        )
        canvas = (*place(0, 0), *place(canvas_width, canvas_height))
        shape = self.shape_of_tiles(model, batch, rows - 2 * pad_rows, columns - 2 * pad_columns, cells)
        tiles = (canvas_height // side, canvas_width // side, canvas)
        return [Grid(cells, cells, whole(size)), Grid(*shape, region, ends_lines=True, tiles=tiles)]

    def shape_of_tiles(self, model: Any, batch: Call, rows: int, columns: int, cells: int) -> Shape:
        """(rows, columns) of the tokens that stand for a grid of features; `cells` along the side of a tile."""
        return rows, columns


class LlavaOnevisionAdapter(LlavaNextAdapter):
    """The number of images per sample is told, and tiles are bounded."""

    model_types = ("llava_onevision",)

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        """As LLaVA-NeXT's; but several images in a sample have one padded tile each, with one newline behind it."""
        counts = batch.get("batch_num_images")
        if counts is None or int(counts.repeat_interleave(counts)[index]) == 1:
            return super().grids(model, processor, batch, index, size)
        vision = model.config.vision_config
        cells = vision.image_size // vision.patch_size
        return [Grid(cells, cells, squared(size), ends=True)]

    def shape_of_tiles(self, model: Any, batch: Call, rows: int, columns: int, cells: int) -> Shape:
        """The features are shrunk to what `vision_aspect_ratio` allows, such as nine tiles' worth."""
        most = int(model.config.vision_aspect_ratio.removeprefix("anyres_max_"))
        ratio = math.sqrt(rows * columns / (most * cells**2))
        return (int(rows // ratio), int(columns // ratio)) if ratio > 1.1 else (rows, columns)

    def frame_grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size, frames: int) -> list[Grid]:
        """Every frame pooled two by two, and one newline behind the last."""
        grid = Grid(*_pooled(model), whole(size))
        return [grid] * (frames - 1) + [dataclasses.replace(grid, ends=True)]

    def video_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        rows, columns = _pooled(model)
        return [[(rows, columns)]] * (count // (rows * columns))


def _pooled(model: Any) -> Shape:
    vision = model.config.vision_config
    return (math.ceil(vision.image_size // vision.patch_size / 2),) * 2
