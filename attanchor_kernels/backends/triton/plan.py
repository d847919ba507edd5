"""Assemble: the places of a tile of slots from the keys of all movers, every field of the plan, and the copy.

With `first` the row where the sequence begins,

    place of a slot             = first + real slots before it        + inserted movers with a host before it
    place of an inserted mover  = first + real slots through its host + inserted movers before it by (host, mover)

where dropped slots do not count, so no program needs more than the movers' keys (and, of what stays, `keep.py`), and
none needs a sum over other programs' results. Tile t writes the rows of its slots, wherever they go, and the t-th
stretch of the padding.
"""

import triton
import triton.language as tl

from attanchor_kernels.backends.triton.copy import copy_rows, slot_rows, zero_rows
from attanchor_kernels.backends.triton.keep import count_survivors, load_survivors
from attanchor_kernels.backends.triton.match import (
    RANKED_MOVERS,
    arrivals,
    cut_by_ranking,
    decode_index,
    decode_score,
    load_movers,
)
from attanchor_kernels.backends.triton.slots import (
    base_of,
    count_real_through,
    count_slots,
    first_feature,
    is_placeholder,
    is_real,
    load_roles,
)
from attanchor_kernels.backends.triton.state import arrive, matched_of, wait
from attanchor_kernels.backends.triton.types import ANCHOR_TEXT, IMAGE

MOVER_BLOCK = tl.constexpr(64)


@triton.jit
def host_slot(key, sizes, config: tl.constexpr):
    """The slot of the host in a key: in the build form keys hold the index among the hosts."""
    if config.image_into_text and not config.merges:
        return decode_index(key) + sizes.images
    return decode_index(key)


@triton.jit
def assemble_tile(rows, inputs, outputs, state, sizes, config: tl.constexpr, sample, tile):
    """Places, fields and copies of one tile, after all match work of the sample."""
    R: tl.constexpr = config.block_rows
    sample64 = tl.cast(sample, tl.int64)
    slot = tile * R + tl.arange(0, R)
    role = load_roles(inputs, sizes, config, sample, slot)
    real = is_real(role)
    real_before, images_before, texts_before, real_count, images, texts = count_slots(
        inputs, sizes, config, sample, tile * R
    )
    real_before += tl.cumsum(real.to(tl.int32), 0) - real.to(tl.int32)
    if config.merges:
        placeholder = is_placeholder(role)
        image_rank = images_before + tl.cumsum(placeholder.to(tl.int32), 0) - placeholder.to(tl.int32)
        if config.image_into_text:
            mover = image_rank
            moves = role == IMAGE
            movers = images
        else:
            matched_text = role == ANCHOR_TEXT
            mover = texts_before + tl.cumsum(matched_text.to(tl.int32), 0) - matched_text.to(tl.int32)
            moves = matched_text
            movers = texts
        reports = slot < sizes.slots
        report = slot
    else:
        feature = tl.where(slot < sizes.images, sample * sizes.images + slot, -1)
        movers = sizes.movers
        mover = slot if config.image_into_text else slot - sizes.images
        moves = (mover >= 0) & (mover < movers)
        reports = moves
        report = mover

    matched = matched_of(state, sample)
    wait(matched, arrivals(sizes, config, movers), config)
    if config.merges:
        feature = tl.where(placeholder, first_feature(inputs, state, sizes, sample) + image_rank, -1)
    keys = state.keys + sample64 * sizes.movers
    cut = tl.full([], 0, tl.uint64)
    if config.budgeted and config.drops:
        cut = tl.load(state.cuts + sample)
    elif config.budgeted:
        if movers <= RANKED_MOVERS:
            cut = cut_by_ranking(keys, movers, sizes.budget, sizes.tau, RANKED_MOVERS)
        else:
            cut = tl.load(state.cuts + sample)

    key, inserted = load_movers(keys, mover, moves, cut, sizes, config)
    host = host_slot(key, sizes, config)
    insertions = tl.zeros([MOVER_BLOCK], tl.int32)
    hosted_before = tl.zeros([R], tl.int32)
    ordered_before = tl.zeros([R], tl.int32)
    for start in range(0, movers, MOVER_BLOCK):
        other = start + tl.arange(0, MOVER_BLOCK)
        other_key, other_inserted = load_movers(keys, other, other < movers, cut, sizes, config)
        other_host = host_slot(other_key, sizes, config)
        insertions += other_inserted.to(tl.int32)
        hosted = other_inserted[None, :] & (other_host[None, :] < slot[:, None])
        hosted_before += tl.sum(hosted.to(tl.int32), axis=1)
        ordered = (other_host[None, :] < host[:, None]) | (
            (other_host[None, :] == host[:, None]) & (other[None, :] < mover[:, None])
        )
        ordered_before += tl.sum((other_inserted[None, :] & ordered).to(tl.int32), axis=1)
    stays, stay_before, stay_count = real, real_before, real_count
    if config.drops:
        stays, stay_before = load_survivors(state, sizes, sample, slot)
        stay_count = count_survivors(state, sizes, sample)
    length = stay_count + tl.sum(insertions)
    first = 0
    if config.pad_left:
        first = sizes.capacity - length

    # The keys have been read: the last tile of the sample puts everything back to zero for the next launch.
    left = matched + 1
    if arrive(left, config) == sizes.row_tiles - 1:
        tl.debug_barrier()
        for start in range(0, movers, 1024):
            at = start + tl.arange(0, 1024)
            tl.store(keys + at, tl.zeros([1024], tl.uint64), mask=at < movers)
        tl.store(left, 0)
        tl.store(matched, 0)
        if config.merges:
            tl.store(base_of(state, sample), 0)
        if config.budgeted:
            tl.store(state.cuts + sample, tl.full([], 0, tl.uint64))

    host_real = tl.zeros([R], tl.int32)
    host_stay = host_real
    if tl.max(inserted.to(tl.int32)) > 0:
        seat = tl.where(inserted, host, -1)
        if not config.drops or config.inherit:
            host_real = count_real_through(inputs, sizes, config, sample, seat)
        host_stay = host_real
        if config.drops:
            host_stays, host_before = load_survivors(state, sizes, sample, seat)
            host_stay = host_before + host_stays.to(tl.int32)
    original = tl.where(stays, first + stay_before + hosted_before, -1)
    copy = tl.where(inserted, first + host_stay + ordered_before, -1)

    position = original - first
    copy_position = copy - first
    if config.inherit:
        position = real_before
        copy_position = host_real - 1
    write_fields(inputs, outputs, sizes, config, sample, original, stays, slot, slot, position, False)
    write_fields(inputs, outputs, sizes, config, sample, copy, inserted, slot, host, copy_position, True)

    padding = tile * R + tl.arange(0, R)
    padded = padding < sizes.capacity - length
    if not config.pad_left:
        padding += length
    write_padding(outputs, sizes, sample, padding, padded)

    reported_host = host - sizes.images if config.image_into_text and not config.merges else host
    at = sample64 * (sizes.slots if config.merges else sizes.movers) + report
    tl.store(outputs.host + at, tl.where(inserted, reported_host, -1).to(tl.int64), mask=reports)
    tl.store(outputs.score + at, decode_score(key), mask=reports)
    places = outputs.places + sample64 * 3 * sizes.slots + slot
    tl.store(places, original, mask=slot < sizes.slots)
    tl.store(places + sizes.slots, copy, mask=slot < sizes.slots)
    tl.store(places + 2 * tl.cast(sizes.slots, tl.int64), feature, mask=slot < sizes.slots)

    if outputs.embeds is not None:
        row, exists = slot_rows(rows, config, sample, slot, feature)
        embeds = outputs.embeds + sample64 * sizes.capacity * config.hidden
        copy_rows(row, exists, embeds, original, copy, config.drops, config)
        at_padding = embeds + padding.to(tl.int64) * config.hidden
        zero_rows(at_padding, padded, config)


@triton.jit
def write_fields(
    inputs, outputs, sizes, config: tl.constexpr, sample, place, chosen, slot, seat, position, IS_ANCHOR: tl.constexpr
):
    """Fields of the chosen rows, which copy `slot`. `position` is overruled by the given id of `seat`, if any is."""
    sample64 = tl.cast(sample, tl.int64)
    at = sample64 * sizes.capacity + place
    tl.store(outputs.attention_mask + at, tl.full(place.shape, 1, tl.int64), mask=chosen)
    tl.store(outputs.source + at, slot.to(tl.int64), mask=chosen)
    tl.store(outputs.is_anchor + at, tl.full(place.shape, IS_ANCHOR, tl.uint8), mask=chosen)
    if inputs.position_ids is not None:
        for axis in range(0, sizes.axes):
            plane = axis * tl.cast(sizes.batch, tl.int64) + sample64
            given = tl.load(inputs.position_ids + plane * sizes.slots + seat, mask=chosen, other=0)
            tl.store(outputs.position_ids + plane * sizes.capacity + place, given, mask=chosen)
    else:
        tl.store(outputs.position_ids + at, position.to(tl.int64), mask=chosen)


@triton.jit
def write_padding(outputs, sizes, sample, place, chosen):
    """Fields of padding."""
    sample64 = tl.cast(sample, tl.int64)
    at = sample64 * sizes.capacity + place
    zero = tl.zeros(place.shape, tl.int64)
    tl.store(outputs.attention_mask + at, zero, mask=chosen)
    tl.store(outputs.source + at, zero - 1, mask=chosen)
    tl.store(outputs.is_anchor + at, zero.to(tl.uint8), mask=chosen)
    for axis in range(0, sizes.axes):
        plane = axis * tl.cast(sizes.batch, tl.int64) + sample64
        tl.store(outputs.position_ids + plane * sizes.capacity + place, zero, mask=chosen)
