"""Everything that needs a GPU, by one command: `make gpu`, or `python -m benchmarks.gpu --output FOLDER`.

For a machine with its own PyTorch and no network. The repository need not be installed; the CUDA extension is built in
place. Every step is a process of its own with its own time limit, so that a hang costs one step; a failed step is
reported and the rest goes on. The most valuable steps come first, and what no time is left for is skipped and said so.

The folder gets summary.json, summary.txt, logs.tar.gz and the rows, at most 8 files, current after every step; the
laboratory's plan and rows are in its folder `lab`. Without a GPU the same steps run at toy sizes, as a rehearsal.
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

from benchmarks.rows import ROOT, read, write_text

TOTAL = 525.0  # seconds for everything, by default
UNAVAILABLE = 3  # exit status of a step whose tool this machine lacks
TAIL = 15  # lines of a failed step's log that are printed


class Step(NamedTuple):
    """Commands that run one after the other until one fails, within `limit` seconds together."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    limit: float
    part: int = 1
    environment: tuple[tuple[str, str], ...] = ()


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

    def benchmark(name: str, file: str, *more: str) -> tuple[str, ...]:
        return (python, "-m", "benchmarks", name, "--device", device, "--output", str(output / file), *more)

    # The repository's own options name plugins that a GPU machine may lack.
    pytest = (python, "-m", "pytest", "-o", "addopts=-ra", "-p", "no:cacheprovider")
    tests = (
        *pytest,
        "-v",
        "--durations",
        "10",
        "-o",
        "faulthandler_timeout=90",
        *_workers(gpu),
        *_hangs(),
        "tests/gpu",
    )
    quick = ("--benchmark-max-time", "0.05", "--benchmark-min-rounds", "3", "--benchmark-warmup", "off")
    timed = (*pytest, "-q", "--benchmark-enable", *quick, "benchmarks/test_operators.py")
    laboratory = (python, "-m", "attanchor_vlm.cli", "lab", "--size", "gpu", "--output", str(output / "lab"))
    laboratory += ("--no-progress", *(("--rehearse",) if gpu is None else ()))
    build: tuple[tuple[str, ...], ...]
    build = ((python, "setup.py", "build_ext", "--inplace"), (python, "-c", "import attanchor_kernels._C"))
    if gpu is None:
        build = ((python, "-c", f"print('nothing to build without a GPU'); raise SystemExit({UNAVAILABLE})"),)
    return [
        Step("environment", ((python, "-c", ENVIRONMENT),), 40),
        Step("build", build, 150, environment=_build_environment(gpu)),
        Step("doctor", ((python, "-m", "attanchor_kernels.doctor"),), 60),
        # compute-sanitizer has a step of its own.
        Step("tests", ((*tests, "--ignore", "tests/gpu/test_gpu_sanitizer.py"),), 240),
        Step("roofline", (benchmark("roofline", "roofline.jsonl", "--passes", "kernels"),), 150),
        Step("overhead", (benchmark("overhead", "overhead.jsonl"),), 170, 2),
        Step("baselines", (benchmark("roofline", "roofline-baselines.jsonl", "--passes", "baselines"),), 180, 2),
        Step("sanitizer", ((python, "-m", "benchmarks.sanitize", "--limit", "90"),), 100, 2),
        Step("training", (benchmark("training", "training.jsonl"),), 80, 2),
        Step("sweep", (benchmark("overhead", "sweep.jsonl", "--sweep"),), 80, 2),
        Step("launches", (timed,), 60, 2),
        Step("laboratory", (laboratory,), 520, 3),
    ]


def _build_environment(gpu: Gpu | None) -> tuple[tuple[str, str], ...]:
    """The build is forced, for the GPU that is here unless the caller names architectures."""
    if gpu is None:
        return ()
    forced = (("ATTANCHOR_BUILD_CUDA", "1"),)
    if "ATTANCHOR_CUDA_ARCHS" in os.environ:
        return forced
    return (*forced, ("ATTANCHOR_CUDA_ARCHS", {(9, 0): "90a", (10, 0): "100a"}.get(gpu[1:3], "80+PTX")))


def _workers(gpu: Gpu | None) -> tuple[str, ...]:
    """Test processes that share the GPU, so that one compiles while another runs: as many as its memory holds."""
    count = min(8, os.cpu_count() or 1, gpu.memory // 2**34) if gpu else 0
    return ("-n", str(count)) if count > 1 and importlib.util.find_spec("xdist") else ()


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
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                return Outcome(step.name, "timed out", time.monotonic() - begin, f"limit {limit:.0f} s")
            finally:
                _end_group(process.pid)
            if status:
                break
    names = {0: "passed", UNAVAILABLE: "not available"}
    return Outcome(step.name, names.get(status, "failed"), time.monotonic() - begin, _last_line(log))


def _end_group(group: int) -> None:
    """Children that a step left behind would disturb the next one's figures."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def _lines(log: Path) -> list[str]:
    return [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]


def _last_line(log: Path) -> str:
    lines = _lines(log)
    return lines[-1].strip("= ")[:110] if lines else ""


def table(outcomes: list[Outcome]) -> str:
    """One line for each step."""
    return "\n".join(f"{one.step:<13}{one.status:<15}{one.seconds:>7.1f} s  {one.detail}" for one in outcomes)


def _keep(output: Path, logs: Path, outcomes: list[Outcome], about: dict[str, Any]) -> None:
    """Everything known so far, so that a run that is cut short keeps it."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for log in sorted(logs.iterdir()):
            archive.add(log, arcname=f"logs/{log.name}")
    temporary = output / ".logs.tar.gz"
    temporary.write_bytes(packed.getvalue())
    os.replace(temporary, output / "logs.tar.gz")
    summary = {**about, "steps": [one._asdict() for one in outcomes]}
    write_text(output / "summary.json", json.dumps(summary, indent=1) + "\n")


def run_all(chosen: list[Step], output: Path, total: float, about: dict[str, Any]) -> list[Outcome]:
    """Run the steps and keep logs and summary; what no time is left for is skipped."""
    end = time.monotonic() + total
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, step in enumerate(chosen, 1):
            left = end - time.monotonic()
            if left < min(15.0, step.limit):
                outcomes.append(Outcome(step.name, "skipped", 0.0, "no time left"))
                continue
            log = Path(folder) / f"{number:02}-{step.name}.log"
            print(f"--- {step.name}", flush=True)
            outcomes.append(run(step, log, min(step.limit, left)))
            shown = _lines(log)[-TAIL:] if outcomes[-1].status in ("failed", "timed out") else []
            print("\n".join(["    " + line[:200] for line in shown] + [table(outcomes[-1:])]), flush=True)
            _keep(output, Path(folder), outcomes, about)
    return outcomes


def _prepare(output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    for stale in [*output.glob("*.jsonl"), *output.glob("summary.*"), *output.glob("logs.tar.gz")]:
        stale.unlink()
    shutil.rmtree(output / "lab", ignore_errors=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; returns 1 if one failed or hung."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("gpu-out"), help="folder (default: %(default)s)")
    parser.add_argument("--part", type=int, choices=[1, 2, 3], help="operators, models, or the laboratory")
    parser.add_argument("--steps", help="only these, with commas between")
    parser.add_argument("--total", type=float, default=TOTAL, help="seconds for everything (default: %(default)s)")
    parser.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto")
    options = parser.parse_args(arguments)

    try:
        gpu = None if options.device == "cpu" else find_gpu(sys.executable)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    if gpu is None and options.device == "cuda":
        print("--device is cuda; PyTorch finds no GPU here", file=sys.stderr)
        return 1
    output = options.output.resolve()
    chosen = [step for step in steps(sys.executable, gpu, output) if options.part in (None, step.part)]
    if options.steps:
        names = options.steps.split(",")
        if unknown := sorted(set(names) - {step.name for step in chosen}):
            parser.error(f"--steps has {', '.join(unknown)}; known are {', '.join(step.name for step in chosen)}")
        chosen = [step for step in chosen if step.name in names]
    if gpu is None:
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        print("no GPU is used: a rehearsal at toy sizes, whose figures mean nothing")
    _prepare(output)
    about = {"gpu": gpu.name if gpu else "none", "part": options.part, "torch": torch.__version__}
    outcomes = run_all(chosen, output, options.total, about)

    from benchmarks import targets

    text = table(outcomes) + "\n\n" + targets.summary(targets.judge(read(output))) + "\n"
    write_text(output / "summary.txt", text)
    print("\n" + text + f"\n{output}")
    return int(any(one.status in ("failed", "timed out") for one in outcomes))


if __name__ == "__main__":
    sys.exit(main())
