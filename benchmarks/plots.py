"""The two pictures: time over the floor, and what anchors add to whole models. Each names the rows it was made of."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from attanchor_vlm.records import write_atomically
from benchmarks.rows import Row, of_newest_gpu

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SOURCE = "Rows"  # key of the text in a PNG that says what it was made of
COLOURS = {"cuda": "#0072b2", "triton": "#d55e00", "reference": "#999999"}
PARTS = (("prefill", "prefill", "#0072b2"), ("step", "a generated token", "#e69f00"))


class Plot(NamedTuple):
    """A picture to be made of rows."""

    draw: Callable[[list[Row]], Figure]
    rows: list[Row]

    @property
    def source(self) -> str:
        """What changes with the rows."""
        return hashlib.sha256(json.dumps(self.rows).encode()).hexdigest()[:16]


def wanted(rows: list[Row]) -> dict[str, Plot]:
    """By file name, every plot that the rows are enough for."""
    overhead = [row for row in overhead_rows(rows) if row.get("measure") is None]
    plots = {"roofline.png": Plot(draw_roofline, roofline_rows(rows)), "overhead.png": Plot(draw_overhead, overhead)}
    return {name: plot for name, plot in plots.items() if plot.rows}


def roofline_rows(rows: list[Row]) -> list[Row]:
    """Of the kernels that are measured against the floor, by a GPU."""
    return [row for row in of_newest_gpu(rows) if row.get("run") == "roofline" and "ratio" in row]


def overhead_rows(rows: list[Row]) -> list[Row]:
    """Of whole models, by a GPU or, where there are none, by CPUs; none if they were run through `attach` alone."""
    rows = [row for row in rows if row.get("run") == "overhead" and row.get("measure") != "sweep"]
    found = of_newest_gpu(rows) or rows
    return found if by_model(found) else []


def by_model(rows: list[Row]) -> dict[tuple[str, str, int], dict[str, Row]]:
    """The newest row of each side that was not run through `attach`, of each model, dtype and batch size: plain, then
    from long to short."""
    found: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        if row.get("measure") is not None:
            continue
        found.setdefault((row["model"], row["dtype"], row["batch"]), {})[row["side"]] = row
    return {
        key: dict(sorted(sides.items(), key=lambda side: (side[0] != "plain", -side[1]["length"])))
        for key, sides in found.items()
    }


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
    """One panel for each model: prefill, a generated token and cache over those of the plain prompt, with quartiles."""
    from matplotlib.figure import Figure

    models = by_model(rows)
    figure = Figure(figsize=(1 + 3.4 * len(models), 3.2), layout="constrained")
    axes = figure.subplots(1, len(models), squeeze=False, sharey=True)[0]
    for axis, ((model, dtype, batch), found) in zip(axes, models.items(), strict=True):
        plain = found["plain"]
        sides = [row for side, row in found.items() if side != "plain"]
        for at, (part, label, colour) in enumerate(PARTS):
            drawn = [(place, row) for place, row in enumerate(sides) if f"{part}_ratio" in row]
            middle = [row[f"{part}_ratio"] for _, row in drawn]
            low = [row[f"{part}_ratio"] - row[f"{part}_ratio_q1"] for _, row in drawn]
            high = [row[f"{part}_ratio_q3"] - row[f"{part}_ratio"] for _, row in drawn]
            places = [place + 0.28 * (at - 1) for place, _ in drawn]
            axis.bar(places, middle, 0.26, yerr=[low, high], capsize=2, color=colour, label=label)
        places = [place + 0.28 for place in range(len(sides))]
        cache = [row["kv_bytes"] / plain["kv_bytes"] for row in sides]
        axis.bar(places, cache, 0.26, color="#009e73", label="KV cache")
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set_xticks(range(len(sides)), [f"{row['side']}\n{row['length']} tokens" for row in sides], fontsize=8)
        axis.set_title(f"{model}, {dtype}, B = {batch}; plain: {plain['length']} tokens", fontsize=8)
        axis.grid(axis="y", alpha=0.3)
    axes[0].set_ylabel("over those of the plain prompt")
    axes[0].legend(fontsize=8)
    return figure


def is_current(plot: Plot, path: Path) -> bool:
    """Whether the picture is there and was made of these rows."""
    from PIL import Image

    if not path.is_file():
        return False
    with Image.open(path) as picture:
        return picture.info.get(SOURCE) == plot.source


def save(plot: Plot, path: Path) -> None:
    about = {"Software": None, SOURCE: plot.source}
    write_atomically(path, lambda temporary: plot.draw(plot.rows).savefig(temporary, dpi=130, metadata=about))
