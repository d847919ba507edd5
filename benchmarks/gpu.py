"""Everything that needs a GPU, by one command: `make gpu`, or `python -m benchmarks.gpu --output FOLDER`.

For a machine with its own PyTorch and no network. The repository need not be installed; the CUDA extension is built in
place. Every step is a process of its own with its own time limit, so that a hang costs one step; a failed step is
reported and the rest goes on. What brings the most evidence comes first: part 1 has ten minutes in all, part 2 five for
what is left. What no time is left for is skipped and said so.

The folder gets the rows, written as they come, and a summary and packed logs of each part, current after every step.
A step replaces the rows of an earlier run when it begins and leaves those of other steps alone. Without a GPU the same
steps run at toy sizes, as a rehearsal, into a folder that no GPU has filled.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from attanchor_vlm.records import write_atomically
from benchmarks import targets
from benchmarks.options import UNAVAILABLE, end, heed_sigterm
from benchmarks.rows import ROOT, of_newest_gpu, read, write_text

TOTAL = {1: 570.0, 2: 280.0}  # seconds for everything
TAIL = 15  # lines of a failed step's log that are printed


class Step(NamedTuple):
    """Commands that run one after the other until one fails, within `limit` seconds together."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    part: int = 1
    environment: tuple[tuple[str, str], ...] = ()
    writes: str = ""  # file in the output folder
    least: float = 15.0  # seconds, of which less are no use


class Outcome(NamedTuple):
    """How a step ended: "passed", "failed", "timed out", "not available" or "skipped"."""

    step: str
    status: str
    seconds: float
    detail: str


ENVIRONMENT = """
import subprocess
from benchmarks.rows import environment
from torch.utils.cpp_extension import CUDA_HOME
for name, value in {**environment("cuda"), "CUDA_HOME": CUDA_HOME}.items():
    print(f"{name:<14}{value}")
try:
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20).stdout)
except OSError as error:
    print(f"nvidia-smi: {error}")
"""
PROBE = """
import json, torch
gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
print(json.dumps([gpu.name, gpu.major, gpu.minor, gpu.total_memory] if gpu else None))
"""
LACKING = f"print('this machine lacks what it takes'); raise SystemExit({UNAVAILABLE})"
IMPORT = "import attanchor_kernels._C"
# What limits the four shapes' construct kernels, by Nsight Compute: a launch each, cold.
SECTIONS = ("SpeedOfLight", "LaunchStats", "Occupancy", "MemoryWorkloadAnalysis", "WarpStateStats")
PROFILED = """
import torch
from benchmarks import cases
for shape in cases.SHAPES:
    case = cases.Case("forward", shape, 8)
    inputs = cases.make_inputs(case, torch.device("cuda"), 0)
    print(case.label, cases.launched("cuda", case, inputs), flush=True)
    torch.cuda.synchronize()
"""


class Gpu(NamedTuple):
    """What the steps depend on: compute capability, and memory in bytes."""

    name: str
    major: int
    minor: int
    memory: int


def find_gpu(python: str, limit: float = 60.0) -> Gpu | None:
    """The first GPU, or None. Asked in a process of its own: a driver that hangs must not hang the run.

    Raises:
        RuntimeError: PyTorch gave no answer.
    """
    try:
        done = subprocess.run([python, "-c", PROBE], capture_output=True, text=True, timeout=limit, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"PyTorch did not say within {limit:.0f} s whether there is a GPU") from None
    except subprocess.CalledProcessError as error:
        raise RuntimeError(f"PyTorch cannot be asked for a GPU:\n{error.stderr[-2000:]}") from None
    return Gpu(*found) if found else None


def steps(python: str, gpu: Gpu | None, output: Path) -> list[Step]:
    """All steps, the most valuable first; without a GPU at toy sizes."""
    device = "cpu" if gpu is None else "cuda"

    def measuring(name: str, limit: float, part: int, command: str, *more: str) -> Step:
        file = f"{name}.jsonl"
        line = (python, "-m", "benchmarks", command, "--device", device, "--output", str(output / file), *more)
        return Step(name, (line,), limit, part, writes=file)

    def roofline(name: str, limit: float, part: int, backends: str, *more: str) -> Step:
        kernels = (
            ("--passes", "kernels", "--smoke", str(output / "smoke.jsonl"))
            if gpu
            else ("--passes", "kernels", "--batches", "1")
        )
        chosen = ("--backends", backends) if gpu and backends else ()
        return measuring(name, limit, part, "roofline", *more, *chosen, *kernels)

    workers = _workers(gpu)
    threads = (("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers))),)
    # The repository's own options name plugins that a GPU machine may lack.
    pytest = (python, "-m", "pytest", "-o", "addopts=-ra", "-p", "no:cacheprovider")
    tests = (*pytest, "-v", "--durations", "10", "-o", "faulthandler_timeout=90")
    tests += (*(("-n", str(workers)) if workers > 1 else ()), *_hangs(), "--ignore", "tests/gpu/test_gpu_sanitizer.py")
    quick = ("--benchmark-max-time", "0.05", "--benchmark-min-rounds", "3", "--benchmark-warmup", "off")
    timed = (*pytest, "-q", "--benchmark-enable", *quick, "benchmarks/test_operators.py")
    build = _on_gpu(python, gpu, (python, "setup.py", "build_ext", "--inplace"), (python, "-c", IMPORT))
    profile = ("ncu", "--kernel-name", "regex:construct", *(word for one in SECTIONS for word in ("--section", one)))
    main = ("--batches", "8,1,32") if gpu else ()
    sanitize = (python, "-m", "benchmarks", "sanitize")

    def built(part: int) -> Step:
        """Of both parts: a part may be the first that runs on its machine, and would measure Triton alone."""
        return Step("build", build, 120, part, _build_environment(gpu))

    return [
        Step("environment", ((python, "-c", ENVIRONMENT),), 40),
        built(1),
        # Of Triton every result is checked where it is measured.
        measuring("smoke", 60, 1, "smoke", *(("--backends", "cuda") if gpu else ())),
        roofline("roofline-cuda", 75, 1, "cuda", "--operations", "forward", *main),
        measuring("tune", 70, 1, "tune", "--backends", "cuda", "--batches", "8,1,32", "--limit", "55"),
        Step("profile", _on_gpu(python, gpu if shutil.which("ncu") else None, (*profile, python, "-c", PROFILED)), 45),
        roofline("roofline-triton", 90, 1, "triton", "--operations", "forward", *main),
        roofline("roofline", 90, 1, "", "--operations", "backward,merge", *main),
        # Its own limit ends first, so that it can still say what it found.
        Step("sanitizer", ((*sanitize, "--tools", "memcheck,synccheck", "--backends", "cuda", "--limit", "50"),), 65),
        Step("tests", ((*tests, "tests/gpu"),), 240, environment=threads, least=30.0),
        built(2),
        measuring("phases", 110, 2, "phases")._replace(environment=_build_environment(gpu)),  # it builds, too
        measuring("overhead", 110, 2, "overhead", "--whole"),
        measuring("baselines", 90, 2, "roofline", "--passes", "baselines"),
        measuring("tune-drop", 45, 2, "tune", "--operations", "drop", "--batches", "8", "--limit", "35"),
        measuring("training", 45, 2, "training"),
        measuring("sweep", 60, 2, "overhead", "--sweep"),
        roofline("roofline-large", 60, 2, "", "--batches", "64,4" if gpu else "1"),
        Step("racecheck", ((*sanitize, "--limit", "80"),), 95, 2, least=60.0),
        Step("launches", (timed,), 60, 2),
    ]


def _on_gpu(python: str, gpu: Gpu | None, *commands: tuple[str, ...]) -> tuple[tuple[str, ...], ...]:
    return commands if gpu is not None else ((python, "-c", LACKING),)


def _build_environment(gpu: Gpu | None) -> tuple[tuple[str, str], ...]:
    """The build is forced, for the GPU that is here unless the caller names architectures."""
    if gpu is None:
        return ()
    forced = (("ATTANCHOR_BUILD_CUDA", "1"),)
    if "ATTANCHOR_CUDA_ARCHS" in os.environ:
        return forced
    newer = "90+PTX" if gpu[1:3] > (9, 0) else "80+PTX"  # clusters begin with 9.0
    return (*forced, ("ATTANCHOR_CUDA_ARCHS", {(9, 0): "90a", (10, 0): "100a"}.get(gpu[1:3], newer)))


def _workers(gpu: Gpu | None) -> int:
    """Test processes that share the GPU, so that many compile while one runs: as many as its memory holds."""
    if gpu is None or not importlib.util.find_spec("xdist"):
        return 1
    return max(1, min(12, os.cpu_count() or 1, gpu.memory // 2**33))


def _hangs() -> tuple[str, ...]:
    """Where pytest-timeout is there, a test that hangs costs itself alone."""
    return ("--timeout", "100", "--timeout-method", "thread") if importlib.util.find_spec("pytest_timeout") else ()


def run(step: Step, log: Path, limit: float) -> Outcome:
    """Run a step in a process group of its own, which is ended as a whole at the limit; output goes to `log`."""
    begin = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "integration"), os.environ.get("PYTHONPATH", "")]),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        **dict(step.environment),
    }
    status = 0
    with log.open("w", encoding="utf-8") as file:
        for command in step.commands:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                status = process.wait(max(1.0, limit - (time.monotonic() - begin)))
            except subprocess.TimeoutExpired:
                return Outcome(step.name, "timed out", time.monotonic() - begin, f"limit {limit:.0f} s")
            finally:
                end(process)
            if status:
                break
    names = {0: "passed", UNAVAILABLE: "not available"}
    return Outcome(step.name, names.get(status, "failed"), time.monotonic() - begin, _last_line(log))


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _last_line(log: Path) -> str:
    lines = _lines(log)
    return lines[-1].strip("= ")[:110] if lines else ""


def table(outcomes: list[Outcome]) -> str:
    """One line for each step."""
    return "\n".join(f"{one.step:<15}{one.status:<15}{one.seconds:>7.1f} s  {one.detail}" for one in outcomes)


def _keep(output: Path, part: int, logs: Path, outcomes: list[Outcome]) -> None:
    """Everything known so far, so that a run that is cut short keeps it."""

    def pack(temporary: Path) -> None:
        with tarfile.open(temporary, mode="w:gz") as archive:
            for log in sorted(logs.iterdir()):
                archive.add(log, arcname=f"logs-part{part}/{log.name}")

    write_atomically(output / f"logs-part{part}.tar.gz", pack)
    judged = targets.summary(targets.judge(read(output)))
    write_text(output / f"summary-part{part}.txt", f"{table(outcomes)}\n\n{judged}")


def run_all(chosen: list[Step], output: Path, total: float, part: int = 1) -> list[Outcome]:
    """Run the steps and keep logs and summary; what no time is left for is skipped."""
    until = time.monotonic() + total
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(chosen, 1):
            left = until - time.monotonic()
            if left < min(step.least, step.limit):
                outcomes.append(Outcome(step.name, "skipped", 0.0, "no time left"))
                _keep(output, part, Path(folder), outcomes)
                continue
            log = Path(folder) / f"{number:02}-{step.name}.log"
            if step.writes:
                (output / step.writes).unlink(missing_ok=True)
            print(f"--- {step.name}", flush=True)
            outcomes.append(run(step, log, min(step.limit, left)))
            shown = _lines(log)[-TAIL:] if outcomes[-1].status in ("failed", "timed out") else []
            print("\n".join(["    " + line[:200] for line in shown] + [table(outcomes[-1:])]), flush=True)
            _keep(output, part, Path(folder), outcomes)
    return outcomes


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns 1 if one failed or hung."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-out"), help="folder (default: %(default)s)")
    parser.add_argument("--part", type=int, choices=list(TOTAL), default=1, help="(default: %(default)s)")
    parser.add_argument("--steps", help="only these, with commas between")
    parser.add_argument("--total", type=float, help=f"seconds for everything (default: by part {TOTAL})")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    options = parser.parse_args(arguments)
    begin = time.monotonic()

    try:
        gpu = None if options.device == "cpu" else find_gpu(sys.executable)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if gpu is None and options.device == "cuda":
        print("--device is cuda; PyTorch finds no GPU here", file=sys.stderr)
        return 1
    output = options.output.resolve()
    chosen = [step for step in steps(sys.executable, gpu, output) if step.part == options.part]
    if options.steps:
        names = options.steps.split(",")
        if unknown := sorted(set(names) - {step.name for step in chosen}):
            parser.error(f"--steps has {', '.join(unknown)}; known are {', '.join(step.name for step in chosen)}")
        chosen = [step for step in chosen if step.name in names]
    if gpu is None:
        if of_newest_gpu(read(output)):
            print(f"{output} is of a GPU, and a rehearsal would replace its rows; name another folder", file=sys.stderr)
            return 1
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print("no GPU is used: a rehearsal at toy sizes, whose figures mean nothing")
    output.mkdir(parents=True, exist_ok=True)
    heed_sigterm()
    total = options.total or TOTAL[options.part]
    outcomes = run_all(chosen, output, total - (time.monotonic() - begin), options.part)
    print(f"\n{(output / f'summary-part{options.part}.txt').read_text(encoding='utf-8')}\n{output}")
    return int(any(one.status in ("failed", "timed out") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
