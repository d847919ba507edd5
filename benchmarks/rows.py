"""Results as JSON lines: every row says by itself what was measured, on what, with which versions."""

from __future__ import annotations

import contextlib
import datetime
import functools
import gc
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

Row = dict[str, Any]
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = ROOT / "docs" / "images"


class BadRows(ValueError):
    """A file of rows that is none."""


def _output_of(*command: str) -> str:
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    """The CPU's name: `platform` knows only its architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def environment(device: str = "cpu") -> Row:
    """Commit, device, driver and versions: part of every row.

    The commit is "unknown" outside a checkout; GIT_COMMIT names it where the files travel without their history.
    """
    commit = _output_of("git", "rev-parse", "--short=12", "HEAD") or os.environ.get("GIT_COMMIT", "unknown")
    changed = _output_of("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    row: Row = {
        "commit": commit + ("+changes" if changed else ""),
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
        "gpu": "none",
        "driver": "none",
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }
    if device != "cpu" and torch.cuda.is_available():
        row["gpu"] = torch.cuda.get_device_name()
        drivers = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        row["driver"] = drivers.splitlines()[0] if drivers else "unknown"
    return row


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing: written under a temporary name in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name + ".")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, keys in the order in which they were put in."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[Row]:
    """The rows of one file, or of every .jsonl file of a folder; none if there is no such file or folder.

    Raises:
        BadRows: a line is no JSON object, naming file and line.
    """
    files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path] if path.exists() else []
    found: list[Row] = []
    for file in files:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise BadRows(f"{file}, line {number} is no JSON: {error}") from error
            if not isinstance(row, dict):
                raise BadRows(f"{file}, line {number} is {type(row).__name__}; it should be a JSON object")
            found.append(row)
    return found


def of_newest_gpu(rows: list[Row]) -> list[Row]:
    """The rows of the GPU that the newest row names: figures of two GPUs are not to be mixed. None without a GPU."""
    measured = [row for row in rows if row.get("gpu", "none") != "none"]
    newest = max(measured, key=lambda row: row["date"], default=None)
    return [row for row in measured if newest is not None and row["gpu"] == newest["gpu"]]


def ratio(row: Row, part: str) -> str:
    """What became of a part: the median over the pairs and its quartiles, and whether they say anything."""
    low, middle, high = (row[f"{part}_ratio{which}"] for which in ("_q1", "", "_q3"))
    return f"{middle:.3g} x [{low:.3g}, {high:.3g}]" + (", within the spread" if row[f"{part}_within_spread"] else "")


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


class Run:
    """One run of a command: its device, its rows, what failed in it.

    The file is rewritten after every row, so that a run cut short keeps what it measured.
    """

    def __init__(self, path: Path, device: str, run: str, dtype: str | None = None) -> None:
        self.path, self.run = path, run
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, dtype or ("float32" if device == "cpu" else "bfloat16"))
        self.rows: list[Row] = []
        self.failed: list[str] = []

    def add(self, row: Row) -> Row:
        row = {"run": self.run, **row, **environment(self.device.type)}
        self.rows.append(row)
        write(self.path, self.rows)
        return row

    @contextlib.contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """A failure inside is told, kept for the end, and costs nothing else its figures.

        What does not fit into the device's memory is left out, and said so.
        """
        try:
            yield
        except Exception as error:
            if isinstance(error, torch.OutOfMemoryError):
                print(f"{what}: not enough memory, not measured", flush=True)
            else:
                self.failed.append(f"{what}: {type(error).__name__}: {error}".partition("\n")[0])
                print(f"{what} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
            traceback.clear_frames(error.__traceback__)  # they may hold tensors, which the error outlives
        self.release()

    def release(self) -> None:
        """Give back what nothing holds any more: a model of 14 GB must be gone before the next one comes."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def status(self) -> int:
        """The command's exit status; what failed is told once more."""
        for what in self.failed:
            print(f"wrong or missing: {what}", file=sys.stderr)
        return int(bool(self.failed))
