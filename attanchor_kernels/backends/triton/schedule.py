"""Launch configurations, chosen by shape. tests/test_triton_compile.py compiles them for every target and reports their
registers and spills. Nothing here has been timed on a GPU yet."""

import functools
from typing import NamedTuple

import torch


class Schedule(NamedTuple):
    """How a construct launch is cut up. It changes no row, and no decision beyond rounding."""

    block_images: int
    block_texts: int
    block_hidden: int
    slices: int
    slice_blocks: int
    split: bool
    persistent: bool
    programs: int  # of a persistent launch
    lag: int  # samples between match and assemble
    block_rows: int
    block_columns: int
    num_warps: int
    num_stages: int
    registers: int  # most of a thread


class Copying(NamedTuple):
    """Tiles of the kernels that only copy."""

    block_rows: int
    block_columns: int
    num_warps: int


# Columns up to which one accumulator keeps tensor cores, which truncate, within 2e-5 of the true cosine.
EXACT_HIDDEN = 8192
# A slice shorter than this is done before its partial sums are.
LEAST_SLICE = 512
# Bytes of partial sums that a launch may use.
SCRATCH = 7 * 2**19
# Programs of 256 threads on a multiprocessor, at up to 128 registers a thread.
RESIDENT = 2


@functools.lru_cache(maxsize=256)
def construct(
    device: torch.device,
    itemsize: int,
    batch: int,
    images: int,
    slots: int,
    hidden: int,
    alignment: int,
    crowded: bool = False,
    drops: bool = False,
) -> Schedule:
    """The configuration for `batch` samples of `slots` rows, at most `images` of them image.

    64 image rows a tile read the text on chip 0.8 times as often as the image and reach the warpgroup tensor cores; 32
    rows where that would leave multiprocessors idle. Where even these are too few, slices of the columns are shared
    out. float32 has no tensor cores (TF32 is not exact enough); its smaller blocks keep it from spilling registers.
    `crowded` are launches of more than rows alone: roles, masks, image into text; `drops` those that drop image tokens.
    A block of texts is large enough for most questions: smaller ones would read as much and be compiled apart.
    """
    units = multiprocessors(device)
    resident = RESIDENT * units
    half = itemsize == 2
    block_images = 64 if half and batch * -(-images // 64) >= resident else 32
    block_texts, block_hidden = (64, 64) if half else (32, 16)

    tiles = max(1, -(-images // block_images))
    partial = 4 * (block_images * block_texts + block_images + block_texts)
    shares = 1
    while (
        half
        and batch * tiles * shares < resident
        and hidden >= 2 * shares * LEAST_SLICE
        and 2 * shares * batch * tiles * partial <= SCRATCH
    ):
        shares *= 2
    slices = max(shares, 1 if hidden <= EXACT_HIDDEN else -(-hidden // (EXACT_HIDDEN // 2)))
    slice_blocks = max(1, -(-hidden // (slices * block_hidden)))
    slices = max(1, -(-hidden // (slice_blocks * block_hidden)))
    split = shares > 1
    few = batch * -(-slots // 8) <= units  # rows to copy: the fewer to a program, the more programs copy
    lean = not (crowded and (split or drops)) and (split or slices == 1)
    return Schedule(
        block_images=block_images,
        block_texts=block_texts,
        block_hidden=block_hidden,
        slices=slices,
        slice_blocks=slice_blocks,
        split=split,
        persistent=False,
        programs=resident,
        lag=min(batch, -(-resident // (tiles * (slices if split else 1)))),
        block_rows=8 if few else 16 if half else 32,
        block_columns=columns(2048 if few or half else 512, itemsize, hidden),
        num_warps=8,
        num_stages=5 if block_images == 64 else 4,
        # 128 let two programs share a multiprocessor, but spill with narrow loads, several sums, or too much beside.
        registers=128 if half and alignment * itemsize == 16 and lean else 255,
    )


def copying(itemsize: int, hidden: int) -> Copying:
    """Of `assemble`: 16 rows of 1 kB in flight per program, 128 bytes a thread."""
    return Copying(block_rows=16, block_columns=columns(1024, itemsize, hidden), num_warps=4)


def adding(itemsize: int, hidden: int) -> Copying:
    """Of its transpose, which holds two such blocks in float32."""
    return Copying(block_rows=16, block_columns=columns(512, itemsize, hidden), num_warps=4)


def columns(most_bytes: int, itemsize: int, hidden: int) -> int:
    """Columns copied at once: no more than a row has."""
    return min(most_bytes // itemsize, max(16, 1 << (hidden - 1).bit_length()))


def multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count
