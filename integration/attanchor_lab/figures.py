"""The laboratory's pictures: differences with their intervals, curves, losses, a scene; and metrics of experiments."""

from __future__ import annotations

import base64
import io
import itertools
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
from PIL import Image

from attanchor_lab.table import BETTER, WORSE, Metric
from attanchor_vlm.figures import PALETTE, plt, save

_COLOURS = ("#555555", *PALETTE)  # the baseline is grey
_VERDICTS = {BETTER: "#2ca02c", WORSE: "#d62728"}
_LEAST = 3  # axes of a radar
_INNER = 0.15  # where the worst arm of an axis stands, so that its polygon does not collapse


def forest(path: Path, lines: Mapping[str, pd.Series]) -> None:
    """Differences as `table.compare` gives them, from top to bottom: mean, 95 % interval alone (thick) and corrected
    (thin), coloured by the verdict."""
    figure, axes = plt.subplots(figsize=(10.5, 1 + 0.26 * len(lines)), layout="constrained")
    shown = [0.0]
    for y, line in enumerate(lines.values()):
        colour = _VERDICTS.get(line["verdict"], "#777777")
        axes.plot((line["low"], line["high"]), (y, y), color=colour, linewidth=1.1)
        axes.plot((line["low_alone"], line["high_alone"]), (y, y), color=colour, linewidth=4, alpha=0.45)
        axes.plot([line["mean"]], [y], "o", color=colour, markersize=5)
        shown += [value for value in (line["low_alone"], line["high_alone"], line["mean"]) if np.isfinite(value)]
    # Corrected intervals of three seeds may reach far beyond everything else: they end at the frame.
    room = 0.05 * (max(shown) - min(shown)) or 1.0
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(lines)), list(lines), fontsize=7.5)
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.set_xlabel("points of mean accuracy; thick: 95 % alone, thin: corrected", fontsize=9)
    _plain(axes, "x")
    save(figure, path)


def curves(path: Path, panels: Mapping[str, Mapping[str, pd.DataFrame]]) -> None:
    """A panel for each setting, in it a line for each arm from (steps, seeds): the mean over seeds, and where there are
    three, the 95 % interval of each point alone."""
    from scipy import stats

    arms = list(dict.fromkeys(arm for series in panels.values() for arm in series))
    reach = max((series[arm].mean(axis=1).abs().max() for series in panels.values() for arm in series), default=0) or 1
    figure, places = _grid(len(panels) or 1, 4, 3.9, 2.9)
    named: dict[str, Any] = {}
    for axes, (name, series) in zip(places, panels.items(), strict=False):
        for arm, values in series.items():
            colour = _COLOURS[1 + arms.index(arm) % len(PALETTE)]
            (named[arm],) = axes.plot(values.index, values.mean(axis=1), color=colour, linewidth=1.6)
            if values.shape[1] > 2:
                half = stats.t.isf(0.025, values.shape[1] - 1) * values.sem(axis=1)
                low, high = values.mean(axis=1) - half, values.mean(axis=1) + half
                axes.fill_between(values.index, low, high, color=colour, alpha=0.12)
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_ylim(-1.1 * reach, 1.1 * reach)
        axes.set_title(name, fontsize=10)
        _plain(axes)
    figure.supxlabel("step of stage 2", fontsize=9)
    figure.supylabel("answer loss, arm minus plain", fontsize=9)
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=3, fontsize=8.5)
    save(figure, path)


def scene(path: Path, kept: Mapping[str, Mapping[str, Any]]) -> None:
    """One scene as it is, then in every arm the attention of the answer's place, with the words at their patches.

    Args:
        kept: For each arm the entry that `measure` made of the scene.
    """
    figure, panels = plt.subplots(1, 1 + len(kept), figsize=(3.1 * (1 + len(kept)), 4.0), layout="constrained")
    shown = [("", next(iter(kept.values()))), *kept.items()]
    for axes, (arm, entry), colour in zip(panels, shown, itertools.cycle((_COLOURS[0], *_COLOURS))):
        rows, columns = entry["grid"]
        extent = (0, columns, rows, 0)
        if not arm:
            image = Image.open(io.BytesIO(base64.b64decode(entry["png"])))
            axes.imshow(np.asarray(image), extent=extent, interpolation="nearest")
            axes.set_title(f"{entry['question']}\nit is {entry['truth']} (framed)", fontsize=9)
        else:
            attention = 100 * np.array(entry["attention"]).reshape(rows, columns)
            axes.imshow(attention, extent=extent, cmap="Greys", interpolation="nearest", vmin=0)
            right = "right" if entry["answer"] == entry["truth"] else "wrong"
            name = textwrap.fill(arm, 34)
            axes.set_title(f"{name}\n{entry['answer']} ({right}); most {attention.max():.1f} %", fontsize=8.5)
            behind: dict[int, list[str]] = {}
            for match in entry["matches"]:
                if match["patch"] is not None:
                    behind.setdefault(match["patch"], []).append(match["text"])
            for patch, words in behind.items():
                box = {"facecolor": colour, "edgecolor": "none", "pad": 1.0}
                y, x = divmod(patch, columns)
                axes.text(x + 0.5, y + 0.5, "\n".join(words), ha="center", va="center", fontsize=6.5, color="white",
                          bbox=box)  # fmt: skip
        y, x = divmod(entry["target"], columns)
        axes.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=2))
        axes.set_xticks([])
        axes.set_yticks([])
    save(figure, path)


def _plain(axes: Any, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.grid(axis=grid, alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _grid(count: int, most: int, width: float, height: float) -> tuple[plt.Figure, Iterator[Any]]:
    """A figure and `count` of its places, at most `most` side by side."""
    columns = min(most, count)
    lines = -(-count // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width * columns, height * lines + 0.4), layout="constrained", squeeze=False
    )
    for place in list(axes.flat)[count:]:
        place.set_axis_off()
    return figure, iter(list(axes.flat)[:count])


# --- Experiments of the paper. ---------------------------------------------------------------------------------------


def radar(path: Path, table: pd.DataFrame, metrics: Mapping[str, Metric], title: str) -> bool:
    """A polygon for each arm over the metrics that all of them have; False, and no file, with fewer than three.

    Every axis runs from its worst arm to its best, whose values stand at its end: the picture compares arms within an
    axis, not axes.

    Args:
        table: As `table.by_seed` gives it.
        metrics: Those that are drawn: of others it is not known whether lower is better, as with AMBER's CHAIR.
    """
    means = table.groupby("arm", sort=False).mean(numeric_only=True)
    names = [name for name in metrics if name in means and means[name].notna().all()]
    if len(names) < _LEAST or len(means) < 2:
        return False
    values = means[names].to_numpy() * [metrics[name].sign for name in names]
    radii = scaled(values)
    angles = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    layout = {"projection": "polar", "theta_offset": np.pi / 2, "theta_direction": -1}  # clockwise from the top
    figure, axes = plt.subplots(figsize=(9.5, 8), subplot_kw=layout, layout="constrained")
    for number, (arm, radius) in enumerate(zip(means.index, radii, strict=True)):
        colour = _COLOURS[number % len(_COLOURS)]
        style = "-" if number else "--"
        axes.plot(np.append(angles, angles[0]), np.append(radius, radius[0]), style, color=colour, label=arm)
        axes.fill(angles, radius, alpha=0.06, color=colour)
    labels = []
    for name, low, high in zip(names, values.min(axis=0), values.max(axis=0), strict=True):
        how = metrics[name]
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


def along(path: Path, points: pd.DataFrame, x_label: str, title: str, logarithmic: bool = False) -> None:
    """A panel for each `panel` of `points`, in it a line for each `series` over `x`. No file without a point.

    Points of equal x are seeds: the line goes through their mean, each is drawn.
    """
    panels = points.groupby("panel", sort=False)
    if not panels.ngroups:
        return
    figure, places = _grid(panels.ngroups, 3, 4.6, 3.6)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for place, (name, panel) in zip(places, panels, strict=True):
        for colour, (label, found) in zip(itertools.cycle(_COLOURS), panel.groupby("series", sort=False)):
            means = found.groupby("x")["y"].mean()
            place.plot(means.index, means, "o-", color=colour, markersize=4, label=label)
            if len(found) > len(means):
                place.scatter(found["x"], found["y"], s=9, color=colour, alpha=0.5)
        if logarithmic:
            place.set_xscale("log")
        place.set_title(name, fontsize=10)
        place.set_xlabel(x_label, fontsize=9)
        _plain(place)
        if panel["series"].nunique() > 1:
            place.legend(fontsize=8)
    save(figure, path)


def dots(path: Path, table: pd.DataFrame, metrics: Mapping[str, Metric], title: str) -> None:
    """A panel for each metric, a dot for each arm at the mean over its seeds, small ones for the seeds; the line is the
    first arm. Axes do not start at zero: differences are small. No file without a metric."""
    names = [name for name in metrics if name in table]
    if not names:
        return
    arms = list(table["arm"].unique())
    figure, places = _grid(len(names), 4, max(2.8, 0.55 * len(arms) + 1), 3.4)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    for place, name in zip(places, names, strict=True):
        for x, (arm, colour) in enumerate(zip(arms, itertools.cycle(_COLOURS))):
            seeds = metrics[name].sign * table.loc[table["arm"] == arm, name].dropna()
            if seeds.empty:
                continue
            if x == 0:
                place.axhline(seeds.mean(), color=colour, linewidth=0.9, linestyle="--")
            place.plot([x], [seeds.mean()], "o", color=colour, markersize=8)
            if len(seeds) > 1:
                place.plot([x] * len(seeds), seeds, "o", color=colour, markersize=3, alpha=0.6)
        place.set_xlim(-0.6, len(arms) - 0.4)
        place.margins(y=0.2)
        place.set_xticks(range(len(arms)), arms, rotation=35, ha="right", fontsize=8)
        place.set_title(metrics[name].title, fontsize=10)
        _plain(place, "y")
    save(figure, path)


def loss_plot(path: Path, logs: Mapping[str, Sequence[Mapping[str, float]]], title: str) -> None:
    """Training and validation loss, and what was inserted, of several runs over their steps.

    Args:
        logs: For each run its log lines, as Trainer keeps them: `loss`, `inserted_share`, `anchor_score` or
            `eval_loss`, each with its `step`.
    """
    figure, (losses, share, score) = plt.subplots(
        1, 3, figsize=(14, 4.4), layout="constrained", width_ratios=(1.7, 1, 1)
    )
    figure.suptitle(title, fontsize=13, fontweight="bold")
    colours, top = itertools.cycle(PALETTE[1:] + PALETTE[:1]), 0.0
    for number, ((name, lines), colour) in enumerate(zip(logs.items(), colours, strict=False)):
        steps, values = _series(lines, "loss")
        losses.plot(steps, values, color=colour, alpha=0.13, linewidth=0.8)
        losses.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=f"{name}, training (mean of 20 steps)")
        length, top = max(steps, default=0), max([top, *_smooth(values)])
        steps, values = _series(lines, "eval_loss")
        top = max([top, *values])
        # Runs are validated at the same steps: a little beside each other, their marks can be told apart.
        beside = steps + 0.012 * length * (number - (len(logs) - 1) / 2)
        mark = {"marker": "osD^v"[number % 5], "markersize": 6.5, "markeredgecolor": "white"}
        losses.plot(beside, values, color=colour, linestyle="none", **mark, label=f"{name}, validation")
        for axes, key in ((share, "inserted_share"), (score, "anchor_score")):
            steps, values = _series(lines, key)
            if len(values) and np.any(values):
                axes.plot(steps, values, color=colour, alpha=0.13, linewidth=0.8)
                axes.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=name)
    losses.set_ylim(0, 1.15 * top or 1.0)
    losses.set_ylabel("loss of the answer")
    share.set_title("inserted anchors / text tokens taking part", fontsize=10)
    score.set_title("mean cosine of the inserted", fontsize=10)
    losses.legend(fontsize=8.5)
    for axes in (losses, share, score):
        axes.set_xlabel("optimiser step")
        _plain(axes)
    share.set_ylim(bottom=0)
    low, high = score.get_ylim()
    score.set_ylim(low - 0.5 * (high - low), high)  # room for the legend
    for axes in (share, score):
        if axes.has_data():
            axes.legend(fontsize=8.5, loc="lower left")
        else:
            axes.text(0.5, 0.5, "nothing inserted", ha="center", va="center", transform=axes.transAxes, color="#555555")
    save(figure, path)


def _series(lines: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(line["step"], line[key]) for line in lines if key in line]
    return np.array([step for step, _ in points]), np.array([value for _, value in points], dtype=float)


def _smooth(values: np.ndarray) -> np.ndarray:
    """The mean of the last 20 values, of fewer at the beginning."""
    return pd.Series(values).rolling(20, min_periods=1).mean().to_numpy()
