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
    ring: int  # split tiles that have room for their partial sums at once
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
# Columns of a slice that is a work item of its own.
SPLIT_HIDDEN = 512
# Programs of 256 threads on a multiprocessor, at up to 128 registers a thread.
RESIDENT = 2
# Bytes of image that L2 holds until their second read: half of an H200's, which keeps some of it twice.
CACHED = 25 * 10**6


@functools.lru_cache(maxsize=256)
def construct(
    device: torch.device,
    itemsize: int,
    batch: int,
    images: int,
    slots: int,
    hidden: int,
    alignment: int,
) -> Schedule:
    """The configuration for `batch` samples of `slots` rows, at most `images` of them image.

    64 image rows a tile read the text on chip 0.8 times as often as the image and reach the warpgroup tensor cores.
    Slices of its columns are work items of their own: a small batch fills the device, and at a large one the programs
    at work hold so little of the image that L2 still has it when it is copied. Tiles and slices do not depend on the
    batch, so neither does a score. float32 has no tensor cores (TF32 is not exact enough); its smaller blocks keep it
    from spilling registers. A block of texts is large enough for most questions: smaller ones would read as much
    and be compiled apart.
    """
    units = multiprocessors(device)
    resident = RESIDENT * units
    half = itemsize == 2
    block_images, block_texts, block_hidden = (64, 64, 64) if half else (32, 32, 16)
    split = half and hidden > SPLIT_HIDDEN
    longest = SPLIT_HIDDEN if split else EXACT_HIDDEN if hidden <= EXACT_HIDDEN else EXACT_HIDDEN // 2
    slice_blocks = max(1, -(-hidden // (max(1, -(-hidden // longest)) * block_hidden)))
    slices = max(1, -(-hidden // (slice_blocks * block_hidden)))
    few = batch * -(-slots // 8) <= units  # rows to copy: the fewer to a program, the more programs copy
    block_rows = 8 if few else 16 if half else 32

    # What a work item reads and writes, in columns of a row, is how long it takes; so many samples are being matched
    # at once, and more of them wait for their copy only if L2 has room or the device would idle.
    items = max(1, -(-images // block_images)) * (slices if split else 1)
    match = (block_images + block_texts) * hidden // (slices if split else 1)
    work = items * match + -(-slots // block_rows) * 2 * block_rows * hidden
    room = CACHED // max(1, images * hidden * itemsize)
    lag = min(-(-resident * match // max(1, work)), max(room, -(-resident // items)) - 1)
    return Schedule(
        block_images=block_images,
        block_texts=block_texts,
        block_hidden=block_hidden,
        slices=slices,
        slice_blocks=slice_blocks,
        split=split,
        ring=-(-3 * resident // (2 * slices)) if split else 0,  # half as many again as can be at work
        lag=min(batch, lag),
        block_rows=block_rows,
        block_columns=columns(2048 if few or half else 512, itemsize, hidden),
        num_warps=8,
        num_stages=5 if half else 4,
        # 128 let two programs share a multiprocessor, but spill with narrow loads.
        registers=128 if half and alignment * itemsize == 16 else 255,
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
