"""Copying rows: slots to their places, zeros to padding, and gradients back.

Values change between the rows' dtype and float32 exactly, also where Triton's interpreter does not.
"""

import triton
import triton.language as tl


@triton.jit
def widen(value, INTERPRETED: tl.constexpr):
    """To float32. The interpreter makes a tiny number of a bfloat16 zero."""
    if INTERPRETED and value.dtype == tl.bfloat16:
        return (value.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    return value.to(tl.float32)


@triton.jit
def round_to(value, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 to the nearest value of `dtype`, ties to even. The interpreter would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = value.to(tl.uint32, bitcast=True)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        nearest = tl.where(value == value, nearest, (bits >> 16) | 0x40)  # a NaN stays one
        return nearest.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return value.to(dtype)


@triton.jit
def image_rows(rows, config: tl.constexpr, sample, index):
    """Pointers to image rows: index in the sample, in the merge form in the whole batch."""
    offset = index.to(tl.int64) * rows.image_row_stride
    if not config.merges:
        offset += tl.cast(sample, tl.int64) * rows.image_batch_stride
    ALIGNMENT: tl.constexpr = config.alignment
    return rows.image + tl.multiple_of(offset, ALIGNMENT)


@triton.jit
def text_rows(rows, config: tl.constexpr, sample, index):
    """Pointers to text rows: index among the texts, in the merge form among the slots."""
    offset = tl.cast(sample, tl.int64) * rows.text_batch_stride + index.to(tl.int64) * rows.text_row_stride
    ALIGNMENT: tl.constexpr = config.alignment
    return rows.text + tl.multiple_of(offset, ALIGNMENT)


@triton.jit
def slot_rows(rows, config: tl.constexpr, sample, slot, feature):
    """Pointers to the rows of slots, and whether each exists; `feature` is -1 for a text."""
    image = image_rows(rows, config, sample, feature if config.merges else slot)
    row = tl.where(feature >= 0, image, text_rows(rows, config, sample, slot - rows.images))
    # The compiler does not see through the choice of a pointer, and would load element by element.
    BYTES: tl.constexpr = config.alignment * rows.text.dtype.element_ty.primitive_bitwidth // 8
    return tl.multiple_of(row, BYTES), feature < rows.features


@triton.jit
def copy_rows(row, exists, to, original, copy, DROPS: tl.constexpr, config: tl.constexpr):
    """Rows to `original` and `copy`, places in the sample that starts at `to`; -1 = no such place. With DROPS there can
    be a copy without an original. A row that does not exist becomes NaN."""
    HIDDEN: tl.constexpr = config.hidden
    COLUMNS: tl.constexpr = config.block_columns
    readable = exists & ((tl.maximum(original, copy) if DROPS else original) >= 0)
    at_original = to + original.to(tl.int64) * HIDDEN
    at_copy = to + copy.to(tl.int64) * HIDDEN
    copied = tl.max(copy) >= 0
    for start in range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = tl.full([1, COLUMNS], True, tl.int1)
        if HIDDEN % COLUMNS != 0:
            inside = (column < HIDDEN)[None, :]
        value = tl.load(
            row[:, None] + column[None, :],
            mask=readable[:, None] & inside,
            other=float("nan"),
            eviction_policy="evict_first",
        )
        # What reads the sequence next comes soon: unlike the inputs' last read, these are not the first to leave L2.
        tl.store(at_original[:, None] + column[None, :], value, mask=(original >= 0)[:, None] & inside)
        if copied:
            tl.store(at_copy[:, None] + column[None, :], value, mask=(copy >= 0)[:, None] & inside)


@triton.jit
def zero_rows(at, chosen, config: tl.constexpr):
    """Zeros to the chosen rows."""
    HIDDEN: tl.constexpr = config.hidden
    COLUMNS: tl.constexpr = config.block_columns
    if tl.max(chosen.to(tl.int32)) > 0:
        zero = tl.zeros([at.shape[0], COLUMNS], at.dtype.element_ty)
        for start in range(0, HIDDEN, COLUMNS):
            column = start + tl.arange(0, COLUMNS)
            mask = chosen[:, None] & (column < HIDDEN)[None, :]
            tl.store(at[:, None] + column[None, :], zero, mask=mask)


@triton.jit
def add_copies(grad, row_stride, original, copy, to, chosen, config: tl.constexpr):
    """To the chosen rows at `to` the sum of the rows at `original` and `copy` of the sample whose gradient starts at
    `grad`; -1 = no such row. Added in float32 and rounded once."""
    HIDDEN: tl.constexpr = config.hidden
    COLUMNS: tl.constexpr = config.block_columns
    ALIGNMENT: tl.constexpr = config.alignment
    at_original = grad + tl.multiple_of(original.to(tl.int64) * row_stride, ALIGNMENT)
    at_copy = grad + tl.multiple_of(copy.to(tl.int64) * row_stride, ALIGNMENT)
    copied = tl.max(tl.where(chosen, copy, -1)) >= 0
    for start in range(0, HIDDEN, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = tl.full([1, COLUMNS], True, tl.int1)
        if HIDDEN % COLUMNS != 0:
            inside = (column < HIDDEN)[None, :]
        mask = (chosen & (original >= 0))[:, None] & inside
        value = tl.load(at_original[:, None] + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
        if copied:
            mask = (chosen & (copy >= 0))[:, None] & inside
            other = tl.load(at_copy[:, None] + column[None, :], mask=mask, other=0.0, eviction_policy="evict_first")
            total = widen(value, config.interpreted) + widen(other, config.interpreted)
            total = round_to(total, value.dtype, config.interpreted)
            value = tl.where((copy >= 0)[:, None], total, value)  # without a copy, the sign of a zero is kept too
        tl.store(to[:, None] + column[None, :], value, mask=chosen[:, None] & inside, eviction_policy="evict_first")
