"""The two pictures: time over the floor, and what anchors add to whole models. Each names the rows it was made of."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.rows import Row, of_newest_gpu

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCE = "Rows"  # key of the text in a PNG that says what it was made of
COLOURS = {"cuda": "#0072b2", "triton": "#d55e00", "reference": "#999999"}
PARTS = (
    ("construction_us", "construction", "#0072b2"),
    ("prefill_us", "longer prefill", "#e69f00"),
    ("decode_us", "longer cache", "#009e73"),
)


class Plot(NamedTuple):
    """A picture to be made of rows."""

    draw: Callable[[list[Row]], Figure]
    rows: list[Row]

    @property
    def source(self) -> str:
        """What changes with the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:16]


def wanted(rows: list[Row]) -> dict[str, Plot]:
    """By file name, every plot that the rows of a GPU are enough for."""
    rows = of_newest_gpu(rows)
    roofline = [row for row in rows if row.get("run") == "roofline" and "ratio" in row]
    overhead = [row for row in rows if row.get("run") == "overhead" and row.get("measure") is None]
    plots = {"roofline.png": Plot(draw_roofline, roofline), "overhead.png": Plot(draw_overhead, overhead)}
    return {name: plot for name, plot in plots.items() if plot.rows}


def draw_roofline(rows: list[Row]) -> Figure:
    """Over the batch size, one panel for each operation and shape: time as a multiple of the floor."""
    from matplotlib.figure import Figure

    operations = [name for name in ("forward", "backward", "merge") if any(r["operation"] == name for r in rows)]
    shapes = list(dict.fromkeys(row["shape"] for row in rows))
    figure = Figure(figsize=(3.1 * len(shapes), 2.5 * len(operations)), layout="constrained")
    axes = figure.subplots(len(operations), len(shapes), squeeze=False, sharey=True)
    for line, operation in zip(axes, operations, strict=True):
        for axis, shape in zip(line, shapes, strict=True):
            chosen = [row for row in rows if row["operation"] == operation and row["shape"] == shape]
            for backend in dict.fromkeys(row["backend"] for row in chosen):
                ratios = {row["batch"]: row["ratio"] for row in chosen if row["backend"] == backend}
                points = sorted(ratios.items())
                axis.plot(*zip(*points, strict=True), "o-", color=COLOURS.get(backend, "black"), label=backend)
            axis.axhline(1, color="black", linewidth=0.8)
            axis.set_xscale("log", base=2)
            axis.set_xticks(sorted({row["batch"] for row in rows}), labels=sorted({row["batch"] for row in rows}))
            axis.set_title(f"{shape}, {operation}", fontsize=9)
            axis.grid(alpha=0.3)
        line[0].set_ylabel("time / copy of the same bytes")
    for axis in axes[-1]:
        axis.set_xlabel("batch")
    axes[0][0].set_ylim(bottom=0)
    axes[0][0].legend(fontsize=8)
    return figure


def draw_overhead(rows: list[Row]) -> Figure:
    """Stacked bars in percent of the time without anchors, by number of new tokens; one panel for each batch size."""
    from matplotlib.figure import Figure

    latest = {(row["model"], row["batch"], row["new_tokens"]): row for row in rows}
    batches = sorted({key[1] for key in latest})
    figure = Figure(figsize=(5.2 * len(batches), 3.6), layout="constrained")
    for axis, batch in zip(figure.subplots(1, len(batches), squeeze=False)[0], batches, strict=True):
        chosen = [row for (_, size, _), row in latest.items() if size == batch]
        labels = [f"{row['model']}\n{row['new_tokens']}" for row in chosen]
        ends = {True: [0.0] * len(chosen), False: [0.0] * len(chosen)}  # above and below zero, where noise may fall
        for key, label, colour in PARTS:
            heights = [100 * row[key] / row["plain_us"] for row in chosen]
            starts = [ends[height >= 0][at] for at, height in enumerate(heights)]
            axis.bar(range(len(chosen)), heights, bottom=starts, label=label, color=colour)
            for at, height in enumerate(heights):
                ends[height >= 0][at] += height
        axis.set_xticks(range(len(chosen)), labels, fontsize=6, rotation=90)
        axis.set_title(f"B = {batch}; model and number of new tokens", fontsize=9)
        axis.set_ylabel("added, % of the time without anchors")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def is_current(plot: Plot, path: Path) -> bool:
    """Whether the picture is there and was made of these rows."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get(SOURCE) == plot.source


def save(plot: Plot, path: Path) -> None:
    """Drawn into a temporary file in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    try:
        plot.draw(plot.rows).savefig(temporary, dpi=130, metadata={"Software": None, SOURCE: plot.source})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
