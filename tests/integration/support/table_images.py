"""Random images in the shapes that the families of the table take, and how those of several samples are stacked."""

from __future__ import annotations

import torch
from builders import Image, grid, square
from tiny_families import PATCH, QWEN_PATCH, SIDE


def sized(generator: torch.Generator, index: int) -> Image:
    """Of its own shape, in a canvas as large as all."""
    sizes = [(16, 24), (24, 16), (16, 16)][index % 3]
    return {
        "pixel_values": torch.randn(1, 3, 24, 24, generator=generator),
        "image_sizes": torch.tensor([sizes]),
    }


def still(generator: torch.Generator, index: int) -> Image:
    """A grid of patches of one frame."""
    shape = grid(generator, index)["image_grid_thw"]
    return {
        "pixel_values": torch.randn(int(shape.prod()), 3, QWEN_PATCH, QWEN_PATCH, generator=generator),
        "image_grid_thw": shape,
    }


def flat(generator: torch.Generator, index: int) -> Image:
    image = still(generator, index)
    return {**image, "pixel_values": image["pixel_values"].flatten(1)}


def merged(generator: torch.Generator, index: int) -> Image:
    return {**flat(generator, index), "image_merge_sizes": torch.tensor([2])}


def one_tile(generator: torch.Generator, index: int) -> Image:
    return {"pixel_values": square(generator, index)["pixel_values"][:, None]}


def twice(generator: torch.Generator, index: int) -> Image:
    """DeepSeek's, of two resolutions."""
    names = ("pixel_values", "high_res_pixel_values")
    return {name: square(generator, index)["pixel_values"] for name in names}


def folded(generator: torch.Generator, index: int) -> Image:
    """Inkling's: patches of an image that stands twice, for its two frames."""
    patch = torch.randn(4 + index % 3, 1, PATCH, PATCH, 3, generator=generator)
    return {"pixel_values": patch.expand(-1, 2, -1, -1, -1)}


def high_and_wide(generator: torch.Generator, index: int) -> Image:
    """Nemotron's: patches in a row, and their grid without time."""
    image = still(generator, index)
    return {"pixel_values": image["pixel_values"].flatten(1), "image_grid_hw": image["image_grid_thw"][:, 1:]}


def blocks(generator: torch.Generator, index: int) -> Image:
    """Inkling 2's: blocks of two by two patches, and their grid."""
    height, width = [(2, 3), (3, 2), (2, 2)][index % 3]
    return {
        "pixel_values": torch.randn(height * width, 2 * PATCH, 2 * PATCH, 3, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def video_llava(generator: torch.Generator, index: int) -> Image:
    return {"pixel_values_images": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def positioned(generator: torch.Generator, index: int) -> Image:
    """Gemma 4's: patches in a row, with their places; padding has -1."""
    height, width = [(6, 6), (6, 12), (12, 6)][index % 3]
    places = torch.full((1, 72, 2), -1)
    places[0, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    return {
        "pixel_values": torch.rand(1, 72, 3 * PATCH**2, generator=generator),
        "image_position_ids": places,
    }


def shaped(generator: torch.Generator, index: int) -> Image:
    """SigLIP 2's: patches in a row, padded to as many."""
    height, width = [(4, 6), (6, 4), (4, 4)][index % 3]
    return {
        "pixel_values": torch.randn(1, 24, 3 * PATCH**2, generator=generator),
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": (torch.arange(24) < height * width)[None].long(),
    }


def targets(generator: torch.Generator, index: int) -> Image:
    """MiniCPM's: patches of all images in one row."""
    height, width = [(4, 8), (8, 4), (8, 8)][index % 3]
    return {
        "pixel_values": torch.randn(1, 3, PATCH, PATCH * height * width, generator=generator),
        "target_sizes": torch.tensor([[height, width]]),
    }


def in_a_row(samples: list[list[Image]]) -> Image:
    pictures = [picture for sample in samples for picture in sample]
    return {
        "pixel_values": torch.cat([picture["pixel_values"] for picture in pictures], -1),
        "target_sizes": torch.cat([picture["target_sizes"] for picture in pictures]),
    }


def local(generator: torch.Generator, index: int) -> Image:
    """A view of the whole, and up to two crops."""
    crops = index % 3
    local = torch.randn(crops, 3, SIDE, SIDE, generator=generator)
    return {
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
        "pixel_values_local": local,
        "num_local_patches": torch.tensor([crops]),
    }


def locals(samples: list[list[Image]]) -> Image:
    pictures = [picture for sample in samples for picture in sample]
    stacked = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    if not len(stacked["pixel_values_local"]):
        del stacked["pixel_values_local"], stacked["num_local_patches"]
    return stacked


def unmasked(generator: torch.Generator, index: int) -> Image:
    """Granite Docling's tiles, of which a mask says which are real."""
    tiles = 1 + index % 2
    return {
        "pixel_values": torch.randn(1, tiles, 3, SIDE, SIDE, generator=generator),
        "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool),
    }


def large_patches(generator: torch.Generator, index: int) -> Image:
    """Gemma 4 Unified's: as Gemma 4's, with pixels of what is pooled elsewhere."""
    image = positioned(generator, index)
    return {**image, "pixel_values": torch.rand(1, 72, 3 * (3 * PATCH) ** 2, generator=generator)}


def pooled(generator: torch.Generator, index: int) -> Image:
    """Molmo 2's: which patches are pooled to each token."""
    rows = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": torch.randn(1, 16, 3 * PATCH**2, generator=generator),
        "image_token_pooling": rows,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
    }


def pooled_together(samples: list[list[Image]]) -> Image:
    pictures = [picture for sample in samples for picture in sample]
    stacked = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    stacked["image_token_pooling"] += torch.arange(len(pictures)).repeat_interleave(4)[:, None] * 16
    return stacked
