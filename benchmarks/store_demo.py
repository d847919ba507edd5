"""Store a demonstration's results as a row, and its pictures beside the page that shows them."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from functools import partial
from pathlib import Path

from attanchor_vlm.records import write_atomically
from benchmarks.rows import IMAGES, RESULTS, Run

PICTURES = ("loss.png", "scenes.png", "photographs.png")
MAKE = "python -m benchmarks store-demo demo-out"


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
