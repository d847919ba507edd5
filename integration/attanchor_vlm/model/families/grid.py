"""Grids of image tokens over the pixels of an image: what adapters answer when asked where tokens lie."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Region = tuple[float, float, float, float]
"""x0, y0, x1, y1 in pixels of the original image, not rounded; may reach past its edges where it was padded."""
Shape = tuple[int, int]
"""(rows, columns) of a grid of image tokens."""
Size = tuple[int, int]
"""(height, width) of an image in pixels."""


@dataclass(frozen=True)
class Grid:
    """Consecutive image tokens, `rows` lines of `columns` equal cells over `region`, in reading order.

    Attributes:
        tile: Index of the tile that the grid is of, None for a view of the whole image.
        ends_lines: Every line is followed by one token that is no image content (LLaVA-NeXT's newline).
        ends: So is the grid as a whole.
        tiles: Where several tiles form one grid: their number in a column and in a line, and the region that they cover
            together. A cell then belongs to the tile that its centre lies in.
    """

    rows: int
    columns: int
    region: Region
    tile: int | None = None
    ends_lines: bool = False
    ends: bool = False
    tiles: tuple[int, int, Region] | None = None

    def cells(self) -> Iterator[tuple[int | None, int, int, Region | None]]:
        """(tile, row, column, region) of each token; region None at newlines."""
        x0, y0, x1, y1 = self.region
        # Of a very long image, LLaVA-NeXT keeps no cells at all, but the ends of its lines.
        width, height = (x1 - x0) / max(self.columns, 1), (y1 - y0) / max(self.rows, 1)
        for row in range(self.rows):
            for column in range(self.columns):
                left, top = x0 + column * width, y0 + row * height
                region = (left, top, left + width, top + height)
                yield self._tile_at(left + width / 2, top + height / 2), row, column, region
            if self.ends_lines:
                yield self._tile_at(x1, y0 + (row + 0.5) * height), row, self.columns, None
        if self.ends:
            yield self.tile, self.rows, 0, None

    def _tile_at(self, x: float, y: float) -> int | None:
        if self.tiles is None:
            return self.tile
        rows, columns, (x0, y0, x1, y1) = self.tiles
        row = min(int((y - y0) / (y1 - y0) * rows), rows - 1)
        column = min(int((x - x0) / (x1 - x0) * columns), columns - 1)
        return row * columns + column


def whole(size: Size) -> Region:
    """All of an image."""
    return 0.0, 0.0, float(size[1]), float(size[0])


def squared(size: Size) -> Region:
    """The square that an image is padded to, around it."""
    height, width = size
    side = max(height, width)
    left, top = -((side - width) // 2), -((side - height) // 2)
    return float(left), float(top), float(left + side), float(top + side)


def split(region: Region, rows: int, columns: int) -> list[Region]:
    """`region` cut into equal parts, in reading order."""
    return [cell for _, _, _, cell in Grid(rows, columns, region).cells() if cell is not None]


def kept(image_processor: Any, size: Size) -> Region:
    """What an image processor like CLIP's keeps of an image: padded to a square, resized, cropped."""
    region = whole(size)
    if getattr(image_processor, "do_pad", False) and hasattr(image_processor, "pad_to_square"):
        region = squared(size)
    if not getattr(image_processor, "do_center_crop", False):
        return region
    x0, y0, x1, y1 = region
    height, width = y1 - y0, x1 - x0
    to, crop = image_processor.size, image_processor.crop_size
    resized = (height, width)
    if image_processor.do_resize:
        if to.get("height") and to.get("width"):
            resized = (to["height"], to["width"])
        elif to.get("shortest_edge") and not to.get("longest_edge"):
            short = to["shortest_edge"]
            long = int(short * max(height, width) / min(height, width))
            resized = (short, long) if height <= width else (long, short)
        else:
            raise ValueError(f"{type(image_processor).__name__} resizes to {to} and crops; no place can be given")
    scale_y, scale_x = height / resized[0], width / resized[1]
    top, left = (resized[0] - crop["height"]) // 2, (resized[1] - crop["width"]) // 2
    return (
        x0 + left * scale_x,
        y0 + top * scale_y,
        x0 + (left + crop["width"]) * scale_x,
        y0 + (top + crop["height"]) * scale_y,
    )
