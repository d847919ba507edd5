"""What a result came from: version, commit, packages, machine. No host or user name, and no path, is among them."""

from __future__ import annotations

import datetime
import functools
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path


def provenance() -> dict[str, str | None]:
    """`version`, `commit`, `torch`, `transformers`, `peft`, `python`, `device`, `processor` and `date` (UTC)."""
    import torch

    return {
        "version": version_of("attanchor-kernels"),
        "commit": commit(),
        "torch": torch.__version__,
        "transformers": version_of("transformers"),
        "peft": version_of("peft"),
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processor": processor(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


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
