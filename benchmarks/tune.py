"""Search for faster launch configurations of the forward kernels, for a person to write into the choice by shape.

From the configuration that the backend chooses, one field is changed at a time; what is faster by more than noise is
kept, and the next field is tried from there. Every candidate is checked before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from attanchor_kernels import backends
from attanchor_kernels.testing.inputs import SHAPES
from benchmarks import floor, options, timing
from benchmarks.cases import SHAPE_OF, Case, Inputs, make_sets, run, verify
from benchmarks.options import UNAVAILABLE
from benchmarks.rows import Run

NOISE = 0.01  # a change must win by this share
BACKENDS = ("cuda", "triton")
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "triton": {
        "ring": (16, 32, 64, 128),
        "block_images": (32, 64, 128),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (4, 8),
        "block_hidden": (32, 64, 128),
        "block_rows": (8, 16, 32, 64),
        "block_columns": (128, 256, 512, 1024),
        "registers": (96, 128, 168, 255),
        "lag": (0, 1, 2, 4, 8, 16),
    },
    "cuda": {
        "bulk": (0,),
        "hold": (0,),
        "cluster": (1, 4, 8),
        "tile_images": (16, 32, 64),
        "tile_rows": (8, 16, 32),
        "lag": (1, 2, 4, 8, 16),
    },
}


def choice_with(backend: str, changes: dict[str, Any]) -> contextlib.AbstractContextManager[list[Any]]:
    """Have the backend's choice changed; the list receives every choice that is used."""
    return _triton_with(changes) if backend == "triton" else _cuda_with(changes)


@contextlib.contextmanager
def _cuda_with(changes: dict[str, Any]) -> Iterator[list[Any]]:
    from attanchor_kernels.backends.cuda import launch

    module: Any = launch
    usual = module.BY_SHAPE
    module.BY_SHAPE = module.Tuning(**changes)
    try:
        yield [module.BY_SHAPE]
    finally:
        module.BY_SHAPE = usual


@contextlib.contextmanager
def _triton_with(changes: dict[str, Any]) -> Iterator[list[Any]]:
    from attanchor_kernels.backends.triton import schedule

    usual: Any = schedule.construct
    used: list[Any] = []

    def choose(*arguments: Any, **options: Any) -> Any:
        chosen = usual(*arguments, **options)
        changed = chosen._replace(**changes)
        columns = chosen.slice_blocks * chosen.block_hidden  # a slice keeps its columns
        used.append(changed._replace(slice_blocks=-(-columns // changed.block_hidden)))
        return used[-1]

    module: Any = schedule
    module.construct = choose
    try:
        yield used
    finally:
        module.construct = usual


def attempt(
    backend: str, case: Case, sets: list[Inputs], expected: Any, device: torch.device, changes: dict[str, Any]
) -> float | None:
    """Seconds of one call with these changes; None if it does not compile, does not fit or is not right."""
    try:
        with choice_with(backend, changes):
            verify(case, expected, run(case, sets[0], backend))
            calls = [partial(run, case, inputs, backend) for inputs in sets]
            return timing.measure(calls, device, repeats=9, budget=0.1).p50
    except Exception as error:  # whatever the compiler or the launch says against it
        print(f"    {changes}: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")
        return None


def search(backend: str, case: Case, on: Run, end: float) -> None:
    """One pass over the fields of a backend for one case, until the clock says `end`; a row for all that was found.

    It is stored when something faster is found too: a candidate that hangs takes no more than itself.
    """
    sets = make_sets(case, on.device)
    least = min(timing.measure(c, on.device, repeats=9, budget=0.1).p50 for _, c in floor.copies(case, sets, on.device))
    expected = run(case, sets[0], "reference")
    best: dict[str, Any] = {}
    with choice_with(backend, {}) as used:
        run(case, sets[0], backend)
    usual = used[-1]
    first = attempt(backend, case, sets, expected, on.device, {})
    if first is None:
        return
    fastest = first
    name = f"{backend}, {case.label}"

    def store() -> None:
        row = {**case.describe(), "backend": backend, "us": round(fastest * 1e6, 3), "ratio": round(fastest / least, 4)}
        chosen = {field: str(value) for field, value in usual._asdict().items()}
        on.add({**row, "changes": best, "chosen": chosen})

    store()
    print(f"{name}: {fastest / least:.3f} x floor as chosen", flush=True)
    for field, values in FIELDS[backend].items():
        if field not in usual._fields:
            continue
        for value in values:
            now = {**usual._asdict(), **best}
            if value == now[field] or time.monotonic() > end:
                continue
            if field in ("tile_rows", "lag") and now.get("hold", 0) != 0:
                continue  # tiles that are kept on chip have no assemble tiles of their own
            taken = attempt(backend, case, sets, expected, on.device, {**best, field: value})
            if taken is None:
                continue
            print(f"    {field}={value}: {taken / least:.3f} x floor", flush=True)
            if taken < fastest * (1 - NOISE):
                fastest, best = taken, {**best, field: value}
                on.rows.pop()
                store()
    print(f"{name}: {fastest / least:.3f} x floor with {best or 'nothing changed'}", flush=True)


def add_options(parser: argparse.ArgumentParser) -> None:
    options.common(parser, "tune")
    parser.add_argument(
        "--backends",
        type=options.names(BACKENDS),
        default=BACKENDS,
        help="default: cuda and triton as far as available",
    )
    parser.add_argument(
        "--shapes", type=options.names(SHAPE_OF), help="names, with commas; default: the four models, on a CPU 'toy'"
    )
    parser.add_argument(
        "--operations", type=options.names(("forward", "drop")), default=("forward",), help="default: forward"
    )
    parser.add_argument("--batches", type=options.numbers, default=(8, 1, 32), help="default: 8,1,32")
    parser.add_argument("--limit", type=float, default=500, help="seconds for everything (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """Search each backend, shape and batch within the time limit."""
    reasons = {name: backends.why_not(name, given.device) for name in given.backends}
    wanted = [name for name, reason in reasons.items() if reason is None]
    if not wanted:
        print(f"nothing to tune: {'; '.join(str(reason) for reason in reasons.values())}", file=sys.stderr)
        return UNAVAILABLE
    on = Run(given.output, given.device, "tune", given.dtype)
    names = given.shapes or (("toy",) if on.device.type == "cpu" else tuple(shape.name for shape in SHAPES))
    wished = itertools.product(given.operations, given.batches, names)
    chosen = [Case(operation, SHAPE_OF[name], batch, on.dtype) for operation, batch, name in wished]
    searches = [(backend, case) for case in chosen for backend in wanted]
    begin = time.monotonic()
    for number, (backend, case) in enumerate(searches, 1):
        with on.guarded(f"{backend}, {case.label}"):
            search(backend, case, on, begin + given.limit * number / len(searches))
    return on.status()
