"""The report's plots and pictures."""

from __future__ import annotations

import base64
import io
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
from attanchor_vlm.figures import save
from matplotlib import pyplot as plt
from PIL import Image

from attanchor_lab.statistics import mean_and_deviation
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.table import ACCURACIES, ATTENTION, HALLUCINATION, Comparison, Laboratory, title

_COLOURS = (
    "#555555", "#d62728", "#ff7f0e", "#1f77b4", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#17becf", "#bcbd22",
    "#006d5b", "#aec7e8",
)  # fmt: skip


def colour(arm: str) -> str:
    return _COLOURS[list(ARMS).index(arm) % len(_COLOURS)] if arm in ARMS else _COLOURS[-1]


def forest(path: Path, laboratory: Laboratory, setting: str) -> None:
    """Every arm's paired difference from plain in mean accuracy: seeds, mean, both intervals."""
    found = {one.arm: it for one, it in laboratory.all_against_plain().items() if one.setting == setting}
    values = {arm: laboratory.differences(Comparison(setting, arm)) for arm in found}
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.5 * len(found)), layout="constrained")
    shown = [0.0]
    for row, (arm, difference) in enumerate(found.items()):
        if difference is not None:
            axes.plot(
                (difference.wide_low, difference.wide_high), (row, row), color=colour(arm), linewidth=1.2, alpha=0.6
            )
            axes.plot((difference.low, difference.high), (row, row), color=colour(arm), linewidth=4, alpha=0.55)
            shown += [difference.low, difference.high]
        axes.plot(values[arm], [row + 0.22] * len(values[arm]), "|", color="#333333", markersize=7)
        if values[arm]:
            axes.plot([mean_and_deviation(values[arm])[0]], [row], "o", color=colour(arm), markersize=7)
        shown += values[arm]
    # Corrected intervals of three seeds may reach far beyond everything else: they end at the frame.
    room = 0.15 * (max(shown) - min(shown)) or 1.0
    axes.set_xlim(min(shown) - room, max(shown) + room)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(found)), [title(arm) for arm in found], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("points of mean accuracy against plain; ticks: seeds; thick: 95 %; thin: corrected", fontsize=9)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def bars(path: Path, laboratory: Laboratory, setting: str) -> None:
    """Accuracy by kind of question and by kind of negative: means, with a dot for every seed."""
    panels = (
        ("by question", {k: ACCURACIES[k] for k in ("existence", "colour", "place")}),
        ("existence, by what is asked for", {k: m for k, m in HALLUCINATION.items() if k != "yes_share"}),
    )
    arms = laboratory.arms(setting)
    figure, both = plt.subplots(1, 2, figsize=(13, 4.2), layout="constrained", width_ratios=(3, 4), sharey=True)
    width = 0.82 / len(arms)
    for axes, (name, metrics) in zip(both, panels, strict=True):
        for number, arm in enumerate(arms):
            for place, metric in enumerate(metrics.values()):
                values = list(laboratory.values(setting, arm, metric).values())
                if not values:
                    continue
                x = place + (number - (len(arms) - 1) / 2) * width
                label = title(arm) if place == 0 else None
                axes.bar(x, mean_and_deviation(values)[0], 0.92 * width, color=colour(arm), alpha=0.75, label=label)
                axes.plot([x] * len(values), values, ".", color="black", markersize=3)
        axes.set_xticks(range(len(metrics)), [metric.title for metric in metrics.values()], fontsize=9)
        axes.set_title(name, fontsize=10)
        axes.grid(axis="y", alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    both[0].set_ylabel("accuracy, %")
    both[0].set_ylim(0, 100)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8.5)
    save(figure, path)


def curves(path: Path, laboratory: Laboratory, setting: str) -> None:
    """Stage 2 over its steps, means over seeds: answer loss, share inserted, precision of the anchors, tau."""
    keys = (
        ("answer_loss", "answer loss (one batch)"),
        ("share", "copies / candidates"),
        ("precision", "anchors at a patch that holds their word"),
        ("tau", "tau"),
    )
    figure, panels = plt.subplots(1, len(keys), figsize=(15, 3.9), layout="constrained")
    for axes, (key, name) in zip(panels, keys, strict=True):
        for arm in laboratory.arms(setting):
            series: dict[int, list[float]] = {}
            for row in laboratory.done(setting, arm).values():
                for line in row["training"]["log"]:
                    if line.get(key) is not None:
                        series.setdefault(line["step"], []).append(line[key])
            steps = sorted(series)
            if steps:
                means = [mean_and_deviation(series[step])[0] for step in steps]
                axes.plot(steps, means, color=colour(arm), linewidth=1.5, label=title(arm))
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step of stage 2")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=8.5)
    save(figure, path)


def attention(path: Path, laboratory: Laboratory, setting: str) -> None:
    """Attention from the answer's place to the true patch and to the copies there, with copies and without."""
    arms = laboratory.arms(setting)
    figure, axes = plt.subplots(figsize=(10, 1.4 + 0.5 * len(arms)), layout="constrained")
    for row, arm in enumerate(arms):
        patch, copies, without = (
            list(laboratory.values(setting, arm, ATTENTION[name]).values()) for name in ("patch", "copies", "without")
        )
        left, right = mean_and_deviation(patch)[0], mean_and_deviation(copies)[0]
        axes.barh(row, left, 0.6, color=colour(arm), alpha=0.8, label="true patch")
        axes.barh(row, right, 0.6, left=left, color=colour(arm), alpha=0.35, hatch="//", label="copies there")
        axes.plot(patch, [row] * len(patch), ".", color="black", markersize=4)
        if without:
            axes.plot([mean_and_deviation(without)[0]], [row], "D", color="white", markeredgecolor="black",
                      markersize=6, label="same weights, copies left out")  # fmt: skip
    even = [100 * run["attention"]["with_copies"]["even"] for run in laboratory.done(setting, arms[0]).values()]
    axes.axvline(mean_and_deviation(even)[0], color="black", linestyle=":", linewidth=1, label="one token's even share")
    axes.set_yticks(range(len(arms)), [title(arm) for arm in arms], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("% of the attention where the answer is predicted; mean of layers, heads, seeds", fontsize=9)
    named: dict[str, Any] = {}
    for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
        named.setdefault(label, handle)
    figure.legend(named.values(), named.keys(), loc="outside lower center", ncols=4, fontsize=8.5)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def pictures(path: Path, laboratory: Laboratory, setting: str) -> bool:
    """The same scenes in every arm that kept them: anchors, attention of the answer's place. False if none did."""
    kept = {
        arm: row["pictures"]
        for arm in laboratory.arms(setting)
        for row in laboratory.done(setting, arm).values()
        if row.get("pictures")
    }
    if not kept:
        return False
    count = min(len(entries) for entries in kept.values())
    figure, grid = plt.subplots(
        count, 1 + len(kept), figsize=(3.1 * (1 + len(kept)), 3.9 * count), squeeze=False, layout="constrained"
    )
    for line in range(count):
        first = next(iter(kept.values()))[line]
        _scene(grid[line][0], first)
        for axes, (arm, entries) in zip(grid[line][1:], kept.items(), strict=True):
            _attended(axes, entries[line], arm)
    save(figure, path)
    return True


def _scene(axes: Any, entry: dict[str, Any]) -> None:
    rows, columns = entry["grid"]
    image = Image.open(io.BytesIO(base64.b64decode(entry["png"])))
    axes.imshow(np.asarray(image), extent=(0, columns, rows, 0), interpolation="nearest")
    y, x = divmod(entry["target"], columns)
    axes.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=2))
    axes.set_title(f"{entry['question']}\nit is {entry['truth']} (framed)", fontsize=9)
    axes.set_axis_off()


def _attended(axes: Any, entry: dict[str, Any], arm: str) -> None:
    rows, columns = entry["grid"]
    attention = np.array(entry["attention"]).reshape(rows, columns) * 100
    axes.imshow(attention, extent=(0, columns, rows, 0), cmap="Greys", interpolation="nearest", vmin=0)
    y, x = divmod(entry["target"], columns)
    axes.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, edgecolor="black", linewidth=2))
    behind: dict[int, list[str]] = {}
    for match in entry["matches"]:
        if match["patch"] is not None:
            behind.setdefault(match["patch"], []).append(match["text"])
    for patch, words in behind.items():
        y, x = divmod(patch, columns)
        axes.add_patch(plt.Rectangle((x, y), 1, 1, fill=False, edgecolor=colour(arm), linewidth=1.4))
        axes.text(
            x + 0.5, y + 0.5, "\n".join(words), ha="center", va="center", fontsize=6.5, color="white",
            bbox={"facecolor": colour(arm), "edgecolor": "none", "pad": 1.0},
        )  # fmt: skip
    right = "right" if entry["answer"] == entry["truth"] else "wrong"
    name = textwrap.fill(title(arm), 34)
    axes.set_title(f"{name}\n{entry['answer']} ({right}); most {attention.max():.1f} %", fontsize=8.5)
    axes.set_xticks([])
    axes.set_yticks([])
