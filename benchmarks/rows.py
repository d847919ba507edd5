"""Results as JSON lines: every row says by itself what was measured, on what, with which versions."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import sys
import traceback
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from attanchor_vlm import provenance
from attanchor_vlm.records import Row, markdown_table, read_rows, write_text

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
IMAGES = ROOT / "docs" / "images"


class BadRows(ValueError):
    """A file of rows that is none."""


@functools.cache
def environment(device: str = "cpu") -> Row:
    """Commit, device, driver and versions: part of every row. Files that a run writes do not count as changes."""
    return provenance.environment(device, "benchmarks/results")


def write(path: Path, rows: Iterable[Row]) -> None:
    """One JSON object a line, keys in the order in which they were put in."""
    write_text(path, "".join(json.dumps(row) + "\n" for row in rows))


def read(path: Path) -> list[Row]:
    """The rows of one file, or of every .jsonl file of a folder; none if there is no such file or folder.

    Raises:
        BadRows: a line is no JSON object, naming file and line.
    """
    try:
        return [row for file in (sorted(path.glob("*.jsonl")) if path.is_dir() else [path]) for row in read_rows(file)]
    except ValueError as error:
        raise BadRows(str(error)) from None


def of_newest_gpu(rows: list[Row]) -> list[Row]:
    """The rows of the GPU that the newest row names: figures of two GPUs are not to be mixed. None without a GPU."""
    measured = [row for row in rows if row.get("gpu", "none") != "none"]
    newest = max(measured, key=lambda row: row["date"], default=None)
    return [row for row in measured if newest is not None and row["gpu"] == newest["gpu"]]


def latest(rows: Iterable[Row], *keys: str) -> dict[tuple[Any, ...], Row]:
    """The last row of each combination of values under these keys, None where a row lacks one."""
    return {tuple(row.get(key) for key in keys): row for row in rows}


def ratio(row: Row, part: str) -> str:
    """What became of a part: the median over the pairs and its quartiles, and whether they say anything."""
    low, middle, high = (row[f"{part}_ratio{which}"] for which in ("_q1", "", "_q3"))
    return f"{middle:.3g} x [{low:.3g}, {high:.3g}]" + (", within the spread" if row[f"{part}_within_spread"] else "")


def span(low: str, high: str) -> str:
    """From the one to the other; once where they read alike."""
    return low if low == high else f"{low} to {high}"


def table(head: list[str], lines: Iterable[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(markdown_table(head, list(lines), words=len(head))) + "\n"


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
