"""Every way of every kernel once, held to the reference, before anything is measured: `python -m benchmarks smoke`.

A process works through the ways and says when it begins one and how it ended. One that hangs, crashes or leaves the
device in error costs its process, not the others their turn: the next process goes on behind it.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from attanchor_kernels import reference
from attanchor_kernels.testing.inputs import Shape
from benchmarks import cases, options
from benchmarks.rows import ROOT, Row, Run

# The first has aligned rows, that tiles can be kept on chip, of several chunks for most blocks of a cluster.
SHAPES = ((Shape("aligned", 75, 21, 1120), 3), (Shape("llava-7b", 576, 50, 4096), 8))
NOT_BUILT = "no construct kernel that was asked for runs on this device"
START, EACH = 60.0, 20.0  # seconds to import and reach the device, and for one way; Triton compiles, too
COMPILING = 4  # times as long


class Way(NamedTuple):
    """One operation of one backend at one dtype, on CUDA by one of its compiled ways."""

    backend: str
    dtype: torch.dtype
    operation: str
    tuning: Any = None

    def describe(self) -> Row:
        tuning = {} if self.tuning is None else self.tuning._asdict()
        dtype = str(self.dtype).removeprefix("torch.")
        return {"backend": self.backend, "dtype": dtype, "operation": self.operation, "tuning": tuning}


def ways(device: torch.device, backends: Sequence[str] | None = None) -> list[Way]:
    """All that are here, or those of some backends; on a CPU the reference, to rehearse."""
    found = []
    for backend in cases.kernel_backends(device):
        if backends is not None and backend not in backends:
            continue
        for dtype, operation in itertools.product((torch.bfloat16, torch.float32), ("forward", "drop")):
            tunings = compiled(dtype, operation) if backend == "cuda" else [None]
            found += [Way(backend, dtype, operation, tuning) for tuning in tunings]
    return found


def compiled(dtype: torch.dtype, operation: str) -> list[Any]:
    """The ways of the CUDA kernel: those that drop image tokens are others."""
    from attanchor_kernels.backends.cuda import launch

    return launch.variants(dtype, drops=operation == "drop")


def check(way: Way, device: torch.device, shapes: Sequence[tuple[Shape, int]] = SHAPES) -> Row:
    """Run a way and hold it to the reference.

    Returns:
        status "right", "wrong", "failed" or "left out", why in `detail`, and how CUDA launched it.
    """
    how: Row = {}
    for shape, batch in shapes:
        case = cases.Case(way.operation, shape, batch, way.dtype)
        inputs = cases.make_inputs(case, device, seed=0)
        try:
            if way.tuning is None:
                cases.verify(case, cases.run(case, inputs, "reference"), cases.run(case, inputs, way.backend))
                continue
            from attanchor_kernels.backends.cuda import launch

            problem = cases.problem_of(case, inputs)
            embeds, made = launch.run(problem, copy=True, tuning=way.tuning)
            rows, plan = reference.construct(problem)
            if embeds is None or not torch.equal(embeds, rows) or not torch.equal(made.places, plan.places):
                return {"status": "wrong", "detail": case.label}
            how = cases.launched(way.backend, case, inputs, way.tuning)
        except cases.WrongResult as error:
            return {"status": "wrong", "detail": str(error)}
        except RuntimeError as error:
            return {"status": "left out" if NOT_BUILT in str(error) else "failed", "detail": str(error)[:300]}
    return {"status": "right", **how}


def work(device: torch.device, first: int, backends: Sequence[str] | None = None) -> None:
    """The ways from `first` on: a line of JSON when one begins, and one when it has ended."""
    small = SHAPES if device.type == "cuda" else SHAPES[:1]
    for way in ways(device, backends)[first:]:
        print(json.dumps(way.describe()), flush=True)
        ended = check(way, device, small)
        print(json.dumps(ended), flush=True)
        if ended["status"] == "failed":
            return  # what comes behind an error of the device fails with it
    print("end", flush=True)


def supervised(command: Sequence[str], start: float = START, each: float = EACH) -> Iterator[Row]:
    """What processes of `command` say of the ways, one after the other; `command` gets the number of the first."""
    done = 0
    while True:
        with _process([*command, str(done)]) as lines:
            limit = start
            begun: Row | None = None
            while True:
                try:
                    line = lines.get(timeout=limit)
                except queue.Empty:
                    line, ended = None, {"status": "hung", "detail": f"no end within {limit:.0f} s"}
                else:
                    ended = {"status": "crashed", "detail": ""}
                if line == "end":
                    return
                said = _json(line)
                if line is not None and said is None:  # what a library prints, or the traceback of a crash
                    continue
                if said is not None and begun is None:
                    begun, limit = said, each * (COMPILING if said["backend"] == "triton" else 1)
                    continue
                if begun is None:
                    yield {"backend": "none", "dtype": "none", **ended}  # not even the first one began
                    return
                yield {**begun, **(said or ended)}
                begun, done = None, done + 1
                if said is None or said["status"] == "failed":
                    break


@contextlib.contextmanager
def _process(command: Sequence[str]) -> Iterator[queue.Queue]:
    """The lines that a process prints, then None; it is ended with all that it started."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    lines: queue.Queue = queue.Queue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.put(line.rstrip("\n"))
        lines.put(None)

    threading.Thread(target=listen, daemon=True).start()
    try:
        yield lines
    finally:
        options.end(process)


def _json(line: str | None) -> Row | None:
    try:
        said = json.loads(line or "")
    except json.JSONDecodeError:
        return None
    return said if isinstance(said, dict) else None


def safe_choice(rows: list[Row]) -> dict[str, int]:
    """What to change of the CUDA backend's choice after these rows: if tiles kept on chip fail, they are not kept."""
    bad = [row for row in rows if row["backend"] == "cuda" and row["status"] not in ("right", "left out")]
    return {"hold": 0} if any(row["tuning"].get("hold") for row in bad) else {}


def add_options(parser: argparse.ArgumentParser) -> None:
    options.common(parser, "smoke", dtype=False)
    parser.add_argument("--backends", type=options.names(("cuda", "triton")), help="default: all that are here")
    parser.add_argument("--from", type=int, dest="first", help=argparse.SUPPRESS)


def main(given: argparse.Namespace) -> int:
    """A row for each way. Returns 1 if one is not right."""
    if given.first is not None:
        work(torch.device(given.device), given.first, given.backends)
        return 0
    if not ways(torch.device(given.device), given.backends):
        print("there is no kernel of these backends here")
        return options.UNAVAILABLE
    on = Run(given.output, given.device, "smoke")
    command = [sys.executable, "-m", "benchmarks", "smoke", "--device", given.device]
    command += ["--backends", ",".join(given.backends)] if given.backends else []
    for row in supervised([*command, "--from"]):
        row = on.add(row)
        print(
            *(row.get(key, "") for key in ("status", "backend", "dtype", "operation", "tuning", "detail")), flush=True
        )
    bad = [row for row in on.rows if row["status"] not in ("right", "left out")]
    print(f"{len(on.rows)} ways, {len(bad)} of them not right")
    return int(bool(bad))
