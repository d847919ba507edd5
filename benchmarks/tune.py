"""Search for faster launch configurations of the Triton forward kernel, for a person to write into its schedule.

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

NOISE = 0.01  # a change must win by this share
FIELDS: dict[str, tuple[Any, ...]] = {
    "persistent": (True, False),
    "block_images": (32, 64, 128),
    "num_stages": (2, 3, 4, 5),
    "num_warps": (4, 8),
    "block_hidden": (32, 64, 128),
    "block_rows": (8, 16, 32, 64),
    "block_columns": (128, 256, 512, 1024),
    "registers": (96, 128, 168, 255),
    "lag": (1, 2, 4, 8, 16),
}


@contextlib.contextmanager
def schedule_with(changes: dict[str, Any]) -> Iterator[list[Any]]:
    """Have the backend's choice changed; the list receives every schedule that is used."""
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
    case: Case, sets: list[Inputs], expected: Any, device: torch.device, changes: dict[str, Any]
) -> float | None:
    """Seconds of one call with these changes; None if it does not compile, does not fit or is not right."""
    try:
        with schedule_with(changes):
            verify(case, expected, run(case, sets[0], "triton"))
            calls = [partial(run, case, inputs, "triton") for inputs in sets]
            return timing.measure(calls, device, repeats=9, budget=0.1).p50
    except Exception as error:  # whatever the compiler or the launch says against it
        print(f"    {changes}: {type(error).__name__}: {str(error).splitlines()[0][:100] if str(error) else ''}")
        return None


def search(case: Case, device: torch.device, store: Store, end: float) -> None:
    """One pass over the fields for one case, until the clock says `end`."""
    sets = [make_inputs(case, device, seed) for seed in range(timing.rotation(case.least_bytes, device))]
    least = min(timing.measure(c, device, repeats=9, budget=0.1).p50 for _, c in floor.copies(case, sets, device))
    expected = run(case, sets[0], "reference")
    best: dict[str, Any] = {}
    with schedule_with({}) as used:
        run(case, sets[0], "triton")
    usual = used[-1]
    fastest = attempt(case, sets, expected, device, {})
    if fastest is None:
        return
    print(f"{case.shape.name}, B={case.batch}: {fastest / least:.3f} x floor as chosen", flush=True)
    for field, values in FIELDS.items():
        if field not in usual._fields:
            continue
        for value in values:
            if value == {**usual._asdict(), **best}[field] or time.monotonic() > end:
                continue
            taken = attempt(case, sets, expected, device, {**best, field: value})
            if taken is None:
                continue
            print(f"    {field}={value}: {taken / least:.3f} x floor", flush=True)
            if taken < fastest * (1 - NOISE):
                fastest, best = taken, {**best, field: value}
    row = {**case.describe(), "backend": "triton", "us": round(fastest * 1e6, 3), "ratio": round(fastest / least, 4)}
    store.add({**row, "changes": best, "chosen": {name: str(value) for name, value in usual._asdict().items()}})
    print(
        f"{case.shape.name}, B={case.batch}: {fastest / least:.3f} x floor with {best or 'nothing changed'}", flush=True
    )


def main(options: argparse.Namespace) -> int:
    """Search each shape and batch within the time limit; one row for each."""
    device = torch.device(options.device)
    if reason := backends.why_not("triton", device.type):
        print(f"nothing to tune: {reason}", file=sys.stderr)
        return 2
    names = options.shapes or (("toy",) if device.type == "cpu" else tuple(shape.name for shape in cases.SHAPES))
    if unknown := [name for name in names if name not in cases.SHAPE_OF]:
        print(f"--shapes is {', '.join(unknown)}; it should be of {', '.join(cases.SHAPE_OF)}", file=sys.stderr)
        return 2
    store = Store(options.output, options.device, "tune")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    chosen = [Case("forward", cases.SHAPE_OF[name], batch, dtype) for batch in options.batches for name in names]
    begin = time.monotonic()
    for number, case in enumerate(chosen, 1):
        search(case, device, store, begin + options.limit * number / len(chosen))
    return 0
