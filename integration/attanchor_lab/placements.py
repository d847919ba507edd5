"""Controls that the paper lacks: the copies of AttAnchor at other places, in everything else the same.

    with placed("random", seed=0):
        train.run(settings)  # every prompt that an attached model rewrites meanwhile gets its copies there

"matched" is the paper's placement. "random" takes the same tokens, those whose best cosine reaches tau, and puts each
behind an image token drawn evenly: if it does as well, matching is not what helps. "front" puts a copy of the whole
question in front of the first image, whatever tau is below 1: image tokens then see the question, which a causal model
otherwise never lets them.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model import rewrite as prepare
from attanchor_vlm.records import write_json
from torch import Tensor

from attanchor_kernels import AnchoredSequence, plan_sequence

PLACEMENTS = ("matched", "random", "front")
_FILE_NAME = "placement.json"  # beside an adapter that was trained with another than "matched"
_in_force: ContextVar[str] = ContextVar("attanchor_placement", default="matched")
_LARGE_ODD = (-7046029254386353131, -4417276706812531889, -8796714831421723037)  # splitmix64's constants, signed


@contextlib.contextmanager
def placed(placement: str, seed: int = 0) -> Iterator[None]:
    """Put copies elsewhere, in every attached model of this process, while the block runs.

    Args:
        placement: "matched", "random" or "front".
        seed: For "random". The same prompt gets the same places in every call, in training as in generation.

    Raises:
        ValueError: there is no such placement; inside, at a call with another direction than "text_into_image".
    """
    if placement not in PLACEMENTS:
        raise ValueError(f"placement is {placement!r}; it should be one of {', '.join(PLACEMENTS)}")
    if placement == "matched":
        yield
        return

    def merge(*arguments: Any, **options: Any) -> AnchoredSequence:
        return place(*arguments, **options, placement=placement, seed=seed)

    def plan(*arguments: Any, **options: Any) -> AnchoredSequence:
        return place(*arguments, **options, placement=placement, seed=seed, copy=False)

    before, token = (prepare.merge_sequence, prepare.plan_sequence), _in_force.set(placement)
    prepare.merge_sequence, prepare.plan_sequence = merge, plan  # type: ignore[assignment]
    try:
        yield
    finally:
        prepare.merge_sequence, prepare.plan_sequence = before
        _in_force.reset(token)


def mark_adapter(folder: Path, placement: str, seed: int) -> None:
    """Note beside an adapter what it was trained with: its own settings cannot say it."""
    if placement != "matched":
        write_json(folder / _FILE_NAME, {"placement": placement, "seed": seed})


def check_adapter(folder: Path) -> None:
    """Refuse a control's adapter where its placement is not in force: it would get matched anchors.

    Raises:
        SetupError: saying what it was trained with.
    """
    path = folder / _FILE_NAME
    placement = json.loads(path.read_text(encoding="utf-8"))["placement"] if path.is_file() else "matched"
    if placement not in ("matched", _in_force.get()):
        raise SetupError(
            f"adapter {folder} was trained as the control {placement!r}, with anchors at other places than matching "
            "gives; only the experiment that trained it can use it (attanchor experiment paper)"
        )


def place(
    text_embeds: Tensor,
    image_embeds: Tensor,
    roles: Tensor,
    tau: float,
    *,
    placement: str,
    seed: int = 0,
    copy: bool = True,
    turn: Tensor | None = None,
    max_anchors: int | None = None,
    direction: str = "text_into_image",
    positions: str = "sequential",
    position_ids: Tensor | None = None,
    padding_side: str = "right",
    backend: str = "auto",
) -> AnchoredSequence:
    """What `attanchor_kernels.merge_sequence` returns, with the copies at other places.

    Args:
        placement: One of `PLACEMENTS`; "matched" gives what `merge_sequence` gives (tested).
        seed: For "random".
        copy: False leaves `embeds` None, as `plan_sequence` does.
        text_embeds, …: As for `merge_sequence`, always batched: (B, S, D), (T, D), (B, S).

    Raises:
        ValueError: the direction is not "text_into_image"; and as `merge_sequence`.
    """
    if direction != "text_into_image":
        raise ValueError(f"direction is {direction!r} with placement {placement!r}; only copies of text can be moved")
    with torch.no_grad():
        found = plan_sequence(
            text_embeds.detach(),
            image_embeds.detach(),
            roles,
            tau,
            turn=turn,
            max_anchors=max_anchors,
            positions="sequential",
            backend=backend,
        )
    holds_image = roles == prepare.IMAGE
    host, ahead = found.host, False
    if placement == "random":
        host = _drawn(text_embeds, roles, found.host >= 0, holds_image, turn, seed)
    elif placement == "front":
        first = torch.where(holds_image.any(-1), holds_image.int().argmax(-1), -1)
        host = torch.where(roles == prepare.ANCHOR_TEXT, first[:, None], -1)
        ahead = True
    return _arranged(
        text_embeds, image_embeds, roles, host, ahead, found.score, positions, position_ids, padding_side, copy
    )


def _drawn(
    text: Tensor, roles: Tensor, inserted: Tensor, holds_image: Tensor, turn: Tensor | None, seed: int
) -> Tensor:
    """(B, S) int64: for each inserted token an image slot that its turn allows, evenly over them, -1 elsewhere.

    Drawn by a hash of the words that take part, so that batch, padding, device and a resumed run change nothing, and
    that an answer, which is there in training alone, has no say.
    """
    allowed = holds_image[:, None, :].expand(-1, roles.shape[1], -1)
    if turn is not None:
        allowed = allowed & (turn[:, None, :] >= turn[:, :, None])
    counts = allowed.sum(-1)
    real = roles != prepare.PADDING
    place = real.long().cumsum(1)  # from the first real slot on, whichever side the padding is on
    content = _bits(text) * (place * _LARGE_ODD[0] + 1) * (roles == prepare.ANCHOR_TEXT)
    prompt = content.sum(-1, keepdim=True)  # of integers, which wrap: the order of the sum does not matter
    salt = (seed * _LARGE_ODD[1] + 2**63) % 2**64 - 2**63
    drawn = _mixed(_mixed(prompt + salt) + place * _LARGE_ODD[0])
    rank = (drawn & 0x7FFFFFFF) % counts.clamp(min=1)
    chosen = (allowed & (allowed.long().cumsum(-1) == rank[..., None] + 1)).int().argmax(-1)
    return torch.where(inserted & (counts > 0), chosen, -1)


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


def _arranged(
    text: Tensor,
    image: Tensor,
    roles: Tensor,
    host: Tensor,
    ahead: bool,
    score: Tensor,
    positions: str,
    position_ids: Tensor | None,
    padding_side: str,
    copy: bool,
) -> AnchoredSequence:
    """The sequence of given hosts: each copy right behind its host, or with `ahead` right in front of it."""
    batch, slots = roles.shape
    device = roles.device
    real, inserted = roles != prepare.PADDING, host >= 0
    slot = torch.arange(slots, device=device).expand(batch, -1)
    # Three places for every slot: in front of it, the slot itself, behind it. Copies at one place keep their order.
    last = 3 * slots
    own = torch.where(real, 3 * slot + 1, last)
    copies = torch.where(inserted, 3 * host + (0 if ahead else 2), last)
    keys, order = torch.cat([own, copies], 1).sort(dim=1, stable=True)
    lengths = (keys < last).sum(1, keepdim=True)
    length = int(lengths.max()) if batch else 0
    at = torch.arange(length, device=device).expand(batch, -1)
    if padding_side == "left":
        at = at - (length - lengths)
    present = (at >= 0) & (at < lengths)
    order = order.gather(1, at.clamp(min=0))
    source, is_anchor = order % max(slots, 1), (order >= slots) & present
    seat = torch.where(is_anchor, host.gather(1, source).clamp(min=0), source)
    if positions == "inherit":
        given = (real.long().cumsum(1) - 1) if position_ids is None else position_ids
        index = seat if given.dim() == 2 else seat.expand(len(given), -1, -1)
        new_positions = given.gather(-1, index).masked_fill(~present, 0)
    else:
        new_positions = at.masked_fill(~present, 0)
    embeds = None
    if copy:
        placeholder = (roles == prepare.IMAGE) | (roles == prepare.SILENT_IMAGE)
        rows = text.masked_scatter(placeholder[..., None], image)
        embeds = rows.gather(1, source[..., None].expand(-1, -1, rows.shape[-1])) * present[..., None]
    return AnchoredSequence(
        embeds=embeds,
        position_ids=new_positions,
        attention_mask=present.long(),
        source=source.masked_fill(~present, -1),
        is_anchor=is_anchor,
        host=host,
        score=score,
    )
