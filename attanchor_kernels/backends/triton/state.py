"""What programs tell each other: zeroed words, and how to arrive at a counter and to wait for one."""

import torch
import triton
import triton.language as tl

from attanchor_kernels.backends.common import allocator
from attanchor_kernels.backends.triton.types import State
from attanchor_kernels.backends.workspace import zeroed

# Polls, a microsecond or more each, until a launch is taken to hang; checked with TRITON_DEBUG=1 alone.
PATIENCE = tl.constexpr(2**24)
# A cache line for the ticket and for the counters of each sample, so that who polls one does not hold up the others.
LINE = tl.constexpr(32)


class States:
    """State for launches of one shape: how many zeroed words each needs, and of scratch that need not be zero."""

    def __init__(
        self,
        device: torch.device,
        batch: int,
        movers: int,
        ring: int,
        scratch: int,
        relevances: int = 0,
        ranks: int = 0,
        survivors: int = 0,
    ) -> None:
        self.device, self.has_relevance = device, relevances > 0
        self.scratch = (scratch, torch.float32), (ranks, torch.uint64), (survivors, torch.int32)
        # Every part begins on 16 bytes: an unaligned pointer would be one more kernel to compile.
        words = LINE.value // 2 * (1 + batch) + -(-ring // 2), batch * movers, batch, -(-relevances // 2)
        self.lengths = [length + length % 2 for length in words]
        self.count = sum(self.lengths)
        self.views: tuple[torch.Tensor | None, tuple[torch.Tensor | None, ...]] = None, ()

    def take(self) -> State:
        """State for one launch on the current stream."""
        words = zeroed(self.device, self.count)
        known, views = self.views  # once for all launches on a stream, whose words are mostly the same
        if known is not words:
            counters, keys, cuts, relevance = words[: self.count].split(self.lengths)
            views = keys.view(torch.uint64), cuts.view(torch.uint64), counters.view(torch.int32)
            views = *views, relevance.view(torch.uint32) if self.has_relevance else None
            self.views = words, views
        empty = allocator(self.device)
        return State(*views, *[empty((count,), (1,), dtype) if count else None for count, dtype in self.scratch])


@triton.jit
def matched_of(state, sample):
    """The counter of a sample's finished match work; behind it those who have left, and the base."""
    return state.counters + (1 + sample) * LINE


@triton.jit
def arrive(counter, config: tl.constexpr):
    """Add one, after everything that the program's threads have read and written so far; returns the count before."""
    meet(config)
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def meet(config: tl.constexpr):
    """The program's threads see what every one of them has written so far."""
    if config.amd == "gfx9":
        drain()
    tl.debug_barrier()


@triton.jit
def wait(counter, count, config: tl.constexpr):
    """Until `counter` has reached `count`; then what was written before is visible to every thread."""
    if config.amd == "":  # there Triton 3.6 takes a volatile load out of the loop
        polls = 0
        while tl.load(counter, volatile=True) < count:
            pause()
            polls += 1
            tl.device_assert(polls < PATIENCE, "a program waited in vain for others of its launch")
    # Compiled to a load that acquires, once. Its result must be used, or Triton 3.6 drops it, acquire and all.
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


@triton.jit
def pause():
    """NVIDIA: a moment in which arrivals at a counter are not held up by those who poll it."""
    tl.inline_asm_elementwise(
        "nanosleep.u32 64;\nmov.u32 $0, $1;", "=r,r", [tl.full([], 0, tl.int32)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def drain():
    """AMD's CDNA: until what this wavefront has read and written has arrived.

    There a barrier of the workgroup does not wait for memory, and the release that follows it waits only for what its
    own wavefront has under way.
    """
    tl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)\nv_mov_b32 $0, $1",
        "=v,v",
        [tl.full([], 0, tl.int32)],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
