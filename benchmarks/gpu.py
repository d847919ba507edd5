"""Everything that needs a GPU, by one command: `make gpu`, or `python -m benchmarks.gpu --output FOLDER`.

For a machine with its own PyTorch and no network. The repository need not be installed; the CUDA extension is built in
place. Every step is a process of its own with its own time limit, so that a hang costs one step; a failed step is
reported and the rest goes on. The most valuable steps come first, and what no time is left for is skipped and said so.

The folder gets the rows, and summary.json, summary.txt and logs.tar.gz, current after every step and named after the
part that they are of. A step replaces the rows of an earlier run when it begins and leaves those of other steps alone,
so that three parts fill one folder. The laboratory's plan and rows are in its folder `lab`. Without a GPU the same
steps run at toy sizes, as a rehearsal, into a folder that no GPU has filled.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import targets
from benchmarks.rows import ROOT, read, write_text

TOTAL = 525.0  # seconds for everything, by default
UNAVAILABLE = 3  # exit status of a step whose tool this machine lacks
TAIL = 15  # lines of a failed step's log that are printed


class Step(NamedTuple):
    """Commands that run one after the other until one fails, within `limit` seconds together."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    parts: tuple[int, ...] = (1,)
    environment: tuple[tuple[str, str], ...] = ()
    writes: str = ""  # file or folder in the output folder
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
for name, value in environment("cuda").items():
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

    def measuring(name: str, limit: float, part: int, file: str, command: str, *more: str) -> Step:
        line = (python, "-m", "benchmarks", command, "--device", device, "--output", str(output / file), *more)
        return Step(name, (line,), limit, (part,), writes=file)

    workers = _workers(gpu)
    threads = (("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers))),)
    # The repository's own options name plugins that a GPU machine may lack.
    pytest = (python, "-m", "pytest", "-o", "addopts=-ra", "-p", "no:cacheprovider")
    tests = (
        *pytest,
        "-v",
        "--durations",
        "10",
        "-o",
        "faulthandler_timeout=90",
        *(("-n", str(workers)) if workers > 1 else ()),
        *_hangs(),
        "tests/gpu",
    )
    quick = ("--benchmark-max-time", "0.05", "--benchmark-min-rounds", "3", "--benchmark-warmup", "off")
    timed = (*pytest, "-q", "--benchmark-enable", *quick, "benchmarks/test_operators.py")
    laboratory = (python, "-m", "attanchor_vlm.cli", "lab", "--size", "gpu", "--output", str(output / "lab"))
    # It ends by itself: what its limit cut off would be lost.
    laboratory += ("--no-progress", "--minutes", "7.5", *(("--rehearse",) if gpu is None else ()))
    build: tuple[tuple[str, ...], ...]
    build = ((python, "setup.py", "build_ext", "--inplace"), (python, "-c", "import attanchor_kernels._C"))
    if gpu is None:
        build = ((python, "-c", f"print('nothing to build without a GPU'); raise SystemExit({UNAVAILABLE})"),)
    return [
        Step("environment", ((python, "-c", ENVIRONMENT),), 40),
        # Of both parts that measure kernels: a part may be the first that runs on its machine.
        Step("build", build, 150, (1, 2), _build_environment(gpu)),
        Step("doctor", ((python, "-m", "attanchor_kernels.doctor"),), 60),
        # compute-sanitizer has a step of its own.
        Step("tests", ((*tests, "--ignore", "tests/gpu/test_gpu_sanitizer.py"),), 240, environment=threads),
        measuring("roofline", 150, 1, "roofline.jsonl", "roofline", "--passes", "kernels"),
        measuring("overhead", 170, 2, "overhead.jsonl", "overhead"),
        measuring("baselines", 230, 2, "roofline-baselines.jsonl", "roofline", "--passes", "baselines"),
        # Its own limit ends first, so that it can still say what it found.
        Step("sanitizer", ((python, "-m", "benchmarks.sanitize", "--limit", "80"),), 110, least=60.0),
        # Which of the compiled ways is fastest: bulk copies or not, tiles kept on chip or not.
        measuring(
            "variants", 70, 1, "tune.jsonl", "tune", "--backends", "cuda", "--batches", "8,1,32", "--limit", "50"
        ),
        measuring("training", 80, 2, "training.jsonl", "training"),
        measuring("sweep", 110, 2, "sweep.jsonl", "overhead", "--sweep"),
        Step("launches", (timed,), 60, (2,)),
        # Its first comparisons alone take minutes.
        Step("laboratory", (laboratory,), 520, (3,), writes="lab", least=240.0),
    ]


def _build_environment(gpu: Gpu | None) -> tuple[tuple[str, str], ...]:
    """The build is forced, for the GPU that is here unless the caller names architectures."""
    if gpu is None:
        return ()
    forced = (("ATTANCHOR_BUILD_CUDA", "1"),)
    if "ATTANCHOR_CUDA_ARCHS" in os.environ:
        return forced
    return (*forced, ("ATTANCHOR_CUDA_ARCHS", {(9, 0): "90a", (10, 0): "100a"}.get(gpu[1:3], "80+PTX")))


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
                _end(process)
            if status:
                break
    names = {0: "passed", UNAVAILABLE: "not available"}
    return Outcome(step.name, names.get(status, "failed"), time.monotonic() - begin, _last_line(log))


def _end(process: subprocess.Popen) -> None:
    """With all that it started: what a step leaves behind would disturb the next one's figures."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs in the driver may not even die: it is not waited for without end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _last_line(log: Path) -> str:
    lines = _lines(log)
    return lines[-1].strip("= ")[:110] if lines else ""


def table(outcomes: list[Outcome]) -> str:
    """One line for each step."""
    return "\n".join(f"{one.step:<13}{one.status:<15}{one.seconds:>7.1f} s  {one.detail}" for one in outcomes)


def _suffix(part: int | None) -> str:
    return f"-part{part}" if part else ""


def _keep(output: Path, logs: Path, outcomes: list[Outcome], about: dict[str, Any]) -> None:
    """Everything known so far, so that a run that is cut short keeps it."""
    suffix = _suffix(about.get("part"))
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for log in sorted(logs.iterdir()):
            archive.add(log, arcname=f"logs{suffix}/{log.name}")
    temporary = output / ".logs.tar.gz"
    temporary.write_bytes(packed.getvalue())
    os.replace(temporary, output / f"logs{suffix}.tar.gz")
    summary = {**about, "steps": [one._asdict() for one in outcomes]}
    write_text(output / f"summary{suffix}.json", json.dumps(summary, indent=1) + "\n")
    judged = targets.summary(targets.judge(read(output)))
    write_text(output / f"summary{suffix}.txt", f"{table(outcomes)}\n\n{judged}\n")


def run_all(chosen: list[Step], output: Path, total: float, about: dict[str, Any]) -> list[Outcome]:
    """Run the steps and keep logs and summary; what no time is left for is skipped."""
    end = time.monotonic() + total
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(chosen, 1):
            left = end - time.monotonic()
            if left < min(step.least, step.limit):
                outcomes.append(Outcome(step.name, "skipped", 0.0, "no time left"))
                _keep(output, Path(folder), outcomes, about)
                continue
            log = Path(folder) / f"{number:02}-{step.name}.log"
            if step.writes:
                _remove(output / step.writes)
            print(f"--- {step.name}", flush=True)
            outcomes.append(run(step, log, min(step.limit, left)))
            shown = _lines(log)[-TAIL:] if outcomes[-1].status in ("failed", "timed out") else []
            print("\n".join(["    " + line[:200] for line in shown] + [table(outcomes[-1:])]), flush=True)
            _keep(output, Path(folder), outcomes, about)
    return outcomes


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns 1 if one failed or hung."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-out"), help="folder (default: %(default)s)")
    parser.add_argument("--part", type=int, choices=[1, 2, 3], help="operators, models, or the laboratory")
    parser.add_argument("--steps", help="only these, with commas between")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything (default: %(default)s)")
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
    chosen = [step for step in steps(sys.executable, gpu, output) if options.part in (None, *step.parts)]
    if options.steps:
        names = options.steps.split(",")
        if unknown := sorted(set(names) - {step.name for step in chosen}):
            parser.error(f"--steps has {', '.join(unknown)}; known are {', '.join(step.name for step in chosen)}")
        chosen = [step for step in chosen if step.name in names]
    if gpu is None:
        if any(json.loads(path.read_text(encoding="utf-8"))["gpu"] != "none" for path in output.glob("summary*.json")):
            print(f"{output} is of a GPU, and a rehearsal would replace its rows; name another folder", file=sys.stderr)
            return 1
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print("no GPU is used: a rehearsal at toy sizes, whose figures mean nothing")
    output.mkdir(parents=True, exist_ok=True)
    about = {"gpu": gpu.name if gpu else "none", "part": options.part, "torch": torch.__version__}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the step that runs, as an interrupt does
    outcomes = run_all(chosen, output, options.total - (time.monotonic() - begin), about)
    shutil.rmtree(output / "lab" / "checkpoints", ignore_errors=True)  # what a laboratory cut short leaves is large
    print(f"\n{(output / f'summary{_suffix(options.part)}.txt').read_text(encoding='utf-8')}\n{output}")
    return int(any(one.status in ("failed", "timed out") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
