"""What a call inserted: where every token of the new prompt comes from, and the figures that training logs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

Call = Mapping[str, Any]
"""The arguments of a model's call, by name."""


class AnchorPlan(NamedTuple):
    """What a call inserted and where: B samples, S tokens in the caller's prompt, L in the new one.

    Attributes:
        input_ids: (B, L) int64, the new prompt; anchors repeat the id that they copy.
        attention_mask: (B, L) int64, 1 = real.
        position_ids: (B, L) or (P, B, L) int64.
        source: (B, L) int64, the slot of the caller's prompt that each token comes from, -1 = padding, or a pause token
            of think mode, which `attention_mask` tells from it. The caller's own tokens stand where
            ``(source >= 0) & ~is_anchor``, in their order; with `keep`, those that were dropped are missing.
        is_anchor: (B, L) bool, True where the token is an inserted copy.
        host: (B, S) int64, the slot behind which each token was copied, -1 = not.
        score: (B, S) float32, each candidate's best cosine, -inf for tokens that are none.
        labels: (B, L) int64 with -100 at anchors and padding, or None.
    """

    input_ids: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    source: Tensor
    is_anchor: Tensor
    host: Tensor
    score: Tensor
    labels: Tensor | None


class AnchorStats:
    """Figures of the last call, as 0-d tensors on the model's device. Computed when read; nothing syncs before."""

    def __init__(self, plan: AnchorPlan | None = None) -> None:
        self._plan = plan

    @property
    def inserted(self) -> Tensor:
        """Number of anchors in the batch."""
        return torch.zeros(()) if self._plan is None else self._plan.is_anchor.sum().float()

    @property
    def candidates(self) -> Tensor:
        """Number of tokens that could have been copied: they took part and had a host."""
        return torch.zeros(()) if self._plan is None else torch.isfinite(self._plan.score).sum().float()

    @property
    def share_of_candidates(self) -> Tensor:
        """Inserted over candidates, 0 without candidates; in image-into-text the candidates are image tokens."""
        return self.inserted / self.candidates.clamp(min=1)

    @property
    def mean_score(self) -> Tensor:
        """Mean best cosine of the inserted tokens, NaN if there is none."""
        return _mean_where(self._plan, lambda plan: plan.host >= 0)

    @property
    def mean_candidate_score(self) -> Tensor:
        """Mean best cosine of all candidates, NaN if there is none: drifts with the projector whatever tau is."""
        return _mean_where(self._plan, lambda plan: torch.isfinite(plan.score))


def _mean_where(plan: AnchorPlan | None, select: Callable[[AnchorPlan], Tensor]) -> Tensor:
    if plan is None:
        return torch.full((), torch.nan)
    chosen = select(plan)
    return plan.score.masked_fill(~chosen, 0).sum() / chosen.sum()


def taking_part(plan: AnchorPlan, anchor_mask: Tensor) -> Tensor:
    """Text tokens that take part in a call, as a 0-d tensor: those of samples without an image do not."""
    matched = torch.isfinite(plan.score).any(-1, keepdim=True)
    return (anchor_mask.to(matched.device) & matched).sum()
