"""Inputs for tests and benchmarks: random problems with a chosen share of matches, and the models' shapes."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels.problem import Role


class Shape(NamedTuple):
    """Sizes of one sample of a model: image tokens M, text tokens N, hidden size D."""

    name: str
    image: int
    text: int
    hidden: int


SHAPES = (
    Shape("tinyllava-1b", 576, 50, 2048),
    Shape("llava-7b", 576, 50, 4096),
    Shape("qwen2.5-vl-3b", 576, 50, 2048),
    Shape("llava-next-7b", 2880, 50, 4096),
)
MATCHED_SHARE = 0.1  # of the text tokens, the paper's setting
TAU = 0.5  # between the cosines of random rows (about 0) and of planted matches (about 0.7)


def matched_pair(
    batch: int,
    shape: Shape,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
    share: float = MATCHED_SHARE,
) -> tuple[Tensor, Tensor]:
    """Image (B, M, D) and text (B, N, D) in which the given share of the text tokens scores above `TAU`.

    A matched text row is its image row plus noise of the same size (cosine about 0.7); all else is independent noise.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    image = torch.randn(batch, shape.image, shape.hidden, generator=generator)
    text = torch.randn(batch, shape.text, shape.hidden, generator=generator)
    count = round(share * shape.text)
    for sample in range(batch):
        movers = torch.randperm(shape.text, generator=generator)[:count]
        hosts = torch.randint(shape.image, (count,), generator=generator)
        text[sample, movers] += image[sample, hosts]
    return image.to(device, dtype), text.to(device, dtype)


def merge_form(image: Tensor, text: Tensor, *, before: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """The same pair as `merge_sequence` takes it, with the first `before` text rows in front of the image.

    Returns:
        text_embeds (B, M+N, D), image_embeds (B*M, D), roles (B, M+N): text in front plain, text behind matched.
    """
    batch, image_count, hidden = image.shape
    text_count = text.shape[1]
    text_embeds = image.new_zeros(batch, image_count + text_count, hidden)
    text_embeds[:, :before] = text[:, :before]
    text_embeds[:, before + image_count :] = text[:, before:]
    roles = torch.full((batch, image_count + text_count), Role.ANCHOR_TEXT, dtype=torch.uint8, device=image.device)
    roles[:, :before] = Role.TEXT
    roles[:, before : before + image_count] = Role.IMAGE
    return text_embeds, image.reshape(-1, hidden), roles


def random_roles(batch: int, slots: int, generator: torch.Generator) -> Tensor:
    """(B, S) uint8 roles of every kind in no order at all."""
    kinds = torch.tensor([*Role, Role.IMAGE, Role.ANCHOR_TEXT], dtype=torch.uint8)
    return kinds[torch.randint(len(kinds), (batch, slots), generator=generator)]
