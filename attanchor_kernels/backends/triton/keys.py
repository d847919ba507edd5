"""One 64-bit word per mover: best cosine above, host below, made so that the unsigned maximum is the answer.

`orderable float bits << 32 | ~host`: the larger cosine wins, of equal ones the lower host; 0 = no candidate yet. The
order of arrival does not matter, so an atomic maximum merges the tiles repeatably.
"""

import triton
import triton.language as tl

LOW_WORD = tl.constexpr(0xFFFFFFFF)
SIGN = tl.constexpr(-(2**31))


@triton.jit
def encode(score, index):
    """Key of a finite score and an index >= 0."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)  # -0.0 + 0.0 is 0.0: equal scores must have equal bits
    ordered = tl.where(bits < 0, ~bits, bits ^ SIGN)
    low = (~index).to(tl.uint32, bitcast=True)
    return (ordered.to(tl.uint32, bitcast=True).to(tl.uint64) << 32) | low.to(tl.uint64)


@triton.jit
def decode_score(key):
    """The score of a key, -inf for an empty one."""
    ordered = (key >> 32).to(tl.uint32).to(tl.int32, bitcast=True)
    bits = tl.where(ordered < 0, ordered ^ SIGN, ~ordered)
    return tl.where(key == 0, float("-inf"), bits.to(tl.float32, bitcast=True))


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
def cut_by_search(keys, movers, budget, tau):
    """The same for any number of movers: the largest word that at least `budget` rank keys reach, bit by bit."""
    PART: tl.constexpr = 2048
    held = load_rank_keys(keys, 0, movers, tau, PART)
    cut = tl.zeros([1], tl.uint64)
    for step in range(64):
        trial = cut | (tl.full([1], 1, tl.uint64) << tl.cast(63 - step, tl.uint64))
        reached = (held >= trial).to(tl.int32)
        for start in range(PART, movers, PART):
            reached += (load_rank_keys(keys, start, movers, tau, PART) >= trial).to(tl.int32)
        cut = tl.where(tl.sum(reached) >= budget, trial, cut)
    return tl.max(cut)
