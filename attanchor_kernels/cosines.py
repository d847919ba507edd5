"""Cosines of movers and hosts in full precision, and the best partner of each row: the reference's half of matching."""

from __future__ import annotations

import torch
from torch import Tensor

NORM_FLOOR = 1e-12


class Cosines:
    """The cosines of movers (b, n, D) and hosts (b, m, D), both in the dtype of accumulation.

    A matrix product may round equal rows differently where they fall into different tiles. So the best partner of a row
    is the first within a few roundings of the largest cosine, and what is reported is summed again, in an order that is
    the same everywhere.
    """

    def __init__(self, movers: Tensor, hosts: Tensor, moves: Tensor, hosting: Tensor, allowed: Tensor | None) -> None:
        # Contiguous: over another layout, sums run in an order that differs from row to row.
        self.movers, self.hosts = movers.contiguous(), hosts.contiguous()
        mover_norm, host_norm = (torch.linalg.vector_norm(rows, dim=-1) for rows in (self.movers, self.hosts))
        self.mover_scale, self.host_scale = (
            norm.clamp_min(NORM_FLOOR).reciprocal() for norm in (mover_norm, host_norm)
        )
        # A norm that is NaN, or whose square is not finite, takes the row out of matching.
        limit = 2.0 ** (512 if movers.dtype == torch.float64 else 64)
        self.moves, self.hosting = moves & (mover_norm < limit), hosting & (host_norm < limit)
        cosine = _product(self.movers, self.hosts)
        cosine.mul_(self.host_scale.unsqueeze(1)).mul_(self.mover_scale.unsqueeze(2))
        if cosine.device.type != "cpu" or not self.hosting.all():
            cosine.masked_fill_(~self.hosting.unsqueeze(1), -torch.inf)
        if allowed is not None:
            cosine.masked_fill_(~allowed, -torch.inf)
        self.cosine = cosine  # (b, n, m), -inf where a mover may not use a host

    def best(self) -> tuple[Tensor, Tensor]:
        """(b, n) best cosine of each mover, -inf without a candidate, and its host's column."""
        found, host = self._first_best(self.cosine)
        score = _dots(self.movers, self.hosts, host) * self.host_scale.gather(1, host) * self.mover_scale
        return score.masked_fill(~self.moves | ~found, -torch.inf), host

    def best_of_hosts(self) -> Tensor:
        """(b, m) best cosine of each host over the movers that may use it, -inf without one."""
        found, mover = self._first_best(self.cosine.masked_fill(~self.moves.unsqueeze(2), -torch.inf).mT)
        score = _dots(self.hosts, self.movers, mover) * self.host_scale * self.mover_scale.gather(1, mover)
        return score.masked_fill(~self.hosting | ~found, -torch.inf)

    def _first_best(self, cosine: Tensor) -> tuple[Tensor, Tensor]:
        slack = 16 * torch.finfo(cosine.dtype).eps
        best = cosine.amax(dim=-1, keepdim=True)
        return ~best.squeeze(-1).isneginf(), (cosine >= best - slack).view(torch.uint8).argmax(dim=-1)


def _dots(rows: Tensor, others: Tensor, chosen: Tensor) -> Tensor:
    """(b, n): the product of each of `rows` (b, n, D) with row `chosen` (b, n) of `others` (b, m, D)."""
    first = others.shape[1] * torch.arange(len(others), device=others.device).unsqueeze(1)
    return others.flatten(0, 1).index_select(0, (first + chosen).flatten()).view_as(rows).mul_(rows).sum(-1)


def _product(rows: Tensor, others: Tensor) -> Tensor:
    """(b, n, m) products in full precision, whatever autocast, TF32 or `set_float32_matmul_precision` say.

    What they set belongs to the process, which other threads share and children inherit, so it is left alone: where
    float32 would be rounded, the product is taken in float64.
    """
    settings = {"cpu": torch.backends.mkldnn, "cuda": torch.backends.cuda}.get(rows.device.type)
    exact = settings is None or settings.matmul.fp32_precision in ("none", "ieee")  # type: ignore[attr-defined]
    wide = rows.dtype if exact else torch.float64
    with torch.autocast(rows.device.type, enabled=False):
        return torch.bmm(rows.to(wide), others.to(wide).mT).to(rows.dtype)
