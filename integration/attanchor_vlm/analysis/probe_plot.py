"""One picture of a probe: cosines by kind of token, the share at each tau, own against other images, hosts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from attanchor_vlm.analysis.probe import WANTED_SHARE, Probe
from attanchor_vlm.analysis.probe_scores import CONTENT, KINDS, PromptScores
from attanchor_vlm.figures import plt, save

_COLOURS = {"content": "#d62728", "function": "#1f77b4", "punctuation": "#8c8c8c"}
_CONTROL = "#444444"


def probe_plot(path: Path, probe: Probe, prompts: Sequence[PromptScores], title: str) -> None:
    """Draw `probe`, which was measured on `prompts`, to a .png, .pdf or .svg file."""
    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    figure.suptitle(f"{title}: {probe.verdict}", fontsize=13, fontweight="bold")
    _cosines(axes[0, 0], probe, prompts)
    _shares(axes[0, 1], probe)
    _images(axes[1, 0], probe, prompts)
    _hosts(axes[1, 1], probe, prompts)
    for one in axes.flat:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def _cosines(axes: Axes, probe: Probe, prompts: Sequence[PromptScores]) -> None:
    best = np.concatenate([prompt.best for prompt in prompts])
    kinds = np.concatenate([prompt.kinds for prompt in prompts])
    bins = np.linspace(min(best.min(), 0), best.max(), 41).tolist()
    for kind in KINDS:
        if (kinds == kind).any():
            values = best[kinds == kind]
            weights = np.full(len(values), 1 / len(values))
            axes.hist(values, bins, weights=weights, histtype="step", linewidth=1.8, color=_COLOURS[kind], label=kind)
    axes.axvspan(*probe.control_best, color=_CONTROL, alpha=0.18, label="content, features permuted (means)")
    axes.axvline(probe.tau, color="black", linestyle="--", linewidth=1, label=f"tau {probe.tau:.3f}: a tenth inserted")
    axes.set(title="Best cosine with an image token", xlabel="cosine", ylabel="share of the tokens of a kind")
    axes.legend(fontsize=8.5)


def _shares(axes: Axes, probe: Probe) -> None:
    taus = [share.tau for share in probe.shares]
    for kind in KINDS:
        if probe.kinds[kind].tokens:
            axes.plot(taus, [getattr(s, kind) for s in probe.shares], color=_COLOURS[kind], marker=".", label=kind)
    axes.plot(taus, [share.all for share in probe.shares], color="black", linewidth=2, marker=".", label="all")
    axes.axhline(WANTED_SHARE, color="black", linestyle=":", linewidth=1)
    axes.set(title="Inserted share", xlabel="tau", ylabel="inserted / text tokens taking part", ylim=(0, 1.02))
    axes.legend(fontsize=8.5)


def _images(axes: Axes, probe: Probe, prompts: Sequence[PromptScores]) -> None:
    pairs = [
        (here, there)
        for prompt in prompts
        if len(prompt.elsewhere)
        for here, there in zip(
            prompt.best[prompt.kinds == CONTENT],
            prompt.elsewhere.mean(0)[prompt.kinds == CONTENT],
            strict=True,
        )
    ]
    own, other = np.array(pairs).T
    axes.scatter(other, own, s=9, alpha=0.35, color=_COLOURS["content"], linewidths=0)
    ends = (min(own.min(), other.min()), max(own.max(), other.max()))
    axes.plot(ends, ends, color="black", linewidth=1)
    shuffled = probe.shuffled
    axes.set(
        title=f"Content words: falls by {shuffled.drop:.4f} ({shuffled.low:.4f} to {shuffled.high:.4f}); "
        f"permuted: {shuffled.control[0]:.4f} to {shuffled.control[1]:.4f}",
        xlabel="best cosine with others' images (mean)",
        ylabel="best cosine with the own image",
    )
    axes.title.set_fontsize(10)


def _hosts(axes: Axes, probe: Probe, prompts: Sequence[PromptScores]) -> None:
    ranked = [np.sort(np.bincount(prompt.hosts, minlength=1))[::-1][:20] for prompt in prompts]
    width = max(map(len, ranked))
    mean = np.mean([np.pad(counts, (0, width - len(counts))) for counts in ranked], axis=0) / probe.hosts.words
    axes.bar(np.arange(1, width + 1), mean, color=_COLOURS["content"], alpha=0.75)
    axes.set(
        title=f"Hosts of {probe.hosts.words} content tokens in {probe.hosts.patches:.0f} image tokens",
        xlabel="image tokens of an image, the most popular first",
        ylabel="share of the words",
        xticks=range(1, width + 1, max(1, width // 10)),
    )
