"""Time each phase of the CUDA kernel, by a build that notes when blocks get there: `python -m benchmarks phases`.

Its figures replace the assumed latencies of `schedule_model`. Stamps cost a little: totals are measured without them.
A wait for a sample of more than a second ends the kernel with an error.
"""

from __future__ import annotations

import argparse
import importlib.machinery
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import cases, options
from benchmarks.rows import ROOT, Row, Run

# csrc/stamps.cuh; of a tile, in this order, where tiles are kept on chip.
PHASES = (
    *("begun", "loading", "first_chunk", "multiplied", "published"),
    *("arrived", "met", "waited", "planned", "copied"),
)
BLOCKS, ITEMS, WARM_UP = 2048, 64, 3


def build(folder: Path) -> Path:
    """The binary with stamps; the ordinary one is left alone.

    Raises:
        subprocess.CalledProcessError: it does not compile.
    """
    define = "-DATTANCHOR_STAMPS"
    flags = {"NVCC_APPEND_FLAGS": define, "CFLAGS": define, "CXXFLAGS": define, "ATTANCHOR_BUILD_CUDA": "1"}
    places = ["--build-lib", str(folder), "--build-temp", str(folder / "objects")]
    command = [sys.executable, "setup.py", "build_ext", *places]
    subprocess.run(command, cwd=ROOT, env={**os.environ, **flags}, check=True)
    return next(folder.rglob("_C*.so"))


def load(binary: Path) -> None:
    """Make this the binary of the CUDA backend; before anything has imported another."""
    name = "attanchor_kernels._C"
    loader = importlib.machinery.ExtensionFileLoader(name, str(binary))
    spec = importlib.util.spec_from_file_location(name, binary, loader=loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    sys.modules[name] = module


def stamped(case: cases.Case, device: torch.device) -> Tensor:
    """(blocks, items, phases) int64 nanoseconds of one launch after others on the same inputs; 0: not reached."""
    from attanchor_kernels.backends.cuda import launch

    problem = cases.problem_of(case, cases.make_inputs(case, device, 0))
    times = torch.zeros(BLOCKS, ITEMS, len(PHASES), dtype=torch.int64, device=device)
    torch.ops.attanchor_cuda.stamp(times)
    try:
        for _ in range(WARM_UP):
            launch.run(problem, copy=True)
        times.zero_()
        launch.run(problem, copy=True)
        return times.cpu()
    finally:
        torch.ops.attanchor_cuda.stamp(times[:0])


def steps(times: Tensor) -> dict[str, list[float]]:
    """Microseconds from each phase of an item to the next that it reached, by "one -> next", sorted."""
    found: dict[str, list[float]] = {}
    for item in times.flatten(0, 1):
        reached = [(name, int(time)) for name, time in zip(PHASES, item, strict=True) if time > 0]
        for (name, time), (then, later) in itertools.pairwise(reached):
            found.setdefault(f"{name} -> {then}", []).append((later - time) / 1000)
    return {name: sorted(values) for name, values in found.items()}


def rows(case: cases.Case, times: Tensor) -> list[Row]:
    """A row for each step; and one for the whole, from the first stamp to the last."""
    there = times[times > 0]
    if not len(there):
        return []
    whole, blocks = float(there.max() - there.min()) / 1000, int((times > 0).flatten(1).any(1).sum())
    made = [{**case.describe(), "step": "whole", "us": whole, "blocks": blocks}]
    for name, values in steps(times).items():
        p50, p90 = values[len(values) // 2], values[len(values) * 9 // 10]
        made.append({**case.describe(), "step": name, "us": p50, "p90": p90, "count": len(values)})
    return made


def add_options(parser: argparse.ArgumentParser) -> None:
    options.common(parser, "phases", dtype=False)
    parser.add_argument("--build", type=Path, default=ROOT / "build" / "stamps", help="folder (default: %(default)s)")
    parser.add_argument("--batches", type=options.numbers, default=(1, 8, 32), help="default: 1,8,32")


def main(given: argparse.Namespace) -> int:
    """Build, measure every shape and batch, store the rows."""
    on = Run(given.output, given.device, "phases")
    if on.device.type != "cuda":
        print("phases are timed on a GPU alone")
        return options.UNAVAILABLE
    load(build(given.build))
    for batch, shape in itertools.product(given.batches, cases.SHAPES):
        case = cases.Case("forward", shape, batch)
        with on.guarded(case.label):
            for row in rows(case, stamped(case, on.device)):
                on.add(row)
                print(f"{case.label:<36}{row['step']:<28}{row['us']:>9.2f} us", flush=True)
    return on.status()
