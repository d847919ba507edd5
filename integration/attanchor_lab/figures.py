"""Pictures of experiments: a radar over metrics, and metrics along a setting."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from attanchor_vlm.figures import PALETTE, plt, save

from attanchor_lab.paper.tables import means, metric_names
from attanchor_lab.paper.values import SHOWN, metric

_COLOURS = ("#555555", *PALETTE)  # the baseline is grey
_LEAST = 3  # axes of a radar
_INNER = 0.15  # where the worst arm of an axis stands, so that its polygon does not collapse


def radar(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> bool:
    """A polygon for each arm over the metrics that all of them have; False, and no file, with fewer than three.

    Every axis runs from its worst arm to its best, whose values stand at its end: the picture compares arms within an
    axis, not axes. Metrics that are not in `SHOWN` have none: lower may be better, as with AMBER's CHAIR.
    """
    found = means(rows)
    names = [name for name in metric_names(rows) if name in SHOWN and all(name in of_arm for of_arm in found.values())]
    if len(names) < _LEAST or len(found) < 2:
        return False
    values = np.array(
        [[metric(name).sign * statistics.fmean(arm[name]) for name in names] for arm in found.values()], dtype=float
    )
    radii = scaled(values)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    layout = {"projection": "polar", "theta_offset": np.pi / 2, "theta_direction": -1}  # clockwise from the top
    figure, axes = plt.subplots(figsize=(9.5, 8), subplot_kw=layout, layout="constrained")
    for arm, radius, colour in zip(found, radii, _cycled(len(found)), strict=True):
        style = "--" if arm == next(iter(found)) else "-"
        axes.plot(np.append(angles, angles[0]), np.append(radius, radius[0]), style, color=colour, label=arm)
        axes.fill(angles, radius, alpha=0.06, color=colour)
    labels = []
    for column, name in enumerate(names):
        how = metric(name)
        low, high = values[:, column].min(), values[:, column].max()
        labels.append(f"{how.title}\n{low:.{how.decimals}f} to {high:.{how.decimals}f}")
    axes.set_xticks(angles, labels, fontsize=8.5)
    axes.set_yticks([])
    axes.set_ylim(0, 1.08)
    axes.tick_params(pad=30)
    axes.legend(loc="upper left", bbox_to_anchor=(1.08, 1.05), fontsize=9)
    figure.suptitle(f"{title}\neach axis from its worst arm (inside) to its best (outside)", fontsize=11)
    save(figure, path)
    return True


def scaled(values: np.ndarray) -> np.ndarray:
    """(arms, metrics) to radii: the worst of a column 0.15, the best 1; 1 where all are equal."""
    low, high = values.min(axis=0), values.max(axis=0)
    spread = np.where(high > low, high - low, 1.0)
    return np.where(high > low, _INNER + (1 - _INNER) * (values - low) / spread, 1.0)


def along(
    path: Path,
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    x_label: str,
    title: str,
    logarithmic: bool = False,
) -> None:
    """A panel for each metric (or group), in it a line for each series of (x, y) points. No file without a panel.

    Points of equal x are seeds: the line goes through their mean, each is drawn.
    """
    if not panels:
        return
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.6 * columns, 3.6 * lines), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for place, (name, series) in zip(axes.flat, panels.items(), strict=False):
        for (label, points), colour in zip(series.items(), _cycled(len(series)), strict=True):
            grouped: dict[float, list[float]] = {}
            for x, y in points:
                grouped.setdefault(x, []).append(y)
            xs = sorted(grouped)
            place.plot(xs, [statistics.fmean(grouped[x]) for x in xs], "o-", color=colour, markersize=4, label=label)
            if any(len(ys) > 1 for ys in grouped.values()):
                place.scatter(*zip(*points, strict=True), s=9, color=colour, alpha=0.5)
        if logarithmic:
            place.set_xscale("log")
        place.set_title(name, fontsize=10)
        place.set_xlabel(x_label, fontsize=9)
        place.grid(alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            place.legend(fontsize=8)
    for place in list(axes.flat)[len(panels) :]:
        place.set_axis_off()
    save(figure, path)


def dots(path: Path, rows: Sequence[Mapping[str, Any]], title: str) -> None:
    """A panel for each metric, a dot for each arm at the mean over its seeds, small ones for the seeds; the line is the
    first arm. Axes do not start at zero: differences are small. No file without a metric."""
    found, names = means(rows), metric_names(rows)
    if not names:
        return
    columns = min(4, len(names))
    lines = -(-len(names) // columns)
    width = max(2.8, 0.55 * len(found) + 1)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, 3.4 * lines + 0.4), layout="constrained", squeeze=False
    )
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for place, name in zip(axes.flat, names, strict=False):
        for x, (values, colour) in enumerate(zip(found.values(), _cycled(len(found)), strict=True)):
            seeds = [metric(name).sign * value for value in values.get(name, ())]
            if not seeds:
                continue
            if x == 0:
                place.axhline(statistics.fmean(seeds), color=colour, linewidth=0.9, linestyle="--")
            place.plot([x], [statistics.fmean(seeds)], "o", color=colour, markersize=8)
            if len(seeds) > 1:
                place.plot([x] * len(seeds), seeds, "o", color=colour, markersize=3, alpha=0.6)
        place.set_xlim(-0.6, len(found) - 0.4)
        place.margins(y=0.2)
        place.set_xticks(range(len(found)), list(found), rotation=35, ha="right", fontsize=8)
        place.set_title(metric(name).title, fontsize=10)
        place.grid(axis="y", alpha=0.25)
        place.spines[["top", "right"]].set_visible(False)
    for place in list(axes.flat)[len(names) :]:
        place.set_axis_off()
    save(figure, path)


def _cycled(count: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(count)]
