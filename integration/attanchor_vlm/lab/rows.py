"""Rows as JSON lines: every run says by itself what it was, on what machine, with which versions."""

from __future__ import annotations

import datetime
import functools
import json
import os
import platform
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from attanchor_vlm import provenance

Row = dict[str, Any]
KINDS = ("start", "run")  # of rows: the weights before stage 2, and a run of one arm
STATUSES = ("done", "failed")


@functools.cache
def environment(device: str) -> Row:
    """Commit, device and versions. The commit is "unknown" for an installed package; changes to docs, which reports are
    written to, do not count as changes."""
    import torch

    gpu = torch.cuda.get_device_name() if device == "cuda" and torch.cuda.is_available() else "none"
    return {
        "commit": provenance.commit("docs") or "unknown",
        "device": device,
        "gpu": gpu,
        "torch": torch.__version__,
        "transformers": provenance.version_of("transformers") or "not installed",
        "peft": provenance.version_of("peft") or "not installed",
        "attanchor": provenance.version_of("attanchor-kernels") or "not installed",
        "python": platform.python_version(),
        "processor": provenance.processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def load_average() -> float | None:
    """Processes that wanted a core over the last minute, or None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


def append(path: Path, row: Row) -> None:
    """Add one row. A line that a kill cut short is ended first, so that it does not take this one with it."""
    line = json.dumps(row, allow_nan=False) + "\n"
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read(paths: Path | Sequence[Path], cut_short: bool = False) -> list[Row]:
    """The rows of files and of every rows.jsonl in folders.

    Args:
        cut_short: Skip lines that are no JSON, which a kill may leave.

    Raises:
        ValueError: a file is missing, or a line is no row of the laboratory, naming file and line.
    """
    found: list[Row] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        file = path / "rows.jsonl" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file} is no file; it should be the rows.jsonl that `attanchor lab` wrote")
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                if cut_short:
                    continue
                raise ValueError(f"{file}, line {number} is no JSON: {error}") from error
            if not isinstance(row, dict) or row.get("kind") not in ("plan", *KINDS):
                raise ValueError(f"{file}, line {number} is no row of the laboratory")
            found.append(row)
    return found


def key(row: Row) -> tuple[str, str, str, int]:
    """What a row is about: kind, setting (of a start: its key), arm, seed."""
    return row["kind"], row["setting"], row.get("arm", ""), row["seed"]


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], Row]:
    """The last row of every run: a run that failed may have been repeated."""
    return {key(row): row for row in rows if row["kind"] in KINDS}
