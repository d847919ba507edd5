"""The roofline run: every operator and backend as a multiple of a copy of the same bytes, measured in the same run."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attanchor_kernels import backends
from attanchor_kernels.testing.inputs import SHAPES
from benchmarks import floor, options, smoke, timing, tune
from benchmarks.baselines import MATMUL_DTYPES, Compiled, plain_merge, verify_merge
from benchmarks.cases import (
    OPERATIONS,
    SHAPE_OF,
    Case,
    Inputs,
    WrongResult,
    kernel_backends,
    launched,
    make_inputs,
    make_sets,
    run,
    verify,
)
from benchmarks.rows import Row, Run, read
from benchmarks.timing import Timing

PASSES = ("kernels", "baselines")
COMPILED_BATCHES = (1, 8, 32, 64)  # one compilation for the first, one for all the others
MEMORY_BATCH = 8
CALLED_BATCHES = (1, 8)  # timed with their launches too


class Roofline(Run):
    """One run of the command, and how it measures."""

    def __init__(self, given: argparse.Namespace) -> None:
        super().__init__(given.output, given.device, "roofline", given.dtype)
        self.names = given.backends or kernel_backends(self.device)
        self.budget = given.budget

    def measure(self, calls: Sequence[Callable[[], Any]], eager: bool = False) -> Timing:
        return timing.measure(calls, self.device, budget=self.budget, eager=eager)

    def each(self, cases: Iterable[Case], measure: Callable[[Case], None]) -> None:
        """A case that fails costs no other its figures."""
        for case in cases:
            with self.guarded(case.label):
                measure(case)

    def report(self, described: Row, taken: Timing, backend: str, **more: Any) -> None:
        """Store a row of what was measured, of `described["bytes"]` moved, and print its line."""
        row = {**described, **taken.describe(), "backend": backend, **more}
        if row["bytes"]:
            row["gbps"] = float(f"{row['bytes'] / taken.p50 / 1e9:.4g}")
        row = self.add(row)
        where = f"{row['operation']:<9}{row.get('shape', ''):<14}B={row.get('batch', '-')!s:<4}{row['backend']:<34}"
        of_floor = f"{row['ratio']:>8.2f} x floor" if "ratio" in row else ""
        print(f"{where}{row['us']:>11.2f} us  {row.get('gbps', 0):>8.1f} GB/s {of_floor}", flush=True)

    def machine(self) -> Timing | None:
        """Copy bandwidth of the device, and what an empty kernel costs in a graph."""
        count = 2**27 if self.device.type == "cuda" else 2**21
        pairs = [(torch.rand(count, device=self.device), torch.empty(count, device=self.device)) for _ in range(2)]
        copied = self.measure([partial(target.copy_, source) for source, target in pairs])
        self.report({"operation": "copy", "bytes": 8 * count}, copied, "torch")
        if not floor.on_gpu(self.device):
            return None
        empty = self.measure(floor.empty_calls(self.device))
        self.report({"operation": "empty", "bytes": 0}, empty, "triton")
        return empty

    def memory(self, case: Case) -> None:
        """Before anything else of a case runs, so that whatever a backend keeps is counted."""
        inputs = make_inputs(case, self.device, seed=0)
        one = case._replace(batch=1)
        for name in self.names:
            with self.guarded(f"{name}, {case.label}"):
                run(one, make_inputs(one, self.device, seed=0), name)  # compile
                peak = timing.peak_beside_outputs(partial(run, case, inputs, name), self.device)
                self.add({"measure": "memory", **case.describe(), "backend": name, "peak_bytes": peak})
                where = f"{case.operation:<9}{case.shape.name:<14}B={case.batch:<4}{name:<34}"
                print(f"{where}{(peak or 0) / 1e6:>10.3f} MB beside outputs", flush=True)

    def kernels(self, case: Case, empty: Timing | None) -> None:
        """Floor, then every backend."""
        sets = make_sets(case, self.device)
        candidates = {name: self.measure(calls) for name, calls in floor.copies(case, sets, self.device)}
        variant = min(candidates, key=lambda name: candidates[name].p50)
        least = candidates[variant]
        self.report(case.describe(), least, "floor", variant=variant)
        expected = run(case, sets[0], "reference")
        for name in self.names:
            with self.guarded(f"{name}, {case.label}"):
                verify(case, expected, run(case, sets[0], name))
                taken = self.measure([partial(run, case, inputs, name) for inputs in sets])
                more: Row = {"floor_us": round(least.p50 * 1e6, 3), **launched(name, case, sets[0])}
                more["auto"] = name == backends.choose("auto", self.device, case.dtype)
                more["ratio"] = round(taken.p50 / least.p50, 4)
                # Digits, not decimals: it can be tiny.
                more["percent_of_roofline"] = float(f"{100 * least.p50 / taken.p50:.4g}")
                if empty is not None:
                    more["us_less_empty"] = round((taken.p50 - empty.p50) * 1e6, 3)
                self.report(case.describe(), taken, name, **more)
                self.called(name, case, sets)

    def called(self, name: str, case: Case, sets: Sequence[Inputs]) -> None:
        """What a caller waits for, launches included: a merge trimmed, as `attach` runs it, a forward at capacity."""
        if case.operation not in ("forward", "merge") or case.batch not in CALLED_BATCHES:
            return
        trim = case.operation == "merge"
        if trim or self.device.type == "cuda":  # what is timed on a CPU is a call in any case
            calls = [partial(run, case, inputs, name, trim) for inputs in sets]
            self.baseline(f"{name}, trimmed" if trim else f"{name}, eager", case, calls, eager=True)

    def baseline(self, name: str, case: Case, calls: Sequence[Callable[[], Any]], eager: bool = False) -> None:
        taken = self.measure(calls, eager)
        more = {"peak_bytes": timing.peak_beside_outputs(calls[0], self.device)} if name == "reference" else {}
        self.report(case.describe(), taken, name, **more)

    def baselines(self, case: Case) -> None:
        """The reference, for a prompt the merge of transformers: as device time alone, and with their launches.

        The reference is no baseline for a prompt: it matches every slot with every slot, which no user would.
        """
        sets = make_sets(case, self.device)
        calls: list[Callable[[], Any]]
        if case.operation == "merge":
            if not verify_merge(sets[0], plain_merge(sets[0])):
                raise WrongResult("masked_scatter puts rows where they do not belong")
            name, calls = "masked_scatter", [partial(plain_merge, inputs) for inputs in sets]
        elif self.names == ["reference"]:
            return
        else:
            name, calls = "reference", [partial(run, case, inputs, "reference") for inputs in sets]
        self.baseline(name, case, calls)
        if self.device.type == "cuda" and case.batch in CALLED_BATCHES:
            self.baseline(f"{name}, eager", case, calls, eager=True)

    def compiled(self, cases: Sequence[Case]) -> None:
        """The compiled baselines at one shape: one compilation for B = 1, one for all larger batches."""
        for matmul in MATMUL_DTYPES:
            compiled = Compiled(matmul)
            for case in cases:
                with self.guarded(f"{compiled.name}, {case.label}"), torch.no_grad():
                    sets = make_sets(case, self.device)
                    if not torch.equal(compiled(sets[0])[0], run(case, sets[0], "reference")[0]):
                        raise WrongResult("embeds differ from the reference")
                    self.baseline(compiled.name, case, [partial(compiled, inputs) for inputs in sets])


def add_options(parser: argparse.ArgumentParser) -> None:
    options.common(parser, "roofline")
    parser.add_argument(
        "--shapes", type=options.names(SHAPE_OF), help="names, with commas; default: the four models, on a CPU 'toy'"
    )
    parser.add_argument("--batches", type=options.numbers, help="default: 1,4,8,32,64, on a CPU 1,2")
    parser.add_argument("--operations", type=options.names(OPERATIONS), default=OPERATIONS, help="default: %(default)s")
    parser.add_argument(
        "--backends",
        type=options.names(("reference", "triton", "cuda")),
        help="default: cuda and triton as far as available, on a CPU reference",
    )
    parser.add_argument("--passes", type=options.names(PASSES), default=PASSES, help="default: %(default)s")
    parser.add_argument("--smoke", type=Path, help="rows of a smoke run: what failed there is not chosen")
    parser.add_argument("--budget", type=float, default=0.4, help="seconds for each measurement (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """Measure the cases, kernels first. Returns 1 if a result was wrong or could not be made: it has no figure."""
    for name in given.backends or ():
        if reason := backends.why_not(name, given.device):
            print(f"--backends is {name}, which cannot run here: {reason}", file=sys.stderr)
            return options.UNAVAILABLE
    on = Roofline(given)
    # After a smoke run in which tiles that stay on chip failed, the other way is measured.
    changes = smoke.safe_choice(read(given.smoke)) if given.smoke else {}
    with tune.choice_with("cuda", changes) if changes else contextlib.nullcontext():
        _measure(on, given)
    return on.status()


def _measure(on: Roofline, given: argparse.Namespace) -> None:
    on_cpu = on.device.type == "cpu"
    shapes = given.shapes or (("toy",) if on_cpu else tuple(shape.name for shape in SHAPES))
    # The sizes that the targets are about come first, so that a run cut short has them.
    batches = given.batches or ((1, 2) if on_cpu else (8, 1, 32, 64, 4))
    wished = itertools.product(batches, shapes, given.operations)
    cases = [Case(operation, SHAPE_OF[name], batch, on.dtype) for batch, name, operation in wished]
    if "kernels" in given.passes:
        empty = on.machine()
        if not on_cpu:
            on.each([case for case in cases if case.batch == MEMORY_BATCH], on.memory)
        on.each(cases, partial(on.kernels, empty=empty))
    if "baselines" in given.passes:
        on.each(cases, on.baselines)
        forward = [case for case in cases if case.operation == "forward" and case.batch in COMPILED_BATCHES]
        for name in () if on_cpu else shapes:
            on.compiled([case for case in forward if case.shape.name == name])
