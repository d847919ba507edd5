"""Time that a call takes on the host, with its launch left out, beside a plain `autograd.Function` of the same size.

Both backends are called on CPU tensors, Triton over a driver that launches nothing, CUDA over the tests' emulated
device, which forgets launches, in the CPU time of this thread. What stays is every check, choice, allocation and lookup
of a call; what the allocator and the streams of CUDA add is not in it.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from attanchor_kernels import backends, build_sequence, checks, merge_sequence, trimming
from attanchor_kernels.testing.inputs import TAU
from benchmarks import options, timing
from benchmarks.cases import MAX_ANCHORS, SHAPE_OF, Case, make_inputs, problem_of
from benchmarks.rows import ROOT, Run, table

CPU = torch.device("cpu")
CALLS = 100
# Operation, trimmed, with a gradient; "construct" is the backend's part of "forward".
KINDS = [
    ("construct", False, False),
    ("forward", False, False),
    ("forward", False, True),
    ("forward", True, False),
    ("merge", False, False),
    ("merge", True, False),
    ("backward", False, True),
]


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """CPU tensors are taken by every backend, and not read: neither what is checked of them there nor a length."""

    def nothing(*_: Any) -> None:
        pass

    with (
        mock.patch.object(backends, "why_not", nothing),
        mock.patch.object(checks, "contents", nothing),
        mock.patch.object(trimming, "read_length", lambda problem, _: problem.capacity - 1),
    ):
        yield


@contextlib.contextmanager
def no_cuda_launch() -> Iterator[None]:
    """The CUDA backend takes CPU tensors, over a device of 132 multiprocessors that forgets launches."""
    sys.path.insert(0, str(ROOT / "tests" / "emulator"))
    emulator = importlib.import_module("emulated").Emulator()
    emulator.configure(resident=264, seed=0)
    emulator.launches(False)
    with as_on_a_gpu():
        yield


@contextlib.contextmanager
def no_triton_launch() -> Iterator[Any]:
    """The Triton backend takes CPU tensors, compiles nothing and launches nothing.

    Gives the class of what stands for compiled kernels; launches are appended to its `launched`, if that is a list.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import CompiledKernel

    class Driver:
        get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    class Kernel(CompiledKernel):
        launched: list[tuple[Any, ...]] | None = None

        def __init__(self, src: Any, **_: Any) -> None:
            self.src, self.name, self.module, self.function = src, src.name, None, None
            self.metadata = self.packed_metadata = ()

        def _run(self, *given: Any) -> None:
            if self.launched is not None:
                self.launched.append((self, given[:3], given[9:]))

        def _init_handles(self) -> None:
            pass

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set; without it, Triton takes the way that it takes on a GPU")
    driver = triton.runtime.driver
    before = driver._active
    driver.set_active(Driver())
    try:
        with mock.patch("triton.compiler.compile", Kernel), as_on_a_gpu():
            yield Kernel
    finally:
        driver._active = before


NO_LAUNCH = {"triton": no_triton_launch, "cuda": no_cuda_launch}


def plain_function(fields: tuple[Tensor, ...], arguments: int) -> Callable[..., Any]:
    """An `autograd.Function` that takes as many arguments, allocates what an operator returns, and does no more."""

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *given: Any) -> tuple[Tensor, ...]:
            made = tuple(torch.empty(field.shape, dtype=field.dtype, device=given[0].device) for field in fields)
            ctx.save_for_backward(made[-1])
            ctx.shapes = [rows.shape for rows in given[:2]]
            ctx.mark_non_differentiable(*made[1:])
            ctx.set_materialize_grads(False)
            return made

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
            return (*(grad.new_empty(shape) for shape in ctx.shapes), *[None] * (arguments - 2))

    others = [None] * (arguments - 2)
    return lambda image, text: Plain.apply(image, text, *others)


def calls_of(case: Case, trim: bool, grad: bool, backend: str) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """A call and the plain one beside it."""
    inputs = make_inputs(case._replace(operation="merge" if case.operation == "merge" else "forward"), CPU, seed=0)
    image, text = (rows.requires_grad_(grad) for rows in (inputs.image, inputs.text))
    chosen: dict[str, Any] = {"max_anchors": MAX_ANCHORS, "trim": trim, "backend": backend}

    def operator() -> Any:
        if inputs.roles is not None:
            return merge_sequence(text, image, inputs.roles, TAU, **chosen)
        return build_sequence(image, text, TAU, **chosen)

    problem, construct = problem_of(case, inputs), torch.ops.attanchor._construct.default
    function = plain_function(construct(*problem, backend), len(construct._schema.arguments))
    if case.operation == "construct":
        return partial(backends.load(backend).construct, problem), lambda: function(image, text)
    if case.operation != "backward":
        return operator, lambda: function(image, text)
    grads = []
    for result in (operator().embeds, function(image, text)[0]):
        upstream = torch.empty_like(result)
        grads.append(partial(torch.autograd.grad, result, [image, text], upstream, retain_graph=True))
    return grads[0], grads[1]


def compare(case: Case, trim: bool, grad: bool, backend: str, repeats: int) -> dict[str, Any]:
    """The least time of a call of both, taken by turns: CPU time of this thread is nearly free of others."""
    calls = dict(zip(("operator", "plain"), calls_of(case, trim, grad, backend), strict=True))
    gc.disable()
    try:
        taken = timing.by_turns(calls, repeats + 1, time.thread_time, CALLS)
    finally:
        gc.enable()
    operator, plain = (min(seconds[1:]) for seconds in taken.values())  # the first prepares what later calls find
    return {
        **case.describe("operation", "shape", "batch", "dtype", "max_anchors"),
        **{"trim": trim, "grad": grad, "backend": backend, "method": "thread time, no launch"},
        "us": round(1e6 * operator, 1),
        "plain_us": round(1e6 * plain, 1),
        "ratio": round(operator / plain, 2),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    options.output(parser, "host")
    parser.add_argument(
        "--backends", type=options.names(NO_LAUNCH), default=tuple(NO_LAUNCH), help="default: triton,cuda"
    )
    parser.add_argument("--repeats", type=options.number, default=20, help="of 100 calls each (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """Store and print a row for each kind of call."""
    on = Run(given.output, "cpu", "host")
    for backend in given.backends:
        with NO_LAUNCH[backend]():
            for operation, trim, grad in KINDS:
                case = Case(operation, SHAPE_OF["llava-7b"], 1, torch.bfloat16)
                on.add(compare(case, trim, grad, backend, given.repeats))
    lines = []
    for row in on.rows:
        what = row["operation"] + ", trimmed" * row["trim"] + ", with gradient" * row["grad"]
        lines.append([row["backend"], what, f"{row['us']:.0f} us", f"{row['ratio']:.1f} x"])
    print(table(["", "", "host time", "of a plain autograd.Function"], lines))
    return 0
