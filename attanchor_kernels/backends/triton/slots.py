"""The S slots of a sample: what each one is, how many of a kind there are, where the next ones stand."""

import triton
import triton.language as tl

from attanchor_kernels.backends.triton.state import matched_of, wait
from attanchor_kernels.backends.triton.types import ANCHOR_TEXT, IMAGE, PADDING, SILENT_IMAGE, TEXT

# A scan reads role bytes in blocks of GROUPS x LANES; single slots are then looked up in one group.
LANES = tl.constexpr(32)
GROUPS = tl.constexpr(32)
SCAN = tl.constexpr(1024)
SCAN_BATCH = tl.constexpr(2048)
# Slots before a sample that are not too many for each of its programs to count.
COUNTED = tl.constexpr(8192)


@triton.jit
def load_roles(inputs, sizes, config: tl.constexpr, sample, slot):
    """Role of each slot of a block, int32; PADDING outside [0, S)."""
    inside = (slot >= 0) & (slot < sizes.slots)
    if config.merges:
        return tl.load(inputs.roles + tl.cast(sample, tl.int64) * sizes.slots + slot, mask=inside, other=0).to(tl.int32)
    is_image = slot < sizes.images
    role = tl.where(is_image, IMAGE, ANCHOR_TEXT)
    if inputs.image_mask is not None:
        at = tl.cast(sample, tl.int64) * sizes.images + slot
        kept = tl.load(inputs.image_mask + at, mask=inside & is_image, other=1)
        role = tl.where(kept, role, PADDING)
    at = tl.cast(sample, tl.int64) * sizes.texts + slot - sizes.images
    if inputs.anchor_mask is not None:
        chosen = tl.load(inputs.anchor_mask + at, mask=inside & (slot >= sizes.images), other=1)
        role = tl.where(chosen, role, TEXT)
    if inputs.text_mask is not None:
        kept = tl.load(inputs.text_mask + at, mask=inside & (slot >= sizes.images), other=1)
        role = tl.where(kept, role, PADDING)
    return tl.where(inside, role, PADDING)


@triton.jit
def is_real(role):
    return (role >= TEXT) & (role <= SILENT_IMAGE)


@triton.jit
def is_placeholder(role):
    return (role == IMAGE) | (role == SILENT_IMAGE)


@triton.jit
def is_ranked(role, IMAGES: tl.constexpr):
    """Which slots the merge form counts through: placeholders, or texts that take part in matching."""
    if IMAGES:
        return is_placeholder(role)
    return role == ANCHOR_TEXT


@triton.jit
def count_slots(inputs, sizes, config: tl.constexpr, sample, first):
    """Real slots, placeholders and matched texts before slot `first`, then in the whole sample: six scalars."""
    real_before = tl.zeros([SCAN], tl.int32)
    images_before = tl.zeros([SCAN], tl.int32)
    texts_before = tl.zeros([SCAN], tl.int32)
    real = tl.zeros([SCAN], tl.int32)
    images = tl.zeros([SCAN], tl.int32)
    texts = tl.zeros([SCAN], tl.int32)
    for start in range(0, sizes.slots, SCAN):
        slot = start + tl.arange(0, SCAN)
        role = load_roles(inputs, sizes, config, sample, slot)
        before = slot < first
        real_here = is_real(role)
        real += real_here.to(tl.int32)
        real_before += (real_here & before).to(tl.int32)
        if config.merges:
            images_here = is_placeholder(role)
            texts_here = role == ANCHOR_TEXT
            images += images_here.to(tl.int32)
            images_before += (images_here & before).to(tl.int32)
            texts += texts_here.to(tl.int32)
            texts_before += (texts_here & before).to(tl.int32)
    return (
        tl.sum(real_before),
        tl.sum(images_before),
        tl.sum(texts_before),
        tl.sum(real),
        tl.sum(images),
        tl.sum(texts),
    )


@triton.jit
def load_groups(inputs, sizes, config: tl.constexpr, sample, start):
    """Roles of the SCAN slots from `start`, (GROUPS, LANES)."""
    slot = start + tl.arange(0, GROUPS)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    return load_roles(inputs, sizes, config, sample, slot)


@triton.jit
def count_real_through(inputs, sizes, config: tl.constexpr, sample, slot):
    """For each slot of a block, the real slots up to and with it; 0 for slot -1."""
    # Whole groups first, then the slot's own.
    count = tl.zeros_like(slot)
    for start in range(0, sizes.slots, SCAN):
        in_group = tl.sum(is_real(load_groups(inputs, sizes, config, sample, start)).to(tl.int32), axis=1)
        end = start + tl.arange(0, GROUPS) * LANES + LANES
        count += tl.sum(tl.where(end[None, :] <= slot[:, None] + 1, in_group[None, :], 0), axis=1)
    near = ((slot + 1) // LANES * LANES)[:, None] + tl.arange(0, LANES)[None, :]
    role = load_roles(inputs, sizes, config, sample, near)
    return count + tl.sum((is_real(role) & (near <= slot[:, None])).to(tl.int32), axis=1)


@triton.jit
def first_feature(inputs, state, sizes, sample):
    """Merge form: where the feature rows of a sample begin, for a program that comes after its match tiles."""
    if sample < counted_samples(sizes):
        return count_placeholders(inputs, sizes, 0, sample)
    return tl.load(base_of(state, sample)) - 1


@triton.jit
def first_feature_in_turn(inputs, state, sizes, config: tl.constexpr, sample, publishes):
    """The same for a match tile; one of each sample `publishes` it for a later sample that does not count.

    So many samples later that it is known before it is asked for: were it the next, each would wait for the one before.
    """
    counted = counted_samples(sizes)
    later = sample + counted
    publishes = publishes & (later < sizes.batch)
    between = 0
    if publishes:
        between = count_placeholders(inputs, sizes, sample, later)
    if sample < counted:
        first = count_placeholders(inputs, sizes, 0, sample)
    else:
        wait(base_of(state, sample), 1, config)
        first = tl.load(base_of(state, sample)) - 1
    if publishes:
        tl.atomic_add(base_of(state, later), first + between + 1, sem="release")
    return first


@triton.jit
def counted_samples(sizes):
    """The first ones, whose programs count by themselves."""
    return COUNTED // sizes.slots + 1


@triton.jit
def base_of(state, sample):
    """The word of one more than a sample's first feature."""
    return matched_of(state, sample) + 2


@triton.jit
def count_placeholders(inputs, sizes, first, end):
    """Placeholders of the samples first … end - 1."""
    count = tl.zeros([SCAN_BATCH], tl.int32)
    last = tl.cast(end, tl.int64) * sizes.slots
    for start in range(tl.cast(first, tl.int64) * sizes.slots, last, SCAN_BATCH):
        at = start + tl.arange(0, SCAN_BATCH)
        count += is_placeholder(tl.load(inputs.roles + at, mask=at < last, other=0)).to(tl.int32)
    return tl.sum(count)


@triton.jit
def count_ranked(inputs, sizes, config: tl.constexpr, sample, IMAGES: tl.constexpr):
    """Merge form: how many slots of a kind the sample has."""
    count = tl.zeros([SCAN], tl.int32)
    for start in range(0, sizes.slots, SCAN):
        role = load_roles(inputs, sizes, config, sample, start + tl.arange(0, SCAN))
        count += is_ranked(role, IMAGES).to(tl.int32)
    return tl.sum(count)


@triton.jit
def find_slots(inputs, sizes, config: tl.constexpr, sample, first, IMAGES: tl.constexpr, COUNT: tl.constexpr):
    """Merge form: slots of the ranks first … first + COUNT - 1 of a kind, -1 where there are fewer."""
    wanted = first + tl.arange(0, COUNT)
    found = tl.full([COUNT], -1, tl.int32)
    passed = 0
    for start in range(0, sizes.slots, SCAN):
        kind = is_ranked(load_groups(inputs, sizes, config, sample, start), IMAGES).to(tl.int32)
        in_group = tl.sum(kind, axis=1)
        here = tl.sum(in_group)
        if (passed < first + COUNT) & (passed + here > first):
            inside = (wanted >= passed) & (wanted < passed + here)
            through = passed + tl.cumsum(in_group, 0)
            earlier = through[:, None] <= wanted[None, :]
            group = tl.sum(earlier.to(tl.int32), axis=0)
            skipped = passed + tl.sum(tl.where(earlier, in_group[:, None], 0), axis=0)
            word = tl.sum(kind << tl.arange(0, LANES)[None, :], axis=1)
            own = tl.arange(0, GROUPS)[:, None] == group[None, :]
            lane = nth_bit(tl.sum(tl.where(own, word[:, None], 0), axis=0), wanted - skipped)
            found = tl.where(inside, start + group * LANES + lane, found)
        passed += here
    return found


@triton.jit
def nth_bit(word, place):
    """Where the set bit stands that so many lower ones precede, for each int32; halved until one is left."""
    lane = tl.zeros_like(word)
    for step in tl.static_range(5):
        lower = count_bits((word >> lane) & ((1 << (16 >> step)) - 1))
        beyond = place >= lower
        lane += tl.where(beyond, 16 >> step, 0)
        place -= tl.where(beyond, lower, 0)
    return lane


@triton.jit
def count_bits(word):
    """Set bits of each int32."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word += word >> 8  # a multiplication would overflow, which is an error where TRITON_DEBUG=1
    word += word >> 16
    return (word & 63).to(tl.int32)
