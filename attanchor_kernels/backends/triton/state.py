"""What programs tell each other: zeroed words, and how to arrive at a counter and to wait for one."""

import torch
import triton
import triton.language as tl

from attanchor_kernels.backends.triton.types import State
from attanchor_kernels.backends.workspace import zeroed


def allocate(device: torch.device, batch: int, movers: int, tiles: int, scratch: int) -> State:
    """Zeroed state for one launch on the current stream of `device`, and `scratch` float32 that need not be zero."""
    # Every part begins on 16 bytes: an unaligned pointer would be one more kernel to compile.
    keys = _even(batch * movers)
    cuts = _even(batch)
    counters = _even(-(-(1 + 2 * batch + batch * tiles) // 2))
    words = zeroed(device, keys + cuts + counters)
    return State(
        keys=words[:keys].view(torch.uint64),
        cuts=words[keys : keys + cuts].view(torch.uint64),
        counters=words[keys + cuts :].view(torch.int32),
        scratch=torch.empty(scratch, dtype=torch.float32, device=device) if scratch else None,
    )


def _even(count: int) -> int:
    return count + count % 2


@triton.jit
def arrive(counter, config: tl.constexpr):
    """Add one, after everything that the program's threads have read and written so far; returns the count before."""
    if config.amd == "gfx9":
        drain()
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel")


@triton.jit
def wait(counter, count, config: tl.constexpr):
    """Until `counter` has reached `count`; then what was written before is visible to every thread."""
    if config.amd == "":  # there Triton 3.6 takes a volatile load out of the loop
        while tl.load(counter, volatile=True) < count:
            pass
    # Compiled to a load that acquires, once. Its result must be used, or Triton 3.6 drops it, acquire and all.
    while tl.atomic_add(counter, 0, sem="acquire") < count:
        pass
    tl.debug_barrier()


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
