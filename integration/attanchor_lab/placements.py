"""Where the laboratory's controls put copies: hosts by other rules than matching.

The operator `place_sequence` builds the prompt of given hosts. With those that matching finds it is that of `attach`
(checked), so that arms differ in placement and in nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import Role, plan_sequence


class Matched(NamedTuple):
    """Best cosines of a batch's text tokens: (B, S) float32 `score`, -inf where a token takes no part, and `best`, the
    slot of the image token that gives it, -1 where there is none."""

    score: Tensor
    best: Tensor


@torch.no_grad()
def match(embedded: Tensor, features: Tensor, is_image: Tensor, takes_part: Tensor) -> Matched:
    """What AttAnchor's operator matches, whatever tau.

    Args:
        embedded: (B, S, D), the look-up of the prompt's ids.
        features: (B, P, D), projected patches.
        is_image, takes_part: (B, S) bool.
    """
    roles = roles_of(is_image, takes_part)
    plan = plan_sequence(embedded.detach(), features.detach().flatten(0, 1).to(embedded.dtype), roles, -1.0)
    return Matched(plan.score, plan.host)


def roles_of(is_image: Tensor, takes_part: Tensor) -> Tensor:
    """(B, S) uint8, as the operators take them; no padding."""
    roles = torch.full_like(is_image, Role.TEXT, dtype=torch.uint8)
    return roles.masked_fill(takes_part, Role.ANCHOR_TEXT).masked_fill(is_image, Role.IMAGE)


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
