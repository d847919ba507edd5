"""How programs tell each other that work is done: arrive at a counter, wait for a counter."""

import triton
import triton.language as tl


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
