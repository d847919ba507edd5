"""Problems one under, at and one over the sizes at which a kernel changes its way: tiles, blocks, scans, slices."""

from __future__ import annotations

import torch

from attanchor_kernels.problem import Problem, Role


def build(images: int, texts: int, hidden: int, dtype=torch.float32, batch: int = 1, **options) -> Problem:
    """Random rows; the last image equals the first, the last text equals both, and the last but one is masked out."""
    generator = torch.Generator().manual_seed(images * texts + hidden)
    image = torch.randn(batch, images, hidden, generator=generator).to(dtype)
    text = torch.randn(batch, texts, hidden, generator=generator).to(dtype)
    image[:, -1] = text[:, -1] = image[:, 0]
    mask = torch.ones(batch, texts, dtype=torch.bool)
    mask[:, -2] = texts < 2
    return Problem(image, text, **{"tau": 0.3, "max_anchors": 7, "text_mask": mask, **options})


def merge(slots: int, hidden: int = 4, batch: int = 1, **options) -> Problem:
    """Mostly plain text; images and matched texts are few, but stand at both ends and around every power of two."""
    generator = torch.Generator().manual_seed(slots)
    roles = torch.full((batch, slots), Role.TEXT, dtype=torch.uint8)
    near = [at + step for at in (0, 32, 64, 128, 256, 512, 1024, slots) for step in (-2, -1, 0, 1)]
    for at in [at for at in near if 0 <= at < slots]:
        kinds = torch.tensor([2, 2, 3, 3, 4, 0], dtype=torch.uint8)  # roles
        roles[:, at] = kinds[torch.randint(len(kinds), (batch,), generator=generator)]
    roles[:, 0], roles[:, -2], roles[:, -1] = Role.IMAGE, Role.IMAGE, Role.ANCHOR_TEXT
    features = int((roles.eq(Role.IMAGE) | roles.eq(Role.SILENT_IMAGE)).sum())
    image = torch.randn(features, hidden, generator=generator)
    text = torch.randn(batch, slots, hidden, generator=generator)
    return Problem(image, text, **{"tau": 0.3, "max_anchors": 5, "roles": roles, "inherit": True, **options})


# Where tiles and blocks of rows and columns end, in every kernel: 16, 32 and 64 rows, 128 bytes of a row.
TILES = {
    f"{size}, {str(dtype).removeprefix('torch.')}{', image into text' * turned}": (
        lambda size=size, dtype=dtype, turned=turned: build(size, size, size, dtype, image_into_text=turned)
    )
    for size, dtype, turned in [
        (15, torch.float32, False),
        (16, torch.float32, True),
        (17, torch.float32, False),
        (31, torch.bfloat16, True),
        (33, torch.float32, False),
        (63, torch.float16, False),
        (64, torch.bfloat16, True),
        (65, torch.bfloat16, False),
    ]
}
# Movers that are ranked by everyone, and one more: their cut is found by one program. Triton 128, CUDA 256.
MOVERS = {
    f"{count} movers{', image into text' * turned}": (
        lambda count=count, turned=turned: build(*((count, 5) if turned else (5, count)), 4, image_into_text=turned)
    )
    for count in (128, 129, 256, 257)
    for turned in (False, True)
}
# Scans of a sample's slots, and of all samples before it.
SLOTS = {
    f"{slots} slots": lambda slots=slots: merge(slots, image_into_text=slots % 2 == 0)
    for slots in (255, 256, 257, 1023, 1024, 1025)
}
# Columns that share an accumulator, and slices of a row shared out over programs.
COLUMNS = {
    "8192 columns": lambda: build(2, 2, 8192, torch.bfloat16),
    "8193 columns": lambda: build(2, 2, 8193, torch.bfloat16),
    "1025 columns": lambda: build(33, 17, 1025, torch.float16),
}
LIMITS = {**TILES, **MOVERS, **SLOTS, **COLUMNS}
