"""Where the tokens of an image lie in its pixels, for every family: tiles, crops, pooling, newline tokens.

``patch_boxes(model, processor, batch, row, images)`` gives one `Box` for each image token of a row, in the order in
which they stand in ``batch["input_ids"]``. A family's own part is in its adapter (`FamilyAdapter.grids`).

    boxes = patch_boxes(model, processor, batch, 0, [[picture]])   # `images` as encode_chat takes them
    slots = image_slots(model, batch, 0)                           # the slot of each of these tokens
    box = boxes[slots.index(host)]                                 # host: an entry of model.attanchor_plan.host[0]
    box.image, box.tile, box.row, box.column, box.pixels           # pixels: x0, y0, x1, y1 in images[0][box.image]
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from attanchor_vlm.chat.videos import Video
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.families.grid import Region


class Box(NamedTuple):
    """What an image token stands for.

    Attributes:
        image: Index among the pictures of its row: its images and, of its videos, a frame for each step of time.
        tile: Index of its tile; None in a view of the whole image.
        row, column: In the grid of its tile or view. LLaVA-NeXT's tiles form one grid together.
        pixels: x0, y0, x1, y1 in pixels of the original image, not rounded and within it; None where there is none of
            it: newline tokens, padding.
        video, frame: Index among the videos of its row, and of the frame that is its picture, where it is of a video.
    """

    image: int
    tile: int | None
    row: int
    column: int
    pixels: Region | None
    video: int | None = None
    frame: int | None = None


def patch_boxes(
    model: Any, processor: Any, batch: Mapping[str, Tensor], row: int, images: Sequence[Sequence[Any]]
) -> list[Box]:
    """The box of each image token of a row.

    Args:
        model: A model of a known family, attached or not, or a PeftModel around one.
        processor: What made `batch`, with the settings that it made it with.
        batch: From `encode_chat`.
        row: Index in the batch.
        images: Those of every row in the order of the prompt, as given to `encode_chat`: PIL images, or (width,
            height), or a `Video`.

    Raises:
        ValueError: the images are not those that the batch was made of, or were processed in an unknown way.
    """
    target = base_of(model)
    adapter = adapter_for(target)
    count = int(adapter.placeholders(target, batch["input_ids"][row : row + 1]).sum())
    before = Counter(isinstance(one, Video) for own in images[:row] for one in own)  # rows lie one behind the other
    boxes: list[Box] = []
    pictures, seen = 0, Counter[bool]()
    for image in images[row]:
        if is_video := isinstance(image, Video):
            (width, height), frames = image.frames[0].size, len(image.frames)
            index = before[True] + seen[True]
            steps = adapter.frame_grids(target, processor, batch, index, (height, width), frames)
            each = -(-frames // max(len(steps), 1))
            views = [([grid], {"video": seen[True], "frame": step * each}) for step, grid in enumerate(steps)]
        else:
            width, height = image if isinstance(image, tuple) else image.size
            views = [(adapter.grids(target, processor, batch, before[False] + seen[False], (height, width)), {})]
        for grids, place in views:
            boxes += [
                Box(pictures, tile, line, column, region and _within(region, width, height), **place)
                for grid in grids
                for tile, line, column, region in grid.cells()
            ]
            pictures += 1
        seen[is_video] += 1
    if len(boxes) != count:
        raise ValueError(
            f"row {row} has {count} image tokens, but its {len(images[row])} images or videos of this size should take "
            f"{len(boxes)} in {target.config.model_type}: pass the images and the processor that the batch was made of"
        )
    return boxes


def image_slots(model: Any, batch: Mapping[str, Tensor], row: int) -> list[int]:
    """The slots of ``batch["input_ids"][row]`` that hold image tokens, in order: `patch_boxes` has one box for each."""
    target = base_of(model)
    return adapter_for(target).placeholders(target, batch["input_ids"][row : row + 1])[0].nonzero()[:, 0].tolist()


def _within(region: Region, width: int, height: int) -> Region | None:
    x0, y0, x1, y1 = region
    x0, y0, x1, y1 = max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height))
    return (x0, y0, x1, y1) if x1 > x0 and y1 > y0 else None
