"""Two sets of rows side by side: what became slower by more than a threshold fails."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import Row, latest, read

# What makes two rows figures of the same thing. Keys that a run does not have are None.
IDENTITY = (
    *("run", "measure", "operation", "model", "shape", "image", "text", "hidden", "batch", "dtype", "max_anchors"),
    *("inserted", "keep", "side", "new_tokens", "share", "backend", "method", "trim", "grad", "on_threads"),
)
HARDWARE = ("gpu", "processor")
# Figures that are compared; less is better.
FIGURES = ("us", "peak_bytes", "construction_us", "prefill_us", "step_us", "train_step_us")


class Change(NamedTuple):
    """One figure that both sets have. `percent` > 0 means worse; what comes from nothing is worse beyond any."""

    name: str
    figure: str
    before: float
    after: float

    @property
    def percent(self) -> float:
        if self.before == 0:
            return math.inf if self.after else 0.0
        return 100 * (self.after / self.before - 1)

    def __str__(self) -> str:
        return f"{self.figure} {self.before:g} -> {self.after:g} ({self.percent:+.1f} %)  {self.name}"


def changes(before: list[Row], after: list[Row]) -> tuple[list[Change], list[str]]:
    """Every figure that both sets have, and the names of the rows of `before` that `after` lacks.

    Of several rows for the same thing the last one counts. On a GPU the processor does not tell rows apart.
    """
    later = latest(after, *IDENTITY)
    found: list[Change] = []
    missing: list[str] = []
    for key, row in latest(before, *IDENTITY).items():
        name = " ".join(f"{field}={value}" for field, value in zip(IDENTITY, key, strict=True) if value is not None)
        if key not in later:
            missing.append(name)
            continue
        both = [figure for figure in FIGURES if None not in (row.get(figure), later[key].get(figure))]
        found += [Change(name, figure, row[figure], later[key][figure]) for figure in both]
    return found, missing


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
            print(f"{title}: {change}")
    for name in missing:
        print(f"missing: {name}")
    counts = f"{len(worse)} worse, {len(better)} better, {len(missing)} missing"
    print(f"{len(found)} figures compared at {options.threshold:g} %: {counts}")
    return int(bool(worse or missing))
