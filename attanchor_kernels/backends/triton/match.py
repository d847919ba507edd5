"""Match: a tile of image rows against all texts of its sample, one 64-bit maximum per mover.

Image rows are the tile and texts the inner loop in both directions; only the axis of the reduction differs.

One 64-bit key per mover holds its best cosine above, its host below, made so that the unsigned maximum is the answer:
`orderable float bits << 32 | ~host`. The larger cosine wins, of equal ones the lower host; 0 = no candidate yet. The
order of arrival does not matter, so an atomic maximum merges the tiles repeatably.
"""

import triton
import triton.language as tl

from attanchor_kernels.backends.triton.copy import image_rows, text_rows, widen
from attanchor_kernels.backends.triton.slots import (
    SCAN,
    base_of,
    count_ranked,
    find_slots,
    first_feature_in_turn,
    is_ranked,
    load_roles,
)
from attanchor_kernels.backends.triton.state import arrive, matched_of, wait
from attanchor_kernels.backends.triton.types import ANCHOR_TEXT, IMAGE

# Up to so many movers are ranked against each other by everyone who needs to know; above, one program finds the cut.
RANKED_MOVERS = tl.constexpr(128)
NORM_FLOOR = tl.constexpr(1e-12)
NO_INDEX = tl.constexpr(2**31 - 1)
LOW_WORD = tl.constexpr(0xFFFFFFFF)
SIGN = tl.constexpr(-(2**31))
EVERY_BIT = tl.constexpr(2**64 - 1)  # no key is so large


@triton.jit
def order_bits(score):
    """uint32 in the order of the scores, none of which is NaN; above 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0: equal scores must have equal bits
    return tl.where(bits < 0, ~bits, bits ^ SIGN).to(tl.uint32, bitcast=True)


@triton.jit
def encode(score, index):
    """Key of a finite score and an index >= 0."""
    high = order_bits(score)
    low = (~index).to(tl.uint32, bitcast=True)
    return (high.to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def decode_bits(ordered):
    """The score of `order_bits`, -inf for 0."""
    bits = ordered.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ SIGN, ~bits)
    return tl.where(ordered == 0, float("-inf"), bits.to(tl.float32, bitcast=True))


@triton.jit
def decode_score(key):
    """The score of a key, -inf for an empty one."""
    return decode_bits((key >> 32).to(tl.uint32))


@triton.jit
def decode_index(key):
    """The index of a key, -1 for an empty one."""
    return ~(key & LOW_WORD).to(tl.uint32).to(tl.int32, bitcast=True)


@triton.jit
def rank_keys(key, mover, tau):
    """Keys that order the movers for the budget: larger score first, of equal ones the lower mover; 0 = below tau."""
    low = (~mover).to(tl.uint32, bitcast=True).to(tl.uint64)
    return tl.where(decode_score(key) >= tau, (key >> 32 << 32) | low, 0)


@triton.jit
def load_movers(keys, mover, chosen, cut, sizes, config: tl.constexpr):
    """Keys of movers, and which of them are inserted."""
    key = tl.load(keys + mover, mask=chosen, other=0)
    inserted = decode_score(key) >= sizes.tau
    if config.budgeted:
        inserted = inserted & (rank_keys(key, mover, sizes.tau) >= cut)
    return key, inserted & (key != 0)


@triton.jit
def load_rank_keys(keys, first, movers, tau, BLOCK: tl.constexpr):
    """Rank keys of the movers first … first + BLOCK - 1 of a sample whose keys start at `keys`."""
    mover = first + tl.arange(0, BLOCK)
    return rank_keys(tl.load(keys + mover, mask=mover < movers, other=0), mover, tau)


@triton.jit
def cut_by_ranking(keys, movers, budget, tau, MOVERS: tl.constexpr):
    """Rank key of the last mover within a budget of 1 or more, 0 if all are; for at most MOVERS movers."""
    PART: tl.constexpr = 16
    key = load_rank_keys(keys, 0, movers, tau, MOVERS)
    rank = tl.zeros([MOVERS], tl.int32)
    for start in range(0, movers, PART):
        other = load_rank_keys(keys, start, movers, tau, PART)
        rank += tl.sum((other[None, :] > key[:, None]).to(tl.int32), axis=1)
    return tl.max(tl.where(rank == budget - 1, key, 0))


@triton.jit
def kth_largest(words, count, place, tau, RANKED: tl.constexpr):
    """The word at a place of 1 or more among the largest of `count` different ones, 0 if there are fewer; RANKED: of
    the rank keys of movers. Digit by digit from above, each chosen by counting."""
    PART: tl.constexpr = 1024
    DIGITS: tl.constexpr = 256
    digit = tl.arange(0, DIGITS)
    found = tl.full([], 0, tl.uint64)
    for step in range(8):
        shift = tl.cast(56 - 8 * step, tl.uint64)
        counts = tl.zeros([DIGITS], tl.int32)
        for start in range(0, count, PART):
            if RANKED:
                word = load_rank_keys(words, start, count, tau, PART)
            else:
                at = start + tl.arange(0, PART)
                word = tl.load(words + at, mask=at < count, other=0)
            begins = (word != 0) & (word >> shift >> 8 == found)
            counts += tl.histogram((word >> shift & 255).to(tl.int32), DIGITS, mask=begins)
        above = tl.sum(counts) - tl.cumsum(counts, 0)
        here = (above < place) & (above + counts >= place)
        found = found << 8 | tl.max(tl.where(here, digit, 0)).to(tl.uint64)
        place -= tl.max(tl.where(here, above, 0))
    return found


@triton.jit
def multiply(image_row, image_kept, text_row, text_kept, first_slice, end_slice, sizes, config: tl.constexpr):
    """Products and squared norms of a block of image rows and a block of text rows over some slices of the columns.

    Every slice has a fresh accumulator and slices are added in order: this bounds the error of tensor cores at large D,
    and gives the same sum to the bit whether one program or several compute the slices.
    """
    M: tl.constexpr = config.block_images
    N: tl.constexpr = config.block_texts
    K: tl.constexpr = config.block_hidden
    HIDDEN: tl.constexpr = config.hidden
    LANE: tl.constexpr = 128 // image_row.dtype.element_ty.primitive_bitwidth  # elements that one thread loads at once
    product = tl.zeros([M, N], tl.float32)
    image_square = tl.zeros([M], tl.float32)
    text_square = tl.zeros([N], tl.float32)
    for part in range(first_slice, end_slice):
        dot = tl.zeros([M, N], tl.float32)
        image_part = tl.zeros([M, K // LANE], tl.float32)
        text_part = tl.zeros([N, K // LANE], tl.float32)
        first = part * slice_blocks(sizes, config) * K
        for start in range(first, min(first + slice_blocks(sizes, config) * K, HIDDEN), K):
            column = start + tl.arange(0, K)
            image_mask = image_kept[:, None]
            text_mask = text_kept[:, None]
            if HIDDEN % K != 0:
                image_mask = image_mask & (column < HIDDEN)[None, :]
                text_mask = text_mask & (column < HIDDEN)[None, :]
            image = tl.load(
                image_row[:, None] + column[None, :], mask=image_mask, other=0.0, eviction_policy="evict_last"
            )
            text = tl.load(text_row[:, None] + column[None, :], mask=text_mask, other=0.0, eviction_policy="evict_last")
            if config.interpreted:  # on a GPU this would cost the tensor cores
                image = widen(image, True)
                text = widen(text, True)
            dot = tl.dot(image, tl.trans(text), dot, input_precision="ieee")
            image_part += sum_squares(image, LANE)
            text_part += sum_squares(text, LANE)
        product += dot
        image_square += tl.sum(image_part, axis=1)
        text_square += tl.sum(text_part, axis=1)
    return product, image_square, text_square


@triton.jit
def sum_squares(rows, LANE: tl.constexpr):
    """For each row, sums over every LANE columns: what a thread holds, so that no sum crosses threads in a loop."""
    rows = rows.to(tl.float32)
    return tl.sum(tl.reshape(rows * rows, [rows.shape[0], rows.shape[1] // LANE, LANE]), axis=2)


@triton.jit
def slice_count(sizes, config: tl.constexpr):
    """Slices of the columns: how many programs share them is no reason to compile anew."""
    return sizes.slices if config.split else config.slices


@triton.jit
def slice_blocks(sizes, config: tl.constexpr):
    """Blocks of columns in a slice."""
    return sizes.slice_blocks if config.split else config.slice_blocks


@triton.jit
def store_partial(at, product, image_square, text_square, config: tl.constexpr):
    M: tl.constexpr = config.block_images
    N: tl.constexpr = config.block_texts
    i = tl.arange(0, M)
    t = tl.arange(0, N)
    tl.store(at + i[:, None] * N + t[None, :], product)
    tl.store(at + M * N + i, image_square)
    tl.store(at + M * N + M + t, text_square)


@triton.jit
def add_partials(at, sizes, config: tl.constexpr):
    """The sum over slices in their order, as `multiply` adds them."""
    M: tl.constexpr = config.block_images
    N: tl.constexpr = config.block_texts
    i = tl.arange(0, M)
    t = tl.arange(0, N)
    product = tl.zeros([M, N], tl.float32)
    image_square = tl.zeros([M], tl.float32)
    text_square = tl.zeros([N], tl.float32)
    for _ in range(sizes.slices):
        product += tl.load(at + i[:, None] * N + t[None, :], cache_modifier=".cg")
        image_square += tl.load(at + M * N + i, cache_modifier=".cg")
        text_square += tl.load(at + M * N + M + t, cache_modifier=".cg")
        at += partial_size(config)
    return product, image_square, text_square


@triton.jit
def partial_size(config: tl.constexpr):
    return config.block_images * config.block_texts + config.block_images + config.block_texts


@triton.jit
def publish(
    keys,
    relevance,
    product,
    image_square,
    text_square,
    allowed,
    image,
    text,
    config: tl.constexpr,
):
    """Cosines of a block, and the best host of each of its movers to `keys`; if images drop, their best cosines to
    `relevance`. `image` and `text` are the index of each row: a mover's as `keys` counts them, a host's as `host`
    reports it."""
    INFINITY: tl.constexpr = float("inf")
    # Rows whose squared norm is not finite (a NaN compares false) neither move nor host.
    image_kept = image_square < INFINITY
    text_kept = text_square < INFINITY
    image_scale = 1.0 / tl.maximum(tl.sqrt(image_square), NORM_FLOOR)
    text_scale = 1.0 / tl.maximum(tl.sqrt(text_square), NORM_FLOOR)
    cosine = product * image_scale[:, None] * text_scale[None, :]
    cosine = tl.where(image_kept[:, None] & text_kept[None, :] & allowed, cosine, float("-inf"))
    if config.image_into_text:
        best = tl.max(cosine, axis=1)
        host = tl.min(tl.where(cosine == best[:, None], text[None, :], NO_INDEX), axis=1)
        tl.atomic_max(keys + image, encode(best, host), mask=best > float("-inf"), sem="relaxed")
    else:
        best = tl.max(cosine, axis=0)
        host = tl.min(tl.where(cosine == best[None, :], image[:, None], NO_INDEX), axis=0)
        tl.atomic_max(keys + text, encode(best, host), mask=best > float("-inf"), sem="relaxed")
        if config.drops:
            best = tl.max(cosine, axis=1)
            tl.atomic_max(relevance + image, order_bits(best), mask=best > float("-inf"), sem="relaxed")


@triton.jit
def match_tile(rows, inputs, state, sizes, config: tl.constexpr, sample, item):
    """Match one tile of image rows or, if tiles are split, a slice of its columns.

    Waits, if ever, for a tile of earlier tickets. Returns whether this was the last match work of the sample.
    """
    M: tl.constexpr = config.block_images
    N: tl.constexpr = config.block_texts
    sample64 = tl.cast(sample, tl.int64)
    tile = item // sizes.slices if config.split else item
    part = item % sizes.slices if config.split else 0
    image_rank = tile * M + tl.arange(0, M)
    if config.merges:
        image_slot = find_slots(inputs, sizes, config, sample, tile * M, True, M)
        first = first_feature_in_turn(inputs, state, sizes, config, sample, item == 0)
        index = first + image_rank
        index = tl.where(load_roles(inputs, sizes, config, sample, image_slot) == IMAGE, index, -1)
        index = tl.where(index < rows.features, index, -1)
        texts = tl.where(tl.max(index) >= 0, count_ranked(inputs, sizes, config, sample, False), 0)
    else:
        image_slot = image_rank
        index = tl.where(image_rank < sizes.images, image_rank, -1)
        index = tl.where(load_roles(inputs, sizes, config, sample, index) == IMAGE, index, -1)
        texts = sizes.texts

    LEAST: tl.constexpr = 1 if config.split else 0  # with nothing to do, a tile still passes its place in the ring on
    for block in tl.range(0, tl.maximum(tl.cdiv(texts, N), LEAST), disable_licm=True):
        image_kept = index >= 0
        image_row = image_rows(rows, config, sample, index)
        text_rank = block * N + tl.arange(0, N)
        if config.merges:
            text_slot = find_slots(inputs, sizes, config, sample, block * N, False, N)
            text_kept = text_slot >= 0
            text_row = text_rows(rows, config, sample, text_slot)
        else:
            text_slot = sizes.images + text_rank
            text_kept = load_roles(inputs, sizes, config, sample, text_slot) == ANCHOR_TEXT
            text_row = text_rows(rows, config, sample, text_rank)

        # Split tiles: block 0 is shared slice by slice, of the other blocks each program takes its own.
        first_slice = 0
        end_slice = slice_count(sizes, config)
        complete = True
        if config.split:
            mine = block % sizes.slices == part
            first_slice = tl.where(block == 0, part, 0)
            end_slice = tl.where(block == 0, part + 1, tl.where(mine, sizes.slices, 0))
            complete = tl.cast(mine & (block > 0), tl.int1)
        product, image_square, text_square = multiply(
            image_row, image_kept, text_row, text_kept, first_slice, end_slice, sizes, config
        )
        # Beyond here a row that takes no part is known by its norm: less is held through the loop over columns.
        image_square = tl.where(image_kept, image_square, float("inf"))
        text_square = tl.where(text_kept, text_square, float("inf"))
        if config.split:  # noqa: SIM102  a compile-time choice, then a run-time one
            if block == 0:
                # Partial sums are in a ring of tiles, so that it stays in L2. Each tile counts its place on by its
                # slices and by one when they have been added; the next tile there waits for that.
                unit = (sample * sizes.match_items + item) // sizes.slices
                place = unit % sizes.ring
                at = state.scratch + tl.cast(place, tl.int64) * sizes.slices * partial_size(config)
                parts = matched_of(state, sizes.batch) + place
                before = unit // sizes.ring * (sizes.slices + 1)
                if before > 0:
                    wait(parts, before, config)
                store_partial(at + part * partial_size(config), product, image_square, text_square, config)
                if arrive(parts, config) == before + sizes.slices - 1:
                    tl.debug_barrier()
                    product, image_square, text_square = add_partials(at, sizes, config)
                    if (unit + sizes.ring) * sizes.slices < sizes.batch * sizes.match_items:
                        arrive(parts, config)
                    else:
                        tl.store(parts, 0)
                    complete = tl.full([], True, tl.int1)
        if complete:
            allowed = tl.full([M, N], True, tl.int1)
            if inputs.turn is not None:
                turn = inputs.turn + sample64 * sizes.slots
                image_turn = tl.load(turn + image_slot, mask=image_slot >= 0, other=0)
                text_turn = tl.load(turn + text_slot, mask=text_slot >= 0, other=0)
                if config.image_into_text:
                    allowed = text_turn[None, :] >= image_turn[:, None]
                else:
                    allowed = image_turn[:, None] >= text_turn[None, :]
            if config.image_into_text:
                image_index = image_rank
                text_index = text_slot if config.merges else text_rank
            else:
                image_index = image_slot
                text_index = text_rank
            keys = state.keys + sample64 * sizes.movers
            relevance = state.relevance
            if config.drops and not config.image_into_text:
                relevance += sample64 * image_candidates(sizes, config)
            publish(
                keys,
                relevance,
                product,
                image_square,
                text_square,
                allowed,
                image_index,
                text_index,
                config,
            )

    return arrive(matched_of(state, sample), config) == sizes.match_items - 1


@triton.jit
def publish_cut(inputs, state, sizes, config: tl.constexpr, sample):
    """Where movers are many, find the cut of the budget of a sample whose match work is all done, for its readers."""
    movers = count_movers(inputs, sizes, config, sample)
    if movers > RANKED_MOVERS:
        tl.debug_barrier()
        keys = state.keys + tl.cast(sample, tl.int64) * sizes.movers
        tl.store(state.cuts + sample, kth_largest(keys, movers, sizes.budget, sizes.tau, True))
        tl.debug_barrier()
        tl.atomic_add(matched_of(state, sample), 1, sem="release")


@triton.jit
def report_matches(inputs, outputs, state, sizes, config: tl.constexpr, sample):
    """Score and host of every mover of a sample whose match work is all done, and its state back to zero."""
    tl.debug_barrier()
    keys = state.keys + tl.cast(sample, tl.int64) * sizes.movers
    reports = tl.cast(sample, tl.int64) * sizes.movers
    passed = 0
    for start in range(0, sizes.movers, SCAN):
        at = start + tl.arange(0, SCAN)
        mover = at
        moves = at < sizes.movers
        if config.merges:  # keys are counted by rank, reports by slot
            ranked = is_ranked(load_roles(inputs, sizes, config, sample, at), config.image_into_text).to(tl.int32)
            mover = passed + tl.cumsum(ranked, 0) - ranked
            moves = ranked > 0
            passed += tl.sum(ranked)
        key = tl.load(keys + mover, mask=moves, other=0)
        tl.store(outputs.host + reports + at, decode_index(key).to(tl.int64), mask=at < sizes.movers)
        tl.store(outputs.score + reports + at, decode_score(key), mask=at < sizes.movers)
        tl.store(keys + mover, tl.zeros([SCAN], tl.uint64), mask=moves)  # read by no one else
    tl.store(matched_of(state, sample), 0)
    if config.merges:
        tl.store(base_of(state, sample), 0)


@triton.jit
def count_movers(inputs, sizes, config: tl.constexpr, sample):
    """How many keys the sample uses."""
    if config.merges:
        return count_ranked(inputs, sizes, config, sample, config.image_into_text)
    return sizes.movers


@triton.jit
def image_candidates(sizes, config: tl.constexpr):
    """Slots of a sample among which its image tokens are: the first ones."""
    return sizes.slots if config.merges else sizes.images


@triton.jit
def arrivals(sizes, config: tl.constexpr, movers):
    """What `matched` counts to before a sample may be assembled."""
    count = sizes.match_items
    if config.drops:
        count += 1
    elif config.budgeted:
        count += (movers > RANKED_MOVERS).to(tl.int32)
    return count
