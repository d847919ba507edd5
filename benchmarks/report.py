"""The README's tables and plots, made from the stored rows alone, so that they can be checked to be current.

A block of the README between `<!-- generated: NAME -->` and `<!-- /generated -->` belongs to this command.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks import demonstration, plots, targets
from benchmarks.rows import ROOT, Row, of_newest_gpu, read, write_text

COMMAND = "python -m benchmarks report"
LABORATORY = "docs/lab/report.md"
NAMED = "## The comparisons named before the runs"
README_PLANS = ("cpu", "again", "long")  # those with six seeds, and the one whose plain arm learns longest
BLOCK = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /generated -->)", re.DOTALL)


def _hardware(rows: list[Row]) -> str:
    """Where the figures come from, one phrase; rows of several runs name all of them."""

    def said(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows))

    parts = [said("processor")]
    if rows[-1]["gpu"] != "none":
        parts = [said("gpu"), f"driver {said('driver')}", f"CUDA {said('cuda')}", f"Triton {said('triton')}"]
    return ", ".join([*parts, f"PyTorch {said('torch')}", f"commit {said('commit')}", said("date")])


def _made_by(rows: list[Row], command: str) -> str:
    return f"\n{_hardware(rows)}; measured by `{command}`, written by `{COMMAND}`.\n"


def _unmeasured(command: str) -> str:
    return f"Not measured yet: no rows of a GPU are stored. `make gpu` or `{command}` measures it.\n"


def _gpu_rows(rows: list[Row], run: str) -> list[Row]:
    return [row for row in of_newest_gpu(rows) if row.get("run") == run]


def _table(head: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines]) + "\n"


def roofline_block(rows: list[Row], image: str) -> str:
    """Forward and backward as a multiple of the floor, and the plot."""
    command = "python -m benchmarks roofline"
    rows = _gpu_rows(rows, "roofline")
    kernels = [row for row in rows if "ratio" in row]
    if not kernels:
        return _unmeasured(command)
    names = list(dict.fromkeys(row["backend"] for row in kernels))
    latest = {(row["operation"], row["shape"], row["batch"], row["backend"]): row for row in kernels}
    lines = []
    for operation, shape, batch in dict.fromkeys(key[:3] for key in latest):
        found = [latest.get((operation, shape, batch, name)) for name in names]
        floor = next(row["floor_us"] for row in found if row)
        cells = [f"{row['us']:.1f} us, {row['ratio']:.2f} x" if row else "" for row in found]
        lines.append([operation, shape, str(batch), f"{floor:.1f} us", *cells])
    lines.sort(key=lambda line: (line[0], line[1], int(line[2])))
    table = _table(["operation", "shape", "B", "floor", *names], lines)
    plot = f"\n![Time over the time of a copy of the same bytes]({image}/roofline.png)\n"
    return table + plot + _made_by(rows, command)


def overhead_block(rows: list[Row], image: str) -> str:
    """The three parts of the cost, by model, batch and length."""
    command = "python -m benchmarks overhead"
    rows = _gpu_rows(rows, "overhead")
    parts = [row for row in rows if row.get("measure") is None and "construction_us" in row]
    if not parts:
        return _unmeasured(command)
    latest = {(row["model"], row["batch"], row["new_tokens"]): row for row in parts}

    def share(row: Row, key: str) -> str:
        return f"{100 * row[key] / row['plain_us']:+.3f} %"

    lines = [
        [
            row["model"],
            str(row["batch"]),
            str(row["new_tokens"]),
            f"{row['plain_us'] / 1e3:.2f} ms",
            *(share(row, key) for key in ("construction_us", "prefill_us", "decode_us")),
            share({**row, "all": row["anchored_us"] - row["plain_us"]}, "all"),
        ]
        for row in latest.values()
    ]
    head = ["model", "B", "new tokens", "plain", "construction", "longer prefill", "longer cache", "in all"]
    plot = f"\n![What anchors add, by model and number of new tokens]({image}/overhead.png)\n"
    return _table(head, lines) + plot + _made_by(rows, command)


def sweep_block(rows: list[Row], image: str) -> str:
    """Construction and longer prefill over image tokens and inserted text tokens, B = 1."""
    command = "python -m benchmarks overhead --sweep"
    rows = [row for row in _gpu_rows(rows, "overhead") if row.get("measure") == "sweep"]
    if not rows:
        return _unmeasured(command)
    latest = {(row["model"], row["image"], row["inserted"]): row for row in rows}
    lines = [
        [
            row["model"],
            str(row["image"]),
            f"{row['inserted']} of {row['text']}",
            f"{row['plain_us'] / 1e3:.2f} ms",
            *(f"{100 * row[key] / row['plain_us']:+.3f} %" for key in ("construction_us", "prefill_us")),
            f"{100 * row['prefill_flops'] / row['plain_flops']:+.3f} %",
        ]
        for row in latest.values()
    ]
    head = ["model", "image tokens", "inserted", "prefill", "construction", "longer prefill", "its share of FLOPs"]
    return _table(head, lines) + _made_by(rows, command)


def training_block(rows: list[Row], image: str) -> str:
    """Steps a second and memory, plain against anchors."""
    command = "python -m benchmarks training"
    rows = _gpu_rows(rows, "training")
    if not rows:
        return _unmeasured(command)
    latest = {row["attached"]: row for row in rows}
    lines = [
        [
            "with anchors" if attached else "plain",
            str(row["batch"]),
            f"{row['steps_per_second']:.2f}",
            f"{row['peak_bytes'] / 2**30:.2f} GiB",
        ]
        for attached, row in sorted(latest.items())
    ]
    return _table([rows[-1]["model"], "B", "steps/s", "peak memory"], lines) + _made_by(rows, command)


def cpu_reference_block(rows: list[Row], image: str) -> str:
    """The CPU implementation, its unavoidable work and the literal loop."""
    command = "python -m benchmarks cpu-reference"
    rows = [row for row in rows if row.get("run") == "cpu-reference"]
    if not rows:
        return f"Not measured yet. `{command}` measures it.\n"
    latest = {row["batch"]: row for row in rows}
    lines = [
        [
            f"{row['shape']}, float32, B={batch}",
            f"{row['us'] / 1e3:.1f} ms",
            f"{row['of_unavoidable']:.2f} x",
            f"{row['of_loop']:.0f} x faster",
        ]
        for batch, row in sorted(latest.items())
    ]
    head = ["", "reference", "of its unavoidable work", "than a per-token loop"]
    return _table(head, lines) + _made_by(rows, command)


def demo_block(rows: list[Row], image: str) -> str:
    """The demonstration's table, verdict and pictures."""
    rows = [row for row in rows if row.get("run") == "demo"]
    if not rows:
        return f"Not stored yet: `make demo`, then `{demonstration.MAKE}`.\n"
    row = rows[-1]
    table = _table(demonstration.HEAD, demonstration.lines_of(row))
    explained = demonstration.EXPLAINED.format(**row) + "\n\n" + "\n".join(f"- {line}" for line in row["verdict"])
    pictures = "\n".join(
        f"![{what}]({image}/demo-{name})"
        for what, name in (
            ("Anchors at their patches in rendered scenes", "scenes.png"),
            ("Anchors on photographs", "photographs.png"),
            ("Loss and inserted share", "loss.png"),
        )
    )
    return f"{table}\n{explained}\n\n{pictures}\n" + _made_by([row], f"make demo` and `{demonstration.MAKE}")


def targets_block(rows: list[Row], image: str) -> str:
    """All targets, counted; the whole table is the command's."""
    made = f"\nEvery size by itself: `python -m benchmarks targets`. Written by `{COMMAND}`.\n"
    return targets.summary(targets.judge(rows)) + "\n" + made


def laboratory_block(rows: list[Row], image: str) -> str:
    """From the laboratory's page, the table of the comparisons named before the runs: the lines of `README_PLANS`.

    `attanchor report` writes that page from the laboratory's own rows.
    """
    page = (ROOT / LABORATORY).read_text(encoding="utf-8")
    section = page.partition(f"{NAMED}\n")[2].partition("\n## ")[0]
    table = [line for line in section.splitlines() if line.startswith("|")]
    if len(table) < 3:
        raise ValueError(f"{LABORATORY} has no table under {NAMED!r}")
    shown = [line for line in table[2:] if line[2:].split(",")[0].split(" |")[0] in README_PLANS]
    how = "Points of mean accuracy, paired by seed; interval, p and verdict are of one test, corrected for its plan."
    link = f"From the rows under `docs/lab`, by `attanchor report`; all plans: [the report]({LABORATORY})."
    return "\n".join([*table[:2], *shown]) + f"\n\n{how} {link}\n"


BLOCKS: dict[str, Callable[[list[Row], str], str]] = {
    "roofline": roofline_block,
    "overhead": overhead_block,
    "sweep": sweep_block,
    "training": training_block,
    "cpu-reference": cpu_reference_block,
    "targets": targets_block,
    "demo": demo_block,
    "laboratory": laboratory_block,
}


def render(readme: str, rows: list[Row], image: str) -> str:
    """The README with its generated blocks made anew. `image` is the path from the README to the plots.

    Raises:
        ValueError: a block has a name that is none of BLOCKS, or has no end.
    """
    for opened in re.findall(r"<!-- generated: ([\w-]+) -->", readme):
        if opened not in BLOCKS:
            raise ValueError(f"the README has a generated block {opened!r}; known are {', '.join(BLOCKS)}")
    if readme.count("<!-- generated: ") != len(BLOCK.findall(readme)):
        raise ValueError("a generated block of the README has no <!-- /generated --> after it")
    return BLOCK.sub(lambda found: found[1] + BLOCKS[found["name"]](rows, image) + found[4], readme)


def main(options: argparse.Namespace) -> int:
    """Write README and plots; with --check only look. Returns 1 if the README is not current, 2 if it has no blocks."""
    if not options.readme.is_file():
        print(f"{options.readme} is no file; give the README by --readme", file=sys.stderr)
        return 2
    rows = read(options.results)
    before = options.readme.read_text(encoding="utf-8")
    image = os.path.relpath(options.images, options.readme.parent).replace(os.sep, "/")
    try:
        after = render(before, rows, image)
    except ValueError as error:
        print(f"{options.readme}: {error}", file=sys.stderr)
        return 2
    if not BLOCK.search(before):
        print(f"{options.readme} has no block <!-- generated: NAME -->, NAME of {', '.join(BLOCKS)}", file=sys.stderr)
        return 2
    wanted = plots.wanted(rows)
    if options.check:
        if before == after and all(plots.is_current(plot, options.images / name) for name, plot in wanted.items()):
            return 0
        print(f"{options.readme} or its plots are not current; run `{COMMAND}`", file=sys.stderr)
        return 1
    for name, plot in wanted.items():
        plots.save(plot, options.images / name)
    if before != after:
        write_text(Path(options.readme), after)
    return 0
