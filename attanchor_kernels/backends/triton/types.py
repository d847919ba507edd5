"""What travels through the kernels: tuples of pointers, sizes and compile-time config.

The launchers build the tuples of pointers, since a missing tensor (None) then compiles away. Sizes are passed one by
one, so that a changed length compiles nothing anew, and are put together inside the kernel.
"""

from typing import Any, NamedTuple

import triton.language as tl

# Values of `roles`; the build form is given the same ones by its masks.
PADDING = tl.constexpr(0)
TEXT = tl.constexpr(1)
IMAGE = tl.constexpr(2)
ANCHOR_TEXT = tl.constexpr(3)
SILENT_IMAGE = tl.constexpr(4)


class Rows(NamedTuple):
    """The rows of the plain concatenation, wherever they are; strides in elements, the last one is 1."""

    image: Any  # pointer to (B, M, D), in the merge form to (T, D)
    text: Any  # pointer to (B, N, D), in the merge form to (B, S, D)
    image_batch_stride: Any
    image_row_stride: Any
    text_batch_stride: Any
    text_row_stride: Any
    images: Any  # M; 0 in the merge form
    features: Any  # rows of `image` over the whole batch


class Inputs(NamedTuple):
    """Pointers to the other tensors of a `Problem`, contiguous."""

    roles: Any
    turn: Any
    image_mask: Any
    text_mask: Any
    anchor_mask: Any
    position_ids: Any
    tau: Any  # one float32 that overrides the number of `Sizes`
    keep_each: Any  # the same for `keep`, (B,) int32
    salience: Any  # (B, M) float32, in the merge form (T,)
    cells: Any  # (B, M) int32, in the merge form (T,)


class Outputs(NamedTuple):
    """Pointers to the new sequence and the fields of its `Plan`, all contiguous.

    No `embeds`, no copy; nothing but `host` and `score`, no plan: then they say what each mover matches best.
    """

    embeds: Any
    position_ids: Any
    attention_mask: Any
    source: Any
    is_anchor: Any
    host: Any
    score: Any
    relevance: Any
    places: Any


class State(NamedTuple):
    """Pointers to what programs tell each other. All zero between launches, but for the scratch."""

    keys: Any  # u64 (B, movers): best cosine and host of a mover, 0 = none yet
    cuts: Any  # u64 (B,): smallest rank key within the budget
    counters: Any  # i32 lines: ticket; `matched`, `left`, base of each sample; `parts` of each place in the ring
    relevance: Any  # u32 (B, M), merge (B, S), if text moves and images drop: orderable bits, 0 = none yet
    scratch: Any  # f32: the ring of partial products of split tiles, or None
    ranks: Any  # u64 (B, M), merge (B, S), if images drop; with cells twice: the best of each cell
    survivors: Any  # i32 (B, 2, words), if images drop


class Sizes(NamedTuple):
    """Run-time lengths."""

    batch: Any
    images: Any  # M; 0 in the merge form
    texts: Any  # N; S in the merge form
    slots: Any  # S
    movers: Any  # keys of a sample
    capacity: Any
    axes: Any  # P
    budget: Any
    tau: Any
    match_items: Any  # of a sample: tiles, or their slices
    row_tiles: Any  # assemble tiles of a sample
    keep: Any  # image tokens of a sample that stay
    slices: Any  # of the columns, if they are shared out
    slice_blocks: Any  # blocks of columns in each
    ring: Any  # tiles that have room for their partial products at once


class Config(NamedTuple):
    """Compile-time choices of the construct kernel, one constexpr argument."""

    hidden: int
    alignment: int  # elements that divide the place of every input row
    merges: bool
    image_into_text: bool
    budgeted: bool
    drops: bool  # image tokens
    inherit: bool
    pad_left: bool
    interpreted: bool  # the interpreter multiplies bfloat16 wrongly and truncates to it
    amd: str  # "gfx9" (CDNA), "gfx1" (RDNA), "" elsewhere: what a barrier of the program orders differs
    block_images: int
    block_texts: int
    block_hidden: int
    slices: int  # of the columns, each summed in an accumulator of its own; 0 if they are shared out
    slice_blocks: int  # blocks of columns in each
    split: bool  # the slices of a tile are work items of their own, as many as `Sizes` says
    block_rows: int
    block_columns: int


class CopyConfig(NamedTuple):
    """Compile-time choices of the kernels that only copy; named as in `Config`."""

    hidden: int
    alignment: int
    merges: bool
    interpreted: bool
    block_rows: int
    block_columns: int
