"""The definition of the method in plain PyTorch: the backend of CPUs and of float64, and what kernels are held to.

    lay_out   which slots are real, which move, which host
    match     each mover's most similar host                      (AttAnchor, arXiv 2509.23109, Algorithms 1 and 2)
    select    threshold and budget
    survive   which image tokens stay, where some are to be dropped
    arrange   the output row of every original and every copy, and from it all fields
    assemble  copy the rows (rows.py; the cosines of matching are in cosines.py)

Off the CPU nothing here waits for the device. On the CPU reading a value is free, and may skip work that takes time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels.cosines import Cosines
from attanchor_kernels.problem import Plan, Problem, Role
from attanchor_kernels.rows import assemble, assemble_backward

__all__ = ["assemble", "assemble_backward", "construct", "place", "plan"]  # what a backend offers


class Layout(NamedTuple):
    """What the slots are. Movers and hosts are packed: column i of `mover_slot` is the slot of mover i."""

    real: Tensor  # (B, S) bool
    image: Tensor  # (B, S) bool, image tokens that take part
    silent: Tensor  # (B, S) bool, image tokens that do not
    feature: Tensor  # (B, S) int64, feature row of an image slot, -1 for text
    mover_slot: Tensor  # (B, movers) int64
    moves: Tensor  # (B, movers) bool
    host_slot: Tensor  # (B, hosts) int64
    hosts: Tensor  # (B, hosts) bool


def construct(problem: Problem) -> tuple[Tensor, Plan]:
    """Embeddings (B, C, D) of the new sequence at capacity C, and the plan that made them."""
    made = plan(problem)
    return assemble(problem.image, problem.text, made.source, made.places), made


def plan(problem: Problem) -> Plan:
    """Match, select, choose who stays, and arrange."""
    layout = _lay_out_merge(problem) if problem.merges else _lay_out_build(problem)
    score, host, relevance = match(problem, layout)
    inserted = select(score, problem.tau if problem.tau_tensor is None else problem.tau_tensor, _budget(problem))
    host_slot = layout.host_slot.gather(1, host) if layout.host_slot.shape[1] else host
    if not problem.drops:
        return arrange(problem, layout, layout.real, host_slot, inserted, score, relevance[:, :0])
    copies = layout.real.new_zeros(layout.real.shape, dtype=torch.int64)
    hosting = copies.scatter_add(1, host_slot, inserted.long()) > 0  # CUDA has no maximum of bools
    stays = survive(problem, layout, relevance, hosting)
    return arrange(problem, layout, stays, host_slot, inserted, score, relevance[:, : problem.images])


def place(problem: Problem, host: Tensor, ahead: bool) -> Plan:
    """The plan that puts a copy of each slot (B, S) behind the slot that `host` names, or with `ahead` in front of it.

    Below 0, at a slot that is none, or where one of the two is padding, nothing is inserted.
    """
    slots = _slots(problem)
    slot = torch.arange(problem.slots, device=host.device).expand_as(host)
    host_slot = host.clamp(0, max(0, problem.slots - 1))
    inserted = slots.real & slots.real.gather(1, host_slot) & (host == host_slot)
    layout = Layout(slots.real, slots.image, slots.silent, slots.feature, slot, slots.real, slot, slots.real)
    nothing = torch.full(host.shape, -torch.inf, device=host.device)
    return arrange(problem, layout, slots.real, host_slot, inserted, nothing, nothing[:, :0], ahead)


# --- Slots -----------------------------------------------------------------------------------------------------------


def _lay_out_build(problem: Problem) -> Layout:
    image, text = problem.image, problem.text
    batch, image_count, text_count = len(image), image.shape[1], text.shape[1]
    device = image.device

    def or_ones(mask: Tensor | None, count: int) -> Tensor:
        return torch.ones(batch, count, dtype=torch.bool, device=device) if mask is None else mask

    image_real, text_real = or_ones(problem.image_mask, image_count), or_ones(problem.text_mask, text_count)
    text_matched = text_real if problem.anchor_mask is None else text_real & problem.anchor_mask
    slot = torch.arange(problem.slots, device=device).expand(batch, -1)
    image_slot, text_slot = slot.split([image_count, text_count], dim=1)
    feature = torch.full_like(slot, -1)
    feature[:, :image_count] = torch.arange(batch * image_count, device=device).view(batch, image_count)
    images, texts = (image_slot, image_real), (text_slot, text_matched)
    movers, hosts = (images, texts) if problem.image_into_text else (texts, images)
    real = torch.cat([image_real, text_real], dim=1)
    return Layout(real, real & (feature >= 0), torch.zeros_like(real), feature, *movers, *hosts)


def _lay_out_merge(problem: Problem) -> Layout:
    slots = _slots(problem)
    images = _pack(slots.image & (slots.feature < len(problem.image)))
    texts = _pack(slots.matched_text)
    movers, hosts = (images, texts) if problem.image_into_text else (texts, images)
    return Layout(slots.real, slots.image, slots.silent, slots.feature, *movers, *hosts)


class _Slots(NamedTuple):
    """What the roles of the merge form say, (B, S): named as in `Layout`, and the text that takes part."""

    real: Tensor
    image: Tensor
    silent: Tensor
    feature: Tensor
    matched_text: Tensor


def _slots(problem: Problem) -> _Slots:
    roles = problem.roles
    assert roles is not None
    image, silent = roles.eq(Role.IMAGE), roles.eq(Role.SILENT_IMAGE)
    placeholder, matched_text = image | silent, roles.eq(Role.ANCHOR_TEXT)
    # Placeholders take features in row-major order over the batch.
    rank = placeholder.flatten().cumsum(0).view(roles.shape) - 1
    real = placeholder | roles.eq(Role.TEXT) | matched_text
    return _Slots(real, image, silent, torch.where(placeholder, rank, -1), matched_text)


def _pack(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen slots of each sample first, in order: (B, k) int64 slots and (B, k) bool, which of them are chosen."""
    slots = chosen.shape[1]
    most = int(chosen.sum(1).max()) if chosen.device.type == "cpu" and chosen.numel() else slots
    slot = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return slot, chosen.gather(1, slot)


# --- Match -----------------------------------------------------------------------------------------------------------


def match(problem: Problem, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Best cosine and host of every mover, and the relevance of every image token.

    Returns:
        score: (B, movers) in float32 (float64 for float64 inputs), -inf without a candidate.
        host: (B, movers) int64 column of `layout.host_slot`, 0 without a candidate.
        relevance: (B, S) float32, -inf without a candidate, and everywhere if nothing is to be dropped.
    """
    movers, device = layout.moves.shape, layout.moves.device
    accumulation = torch.float64 if problem.text.dtype == torch.float64 else torch.float32
    score = torch.full(movers, -torch.inf, dtype=accumulation, device=device)
    host = torch.zeros(movers, dtype=torch.int64, device=device)
    relevance = torch.full(layout.real.shape, -torch.inf, device=device)
    for some, packed in _parts(problem, layout):
        count = packed.moves.shape[1]
        if count == 0 or packed.hosts.shape[1] == 0:
            continue
        mover_rows = _rows(problem, packed, some, packed.mover_slot, problem.image_into_text).to(accumulation)
        host_rows = _rows(problem, packed, some, packed.host_slot, not problem.image_into_text).to(accumulation)
        allowed = None
        if problem.turn is not None:
            mover_turn, host_turn = (problem.turn[some].gather(1, at) for at in (packed.mover_slot, packed.host_slot))
            allowed = host_turn.unsqueeze(1) >= mover_turn.unsqueeze(2)
        scores = Cosines(mover_rows, host_rows, packed.moves, packed.hosts, allowed)
        best, host[some, :count] = scores.best()
        score[some, :count] = best
        if problem.drops and problem.image_into_text:
            relevance[some].scatter_(1, packed.mover_slot, best.float())
        elif problem.drops:
            relevance[some].scatter_(1, packed.host_slot, scores.best_of_hosts().float())
    return score, host, relevance


def _parts(problem: Problem, layout: Layout) -> Iterator[tuple[slice, Layout]]:
    """What is matched at once: off the CPU all samples; on it one, which stays in its caches, and no row but its own.

    So one sample's scores are the same bits alone and in a batch.
    """
    if layout.real.device.type != "cpu":
        yield slice(None), layout
        return
    for sample in range(problem.batch):
        some = slice(sample, sample + 1)
        part = Layout(*(field[some] for field in layout))
        if problem.merges:
            movers, hosts = int(part.moves.sum()), int(part.hosts.sum())
            part = part._replace(
                mover_slot=part.mover_slot[:, :movers],
                moves=part.moves[:, :movers],
                host_slot=part.host_slot[:, :hosts],
                hosts=part.hosts[:, :hosts],
            )
        yield some, part


def _rows(problem: Problem, layout: Layout, some: slice, slot: Tensor, of_image: bool) -> Tensor:
    """(b, k, D): the rows at slots (b, k) of the samples `some`, which `layout` holds."""
    image, text = problem.image, problem.text[some]
    if not problem.merges:
        return image[some] if of_image else text
    if not of_image:
        return text.gather(1, slot.unsqueeze(-1).expand(-1, -1, text.shape[-1]))
    if len(image) == 0:
        return image.new_zeros(*slot.shape, image.shape[-1])
    feature = layout.feature.gather(1, slot)
    if len(feature) == 1 and image.device.type == "cpu":  # mostly one run: a view is enough
        first, count = int(feature[0, 0]), feature.shape[1]
        if int(feature[0, -1]) - first == count - 1:
            return image[first : first + count].unsqueeze(0)
    return image[feature.clamp(0, len(image) - 1)]


# --- Select, survive and arrange -------------------------------------------------------------------------------------


def _budget(problem: Problem) -> int | Tensor | None:
    """Most copies in a sample, a number or (B, 1). Every host must be able to stay."""
    most, kept = problem.max_anchors, _kept(problem)
    if kept is None or problem.image_into_text:
        return most
    if most is None:
        return kept
    return min(most, kept) if isinstance(kept, int) else kept.clamp_max(most)


def _kept(problem: Problem) -> int | Tensor | None:
    """Image tokens of a sample that stay, a number or (B, 1)."""
    return problem.keep if problem.keep_each is None else problem.keep_each.unsqueeze(1)


def select(score: Tensor, tau: float | Tensor, budget: int | Tensor | None) -> Tensor:
    """(B, movers) bool: which movers are inserted. `tau >= 1` is the identity; a NaN in a tensor inserts nothing."""
    if not isinstance(tau, Tensor) and tau >= 1:
        return torch.zeros_like(score, dtype=torch.bool)
    eligible = (score >= tau) & ~score.isneginf()
    if isinstance(tau, Tensor):
        eligible &= tau < 1
    if budget is None or (isinstance(budget, int) and budget >= score.shape[1]):
        return eligible
    order = score.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return eligible & (_inverse(order) < budget)


def survive(problem: Problem, layout: Layout, relevance: Tensor, hosting: Tensor) -> Tensor:
    """(B, S) bool: the slots whose originals stay. All text does, and at most `keep` image tokens of a sample.

    First those that host an anchor (`hosting`, text into image), then the best of every cell in which none stays yet,
    then all others; within each of the three the highest priority first, and of equal ones the lowest slot.
    """
    image, slots, keep = layout.image, problem.slots, _kept(problem)
    assert keep is not None
    priority = relevance if problem.salience is None else _of_slots(problem.salience, layout, -torch.inf)
    priority = priority.masked_fill(priority.isnan() | ~image, -torch.inf)
    rank = _inverse(priority.argsort(dim=1, descending=True, stable=True))
    tier = torch.where(image, 2, 3)
    if problem.cells is not None:
        cell = _of_slots(problem.cells.long(), layout, -1)
        inside = image & (cell >= 0) & (cell < problem.images)
        cell = torch.where(inside, cell, problem.images)  # one more, for the tokens in none
        nothing = rank.new_zeros(problem.batch, problem.images + 1)
        taken = nothing.scatter_add(1, cell, hosting.long()) > 0
        best = (nothing + slots).scatter_reduce(1, cell, rank.masked_fill(~image, slots), "amin")
        tier = torch.where(inside & ~taken.gather(1, cell) & (rank == best.gather(1, cell)), 1, tier)
    if not problem.image_into_text:
        tier = torch.where(hosting, 0, tier)
    stays = image & (_inverse((tier * slots + rank).argsort(dim=1)) < keep)
    return torch.where(image, stays, layout.real & ~(layout.silent & _follow_dropped(image, stays)))


def _of_slots(of_images: Tensor, layout: Layout, missing: float) -> Tensor:
    """(B, S): what each slot's feature row has, `missing` where it has none."""
    values = torch.cat([of_images.flatten(), of_images.new_full((1,), missing)])
    last = len(values) - 1
    return values[torch.where(layout.feature < 0, last, layout.feature.clamp_max(last))]


def _follow_dropped(image: Tensor, stays: Tensor) -> Tensor:
    """(B, S) bool: the slots with image tokens right before them, none of which stays.

    A silent row belongs to the run of image tokens that ends at it: a row of the picture and its newline.
    """
    slot = torch.arange(image.shape[1], device=image.device)
    # The last slot before s that is no image token: behind it the run that ends at s - 1 begins. (What the roll brings
    # to slot 0 makes no run there.)
    ends = torch.where(image, -1, slot).cummax(1).values.roll(1, 1)
    through = torch.cat([torch.zeros_like(ends[:, :1]), stays.long().cumsum(1)], 1)  # survivors in front of each slot
    return (slot - ends > 1) & (through[:, :-1] == through.gather(1, ends + 1))


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation of each row: entry i of `order` is the place of i in the result."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def arrange(
    problem: Problem,
    layout: Layout,
    stays: Tensor,
    host_slot: Tensor,
    inserted: Tensor,
    score: Tensor,
    relevance: Tensor,
    ahead: bool = False,
) -> Plan:
    """All fields of the plan, from the originals that stay (B, S) and the movers' hosts (B, movers).

    An original stands after the slots that stay before it and the anchors of their hosts; an anchor after the slots
    that stay up to its host and the anchors that come before it in the order of (host, mover). With `ahead` a host
    stands behind its anchors.
    """
    batch, slots, capacity = problem.batch, problem.slots, problem.capacity
    kept = stays.long()
    anchors = torch.zeros_like(kept)
    if slots:
        anchors.scatter_add_(1, host_slot, inserted.long())
    kept_through, rows_through = kept.cumsum(1), (kept + anchors).cumsum(1)
    length = kept.sum(1, keepdim=True) + inserted.sum(1, keepdim=True)
    first = capacity - length if problem.pad_left else torch.zeros_like(length)

    original_place = rows_through - kept - (0 if ahead else anchors) + first
    by_host = torch.where(inserted, host_slot, slots).argsort(dim=1, stable=True)
    kept_first = kept_through - kept if ahead else kept_through
    anchor_place = (kept_first.gather(1, host_slot) if slots else host_slot) + _inverse(by_host) + first

    # Rows that are not there go to column C, which is cut off.
    original_at = torch.where(stays, original_place, capacity)
    anchor_at = torch.where(inserted, anchor_place, capacity)
    slot = torch.arange(slots, device=kept.device).expand(batch, -1)

    def lay(at_originals: Tensor, at_anchors: Tensor) -> Tensor:
        row = torch.full((batch, capacity + 1), -1, dtype=torch.int64, device=kept.device)
        row.scatter_(1, original_at, at_originals).scatter_(1, anchor_at, at_anchors)
        return row[:, :capacity].contiguous()

    source = lay(slot, layout.mover_slot)
    is_anchor = torch.zeros(batch, capacity + 1, dtype=torch.bool, device=kept.device)
    is_anchor = is_anchor.scatter_(1, anchor_at, True)[:, :capacity].contiguous()
    present = source >= 0
    if problem.inherit:
        plain = problem.position_ids
        if plain is None:
            plain = (layout.real.long().cumsum(1) - 1).unsqueeze(0)
        seat = lay(slot, host_slot).clamp_min(0).expand(len(plain), -1, -1)
        position_ids = plain.gather(2, seat) if slots else torch.zeros_like(seat)
    else:
        position_ids = (present.cumsum(1) - 1).unsqueeze(0)

    copy_place = torch.full_like(slot, -1).scatter_(1, layout.mover_slot, torch.where(inserted, anchor_place, -1))
    return Plan(
        position_ids=position_ids.masked_fill(~present, 0),
        attention_mask=present.long(),
        source=source,
        is_anchor=is_anchor,
        host=_per_mover(problem, layout, torch.where(inserted, host_slot - problem.host_offset, -1), -1),
        score=_per_mover(problem, layout, score.float(), -torch.inf),
        relevance=relevance.contiguous(),
        places=torch.stack([torch.where(stays, original_place, -1), copy_place, layout.feature], 1).int(),
    )


def _per_mover(problem: Problem, layout: Layout, packed: Tensor, missing: float) -> Tensor:
    """Packed movers back at their slots, as `merge_sequence` reports them; `build_sequence` packs nothing."""
    if not problem.merges:
        return packed
    spread = torch.full((problem.batch, problem.slots), missing, dtype=packed.dtype, device=packed.device)
    return spread.scatter_(1, layout.mover_slot, packed)
