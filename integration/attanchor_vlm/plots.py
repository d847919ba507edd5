"""Pictures: loss curves, and images with their anchors at the patches that they were matched with."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is looked for

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from PIL import Image

from attanchor_vlm.files import write_atomically

_PALETTE = ("#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd", "#17becf", "#e377c2", "#8c564b")
_GREY = "#b8bec6"


@dataclass(frozen=True)
class Match:
    """A token of the prompt that took part: its text, its best cosine, and the patch it was copied behind (or None)."""

    text: str
    score: float
    patch: int | None


@dataclass(frozen=True)
class Anchored:
    """One image with one question; `grid` is (rows, columns) of patches; `image` is the part that the model sees."""

    image: Image.Image
    grid: tuple[int, int]
    question: str
    matches: Sequence[Match]
    answer: str | None = None
    truth: str | None = None  # shown where the answer differs from it


def anchor_picture(path: Path, examples: Sequence[Anchored], tau: float, title: str) -> None:
    """A row for each example: the image with its patch grid and anchors, and every token's best cosine beside tau."""
    height = 4.3 * len(examples)
    figure, axes = plt.subplots(
        len(examples), 2, figsize=(12, height + 0.7), width_ratios=(1.55, 1), squeeze=False, layout="constrained"
    )
    layout: Any = figure.get_layout_engine()
    layout.set(hspace=0.06, wspace=0.03)
    figure.suptitle(title, fontsize=13, fontweight="bold")
    for (left, right), example in zip(axes, examples, strict=True):
        colours = _colours(example)
        _draw_image(left, example, colours)
        _draw_scores(right, example, colours, tau)
    _save(figure, path)


def _colours(example: Anchored) -> dict[int, str]:
    """A colour for every patch with anchors, in reading order."""
    patches = sorted({match.patch for match in example.matches if match.patch is not None})
    return {patch: _PALETTE[index % len(_PALETTE)] for index, patch in enumerate(patches)}


def _draw_image(axes: Axes, example: Anchored, colours: Mapping[int, str]) -> None:
    rows, columns = example.grid
    pixels = np.asarray(example.image.convert("RGB"))
    axes.imshow(pixels, extent=(0, columns, rows, 0), interpolation="nearest", aspect="equal")
    for x in range(columns + 1):
        axes.plot((x, x), (0, rows), color="white", linewidth=0.5, alpha=0.45)
    for y in range(rows + 1):
        axes.plot((0, columns), (y, y), color="white", linewidth=0.5, alpha=0.45)
    # Labels stand beside the image, spread so that none covers another, in the order of their patches' rows.
    labels = sorted(colours, key=lambda patch: (patch // columns, -(patch % columns)))
    wanted = [patch // columns + 0.5 for patch in labels]
    for patch, height in zip(labels, _spread(wanted, rows * 0.085, rows), strict=True):
        row, column = divmod(patch, columns)
        colour = colours[patch]
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor="white", linewidth=4))
        axes.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=colour, linewidth=2.4))
        words = [f"{match.text} {match.score:.2f}" for match in example.matches if match.patch == patch]
        text = ", ".join(words[:3]) + (f" +{len(words) - 3}" if len(words) > 3 else "")
        axes.annotate(
            text,
            xy=(column + 1, row + 0.5),
            xytext=(columns * 1.04, height),
            va="center",
            fontsize=9.5,
            color="white",
            annotation_clip=False,
            bbox={"boxstyle": "round,pad=0.3", "facecolor": colour, "edgecolor": "none"},
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1.4, "shrinkA": 0, "shrinkB": 0},
        )
    axes.set_xlim(0, columns * 1.5)
    axes.set_ylim(rows, 0)
    if not colours:
        axes.text(columns * 1.04, rows / 2, "no token reaches tau", va="center", fontsize=9.5, color="#555555")
    axes.set_axis_off()
    answer = f"  →  {example.answer}" if example.answer else ""
    if example.truth is not None and example.truth != example.answer:
        answer += f"  (wrong; it is {example.truth})"
    axes.set_title(f"“{example.question}”{answer}", fontsize=11, loc="left")


def _spread(wanted: Sequence[float], gap: float, end: float) -> list[float]:
    """Positions near the (sorted) wanted ones, at least `gap` apart and, if they fit, within (0, end)."""
    placed: list[float] = []
    for value in wanted:
        placed.append(max(value, placed[-1] + gap) if placed else max(value, gap / 2))
    over = placed[-1] - (end - gap / 2) if placed else 0.0
    if over > 0:
        limit = end - gap / 2
        for index in range(len(placed) - 1, -1, -1):
            placed[index] = min(placed[index], limit)
            limit = placed[index] - gap
    return placed


def _draw_scores(axes: Axes, example: Anchored, colours: Mapping[int, str], tau: float) -> None:
    matches = example.matches
    rows = np.arange(len(matches))
    scores = [match.score if np.isfinite(match.score) else 0.0 for match in matches]
    bars = [_GREY if match.patch is None else colours[match.patch] for match in matches]
    axes.barh(rows, scores, color=bars, height=0.72)
    low, high = min(0.0, *scores), max(*scores, tau if tau < 1 else 0.0, 0.1)
    backing = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # tau's line passes behind
    for row, score in enumerate(scores):
        axes.text(
            max(score, 0) + 0.012 * high,
            row,
            f"{score:.2f}",
            va="center",
            fontsize=8.5,
            color="#444444",
            bbox=backing,
            zorder=3,
        )
    if tau < 1:
        axes.axvline(tau, color="black", linestyle="--", linewidth=1, zorder=2)
        axes.annotate(
            f"tau {tau:.2f}",
            (tau, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_yticks(rows, [match.text for match in matches], fontsize=9)
    axes.set_ylim(len(matches) - 0.4, -0.6)
    axes.set_xlim(low, high * 1.16)
    axes.set_xlabel("best cosine with a patch", fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


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
    colours = itertools.cycle(_PALETTE[1:] + _PALETTE[:1])
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
    _save(figure, path)


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


def _save(figure: plt.Figure, path: Path) -> None:
    try:
        write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
    finally:
        plt.close(figure)


def seen_part(image: Image.Image, image_processor: Any) -> Image.Image:
    """The part of an image that a CLIP-like processor keeps, at the image's own resolution: its centre crop."""
    image = image.convert("RGB")
    crop, size = getattr(image_processor, "crop_size", None), getattr(image_processor, "size", None)
    if not getattr(image_processor, "do_center_crop", False) or not crop or not size or not size.get("shortest_edge"):
        return image
    scale = min(image.size) / size["shortest_edge"]
    width, height = min(crop["width"] * scale, image.width), min(crop["height"] * scale, image.height)
    left, top = (image.width - width) / 2, (image.height - height) / 2
    return image.crop((round(left), round(top), round(left + width), round(top + height)))
