"""A sequence from given hosts: what AttAnchor builds from cosines, built from any rule of where copies go.

`attach` offers the paper's placement alone. The controls need the same sequence with copies at other places, so the
assembling is here once, with the host of every token as its input. With the hosts that matching finds, the result is
that of `attach` (tested), so that arms differ in placement and in nothing else.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import plan_sequence

_TEXT, _IMAGE, _ANCHOR_TEXT = 1, 2, 3  # roles of plan_sequence


class Placed(NamedTuple):
    """A prompt with copies: B samples of L tokens, right-padded.

    Attributes:
        embeds: (B, L, D).
        position_ids, attention_mask: (B, L) int64.
        source: (B, L) int64, the slot that each token copies, -1 = padding.
        is_anchor: (B, L) bool.
        host: (B, S) int64, the slot behind which each token was copied, -1 = not.
    """

    embeds: Tensor
    position_ids: Tensor
    attention_mask: Tensor
    source: Tensor
    is_anchor: Tensor
    host: Tensor


class Matched(NamedTuple):
    """Best cosines of a batch's text tokens: (B, S) float32 `score`, -inf where a token takes no part, and `best`, the
    slot of the image token that gives it, -1 where there is none."""

    score: Tensor
    best: Tensor


@torch.no_grad()
def match(ids: Tensor, embedded: Tensor, features: Tensor, is_image: Tensor, takes_part: Tensor) -> Matched:
    """What AttAnchor's operator matches, whatever tau.

    Args:
        ids: (B, S) token ids.
        embedded: (B, S, D), their look-up.
        features: (B, P, D), projected patches.
        is_image, takes_part: (B, S) bool.
    """
    roles = torch.full_like(ids, _TEXT, dtype=torch.uint8)
    roles = roles.masked_fill(takes_part, _ANCHOR_TEXT).masked_fill(is_image, _IMAGE)
    plan = plan_sequence(embedded.detach(), features.detach().flatten(0, 1).to(embedded.dtype), roles, -1.0)
    return Matched(plan.score, plan.host)


def place(rows: Tensor, host: Tensor, positions: str = "sequential") -> Placed:
    """Copy every token right behind its host; several at one host keep their order.

    Args:
        rows: (B, S, D), the plain sequence, image features in their slots; no padding.
        host: (B, S) int64 slots, -1 for no copy.
        positions: "sequential" or "inherit", as in `attanchor_kernels.build_sequence`.

    Raises:
        ValueError: another `positions`, or a host that is no slot.
    """
    if positions not in ("sequential", "inherit"):
        raise ValueError(f"positions is {positions!r}; it should be 'sequential' or 'inherit'")
    batch, slots = host.shape
    if host.device.type == "cpu" and host.numel() and not (int(host.min()) >= -1 and int(host.max()) < slots):
        raise ValueError(f"host holds {int(host.min())} to {int(host.max())}; it should be -1 or a slot below {slots}")
    slot = torch.arange(slots, device=host.device).expand(batch, -1)
    last = slots * (slots + 1)
    # A token stands at its own slot, a copy right behind its host's; what is not copied goes to the end and is cut off.
    copies = torch.where(host >= 0, host * (slots + 1) + 1 + slot, last)
    keys, order = torch.cat([slot * (slots + 1), copies], 1).sort(dim=1)
    length = int((keys < last).sum(1).max())
    keys, order = keys[:, :length], order[:, :length]
    real, is_anchor = keys < last, (order >= slots) & (keys < last)
    source = order % slots
    embeds = rows.gather(1, source[..., None].expand(-1, -1, rows.shape[-1])) * real[..., None]
    counted = torch.arange(length, device=host.device).expand(batch, -1)
    inherited = torch.where(is_anchor, host.gather(1, source), source)
    position_ids = (counted if positions == "sequential" else inherited) * real
    return Placed(embeds, position_ids, real.long(), source.masked_fill(~real, -1), is_anchor, host)


def random_patches(inserted: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """(B, S) hosts: a patch drawn evenly for every inserted token. Patches fill the slots from 1 on."""
    drawn = torch.randint(1, patches + 1, inserted.shape, generator=generator, device=inserted.device)
    return drawn.masked_fill(~inserted, -1)


def at_slot(inserted: Tensor, slot: int) -> Tensor:
    """(B, S) hosts: every inserted token behind the same slot."""
    return torch.full_like(inserted, slot, dtype=torch.long).masked_fill(~inserted, -1)


def true_patches(holds: Tensor, target: Tensor, generator: torch.Generator) -> Tensor:
    """(B, n) patches for n words: that of the object asked for; without one, any that holds the word; -1 for neither.

    It knows what the model is to find out: that both words stand at one patch tells that the object is there.

    Args:
        holds: (B, n, P) bool, the patches that hold each word.
        target: (B,) int64, the patch of the object asked for, -1 for none.
    """
    noise = torch.rand(holds.shape, generator=generator, device=holds.device)
    anywhere = noise.masked_fill(~holds, -1).argmax(-1).masked_fill(~holds.any(-1), -1)
    there = target[:, None].expand_as(anywhere)
    at_target = holds.gather(-1, there.clamp(min=0)[..., None])[..., 0] & (there >= 0)
    return torch.where(at_target, there, anywhere)


def plain_rows(model: Any, ids: Tensor, features: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """(B, S, D) twice: the look-up of the ids, and the same with the image features in their slots."""
    embedded = model.get_input_embeddings()(ids)
    return embedded, embedded.masked_scatter(is_image[..., None], features.to(embedded.dtype))
