"""What the package's figures share: colours, fonts, and how they reach the disk."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")  # no display is needed, and none is looked for

from matplotlib import font_manager
from matplotlib import pyplot as plt

from attanchor_vlm.records import write_atomically

PALETTE = ("#d62728", "#1f77b4", "#2ca02c", "#e07b00", "#9467bd", "#0e8f9e", "#d6449f", "#8c564b", "#6b7a0f", "#3f4fa3")


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure, whole or not at all, and free it. Letters that no installed font has become boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        try:
            write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
        finally:
            plt.close(figure)


def fonts() -> list[str]:
    """matplotlib's own font, and behind it those for other scripts that are installed."""
    wide = (
        "Noto Sans CJK",
        "Source Han Sans",
        "WenQuanYi",
        "Microsoft YaHei",
        "PingFang",
        "Arial Unicode",
        "Noto Sans",
    )
    installed = sorted(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for start in wide for name in installed if name.startswith(start))]


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
    colours = itertools.cycle(PALETTE[1:] + PALETTE[:1])
    for number, ((name, lines), colour) in enumerate(zip(logs.items(), colours, strict=False)):
        steps, values = _series(lines, "loss")
        losses.plot(steps, values, color=colour, alpha=0.13, linewidth=0.8)
        losses.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=f"{name}, training (mean of 20 steps)")
        length = max(steps, default=0)
        steps, values = _series(lines, "eval_loss")
        # Runs are validated at the same steps: a little beside each other, their marks can be told apart.
        beside = steps + 0.012 * length * (number - (len(logs) - 1) / 2)
        mark = {"marker": "osD^v"[number % 5], "markersize": 6.5, "markeredgecolor": "white"}
        losses.plot(beside, values, color=colour, linestyle="none", **mark, label=f"{name}, validation")
        for axes, key in ((share, "inserted_share"), (score, "anchor_score")):
            steps, values = _series(lines, key)
            if len(values) and np.any(values):
                axes.plot(steps, values, color=colour, alpha=0.13, linewidth=0.8)
                axes.plot(steps, _smooth(values), color=colour, linewidth=1.6, label=name)
    top = max((max(_series(lines, "eval_loss")[1], default=0.0) for lines in logs.values()), default=0.0)
    smooth_top = max(
        (float(np.max(_smooth(_series(lines, "loss")[1]), initial=0.0)) for lines in logs.values()), default=1.0
    )
    losses.set_ylim(0, 1.15 * max(top, smooth_top) or 1.0)
    losses.set_ylabel("loss of the answer")
    share.set_title("inserted anchors / text tokens taking part", fontsize=10)
    score.set_title("mean cosine of the inserted", fontsize=10)
    losses.legend(fontsize=8.5)
    for axes in (losses, share, score):
        axes.set_xlabel("optimiser step")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
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


def _smooth(values: np.ndarray, window: int = 20) -> np.ndarray:
    """The mean of the last `window` values, of fewer at the beginning."""
    if not len(values):
        return values
    total = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    start = np.maximum(end - window, 0)
    return (total[end] - total[start]) / (end - start)
