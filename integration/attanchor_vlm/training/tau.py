"""tau while the projector trains: fixed, it drifts, so it can be measured anew, or follow a running quantile."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from attanchor_vlm import distributed
from attanchor_vlm.analysis.calibrate import HIGHEST_TAU, Scores
from attanchor_vlm.model.attach import config_of, set_tau
from attanchor_vlm.model.plan import AnchorPlan, taking_part

_BINS = 4000  # over the cosines -1 to 1


class RunningQuantile:
    """The score that a wanted fraction of the latest steps' tokens reaches, from a histogram that forgets.

    Every step multiplies what was there by ``1 - 1 / memory``. Between the edges of a bin (1/2000 wide), scores are
    taken to be spread evenly.

    Args:
        fraction: Wanted anchors per text token that takes part.
        memory: Optimiser steps that count.
    """

    def __init__(self, fraction: float, memory: int = 10):
        self.fraction, self.memory = fraction, memory
        self.weights = torch.zeros(_BINS, dtype=torch.float64)
        self.num_candidates = 0.0

    @staticmethod
    def bins(scores: Tensor) -> Tensor:
        """(_BINS,) float64, how many of the finite scores fall in each bin; on their device, without a sync."""
        scores = scores.flatten().float()
        real = torch.isfinite(scores)
        index = ((scores.masked_fill(~real, 0) + 1) * (_BINS / 2)).long().clamp(0, _BINS - 1)
        return torch.zeros(_BINS, dtype=torch.float64, device=scores.device).scatter_add_(0, index, real.double())

    def add(self, counts: Tensor, num_candidates: float) -> None:
        """One step's bins and text tokens."""
        kept = 1 - 1 / self.memory
        self.weights = self.weights * kept + counts
        self.num_candidates = self.num_candidates * kept + num_candidates

    def tau(self) -> float:
        """The threshold; -1 if even all candidates are fewer than wanted."""
        wanted = self.fraction * self.num_candidates
        reached = self.weights.flip(0).cumsum(0)
        place = int(torch.searchsorted(reached, torch.tensor(wanted, dtype=torch.float64)))
        if place >= _BINS:
            return -1.0
        inside = float(self.weights[_BINS - 1 - place])
        before = float(reached[place]) - inside
        edge = 1 - place * 2 / _BINS
        return min(max(edge - (wanted - before) / inside * 2 / _BINS, -1.0), HIGHEST_TAU)

    def state(self) -> dict[str, Any]:
        filled = self.weights.nonzero()[:, 0].tolist()
        return {"bins": {str(index): float(self.weights[index]) for index in filled}, "takers": self.num_candidates}

    def restore(self, state: dict[str, Any]) -> None:
        self.weights = torch.zeros(_BINS, dtype=torch.float64)
        for index, weight in state["bins"].items():
            self.weights[int(index)] = weight
        self.num_candidates = state["takers"]


class TauKeeper(TrainerCallback):
    """Sets tau for a wanted fraction: at the start of training, and with `hold` for as long as it lasts.

    All processes of a run come to the same tau: they measure different samples and put their scores together.

    Args:
        fraction: Wanted anchors per text token that takes part.
        hold: None measures once; "epoch" anew before every epoch; "quantile" lets tau follow the scores of the latest
            optimiser steps.
        measure: The scores of a model, the same samples every time.
        say: Takes the lines for the user.
    """

    def __init__(
        self,
        fraction: float,
        hold: str | None,
        measure: Callable[[nn.Module], Scores],
        say: Callable[[str], None],
    ):
        self.fraction, self.hold, self.measure, self.say = fraction, hold, measure, say
        self.quantile = RunningQuantile(fraction)
        self.epoch = -1  # the last that was measured for
        self._tau: float | None = None
        self._seen: Tensor | None = None  # this step's bins, and behind them its text tokens

    def observe(self, plan: AnchorPlan, anchor_mask: Tensor) -> None:
        """Note the scores of one forward pass of training."""
        if self.hold == "quantile":
            num_candidates = taking_part(plan, anchor_mask).double()[None]
            seen = torch.cat([RunningQuantile.bins(plan.score), num_candidates])
            self._seen = seen if self._seen is None else self._seen + seen

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if self._tau is not None:  # resumed
            set_tau(model, self._tau)
            return
        scores = self._calibrate(model, 0)
        if self.hold == "quantile":
            every = torch.cat(scores.of_sample)
            self.quantile.add(RunningQuantile.bins(every).cpu(), scores.num_candidates)

    def on_epoch_begin(self, args, state, control, model=None, **kwargs):
        epoch = int(state.epoch or 0)
        if self.hold == "epoch" and epoch > self.epoch:
            self._calibrate(model, epoch)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if self.hold != "quantile":
            return
        seen = torch.zeros(_BINS + 1, dtype=torch.float64) if self._seen is None else self._seen
        seen, self._seen = distributed.add_up(seen), None
        self.quantile.add(seen[:-1], float(seen[-1]))
        self._tau = self.quantile.tau()
        set_tau(model, self._tau)

    def _calibrate(self, model: nn.Module, epoch: int) -> Scores:
        scores = self.measure(model)
        self._tau, self.epoch = scores.threshold(self.fraction), epoch
        set_tau(model, self._tau)
        when = f"epoch {epoch + 1}: " if self.hold == "epoch" else ""
        inserted = scores.fraction(self._tau, config_of(model).max_anchors)
        self.say(
            f"{when}tau {self._tau:.4f} inserts {inserted:.1%} of the text tokens, measured on "
            f"{len(scores.of_sample)} samples"
        )
        return scores

    def state(self) -> dict[str, Any]:
        """What a resumed run needs to go on with the same tau, as JSON has it."""
        return {"tau": self._tau, "epoch": self.epoch, "quantile": self.quantile.state()}

    def restore(self, state: dict[str, Any]) -> None:
        self._tau, self.epoch = state["tau"], state["epoch"]
        self.quantile.restore(state["quantile"])
