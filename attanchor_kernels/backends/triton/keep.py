"""Keep: which slots stay in the new sequence, chosen by the program that ends the match of a sample.

Every image token that takes part gets a 64-bit rank, made so that the K largest are those that stay:
`class << 62 | orderable bits of its priority << 30 | 30 bits of ~slot`. Hosts of inserted copies are of class 3, the
best of a cell without a host of class 2, all others of class 1; 0 = no candidate. The outcome is a bit for every slot,
and for every 32 slots the number of those before them that stay, so that its readers need no sum over other slots.
"""

import triton
import triton.language as tl

from attanchor_kernels.backends.triton.match import (
    EVERY_BIT,
    count_movers,
    decode_bits,
    decode_index,
    image_candidates,
    kth_largest,
    load_movers,
    order_bits,
)
from attanchor_kernels.backends.triton.slots import (
    GROUPS,
    LANES,
    SCAN,
    count_bits,
    first_feature,
    is_placeholder,
    is_real,
    load_roles,
)
from attanchor_kernels.backends.triton.state import meet
from attanchor_kernels.backends.triton.types import IMAGE, SILENT_IMAGE

SLOT_BITS = tl.constexpr(2**30 - 1)
HOST = tl.constexpr(3 << 62)
BEST_OF_CELL = tl.constexpr(2 << 62)
OTHER = tl.constexpr(1 << 62)


@triton.jit
def load_candidates(inputs, sizes, config: tl.constexpr, sample, start, passed):
    """Of SCAN slots from `start`: which are image tokens that take part, the place of each among the placeholders of
    its sample, and the number of placeholders through the last of them, given `passed` before the first."""
    slot = start + tl.arange(0, SCAN)
    role = load_roles(inputs, sizes, config, sample, tl.where(slot < image_candidates(sizes, config), slot, -1))
    rank = slot
    if config.merges:
        placeholder = is_placeholder(role).to(tl.int32)
        rank = passed + tl.cumsum(placeholder, 0) - placeholder
        passed += tl.sum(placeholder)
    return slot, role == IMAGE, rank, passed


@triton.jit
def choose_survivors(rows, inputs, outputs, state, sizes, config: tl.constexpr, sample):
    """Cut of the budget, relevance, and what stays of a sample whose match work is all done. Run by one program."""
    tl.debug_barrier()
    sample64 = tl.cast(sample, tl.int64)
    among = image_candidates(sizes, config)
    keys = state.keys + sample64 * sizes.movers
    ranks = state.ranks + sample64 * among
    best = state.ranks + (sizes.batch + sample64) * among  # of each cell
    first = sample64 * sizes.images  # of the values that there is one of for each image row
    values = sizes.batch * tl.cast(sizes.images, tl.int64)
    if config.merges:
        first += first_feature(inputs, state, sizes, sample)
        values += rows.features
    keep = sizes.keep
    if inputs.keep_each is not None:
        keep = tl.maximum(tl.load(inputs.keep_each + sample), 0)

    count = 0
    passed = 0
    for start in range(0, among, SCAN):
        slot, candidate, rank, passed = load_candidates(inputs, sizes, config, sample, start, passed)
        inside = slot < among
        if config.image_into_text:
            relevance = (tl.load(keys + rank, mask=candidate, other=0) >> 32).to(tl.uint32)
        else:
            at_relevance = state.relevance + sample64 * among + slot
            relevance = tl.load(at_relevance, mask=inside, other=0)
            tl.store(at_relevance, tl.zeros([SCAN], tl.uint32), mask=inside)  # as the next launch wants it
        tl.store(outputs.relevance + sample64 * among + slot, decode_bits(relevance), mask=inside)
        priority = relevance
        if inputs.salience is not None:
            valued = candidate & (first + rank < values)
            value = tl.load(inputs.salience + first + rank, mask=valued, other=float("-inf"))
            priority = tl.where(value > float("-inf"), order_bits(value), 0)  # false of a NaN too
        own = (priority.to(tl.uint64) << 30) | (~slot & SLOT_BITS).to(tl.uint64) | OTHER
        tl.store(ranks + slot, tl.where(candidate, own, 0), mask=inside)
        if inputs.cells is not None:
            tl.store(best + slot, tl.zeros([SCAN], tl.uint64), mask=inside)
        count += tl.sum(candidate.to(tl.int32))
    meet(config)

    movers = count_movers(inputs, sizes, config, sample)
    budget = sizes.budget
    if not config.image_into_text:
        budget = tl.minimum(budget, keep)
    cut = tl.full([], 0, tl.uint64)
    if budget == 0:
        cut = tl.full([], EVERY_BIT, tl.uint64)
    elif budget < movers:
        cut = kth_largest(keys, movers, budget, sizes.tau, True)
    tl.store(state.cuts + sample, cut)
    if not config.image_into_text:
        for start in range(0, movers, SCAN):
            mover = start + tl.arange(0, SCAN)
            key, inserted = load_movers(keys, mover, mover < movers, cut, sizes, config)
            host = decode_index(key)
            tl.store(ranks + host, tl.load(ranks + host, mask=inserted, other=0) | HOST, mask=inserted)
        meet(config)

    if inputs.cells is not None:
        for again in tl.static_range(2):
            passed = 0
            for start in range(0, among, SCAN):
                slot, candidate, rank, passed = load_candidates(inputs, sizes, config, sample, start, passed)
                valued = candidate & (first + rank < values)
                cell = tl.load(inputs.cells + first + rank, mask=valued, other=-1)
                counted = (cell >= 0) & (cell < among)
                own = tl.load(ranks + slot, mask=counted, other=0)
                if again == 0:
                    tl.atomic_max(best + cell, own, mask=counted, sem="relaxed")
                else:
                    leads = counted & (own == tl.load(best + cell, mask=counted, other=0)) & (own < BEST_OF_CELL)
                    tl.store(ranks + slot, own - OTHER + BEST_OF_CELL, mask=leads)
            meet(config)

    least = tl.full([], 0, tl.uint64)
    if keep == 0:
        least = tl.full([], EVERY_BIT, tl.uint64)
    elif keep < count:
        least = kth_largest(ranks, among, keep, sizes.tau, False)
    publish_survivors(inputs, state, sizes, config, sample, ranks, least)


@triton.jit
def publish_survivors(inputs, state, sizes, config: tl.constexpr, sample, ranks, least):
    """Bits and counts of the slots that stay: image tokens of rank `least` or more, silent rows as they fall, texts.

    A silent row goes with the image tokens since the last slot that is none; without any it stays.
    """
    among = image_candidates(sizes, config)
    words = survivor_words(sizes)
    stay_at = state.survivors + tl.cast(sample, tl.int64) * 2 * words
    chosen_before = 0
    before = 0
    since = 0
    for start in range(0, sizes.slots, SCAN):
        slot = start + tl.arange(0, SCAN)
        role = load_roles(inputs, sizes, config, sample, slot)
        candidate = role == IMAGE
        rank = tl.load(ranks + slot, mask=candidate & (slot < among), other=0)
        chosen = candidate & (rank >= least)
        stays = is_real(role) & (chosen | ~candidate)
        if config.merges:
            earlier = chosen_before + tl.cumsum(chosen.to(tl.int32), 0) - chosen.to(tl.int32)
            starts = load_roles(inputs, sizes, config, sample, slot - 1) != IMAGE
            at_start = tl.where(starts, earlier, since)
            silent = role == SILENT_IMAGE
            if tl.max(silent.to(tl.int32)) > 0:
                stays = stays & (~silent | starts | (earlier > tl.associative_scan(at_start, 0, larger)))
            since = tl.max(at_start)
            chosen_before += tl.sum(chosen.to(tl.int32))
        stays = tl.reshape(stays.to(tl.int32), [GROUPS, LANES])
        word = tl.sum(stays << tl.arange(0, LANES)[None, :], axis=1)
        here = tl.sum(stays, axis=1)
        at = start // LANES + tl.arange(0, GROUPS)
        tl.store(stay_at + at, word, mask=at < words)
        tl.store(stay_at + words + at, before + tl.cumsum(here, 0) - here, mask=at < words)
        before += tl.sum(here)
    tl.store(stay_at + 2 * words - 1, before)


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def survivor_words(sizes):
    """Bits of 32 slots each, and as many counts; the last word has no bits, and the count of all."""
    return tl.cdiv(sizes.slots, LANES) + 1


@triton.jit
def load_survivors(state, sizes, sample, slot):
    """Whether each slot of a block stays, and how many stay before it; nothing for a slot outside the sample."""
    words = survivor_words(sizes)
    inside = (slot >= 0) & (slot < sizes.slots)
    at = state.survivors + tl.cast(sample, tl.int64) * 2 * words + slot // LANES
    word = tl.load(at, mask=inside, other=0)
    before = tl.load(at + words, mask=inside, other=0)
    lane = slot % LANES
    return (word >> lane) & 1 != 0, before + count_bits(word & ~(tl.full(slot.shape, -1, tl.int32) << lane))


@triton.jit
def count_survivors(state, sizes, sample):
    """How many slots of the sample stay."""
    words = survivor_words(sizes)
    return tl.load(state.survivors + tl.cast(sample, tl.int64) * 2 * words + 2 * words - 1)
