"""What must hold of a model whose prompt has anchors, told from two recordings: of the plain prompt and of the new one.

B samples, S tokens in the plain prompt, L in the new one, T of the S in the whole batch are image placeholders.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_vlm.model.plan import AnchorPlan
from attanchor_vlm.model.recording import Recording, visible

RULES = {
    "parity": "with nothing inserted, the model computes what it computes untouched",
    "arguments": "with anchors, the language model gets of each token what it got of the token copied, nothing missing",
    "rows": "the features that are matched are those at the placeholders, in their order",
    "positions": "the prompt's own tokens keep their positions, and an anchor has its host's; or all are counted",
    "sight": "in every layer, the prompt's own tokens see of each other what they saw",
    "hosts": "in every layer, an anchor sees what its host sees; one of an image, or what the token copied sees",
}


class Finding(NamedTuple):
    """What one rule of `RULES` found; None is well. `note` is no fault, but worth knowing; `cause` was raised."""

    rule: str
    found: str | None = None
    note: str | None = None
    cause: Exception | None = None


class Prompts(NamedTuple):
    """The plain prompt and the new one.

    Attributes:
        is_real: (B, S) bool.
        is_image: (B, S) bool, the placeholders.
        plan: Of the new prompt.
    """

    is_real: Tensor
    is_image: Tensor
    plan: AnchorPlan

    @property
    def is_new(self) -> Tensor:
        """(B, L) bool, the tokens of the new prompt that come from the plain one."""
        return self.plan.source >= 0

    @property
    def is_own(self) -> Tensor:
        """(B, L) bool, those of them that are no copies."""
        return self.is_new & ~self.plan.is_anchor

    def gathered(self, values: Tensor) -> Tensor:
        """(B, L, …) from (B, S, …)."""
        sample = torch.arange(len(values), device=values.device)[:, None]
        return values[sample, self.plan.source.clamp(min=0).to(values.device)]

    def order(self) -> Tensor:
        """(T',) int64, the placeholder, counted over the batch, that each placeholder of the new prompt comes from."""
        number = self.is_image.flatten().cumsum(0).view_as(self.is_image) - 1
        return self.gathered(number)[self.gathered(self.is_image) & self.is_new]


def parity(plain: Recording, same: Recording, prompts: Prompts) -> Finding:
    """`same` is of the rewritten prompt in which nothing was inserted."""
    if plain.output is None or same.output is None:
        return Finding("parity", "the language model was not called")
    before, after = prompts.gathered(plain.output)[prompts.is_own], same.output[prompts.is_own]
    error = _error(after, before)
    return Finding(
        "parity", None if error <= 10 * _rounding(before) else f"what it computes is another by {error:.2g} of its size"
    )


def arguments(plain: Recording, new: Recording, prompts: Prompts, own_value: Collection[str]) -> Finding:
    """`own_value` names the arguments in which an anchor has a value of its own."""
    return Finding("arguments", "; ".join(_wrong_arguments(plain, new, prompts, own_value)) or None)


def _wrong_arguments(plain: Recording, new: Recording, prompts: Prompts, own_value: Collection[str]) -> Iterator[str]:
    for name, before in plain.arguments.items():
        after = new.arguments.get(name)
        if after is None:
            yield f"{name} is missing"
            continue
        pair = _followed(before, after, prompts, name in own_value)
        if pair is None:
            yield f"{name} has shape {tuple(after.shape)} where that of the plain prompt has {tuple(before.shape)}"
        elif (error := _error(*pair)) > _rounding(before):
            yield f"{name} is another by {error:.2g} of its size"


def _followed(before: Tensor, after: Tensor, prompts: Prompts, own_alone: bool) -> tuple[Tensor, Tensor] | None:
    """What an argument holds of the new prompt's tokens, and what it should; None if its shape follows no rule."""
    (batch, old), length = prompts.is_real.shape, prompts.plan.source.shape[1]
    if before.dim() == after.dim():
        for axis in range(before.dim() - 1):
            if before.shape[axis : axis + 2] == (batch, old) and after.shape[axis : axis + 2] == (batch, length):
                tokens = (prompts.is_own if own_alone else prompts.is_new).to(after.device)
                found, wanted = (value.movedim((axis, axis + 1), (0, 1)) for value in (after, before))
                return found[tokens], prompts.gathered(wanted)[tokens]
        order = prompts.order()
        if len(before) == int(prompts.is_image.sum()) and len(after) == len(order):
            return after, before[order.to(before.device)]
    return (after, before) if before.shape == after.shape else None


def rows(plain: Recording, found: Tensor, prompts: Prompts) -> Finding:
    """`found` are (T, D), the adapter's."""
    held = {name: value for name, value in plain.arguments.items() if value.shape == found.shape}
    for name in ("hidden_states", "inputs_embeds"):
        if name in plain.arguments and plain.arguments[name].shape[:2] == prompts.is_image.shape:
            held[name] = plain.arguments[name][prompts.is_image.to(plain.arguments[name].device)]
    held = {name: value for name, value in held.items() if value.shape == found.shape}
    if not held:
        return Finding("rows", f"the adapter's have shape {tuple(found.shape)}, and nothing in the prompt has")
    best = min(_error(found.to(value), value) for value in held.values())
    if best <= _rounding(found):
        return Finding("rows")
    for value in held.values():  # added to the embedding of the placeholder, which is the same everywhere
        shift = value.float() - found.to(value).float()
        if _error(shift, shift.mean(0).expand_as(shift)) <= 10 * _rounding(found):
            return Finding("rows", note="features are added to the embedding of placeholders; those alone are matched")
    return Finding("rows", f"the adapter's are others than those in the prompt, by {best:.2g} of their size")


def positions(plain: Recording, new: Recording, prompts: Prompts) -> Finding:
    """A position of several numbers is kept, a single one is counted."""
    before, after = plain.positions, new.positions
    if before is None or before.dim() < 3:
        if after is None:  # the language model counts by itself
            return Finding("positions")
        is_new = prompts.is_new.to(after.device)
        ahead = (after - is_new.cumsum(-1)).expand(*after.shape[:-2], *is_new.shape)
        wrong = int(((ahead != ahead.masked_fill(~is_new, ahead.min()).amax(-1, keepdim=True)) & is_new).sum())
        return Finding("positions", f"{wrong} tokens are not counted in their order" if wrong else None)
    if after is None or after.dim() < 3:
        return Finding("positions", f"{len(before)} numbers a token became a single one, or none")
    axes = min(len(before), len(after))  # in front, some models put the positions in the text
    before, after = before[-axes:].movedim(0, -1), after[-axes:].movedim(0, -1)
    moved = int((prompts.gathered(before) != after).any(-1)[prompts.is_own.to(after.device)].sum())
    if moved:
        return Finding("positions", f"{moved} of {int(prompts.is_own.sum())} own tokens have moved")
    host = prompts.gathered(prompts.plan.host.to(before.device)).clamp(min=0)
    sample = torch.arange(len(host), device=host.device)[:, None]
    astray = int((before[sample, host] != after).any(-1)[prompts.plan.is_anchor.to(after.device)].sum())
    return Finding("positions", f"{astray} anchors are not at their host's position" if astray else None)


def sight(plain: Recording, new: Recording, prompts: Prompts) -> list[Finding]:
    """The rules "sight" and "hosts"."""
    if len(plain.masks) != len(new.masks) or not plain.masks:
        found = f"{len(new.masks)} layers were seen instead of {len(plain.masks)}" if plain.masks else None
        return [Finding(rule, found, None if found else "no layers are known: not looked at") for rule in _SIGHT]
    wrong: dict[str, str] = {}
    note, known = None, set()
    for layer, masks in enumerate(zip(plain.masks, new.masks, strict=True)):
        if (key := tuple(map(id, masks))) in known:
            continue
        known.add(key)
        try:
            before, after = (
                visible(mask, *tokens.shape)
                for mask, tokens in zip(masks, (prompts.is_real, prompts.is_new), strict=True)
            )
        except ValueError as error:
            note = f"{error}: not looked at"
            continue
        if before is None and after is None:
            continue
        before, after = _or_causal(before, prompts.is_real), _or_causal(after, prompts.is_new)
        for sample in range(len(before)):
            lost = _look(before[sample], after[sample], prompts, sample, wrong, f" in layer {layer}")
            if lost:
                note = f"{lost} earlier tokens are out of a sliding window in layer {layer}, pushed by anchors"
    return [Finding("sight", wrong.get("sight"), note), Finding("hosts", wrong.get("hosts"))]


_SIGHT = ("sight", "hosts")


def _look(before: Tensor, after: Tensor, prompts: Prompts, sample: int, wrong: dict[str, str], where: str) -> int:
    """One layer of one sample: notes what is wrong, returns how many pairs a sliding window lost."""
    device, plan = after.device, prompts.plan
    source, is_anchor = plan.source[sample].to(device), plan.is_anchor[sample].to(device)
    own = prompts.is_own[sample].to(device).nonzero()[:, 0]
    before = before.to(device)[source[own]][:, source[own]]
    seen = after[own][:, own]
    later = own[None] > own[:, None]
    lost = before & ~seen
    distance = own[:, None] - own[None]
    # A window loses what is furthest, and nothing else; what was cut already is no window of ours to judge.
    earlier = lost & ~later
    window = bool((~before & ~later).any()) or (
        bool(earlier.any()) and distance[earlier].min() > distance[seen & ~later].max()
    )
    for name, pairs in (
        ("lose sight of later ones", lost & later),
        ("see later ones that they did not see", seen & ~before & later),
        ("lose sight of earlier ones", earlier if not window else earlier & False),
    ):
        if count := int(pairs.any(-1).sum()):
            wrong.setdefault("sight", f"{count} own tokens {name}{where}")
    anchors = is_anchor.nonzero()[:, 0]
    slot = torch.zeros(len(plan.host[sample]), dtype=torch.long, device=device).scatter(0, source[own], own)
    hosts = slot[plan.host[sample].to(device)[source[anchors]]]
    differs = after[anchors][:, own] != after[hosts][:, own]
    # A copy of an image token may see what that one sees, where image tokens see each other.
    copied = source[anchors]
    of_image = prompts.is_image[sample].to(device)[copied]
    differs &= ~of_image[:, None] | (after[anchors][:, own] != after[slot[copied]][:, own])
    if window:
        differs &= own[None] > anchors[:, None]
    if count := int(differs.any(-1).sum()):
        wrong.setdefault("hosts", f"{count} of {len(anchors)} anchors see other tokens than their hosts{where}")
    return int(earlier.sum()) if window else 0


def _or_causal(seen: Tensor | None, is_real: Tensor) -> Tensor:
    if seen is not None:
        return seen
    length = is_real.shape[1]
    return torch.ones(length, length, dtype=torch.bool, device=is_real.device).tril() & is_real[:, None]


def _error(found: Tensor, wanted: Tensor) -> float:
    """How far `found` is off, relative to the size of `wanted`; infinite where numbers that are counted differ."""
    found = found.to(wanted.device)
    if not wanted.is_floating_point():
        return 0.0 if torch.equal(found, wanted) else float("inf")
    difference, size = (found.float() - wanted.float()).norm(), wanted.float().norm()
    return float(difference) / max(float(size), 1e-30) if difference else 0.0


def _rounding(value: Tensor) -> float:
    """The error that is no fault: the two prompts are computed in other orders."""
    return 1e-4 if value.dtype in (torch.float32, torch.float64) else 1e-2
