"""Every kernel under compute-sanitizer: memory, races in shared memory, barriers. `python -m benchmarks sanitize`.

The three tools run at once, each over a small program that launches every kernel of every backend on small ragged
shapes and compares with the reference. Exit status 0 clean, 1 an error was found, 3 the tool is not here or cannot run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from attanchor_kernels import backends, build_sequence, merge_sequence, plan_sequence
from attanchor_kernels.testing.inputs import TAU, Shape, merge_form
from benchmarks import options, smoke
from benchmarks.cases import Case, kernel_backends, make_inputs
from benchmarks.options import UNAVAILABLE

TOOLS = ("memcheck", "racecheck", "synccheck")
FOUND = 86
NOT_BUILT = ("no construct kernel that was asked for runs on this device",)
CANNOT_RUN = ("Device not supported", "Unable to find injection library", "Failed to initialize", "not supported on")
# Few, since every one is compiled anew for Triton; together they take every branch of the launchers.
CONFIGURATIONS: tuple[tuple[torch.dtype, Shape, int, dict[str, Any]], ...] = (
    (torch.bfloat16, Shape("ragged", 75, 21, 136), 3, {"max_anchors": 4}),
    (torch.float32, Shape("odd", 33, 12, 37), 2, {"direction": "image_into_text", "padding_side": "left"}),
)


def find_binary() -> str | None:
    """compute-sanitizer on the PATH or in the CUDA toolkit that PyTorch finds."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    from torch.utils.cpp_extension import CUDA_HOME

    for folder in ("bin", "compute-sanitizer"):
        candidate = Path(CUDA_HOME or "") / folder / "compute-sanitizer"
        if CUDA_HOME and candidate.is_file():
            return str(candidate)
    return None


def work(device: torch.device, names: Sequence[str]) -> None:
    """What runs under the tool: every operator of these backends, held to the reference.

    Raises:
        AssertionError: a result is wrong.
    """

    for backend in names:
        for dtype, shape, batch, more in CONFIGURATIONS:
            made = make_inputs(Case("forward", shape, batch, dtype, 2), device, 0)
            results = []
            for name, where in ((backend, device), ("reference", torch.device("cpu"))):
                image, text = (rows.to(where).requires_grad_() for rows in (made.image, made.text))
                built = build_sequence(image, text, TAU, trim=False, backend=name, **more)
                assert built.embeds is not None
                gradients = torch.autograd.grad(built.embeds, [image, text], torch.ones_like(built.embeds))
                merge = merge_form(image.detach(), text.detach(), before=3)
                merged = merge_sequence(*merge, TAU, trim=True, backend=name, **more)
                planned = plan_sequence(*merge, TAU, trim=False, backend=name, **more)
                fields = (*built[:6], *gradients, *merged[:6], *planned[1:6])
                results.append([field.detach().cpu() for field in fields if field is not None])
            for one, other in zip(*results, strict=True):
                assert torch.equal(one, other), f"{backend}, {dtype}, {shape}, {more}: wrong"
        print(f"{backend}: right", flush=True)
    for way in smoke.ways(device, names):  # whatever the shape would choose
        ended = smoke.check(way, device, smoke.SHAPES[:1])
        print(way, ended["status"], flush=True)
        assert ended["status"] in ("right", "left out"), f"{way}: {ended}"


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--limit", type=float, default=100, help="seconds for each tool (default: %(default)s)")
    parser.add_argument("--tools", type=options.names(TOOLS), default=TOOLS, help="default: %(default)s")
    parser.add_argument("--backends", type=options.names(("cuda", "triton")), help="default: all that are here")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)


def main(given: argparse.Namespace) -> int:
    """Run the tools side by side and say what each found."""
    device = torch.device("cuda")
    if given.worker:
        work(device, given.backends or kernel_backends(device))
        return 0
    binary = find_binary()
    if binary is None:
        print("compute-sanitizer is not here; it comes with the CUDA toolkit")
        return UNAVAILABLE
    if missing := [name for name in given.backends or () if backends.why_not(name, "cuda")]:
        print(f"not here: {', '.join(missing)}")
        return UNAVAILABLE
    worker = [sys.executable, "-m", "benchmarks", "sanitize", "--worker"]
    worker += ["--backends", ",".join(given.backends)] if given.backends else []
    # Without the cache every tensor is an allocation of its own, beyond which memcheck sees.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    end = time.monotonic() + given.limit
    with tempfile.TemporaryDirectory() as folder:
        running = {}
        for tool in given.tools:
            log = (Path(folder) / tool).open("w+")
            command = [binary, "--tool", tool, "--error-exitcode", str(FOUND), *worker]
            process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
            running[tool] = (process, log)
        outcomes = [_outcome(tool, *running[tool], end) for tool in given.tools]
    return max(outcomes, key=lambda status: (status == 1, status))


def _outcome(tool: str, process: subprocess.Popen, log, end: float) -> int:
    try:
        status = process.wait(max(1.0, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        status = -1
    log.seek(0)
    text = log.read()
    log.close()
    if status == 0:
        verdict, result = "clean", 0
    elif any(sign in text for sign in CANNOT_RUN):
        verdict, result = "cannot run on this machine", UNAVAILABLE
    else:
        verdict, result = {FOUND: "errors found", -1: "ran past its limit"}.get(status, f"exit status {status}"), 1
    print(f"{tool}: {verdict}")
    if status != 0:
        print("\n".join(f"    {line}" for line in text.splitlines()[-40:]))
    return result
