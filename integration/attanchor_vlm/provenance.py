"""What a result came from: versions, commit, machine. No host or user name, and no path, is among them."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def environment(device: str | None = None, *left_out: str) -> dict[str, str | int]:
    """What every row of the library, the laboratory and the benchmarks says of where it comes from.

    `version`, `commit`, `date` (UTC), `torch`, `triton`, `transformers`, `peft`, `python`, `device` ("cpu" or "cuda"),
    `gpu`, `driver`, `cuda`, `processor`, `cores`, `threads`. What is not there is "none", "unknown" or "not installed".

    Args:
        device: What was computed on; None for the GPU if there is one.
        left_out: As for `commit`.
    """
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    has_gpu = device != "cpu" and torch.cuda.is_available()
    return {
        "version": version_of("attanchor-kernels") or "not installed",
        "commit": commit(*left_out) or "unknown",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "torch": torch.__version__,
        **{name: version_of(name) or "not installed" for name in ("triton", "transformers", "peft")},
        "python": platform.python_version(),
        "device": device,
        "gpu": torch.cuda.get_device_name() if has_gpu else "none",
        "driver": _driver() if has_gpu else "none",
        "cuda": torch.version.cuda or torch.version.hip or "none",
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
        "threads": torch.get_num_threads(),
    }


@functools.cache
def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.split()
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return found[0] if found else "unknown"


def version_of(package: str) -> str | None:
    """The installed version; None if there is none."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


@functools.cache
def processor() -> str:
    """The CPU's name: `platform` knows only its architecture on Linux."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def commit(*left_out: str) -> str | None:
    """The commit of the working tree that this package is imported from, with "+changes" if a tracked file differs.

    None for an installed package, also where it is installed below another project's working tree. GIT_COMMIT names it
    where the files travel without their history.

    Args:
        left_out: Paths from the tree's root whose changes do not count, such as a folder that results are written to.
    """
    folder = Path(__file__).resolve().parent
    try:
        _git(folder, "ls-files", "--error-unmatch", "provenance.py")
        paths = ["--", ":/", *(f":(top,exclude){path}" for path in left_out)]
        changed = _git(folder, "status", "--porcelain", "--untracked-files=no", *paths)
        return _git(folder, "rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return os.environ.get("GIT_COMMIT")


def _git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
