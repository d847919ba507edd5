"""Shared by the GPU tests: moving arguments, planted problems whose decisions are beyond doubt, capture, comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attanchor_kernels import AnchoredSequence, build_sequence, checks
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import BAND, assert_keeps_contract
from attanchor_kernels.testing.inputs import TAU, Shape, matched_pair

DEVICE = torch.device("cuda")
OPS = torch.ops.attanchor
SMALL = Shape("small", 70, 20, 96)


def moved(arguments: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments with their tensors on the GPU; strides are kept."""

    def move(value: Any) -> Any:
        if not isinstance(value, Tensor) or value.is_contiguous():
            return value.to(DEVICE) if isinstance(value, Tensor) else value
        storage = value.untyped_storage().to(device=DEVICE)
        empty = torch.empty(0, dtype=value.dtype, device=DEVICE)
        return empty.set_(storage, value.storage_offset(), value.shape, value.stride())

    return {name: move(value) for name, value in arguments.items()}


def on_cpu(result: AnchoredSequence) -> AnchoredSequence:
    """A result on the CPU, its positions with their P axis."""
    result = AnchoredSequence(*(None if field is None else field.detach().cpu() for field in result))
    flat = result.position_ids.dim() == 2
    return result._replace(position_ids=result.position_ids.unsqueeze(0)) if flat else result


def check_contract(result: AnchoredSequence, problem: Problem, trim: bool) -> None:
    """`problem` lives on the CPU, `result` anywhere."""
    assert_keeps_contract(on_cpu(result), problem, trimmed=trim)


def planted(
    batch: int, shape: Shape = SMALL, dtype: torch.dtype = torch.bfloat16, seed: int = 0, device: torch.device = DEVICE
) -> tuple[Tensor, Tensor]:
    """Image and text whose decisions at `TAU` no rounding changes: matches score about 0.7, all else about 0."""
    return matched_pair(batch, shape, dtype=dtype, device=device, seed=seed, share=0.25)


def reference(image: Tensor, text: Tensor, **options: Any) -> AnchoredSequence:
    """What the reference makes of the same rows, on the same device."""
    options = {"tau": TAU, "trim": False, **options}
    return build_sequence(image, text, **options, backend="reference")


def assert_same(got: Any, expected: Any) -> None:
    """Equal bit for bit, but for the cosines, which are equal within the contract's band."""
    names = AnchoredSequence._fields[-len(got) :]
    for name, one, other in zip(names, got, expected, strict=True):
        if one is None or other is None:
            continue
        if name in ("score", "relevance"):
            finite = other.isfinite()
            assert torch.equal(one.isfinite(), finite), name
            assert (one[finite].double() - other[finite].double()).abs().le(BAND).all(), name
        else:
            assert one.dtype == other.dtype, name
            assert torch.equal(bits(one), bits(other)), name


def bits(value: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals NaN, 0.0 is not -0.0."""
    return value.detach().contiguous().view(torch.uint8) if value.dim() else value.detach()


def problem_of(arguments: dict[str, Any]) -> Problem:
    """The normal form of `build_sequence` or `merge_sequence` arguments."""
    call = checks.merge_call if "roles" in arguments else checks.build_call
    return call(**arguments).problem


def graph_safe_warm_up() -> None:
    """One call on a side stream, as `torch.cuda.graph` wants it before a capture."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        OPS.build_sequence(*planted(2), TAU)
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()


def capture(run: Callable[[], Any], stream: torch.cuda.Stream | None = None) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A graph of `run` and the outputs that each replay fills."""
    run()  # compiles what is not compiled yet
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = run()
    return graph, outputs


def copies(outputs: Any) -> list[Tensor]:
    return [field.clone() for field in outputs]


def calls(count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Problems of many shapes, one after the other, so that whatever a launch leaves behind meets the next."""
    generator = torch.Generator().manual_seed(0)
    for step in range(count):
        batch, image, text = (int(torch.randint(1, most, (), generator=generator)) for most in (9, 400, 90))
        # Triton compiles anew for every D, seconds each. Of these two one is narrow, one is shared out over a cluster.
        yield planted(batch, Shape("any", image, text, (200, 1088)[step // 3 % 2]), seed=step)


def dirty_memory(numbers: list[int]) -> None:
    """Leave garbage in the blocks that the allocator hands out next, also to memory that a binary allocates."""
    garbage = [torch.full((count,), 0xA5, dtype=torch.uint8, device=DEVICE) for count in numbers for _ in range(3)]
    torch.cuda.synchronize()
    del garbage
