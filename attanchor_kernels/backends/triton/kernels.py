"""The three kernels that are launched: construct (match, plan and copy in one), assemble, and its transpose.

Construct makes what its outputs have pointers for: without `embeds` it plans and does not copy, without `source` it
matches and does not plan.
"""

import triton
import triton.language as tl

from attanchor_kernels.backends import common
from attanchor_kernels.backends.triton.copy import add_copies, copy_rows, slot_rows, zero_rows
from attanchor_kernels.backends.triton.keep import choose_survivors
from attanchor_kernels.backends.triton.match import match_tile, publish_cut, report_matches
from attanchor_kernels.backends.triton.plan import assemble_tile
from attanchor_kernels.backends.triton.state import arrive, matched_of
from attanchor_kernels.backends.triton.types import Rows, Sizes

NEVER = tl.constexpr(common.NEVER)
LEAST_TAU = tl.constexpr(common.LEAST_TAU)
LENGTHS = [
    *("batch", "images", "texts", "slots", "features", "movers", "capacity", "axes", "budget"),
    *("image_batch_stride", "image_row_stride", "text_batch_stride", "text_row_stride"),
    *("match_items", "row_tiles", "lag", "keep", "slices", "slice_blocks", "ring"),
]


@triton.jit(do_not_specialize=LENGTHS)
def construct_kernel(
    image,
    text,
    inputs,
    outputs,
    state,
    tau,
    batch,
    images,
    texts,
    slots,
    features,
    movers,
    capacity,
    axes,
    budget,
    image_batch_stride,
    image_row_stride,
    text_batch_stride,
    text_row_stride,
    match_items,
    row_tiles,
    lag,
    keep,
    slices,
    slice_blocks,
    ring,
    config: tl.constexpr,
):
    """Match and assemble every sample in one launch, of as many programs as there are work items.

    Work is handed out by tickets: the match tiles of the first `lag` samples, then in turn the match tiles of a sample
    and the assemble tiles of the one `lag` before it, then the assemble tiles of the last `lag` samples. Whoever waits,
    waits for work of earlier tickets alone, all of them held by programs that have begun. So the earliest that is not
    done never waits: no deadlock, whatever runs at the same time.
    """
    rows = Rows(image, text, image_batch_stride, image_row_stride, text_batch_stride, text_row_stride, images, features)
    if inputs.tau is not None:
        tau = tl.load(inputs.tau)
        tau = tl.where(tau < 1, tl.maximum(tau, LEAST_TAU), NEVER)  # NEVER for NaN too
    sizes = Sizes(
        *(batch, images, texts, slots, movers, capacity, axes, budget, tau, match_items, row_tiles),
        *(keep, slices, slice_blocks, ring),
    )
    ticket = tl.atomic_add(state.counters, 1, sem="relaxed")
    if ticket == batch * (match_items + row_tiles) - 1:
        tl.store(state.counters, 0)
    work(rows, inputs, outputs, state, sizes, config, lag, ticket)


@triton.jit
def work(rows, inputs, outputs, state, sizes, config: tl.constexpr, lag, ticket):
    """The work item of a ticket."""
    items = sizes.match_items
    both = items + sizes.row_tiles
    head = lag * items
    middle = head + (sizes.batch - lag) * both
    if ticket < head:
        sample = ticket // items
        item = ticket % items
    elif ticket < middle:
        item = (ticket - head) % both
        sample = (ticket - head) // both + tl.where(item < items, lag, 0)
    else:
        sample = sizes.batch - lag + (ticket - middle) // sizes.row_tiles
        item = items + (ticket - middle) % sizes.row_tiles
    if outputs.source is None:  # all tickets are match tiles
        if match_tile(rows, inputs, state, sizes, config, sample, item):
            report_matches(inputs, outputs, state, sizes, config, sample)
    elif item < items:
        if match_tile(rows, inputs, state, sizes, config, sample, item):
            if config.drops:
                choose_survivors(rows, inputs, outputs, state, sizes, config, sample)
                arrive(matched_of(state, sample), config)
            elif config.budgeted:
                publish_cut(inputs, state, sizes, config, sample)
    else:
        assemble_tile(rows, inputs, outputs, state, sizes, config, sample, item - items)


ASSEMBLE_LENGTHS = [
    *("images", "features", "slots", "length", "row_tiles"),
    *("image_batch_stride", "image_row_stride", "text_batch_stride", "text_row_stride"),
]


@triton.jit(do_not_specialize=ASSEMBLE_LENGTHS)
def assemble_kernel(
    image,
    text,
    source,
    places,
    embeds,
    images,
    features,
    slots,
    length,
    row_tiles,
    image_batch_stride,
    image_row_stride,
    text_batch_stride,
    text_row_stride,
    config: tl.constexpr,
):
    """Copy the rows of a tile of slots to their places, and zero the padding in a tile of output rows."""
    rows = Rows(image, text, image_batch_stride, image_row_stride, text_batch_stride, text_row_stride, images, features)
    sample = tl.program_id(0) // row_tiles
    sample64 = sample.to(tl.int64)
    index = tl.program_id(0) % row_tiles * config.block_rows + tl.arange(0, config.block_rows)
    to = embeds + sample64 * length * config.hidden
    plane = places + sample64 * 3 * slots + index
    original = tl.load(plane, mask=index < slots, other=-1)
    copy = tl.load(plane + slots, mask=index < slots, other=-1)
    feature = tl.load(plane + 2 * tl.cast(slots, tl.int64), mask=index < slots, other=-1)
    row, exists = slot_rows(rows, config, sample, index, feature)
    copy_rows(row, exists, to, original, copy, True, config)
    padded = tl.load(source + sample64 * length + index, mask=index < length, other=0) < 0
    zero_rows(to + index.to(tl.int64) * config.hidden, padded, config)


TRANSPOSE_LENGTHS = [
    *("batch", "images", "texts", "features", "slots", "row_tiles"),
    *("grad_batch_stride", "grad_row_stride"),
]


@triton.jit(do_not_specialize=TRANSPOSE_LENGTHS)
def transpose_kernel(
    grad,
    places,
    image_grad,
    text_grad,
    batch,
    images,
    texts,
    features,
    slots,
    row_tiles,
    grad_batch_stride,
    grad_row_stride,
    config: tl.constexpr,
):
    """Gather the gradients of a tile of slots from the one or two places of each.

    In the merge form the programs after the last slot zero the features that no placeholder took.
    """
    program = tl.program_id(0)
    if program < batch * row_tiles:
        sample = program // row_tiles
        sample64 = sample.to(tl.int64)
        slot = program % row_tiles * config.block_rows + tl.arange(0, config.block_rows)
        plane = places + sample64 * 3 * slots + slot
        original = tl.load(plane, mask=slot < slots, other=-1)
        copy = tl.load(plane + slots, mask=slot < slots, other=-1)
        feature = tl.load(plane + 2 * tl.cast(slots, tl.int64), mask=slot < slots, other=-1)
        ALIGNMENT: tl.constexpr = config.alignment
        sample_grad = grad + tl.multiple_of(sample64 * grad_batch_stride, ALIGNMENT)
        is_image = feature >= 0
        image_to = image_grad
        text_to = text_grad
        if image_grad is not None:
            image_to = image_grad + feature.to(tl.int64) * config.hidden
        if text_grad is not None:
            text_to = text_grad + (sample64 * texts + slot - images) * config.hidden
        if image_grad is None:
            to = text_to
            chosen = (slot < slots) & (feature < 0)
        elif text_grad is None:
            to = image_to
            chosen = is_image & (feature < features)
        else:
            to = tl.where(is_image, image_to, text_to)
            # The compiler does not see through the choice of a pointer. Both gradients are fresh, rows side by side.
            BYTES: tl.constexpr = config.hidden * image_grad.dtype.element_ty.primitive_bitwidth // 8
            to = tl.multiple_of(to, 16 if BYTES % 16 == 0 else BYTES & -BYTES)
            chosen = (slot < slots) & (feature < features)
        add_copies(sample_grad, grad_row_stride, original, copy, to, chosen, config)
        if config.merges and text_grad is not None:
            zero_rows(text_to, is_image, config)
    elif image_grad is not None:
        used = count_used_features(places, batch, slots)
        spare = tl.num_programs(0) - batch * row_tiles
        first = used + (program - batch * row_tiles) * config.block_rows
        for start in range(first, features, spare * config.block_rows):
            index = start + tl.arange(0, config.block_rows)
            zero_rows(image_grad + index.to(tl.int64) * config.hidden, index < features, config)


@triton.jit
def count_used_features(places, batch, slots):
    """Placeholders of the whole batch: one more than the feature of the last, which is looked for from the end."""
    PART: tl.constexpr = 1024
    used = 0
    left = batch * tl.cdiv(slots, PART)
    while (left > 0) & (used == 0):
        left -= 1
        slot = left % tl.cdiv(slots, PART) * PART + tl.arange(0, PART)
        plane = places + tl.cast(left // tl.cdiv(slots, PART), tl.int64) * 3 * slots + 2 * tl.cast(slots, tl.int64)
        used = tl.max(tl.load(plane + slot, mask=slot < slots, other=-1)) + 1
    return used
