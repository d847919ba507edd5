"""The two pictures: time over the floor, and what anchors add to whole models."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.rows import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[], "Figure"]
COLOURS = {"cuda": "#0072b2", "triton": "#d55e00", "reference": "#999999"}
PARTS = (
    ("construction_us", "construction", "#0072b2"),
    ("prefill_us", "longer prefill", "#e69f00"),
    ("decode_us", "longer cache", "#009e73"),
)


def wanted(rows: list[Row]) -> dict[str, Draw]:
    """File name and drawing function of every plot that the rows of a GPU are enough for."""
    rows = [row for row in rows if row.get("gpu", "none") != "none"]
    roofline = [row for row in rows if row.get("run") == "roofline" and "ratio" in row]
    overhead = [row for row in rows if row.get("run") == "overhead" and row.get("measure") is None]
    found: dict[str, Draw] = {}
    if roofline:
        found["roofline.png"] = lambda: draw_roofline(roofline)
    if overhead:
        found["overhead.png"] = lambda: draw_overhead(overhead)
    return found


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
        bottom = [0.0] * len(chosen)
        for key, label, colour in PARTS:
            heights = [max(0.0, 100 * row[key] / row["plain_us"]) for row in chosen]
            axis.bar(range(len(chosen)), heights, bottom=bottom, label=label, color=colour)
            bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
        axis.set_xticks(range(len(chosen)), labels, fontsize=6, rotation=90)
        axis.set_title(f"B = {batch}; model and number of new tokens", fontsize=9)
        axis.set_ylabel("added, % of the time without anchors")
        axis.grid(axis="y", alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def save(draw: Draw, path: Path) -> None:
    """Drawn into a temporary file in the same folder, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, suffix=".png")
    os.close(handle)
    try:
        draw().savefig(temporary, dpi=130, metadata={"Software": None})
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
