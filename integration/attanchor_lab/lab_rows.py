"""Rows as JSON lines: every run says by itself what it was, on what machine, with which versions."""

from __future__ import annotations

import datetime
import functools
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from attanchor_vlm import provenance
from attanchor_vlm.records import Row, read_rows

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


def read(path: Path) -> list[Row]:
    """The rows of a file, or of the rows.jsonl in a folder; a last line that a kill cut short is left out.

    Raises:
        ValueError: the file is missing, or a line is no row of the laboratory, naming file and line.
    """
    file = path / "rows.jsonl" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is no file; it should be the rows.jsonl that `attanchor lab` wrote")
    found = read_rows(file)
    for number, row in enumerate(found, 1):
        if row.get("kind") not in ("plan", *KINDS):
            raise ValueError(f"{file}, row {number} is no row of the laboratory")
    return found


def key(row: Row) -> tuple[str, str, str, int]:
    """What a row is about: kind, setting (of a start: its key), arm, seed."""
    return row["kind"], row["setting"], row.get("arm", ""), row["seed"]


def latest(rows: Iterable[Row]) -> dict[tuple[str, str, str, int], Row]:
    """The last row of every run: a run that failed may have been repeated."""
    return {key(row): row for row in rows if row["kind"] in KINDS}
