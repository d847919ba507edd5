"""Two sets of rows side by side: what became slower by more than a threshold fails."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import Row, read

# What makes two rows figures of the same thing. Keys that a run does not have are None.
IDENTITY = (
    *("run", "measure", "operation", "model", "shape", "image", "text", "hidden", "batch", "dtype", "max_anchors"),
    *("inserted", "keep", "side", "new_tokens", "share", "backend", "method", "trim", "grad", "on_threads"),
)
HARDWARE = ("gpu", "processor")
# Figures that are compared; less is better.
FIGURES = ("us", "peak_bytes", "construction_us", "prefill_us", "step_us", "train_step_us")


class Change(NamedTuple):
    """One figure that both sets have. `percent` > 0 means worse."""

    name: str
    figure: str
    before: float
    after: float
    percent: float


def identity(row: Row) -> tuple:
    return tuple(row.get(key) for key in IDENTITY)


def changes(before: list[Row], after: list[Row]) -> tuple[list[Change], list[str]]:
    """Every figure that both sets have, and the names of the rows of `before` that `after` lacks.

    Of several rows for the same thing the last one counts. On a GPU the processor does not tell rows apart.
    """
    later = {identity(row): row for row in after}
    found: list[Change] = []
    missing: list[str] = []
    for key, row in {identity(row): row for row in before}.items():
        name = " ".join(f"{field}={value}" for field, value in zip(IDENTITY, key, strict=True) if value is not None)
        if key not in later:
            missing.append(name)
            continue
        for figure in FIGURES:
            old, new = row.get(figure), later[key].get(figure)
            if old is None or new is None:
                continue
            found.append(Change(name, figure, old, new, _worse_by(old, new)))
    return found, missing


def _worse_by(old: float, new: float) -> float:
    """Percent; what comes from nothing is worse beyond any."""
    if old == 0:
        return math.inf if new else 0.0
    return 100 * (new / old - 1)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("before", type=Path, help="a .jsonl file, or a folder of them")
    parser.add_argument("after", type=Path)
    parser.add_argument("--threshold", type=float, default=5.0, help="percent slower that fails (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    """Print what changed. Returns 1 for a regression or a lost row, 2 if the sets have nothing in common."""
    for path in (options.before, options.after):
        if not path.exists():
            print(f"{path} is not there; give a .jsonl file or a folder of them", file=sys.stderr)
            return 2
    before, after = read(options.before), read(options.after)
    found, missing = changes(before, after)
    if not found:
        print(f"{options.before} and {options.after} have no figure in common", file=sys.stderr)
        return 2
    for key in HARDWARE:
        machines = [{row.get(key) for row in rows} for rows in (before, after)]
        if machines[0] != machines[1]:
            print(f"warning: {key} differs: {machines[0]} and {machines[1]}", file=sys.stderr)
    worse = [change for change in found if change.percent > options.threshold]
    better = [change for change in found if change.percent < -options.threshold]
    for title, group in (("worse", worse), ("better", better)):
        for change in sorted(group, key=lambda change: -abs(change.percent)):
            print(
                f"{title}: {change.figure} {change.before:g} -> {change.after:g} "
                f"({change.percent:+.1f} %)  {change.name}"
            )
    for name in missing:
        print(f"missing: {name}")
    print(
        f"{len(found)} figures compared at {options.threshold:g} %: {len(worse)} worse, {len(better)} better, "
        f"{len(missing)} missing"
    )
    return int(bool(worse or missing))
