"""Choose tau: measure the best cosines of some samples, and find the threshold that inserts a wanted fraction."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from attanchor_vlm import distributed
from attanchor_vlm.data.batches import Collator, to_model
from attanchor_vlm.data.rows import Sample
from attanchor_vlm.model.adapter_files import FILE_NAME, load_settings
from attanchor_vlm.model.attach import attach, base_of, set_tau
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.plan import taking_part
from attanchor_vlm.settings import check_fraction, differences

HIGHEST_TAU = 0.999  # 1 would insert nothing, and would not measure either
# What a threshold does not depend on, or what the processor says anew.
_FREE_TO_STORE = (
    *("tau", "max_anchors", "keep", "keep_by"),
    *("special_token_ids", "generation_prompt_ids", "function_token_ids"),
)


@dataclass(frozen=True)
class Scores:
    """Best cosines of every candidate in some samples. They do not depend on tau or on a budget.

    Attributes:
        of_sample: For each sample a float32 tensor of its candidates' scores: text tokens, or image tokens if those are
            what is copied.
        num_candidates: Text tokens that take part, in all samples: what fractions are fractions of.
    """

    of_sample: tuple[Tensor, ...]
    num_candidates: int

    @cached_property
    def ranked(self) -> Tensor:
        """All scores, highest first."""
        return torch.cat(self.of_sample).sort(descending=True).values

    def threshold(self, fraction: float) -> float:
        """The tau that inserts `fraction` anchors on every text token, as nearly as these samples tell, at most 0.999.

        It lies between the last score that is to be inserted and the next, so that rounding decides nothing.
        """
        ranked = self.ranked
        wanted = min(max(round(fraction * self.num_candidates), 1), len(ranked))
        last = float(ranked[wanted - 1])
        after = float(ranked[wanted]) if wanted < len(ranked) else last - 0.01
        middle = min((last + after) / 2, HIGHEST_TAU)
        rounded = (round(middle, digits) for digits in (4, 6, 8))
        return next((tau for tau in rounded if after < tau <= last), middle)

    def inserted(self, tau: float, max_anchors: int | None = None) -> Tensor:
        """(samples,) int64, the anchors that each sample gets."""
        counts = torch.tensor([int((scores >= tau).sum()) for scores in self.of_sample])
        return counts if max_anchors is None else counts.clamp(max=max_anchors)

    def fraction(self, tau: float, max_anchors: int | None = None) -> float:
        """Inserted anchors per text token."""
        return float(self.inserted(tau, max_anchors).sum()) / self.num_candidates


@torch.no_grad()
def measure_scores(
    model: nn.Module,
    collate: Callable[[Sequence[Sample]], dict[str, Tensor]],
    samples: Iterable[Sample],
    batch_size: int = 32,
    progress: bool = False,
    own_part: bool = False,
) -> Scores:
    """The best cosines of the samples that have images.

    Under torchrun every process measures its part, and all get the scores of all; the model may be sharded.

    Args:
        model: Attached, on its device; left in evaluation mode, its settings and counters as they were.
        own_part: `samples` are this process's part already, and all have images.
    """
    mine, share_out = samples, own_part
    if not own_part:
        mine = [sample for sample in samples if sample.images]
        world = distributed.world_size()
        share_out = len(mine) >= world
        if share_out:  # as many for each: a sharded model's processes must call it equally often
            mine = mine[: len(mine) // world * world][distributed.rank() :: world]
    target = base_of(model)
    settings, calls = target.config.attanchor, target.attanchor_calls
    of_sample: list[Tensor] = []
    num_candidates = 0
    try:
        set_tau(model, HIGHEST_TAU)
        model.eval()
        iterator = iter(mine)
        total = len(mine) if isinstance(mine, Sized) else None
        bar = tqdm(desc="measuring scores", total=total, unit="", disable=not progress, leave=False)
        while part := list(islice(iterator, batch_size)):
            batch = to_model(collate(part), model)
            model(**batch)
            bar.update(len(part))
            for row in target.attanchor_plan.score.float().cpu():
                of_sample.append(row[torch.isfinite(row)])
            num_candidates += int(taking_part(target.attanchor_plan, batch["anchor_mask"]))
        bar.close()
    finally:
        target.config.attanchor, target.attanchor_calls = settings, calls
    if share_out:
        parts = distributed.gather((of_sample, num_candidates))
        of_sample, num_candidates = [row for rows, _ in parts for row in rows], sum(count for _, count in parts)
    if not num_candidates or not sum(len(row) for row in of_sample):
        raise ValueError("no sample has an image and a question, so there is nothing to match")
    return Scores(tuple(of_sample), num_candidates)


def threshold_for_share(
    model: Any,
    processor: Any,
    samples: Iterable[Sample],
    share: float,
    config: AttAnchorConfig,
    batch_size: int = 32,
) -> tuple[float, Tensor]:
    """The tau at which about `share` inserted anchors come on every text token that takes part, and all scores, sorted.

    Scores do not depend on tau, so one pass measures them. Leaves `model` attached with that tau. The paper chose its
    thresholds for a share of about 0.1.

    Raises:
        ValueError: `share` is one that no threshold can give, or no sample has an image.
    """
    check_fraction(share, config.direction, "share")
    attach(model, dataclasses.replace(config, tau=HIGHEST_TAU))
    scores = measure_scores(model, Collator(processor, "each", config.content_words), samples, batch_size)
    tau = scores.threshold(share)
    attach(model, dataclasses.replace(config, tau=tau))
    return tau, scores.ranked


def check_storable(directory: Path, config: AttAnchorConfig) -> None:
    """Refuse to replace settings that differ in what a threshold depends on: it would not fit them."""
    path = directory / FILE_NAME
    if not path.is_file():
        return
    compared = {name: value for name, value in config.to_dict().items() if name not in _FREE_TO_STORE}
    if changes := differences(load_settings(path).to_dict(), compared):
        raise ValueError(f"{path} holds other settings: {changes}; measure with the same ones, or save elsewhere")


def summary(scores: Scores, tau: float, wanted: float, max_anchors: int | None) -> dict[str, Any]:
    """What was measured, as JSON has it: `wanted` was asked for, `fraction` is what is inserted within the budget."""
    counts = scores.inserted(tau, max_anchors)
    levels = (0.05, 0.25, 0.5, 0.75, 0.95)
    quantiles = np.quantile(scores.ranked.double().numpy(), levels).tolist()  # torch's takes 16 million at most
    return {
        "tau": tau,
        "wanted": wanted,
        "fraction": round(scores.fraction(tau, max_anchors), 6),
        "max_anchors": max_anchors,
        "samples": len(scores.of_sample),
        "text_tokens": scores.num_candidates,
        "candidates": len(scores.ranked),
        "anchors_per_sample": {"mean": round(float(counts.double().mean()), 3), "max": int(counts.max())},
        "quantiles": {f"{level:.0%}": round(value, 6) for level, value in zip(levels, quantiles, strict=True)},
    }


def score_plot(path: Path, scores: Scores, tau: float, max_anchors: int | None = None, title: str = "") -> None:
    """The distribution of the best cosines with tau in it, and what other thresholds would insert."""
    from attanchor_vlm.figures import plt, save

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    ranked = scores.ranked.numpy()
    low, high = min(float(ranked[-1]), tau - 1e-3), max(float(ranked[0]), tau) + 1e-3
    above = min(max(round(60 * (high - tau) / (high - low)), 1), 59)  # of 60 bars; tau lies between two
    edges = np.concatenate([np.linspace(low, tau, 61 - above), np.linspace(tau, high, above + 1)[1:]])
    counts, _ = np.histogram(ranked, edges)
    colours = ["#d62728" if edge >= tau else "#b8bec6" for edge in edges[:-1]]
    left.bar(edges[:-1], counts, width=np.diff(edges), align="edge", color=colours, linewidth=0)
    left.set_xlabel("best cosine of a candidate")
    left.set_ylabel("candidates")
    left.set_title(f"{len(ranked)} candidates of {len(scores.of_sample)} samples", fontsize=10)

    thresholds = np.linspace(low, high, 200)
    inserted = [100 * scores.fraction(float(one)) for one in thresholds]
    right.plot(thresholds, inserted, color="#1f77b4", label="all that reach tau")
    if max_anchors is not None:
        bounded = [100 * scores.fraction(float(one), max_anchors) for one in thresholds]
        right.plot(thresholds, bounded, color="#2ca02c", label=f"at most {max_anchors} a sample")
    at_tau = 100 * scores.fraction(tau, max_anchors)
    right.plot([tau], [at_tau], "o", color="#d62728")
    right.annotate(f"{at_tau:.1f} %", (tau, at_tau), xytext=(7, 5), textcoords="offset points", color="#d62728")
    right.set_xlabel("tau")
    right.set_ylabel("inserted, in % of the text tokens")
    right.set_ylim(bottom=0)
    right.legend(fontsize=8.5)
    for axes in (left, right):
        axes.axvline(tau, color="black", linestyle="--", linewidth=1)
        axes.annotate(
            f"tau {tau:.4f}",
            (tau, 1),
            xycoords=("data", "axes fraction"),
            xytext=(4, -12),
            textcoords="offset points",
            fontsize=9,
        )
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if title:
        figure.suptitle(title, fontsize=12, fontweight="bold")
    save(figure, path)
