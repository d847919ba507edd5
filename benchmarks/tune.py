"""Search for faster launch configurations of the forward kernels, for a person to write into the choice by shape.

From the configuration that the backend chooses, one field is changed at a time; what is faster by more than noise is
kept, and the next field is tried from there. Every candidate is checked before it is timed.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from attanchor_kernels import backends
from benchmarks import cases, floor, timing
from benchmarks.cases import Case, Inputs, make_inputs, run, verify
from benchmarks.rows import Store

UNAVAILABLE = 3  # exit status where no backend that was asked for is there
NOISE = 0.01  # a change must win by this share
BACKENDS = ("cuda", "triton")
FIELDS: dict[str, dict[str, tuple[Any, ...]]] = {
    "triton": {
        "persistent": (True, False),
        "block_images": (32, 64, 128),
        "num_stages": (2, 3, 4, 5),
        "num_warps": (4, 8),
        "block_hidden": (32, 64, 128),
        "block_rows": (8, 16, 32, 64),
        "block_columns": (128, 256, 512, 1024),
        "registers": (96, 128, 168, 255),
        "lag": (1, 2, 4, 8, 16),
    },
    "cuda": {
        "bulk": (0,),
        "hold": (0,),
        "cluster": (4, 8),
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
    module.BY_SHAPE = usual._replace(**changes)
    try:
        yield [module.BY_SHAPE]
    finally:
        module.BY_SHAPE = usual


@contextlib.contextmanager
def _triton_with(changes: dict[str, Any]) -> Iterator[list[Any]]:
    from attanchor_kernels.backends.triton import schedule

    usual: Any = schedule.construct
    used: list[Any] = []

    def changed(*arguments: Any, **options: Any) -> Any:
        used.append(usual(*arguments, **options)._replace(**changes))
        return used[-1]

    module: Any = schedule
    module.construct = changed
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


def search(backend: str, case: Case, device: torch.device, store: Store, end: float) -> None:
    """One pass over the fields of a backend for one case, until the clock says `end`."""
    sets = [make_inputs(case, device, seed) for seed in range(timing.rotation(case.least_bytes, device))]
    least = min(timing.measure(c, device, repeats=9, budget=0.1).p50 for _, c in floor.copies(case, sets, device))
    expected = run(case, sets[0], "reference")
    best: dict[str, Any] = {}
    with choice_with(backend, {}) as used:
        run(case, sets[0], backend)
    usual = used[-1]
    fastest = attempt(backend, case, sets, expected, device, {})
    if fastest is None:
        return
    name = f"{backend}, {case.shape.name}, B={case.batch}"
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
            taken = attempt(backend, case, sets, expected, device, {**best, field: value})
            if taken is None:
                continue
            print(f"    {field}={value}: {taken / least:.3f} x floor", flush=True)
            if taken < fastest * (1 - NOISE):
                fastest, best = taken, {**best, field: value}
    row = {**case.describe(), "backend": backend, "us": round(fastest * 1e6, 3), "ratio": round(fastest / least, 4)}
    store.add({**row, "changes": best, "chosen": {name: str(value) for name, value in usual._asdict().items()}})
    print(f"{name}: {fastest / least:.3f} x floor with {best or 'nothing changed'}", flush=True)


def main(options: argparse.Namespace) -> int:
    """Search each backend, shape and batch within the time limit; one row for each."""
    device = torch.device(options.device)
    wanted = options.backends or BACKENDS
    if unknown := [name for name in wanted if name not in BACKENDS]:
        print(f"--backends is {', '.join(unknown)}; it should be of {', '.join(BACKENDS)}", file=sys.stderr)
        return 2
    reasons = {name: backends.why_not(name, device.type) for name in wanted}
    wanted = [name for name, reason in reasons.items() if reason is None]
    if not wanted:
        print(f"nothing to tune: {'; '.join(str(reason) for reason in reasons.values())}", file=sys.stderr)
        return UNAVAILABLE
    names = options.shapes or (("toy",) if device.type == "cpu" else tuple(shape.name for shape in cases.SHAPES))
    if unknown := [name for name in names if name not in cases.SHAPE_OF]:
        print(f"--shapes is {', '.join(unknown)}; it should be of {', '.join(cases.SHAPE_OF)}", file=sys.stderr)
        return 2
    store = Store(options.output, options.device, "tune")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = [Case("forward", cases.SHAPE_OF[name], batch, dtype) for batch in options.batches for name in names]
    searches = [(backend, case) for case in chosen for backend in wanted]
    begin = time.monotonic()
    for number, (backend, case) in enumerate(searches, 1):
        search(backend, case, device, store, begin + options.limit * number / len(searches))
    return 0
