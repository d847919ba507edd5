"""Where copies of text go: behind the image token that each matches, or, as controls, elsewhere.

"matched" is the method, which the operator does in one pass. Every other placement takes the tokens that matching
inserts, and says itself which slots they are put at. "random" draws an image token for each: if it does as well,
matching is not what helps. "front" puts a copy of the whole question in front of the first image: image tokens then see
the question, which a causal model otherwise never lets them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import AnchoredSequence, Role, merge_sequence, place_sequence, plan_sequence
from attanchor_vlm.model import config as settings

_LARGE_ODD = (-7046029254386353131, -4417276706812531889, -8796714831421723037)  # splitmix64's constants, signed


class Matched(NamedTuple):
    """What a placement is made from: B prompts of S slots, as matching leaves them.

    Attributes:
        text_embeds: (B, S, D).
        roles: (B, S) uint8, `attanchor_kernels.Role`; image tokens that were dropped are padding.
        turn: (B, S) int32, or None, as in `attanchor_kernels.merge_sequence`.
        host: (B, S) int64, the slot that each inserted token matches best, -1 = not inserted.
        score: (B, S) float32, the best cosines.
    """

    text_embeds: Tensor
    roles: Tensor
    turn: Tensor | None
    host: Tensor
    score: Tensor


class Placement(NamedTuple):
    """`hosts` gives (B, S) int64, the slot for a copy of each slot, -1 for none, from what matched and a seed; copies
    stand behind their hosts, or with `ahead` in front of them."""

    hosts: Callable[[Matched, int], Tensor]
    ahead: bool = False


def register_placement(name: str, placement: Placement) -> None:
    """Make a placement known as a value of `AttAnchorConfig.placement`."""
    _PLACEMENTS[name] = placement
    if name not in settings.PLACEMENTS:
        settings.PLACEMENTS.append(name)


def place(
    config: settings.AttAnchorConfig,
    text_embeds: Tensor,
    image_embeds: Tensor,
    roles: Tensor,
    *,
    turn: Tensor | None,
    kept: dict[str, Any],
    copy: bool,
    frames: Tensor | None = None,
    **options: Any,
) -> AnchoredSequence:
    """What `attanchor_kernels.merge_sequence` returns, with the copies where ``config.placement`` puts them.

    Args:
        kept: `keep` and its companions of `merge_sequence`; who stays is decided as with matched copies.
        copy: False leaves `embeds` None, as `plan_sequence` does.
        frames: (B, S) int64, the frame of each image token, counted over the batch, or None without a cap for each.
        text_embeds, …: As for `merge_sequence`; `options` are its positions and the side of padding.
    """
    matching = {"turn": turn, "direction": config.direction, "backend": config.backend, **kept}
    if config.inserts_nothing or (config.placement == "matched" and frames is None):
        merge, most = merge_sequence if copy else plan_sequence, config.max_anchors
        return merge(text_embeds, image_embeds, roles, config.tau, max_anchors=most, **matching, **options)
    most = config.max_anchors if frames is None else None
    plain = text_embeds.detach(), image_embeds.detach()
    found = plan_sequence(*plain, roles, config.tau, max_anchors=most, **matching)
    if frames is not None:
        found = found._replace(host=_capped(config, found.host, found.score, frames))
    if kept:
        if options["positions"] == "inherit" and options["position_ids"] is None:
            options["position_ids"] = roles.ne(Role.PADDING).long().cumsum(1) - 1
        roles, image_embeds = _without_dropped(roles, image_embeds, found)
    placement = _PLACEMENTS[config.placement]
    hosts = placement.hosts(Matched(text_embeds, roles, turn, found.host, found.score), config.placement_seed)
    made = place_sequence(
        text_embeds, image_embeds, roles, hosts, ahead=placement.ahead, copy=copy, backend=config.backend, **options
    )
    return made._replace(score=found.score, relevance=found.relevance)


def _without_dropped(roles: Tensor, image_embeds: Tensor, found: AnchoredSequence) -> tuple[Tensor, Tensor]:
    """The roles with padding where an image token was dropped, and the features of those that stay."""
    own = (found.source >= 0) & ~found.is_anchor
    stays = torch.zeros(len(roles), roles.shape[1] + 1, dtype=torch.bool, device=roles.device)
    stays = stays.scatter_(1, torch.where(own, found.source + 1, 0), True)[:, 1:]
    holds = roles.eq(Role.IMAGE) | roles.eq(Role.SILENT_IMAGE)
    return roles.masked_fill(holds & ~stays, Role.PADDING), image_embeds[stays[holds]]


def _capped(config: settings.AttAnchorConfig, host: Tensor, score: Tensor, frames: Tensor) -> Tensor:
    """(B, S) int64, `host` without what exceeds the best of each frame, and then those of the sample."""
    frame = frames.gather(1, host.clamp(min=0)) if config.direction == "text_into_image" else frames
    sample = torch.arange(len(host), device=host.device)[:, None].expand_as(host)
    for group, most in ((frame, config.max_anchors_per_frame), (sample, config.max_anchors)):
        if most is not None:
            host = host.masked_fill(rank_within(score, torch.where(host >= 0, group, -1)) >= most, -1)
    return host


def rank_within(score: Tensor, group: Tensor) -> Tensor:
    """As `group`, int64: how many of its group score better than each, earlier ones first among equals."""
    flat = group.flatten()
    order = score.flatten().argsort(descending=True, stable=True)
    order = order[flat[order].argsort(stable=True)]
    place = torch.arange(len(order), device=order.device)
    rank = place - torch.searchsorted(flat[order].contiguous(), flat[order].contiguous())
    return torch.empty_like(order).scatter_(0, order, rank).view_as(group)


def _random(matched: Matched, seed: int) -> Tensor:
    """(B, S) int64: for each inserted token an image slot that its turn allows, evenly over them, -1 elsewhere."""
    roles, turn = matched.roles, matched.turn
    allowed = roles.eq(Role.IMAGE)[:, None, :].expand(-1, roles.shape[1], -1)
    if turn is not None:
        allowed = allowed & (turn[:, None, :] >= turn[:, :, None])
    counts = allowed.sum(-1)
    rank = drawn(matched.text_embeds, roles, seed) % counts.clamp(min=1)
    chosen = (allowed & (allowed.long().cumsum(-1) == rank[..., None] + 1)).int().argmax(-1)
    return torch.where((matched.host >= 0) & (counts > 0), chosen, -1)


def drawn(text_embeds: Tensor, roles: Tensor, seed: int) -> Tensor:
    """(B, S) int64 from 0 below 2**31: a number drawn for every slot.

    Drawn by a hash of the words that take part, so that batch, padding, device and a resumed run change nothing, and
    that an answer, which is there in training alone, has no say.
    """
    place = roles.ne(Role.PADDING).long().cumsum(1)  # from the first real slot on, whichever side the padding is on
    content = _bits(text_embeds) * (place * _LARGE_ODD[0] + 1) * roles.eq(Role.ANCHOR_TEXT)
    prompt = content.sum(-1, keepdim=True)  # of integers, which wrap: the order of the sum does not matter
    salt = (seed * _LARGE_ODD[1] + 2**63) % 2**64 - 2**63
    return _mixed(_mixed(prompt + salt) + place * _LARGE_ODD[0]) & 0x7FFFFFFF


def _bits(text: Tensor) -> Tensor:
    """(B, S) int64 from the bits of each row's first features: equal rows give equal numbers."""
    rows = text.detach()[..., :8].contiguous()
    bits = rows.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[rows.element_size()]).long()
    weights = _mixed(torch.arange(1, bits.shape[-1] + 1, device=bits.device)) | 1
    return (bits * weights).sum(-1)


def _mixed(number: Tensor) -> Tensor:
    """splitmix64's mixing: every bit of the int64 result depends on every bit of `number`."""
    number = (number ^ ((number >> 30) & 0x3FFFFFFFF)) * _LARGE_ODD[1]
    number = (number ^ ((number >> 27) & 0x1FFFFFFFFF)) * _LARGE_ODD[2]
    return number ^ ((number >> 31) & 0x1FFFFFFFF)


def _front(matched: Matched, seed: int) -> Tensor:
    """(B, S) int64: the first image token for every token that takes part."""
    holds_image = matched.roles.eq(Role.IMAGE)
    first = torch.where(holds_image.any(-1), holds_image.int().argmax(-1), -1)
    return torch.where(matched.roles.eq(Role.ANCHOR_TEXT), first[:, None], -1)


_PLACEMENTS = {
    "matched": Placement(lambda matched, seed: matched.host),
    "random": Placement(_random),
    "front": Placement(_front, ahead=True),
}
