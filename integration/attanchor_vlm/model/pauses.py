"""Think mode of Algorithm 2: K pause tokens at the end of each prompt, in front of the answer that is learned.

They are real tokens (attention mask 1) that nothing is copied from or to, and that are never learned (label -100).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_vlm.constants import IGNORE_INDEX
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.plan import AnchorPlan, Call

_RESERVED = re.compile(r"reserved|unused|extra_id|<\|?(?:pad|unk)", re.IGNORECASE)


class Pauses(NamedTuple):
    """Where pause tokens were put: B samples, S tokens each, K pauses.

    Attributes:
        slot: (B, S+K) int64, the caller's slot of each token, -1 at pauses.
        place: (B, S) int64, where each of the caller's tokens stands now.
    """

    slot: Tensor
    place: Tensor

    def lengthen(self, values: Tensor, at_pauses: Any) -> Tensor:
        """(B, S+K) from (B, S)."""
        slot = self.slot.to(values.device)
        return torch.where(slot < 0, at_pauses, values.gather(1, slot.clamp(min=0)))

    def in_callers_slots(self, plan: AnchorPlan) -> AnchorPlan:
        """The plan of a lengthened prompt in the slots of the caller's own; pauses have source -1, as padding has."""
        slot, place = self.slot.to(plan.source.device), self.place.to(plan.source.device)

        def callers(indices: Tensor) -> Tensor:
            return slot.gather(1, indices.clamp(min=0)).masked_fill(indices < 0, -1)

        return plan._replace(
            source=callers(plan.source), host=callers(plan.host.gather(1, place)), score=plan.score.gather(1, place)
        )


def with_pauses(config: AttAnchorConfig, processor: Any, count: int, token: str | None) -> AttAnchorConfig:
    """`config` with `count` pause tokens, which the vocabulary names `token`; unchanged for 0."""
    if not count:
        return config
    tokenizer = getattr(processor, "tokenizer", processor)
    known = tokenizer.get_vocab()
    if token not in known:
        reserved = sorted((name for name in known if _RESERVED.search(name)), key=lambda name: known[name])
        hint = f"such as {', '.join(map(repr, reserved[:3]))}" if reserved else "it has none that is named as reserved"
        raise ValueError(
            f"pause_token {token!r} is no token of the model's vocabulary; take one that means nothing else, {hint}"
        )
    images = {getattr(processor, "image_token", None), getattr(tokenizer, "image_token", None)}
    if token in {tokenizer.bos_token, tokenizer.eos_token, *images}:
        raise ValueError(f"pause_token {token!r} begins or ends texts or stands for an image; take another token")
    return dataclasses.replace(config, pause_tokens=count, pause_token_id=known[token])


def add_pauses(
    settings: AttAnchorConfig,
    arguments: Call,
    anchor_mask: Tensor,
    has_image: Tensor,
    per_token: Iterable[str],
) -> tuple[dict[str, Any], Tensor, Pauses]:
    """Put the pauses in front of a sample's first supervised token; without labels, behind its last token.

    So training and generation have them in the same place. Samples without an image get none, as alone they are not
    rewritten either.

    Args:
        anchor_mask, has_image: (B, S) and (B,) bool.
        per_token: Names of further (B, S) inputs; pauses get 0, text.

    Returns:
        The arguments and the mask with S+K tokens, and where the pauses went.
    """
    ids, mask, labels = (arguments.get(name) for name in ("input_ids", "attention_mask", "labels"))
    assert ids is not None
    count = settings.pause_tokens
    if arguments.get("position_ids") is not None:
        raise ValueError("position_ids is given, but pause tokens are added, which it has none for; leave it out")
    mask = torch.ones_like(ids) if mask is None else mask
    batch, slots = ids.shape
    index = torch.arange(slots, device=ids.device).expand(batch, slots)
    end = torch.where(mask.bool(), index + 1, 0).amax(-1, keepdim=True)
    if labels is not None:
        learned = torch.where(labels != IGNORE_INDEX, index, slots).amin(-1, keepdim=True)
        end = torch.minimum(end, learned)
    place = index + count * (index >= end)
    slot = torch.full((batch, slots + count), -1, device=ids.device).scatter(1, place, index)
    pauses = Pauses(slot, place)

    longer = dict(arguments)
    longer["input_ids"] = pauses.lengthen(ids, settings.pause_token_id)
    longer["attention_mask"] = pauses.lengthen(mask, has_image[:, None].to(mask))
    if labels is not None:
        longer["labels"] = pauses.lengthen(labels, IGNORE_INDEX)
    for name in per_token:
        if arguments.get(name) is not None:
            longer[name] = pauses.lengthen(arguments[name], 0)
    return longer, pauses.lengthen(anchor_mask, False), pauses
