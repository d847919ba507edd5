"""The floor: a copy that reads and writes exactly the bytes that an operator must, and an empty kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.cases import Case, Inputs

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = None

WORD = 8  # bytes; rows are whole words
CONFIGURATIONS = ((2048, 4), (4096, 8), (1024, 4))  # words a program, warps


if triton is not None:

    @triton.jit
    def copy_kernel(source, target, read, written, BLOCK: tl.constexpr):
        """Copy; where more is read than written, add the rest to the first blocks, as backward adds its copies."""
        at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(source + at, mask=at < read, other=0)
        value += tl.load(source + written + at, mask=written + at < read, other=0)
        tl.store(target + at, value, mask=at < written)

    @triton.jit
    def empty_kernel(value):
        pass


def on_gpu(device: torch.device) -> bool:
    return device.type == "cuda" and triton is not None


def copies(case: Case, sets: list[Inputs], device: torch.device) -> Iterator[tuple[str, list[partial]]]:
    """Candidates for the floor, by name: the calls of each do the same work on rotated memory.

    On a GPU several launch configurations, of which the fastest is the floor; on a CPU torch's copy.
    """
    read, written = case.read_bytes // WORD, case.written_bytes // WORD
    sources = [torch.randint(2**40, (read,), device=device) for _ in sets]
    if not on_gpu(device):
        yield "torch", [partial(copy_by_torch, source, written) for source in sources]
        return
    for block, warps in CONFIGURATIONS:
        calls = [partial(copy_by_triton, source, written, block, warps) for source in sources]
        yield f"triton {block}x{warps}", calls


def copy_by_triton(source: Tensor, written: int, block: int, warps: int) -> Tensor:
    """All words of `source` read, `written` words written, in one launch."""
    target = torch.empty(written, dtype=torch.int64, device=source.device)
    copy_kernel[(triton.cdiv(written, block),)](source, target, len(source), written, BLOCK=block, num_warps=warps)
    return target


def copy_by_torch(source: Tensor, written: int) -> Tensor:
    """The same on a CPU."""
    target = source.new_empty(written)
    both = min(len(source), written)
    target[:both] = source[:both]
    target[both:] = 0
    rest = source[written:]
    target[: len(rest)] += rest
    return target


def empty_calls(device: torch.device) -> list[Callable[[], None]]:
    """A kernel that does nothing: what a launch inside a graph costs by itself."""
    word = torch.zeros(1, device=device)

    def call() -> None:
        empty_kernel[(1,)](word, num_warps=4)

    return [call]
