"""A demonstration's results as a stored row, and as the README's table."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from attanchor_vlm.records import write_atomically
from benchmarks.rows import IMAGES, RESULTS, Row, Run

PICTURES = ("loss.png", "scenes.png", "photographs.png")
KINDS = ("existence", "colour", "place", "mean")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("demo", type=Path, help="folder that `make demo` wrote")
    parser.add_argument("--images", type=Path, default=IMAGES, help="folder of the README's pictures")


def main(options: argparse.Namespace) -> int:
    """Store `results.json` as a row, and the pictures beside the README's. Returns 2 if the folder holds no demo."""
    missing = [name for name in ("results.json", *PICTURES) if not (options.demo / name).is_file()]
    if missing:
        print(f"{options.demo} lacks {', '.join(missing)}; give the folder that `make demo` wrote", file=sys.stderr)
        return 2
    results = json.loads((options.demo / "results.json").read_text(encoding="utf-8"))
    for name in PICTURES:
        write_atomically(options.images / f"demo-{name}", partial(shutil.copyfile, options.demo / name))
    Run(RESULTS / "demo.jsonl", "cpu", "demo").add(results)
    return 0


def lines_of(row: Row) -> list[list[str]]:
    """The table's lines: the model before fine-tuning, then each arm."""

    def accuracies(of: dict[str, float]) -> list[str]:
        return [f"{100 * of[kind]:.1f}" for kind in KINDS]

    lines = [["before fine-tuning", "", "", *accuracies(row["before"]), "", ""]]
    for arm in row["arms"]:
        share, seconds = arm["inserted_share"]["test"], arm["train_seconds"]
        figures = [f"{arm['tau']:.3f}", f"{arm['val_loss']:.4f}", *accuracies(arm["accuracy"])]
        lines.append([arm["name"], *figures, f"{100 * share:.1f} %", f"{seconds:.0f} s"])
    return lines


HEAD = ["", "tau", "validation loss", *KINDS, "inserted", "training"]
EXPLAINED = "Accuracy in percent on {questions} test questions; inserted: anchors over the text tokens that take part."
MAKE = "python -m benchmarks store-demo demo-out"
