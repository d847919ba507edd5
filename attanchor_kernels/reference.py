"""The definition of the method in plain PyTorch: the backend of CPUs and of float64, and what kernels are held to.

    lay_out   which slots are real, which move, which host
    match     each mover's most similar host                      (AttAnchor, arXiv 2509.23109, Algorithms 1 and 2)
    select    threshold and budget
    arrange   the output row of every original and every copy, and from it all fields
    assemble  copy the rows

Off the CPU nothing here waits for the device. On the CPU reading a value is free, and may skip work that takes time.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels.problem import ANCHOR_TEXT, IMAGE, SILENT_IMAGE, TEXT, Plan, Problem

NORM_FLOOR = 1e-12


class Layout(NamedTuple):
    """What the slots are. Movers and hosts are packed: column i of `mover_slot` is a slot, of `mover_rows` its row."""

    real: Tensor  # (B, S) bool
    feature: Tensor  # (B, S) int64, feature row of an image slot, -1 for text
    mover_rows: Tensor  # (B, movers, D)
    mover_slot: Tensor  # (B, movers) int64
    moves: Tensor  # (B, movers) bool
    host_rows: Tensor  # (B, hosts, D)
    host_slot: Tensor  # (B, hosts) int64
    hosts: Tensor  # (B, hosts) bool


def construct(problem: Problem) -> tuple[Tensor, Plan]:
    """Embeddings (B, C, D) of the new sequence at capacity C, and the plan that made them."""
    made = plan(problem)
    return assemble(problem.image, problem.text, made.source, made.places), made


def plan(problem: Problem) -> Plan:
    """Match, select and arrange."""
    layout = _lay_out_merge(problem) if problem.merges else _lay_out_build(problem)
    score, host = match(problem, layout)
    inserted = select(score, problem.tau, problem.max_anchors)
    return arrange(problem, layout, score, host, inserted)


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
    images = image, image_slot, image_real
    texts = text, text_slot, text_matched
    movers, hosts = (images, texts) if problem.image_into_text else (texts, images)
    return Layout(torch.cat([image_real, text_real], dim=1), feature, *movers, *hosts)


def _lay_out_merge(problem: Problem) -> Layout:
    roles, image, text = problem.roles, problem.image, problem.text
    assert roles is not None
    placeholder = (roles == IMAGE) | (roles == SILENT_IMAGE)
    # Placeholders take features in row-major order over the batch.
    rank = placeholder.flatten().cumsum(0).view(roles.shape) - 1
    feature = torch.where(placeholder, rank, -1)
    matched_image = (roles == IMAGE) & (feature < len(image))

    def pack_images() -> tuple[Tensor, Tensor, Tensor]:
        slot, valid = _pack(matched_image)
        if len(image) == 0:
            return image.new_zeros(*slot.shape, image.shape[-1]), slot, valid
        return image[feature.gather(1, slot).clamp(0, len(image) - 1)], slot, valid

    def pack_texts() -> tuple[Tensor, Tensor, Tensor]:
        slot, valid = _pack(roles == ANCHOR_TEXT)
        return text.gather(1, slot.unsqueeze(-1).expand(-1, -1, text.shape[-1])), slot, valid

    movers, hosts = (pack_images(), pack_texts()) if problem.image_into_text else (pack_texts(), pack_images())
    real = placeholder | (roles == TEXT) | (roles == ANCHOR_TEXT)
    return Layout(real, feature, *movers, *hosts)


def _pack(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """The chosen slots of each sample first, in order: (B, k) int64 slots and (B, k) bool, which of them are chosen."""
    slots = chosen.shape[1]
    most = int(chosen.sum(1).max()) if chosen.device.type == "cpu" and chosen.numel() else slots
    slot = chosen.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :most]
    return slot, chosen.gather(1, slot)


# --- Match -----------------------------------------------------------------------------------------------------------


def match(problem: Problem, layout: Layout) -> tuple[Tensor, Tensor]:
    """Best cosine and host of every mover.

    Returns:
        score: (B, movers) in float32 (float64 for float64 inputs), -inf without a candidate.
        host: (B, movers) int64 column of `layout.host_rows`, 0 without a candidate.
    """
    shape = layout.moves.shape
    accumulation = torch.float64 if problem.text.dtype == torch.float64 else torch.float32
    if shape[1] == 0 or layout.hosts.shape[1] == 0:
        nothing = torch.full(shape, -torch.inf, dtype=accumulation, device=layout.moves.device)
        return nothing, torch.zeros(shape, dtype=torch.int64, device=layout.moves.device)

    # Contiguous: over another layout, sums run in an order that differs from row to row.
    movers, hosts = (rows.to(accumulation).contiguous() for rows in (layout.mover_rows, layout.host_rows))
    mover_norm, host_norm = (torch.linalg.vector_norm(rows, dim=-1) for rows in (movers, hosts))
    mover_scale, host_scale = (norm.clamp_min(NORM_FLOOR).reciprocal() for norm in (mover_norm, host_norm))
    # A norm that is NaN, or whose square is not finite, takes the row out of matching.
    limit = 2.0 ** (512 if accumulation == torch.float64 else 64)
    moves, hosting = layout.moves & (mover_norm < limit), layout.hosts & (host_norm < limit)

    with _exact_matmul(movers.device):
        cosine = torch.bmm(movers, hosts.mT)
    cosine.mul_(host_scale.unsqueeze(1)).mul_(mover_scale.unsqueeze(2))
    if cosine.device.type != "cpu" or not hosting.all():
        cosine.masked_fill_(~hosting.unsqueeze(1), -torch.inf)
    if problem.turn is not None:
        mover_turn, host_turn = (problem.turn.gather(1, slot) for slot in (layout.mover_slot, layout.host_slot))
        cosine.masked_fill_(host_turn.unsqueeze(1) < mover_turn.unsqueeze(2), -torch.inf)

    # A matrix product may round equal rows differently where they fall into different tiles. So the host is the first
    # column within a few roundings of the best, and its score is summed again, in an order that is the same everywhere.
    slack = 16 * torch.finfo(accumulation).eps
    best = cosine.amax(dim=-1, keepdim=True)
    host = (cosine >= best - slack).view(torch.uint8).argmax(dim=-1)
    first_host = hosts.shape[1] * torch.arange(len(hosts), device=host.device).unsqueeze(1)
    host_row = hosts.flatten(0, 1).index_select(0, (first_host + host).flatten()).view_as(movers)
    score = host_row.mul_(movers).sum(-1) * host_scale.gather(1, host) * mover_scale
    return score.masked_fill(~moves | best.squeeze(-1).isneginf(), -torch.inf), host


_precision_lock = threading.Lock()


@contextlib.contextmanager
def _exact_matmul(device: torch.device) -> Iterator[None]:
    """Full precision whatever autocast, TF32 or `set_float32_matmul_precision` say; they are left as found."""
    settings = (torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn).matmul  # type: ignore
    # The setting belongs to the process: without the lock two threads could restore each other's.
    with _precision_lock, torch.autocast(device.type, enabled=False):
        found = settings.fp32_precision
        settings.fp32_precision = "none"
        if settings.fp32_precision == found:  # from a setting above this one: it must go on following that
            found = "none"
        settings.fp32_precision = "ieee"
        try:
            yield
        finally:
            settings.fp32_precision = found


# --- Select and arrange ----------------------------------------------------------------------------------------------


def select(score: Tensor, tau: float, max_anchors: int | None) -> Tensor:
    """(B, movers) bool: which movers are inserted. `tau >= 1` is the identity."""
    if tau >= 1:
        return torch.zeros_like(score, dtype=torch.bool)
    eligible = (score >= tau) & ~score.isneginf()
    if max_anchors is None or max_anchors >= score.shape[1]:
        return eligible
    order = score.masked_fill(~eligible, -torch.inf).argsort(dim=1, descending=True, stable=True)
    return eligible & (_inverse(order) < max_anchors)


def _inverse(order: Tensor) -> Tensor:
    """The inverse of a permutation of each row: entry i of `order` is the place of i in the result."""
    place = torch.arange(order.shape[1], device=order.device).expand_as(order)
    return torch.empty_like(order).scatter_(1, order, place)


def arrange(problem: Problem, layout: Layout, score: Tensor, host: Tensor, inserted: Tensor) -> Plan:
    """All fields of the plan, from the movers' hosts.

    An original stands after the real slots before it and the anchors of their hosts; an anchor after the real slots up
    to its host and the anchors that come before it in the order of (host, mover).
    """
    batch, slots, capacity = problem.batch, problem.slots, problem.capacity
    real = layout.real.long()
    host_slot = layout.host_slot.gather(1, host) if layout.host_slot.shape[1] else host
    anchors = torch.zeros_like(real)
    if slots:
        anchors.scatter_add_(1, host_slot, inserted.long())
    real_through, rows_through = real.cumsum(1), (real + anchors).cumsum(1)
    length = real.sum(1, keepdim=True) + inserted.sum(1, keepdim=True)
    first = capacity - length if problem.pad_left else torch.zeros_like(length)

    original_place = rows_through - real - anchors + first
    by_host = torch.where(inserted, host_slot, slots).argsort(dim=1, stable=True)
    anchor_place = (real_through.gather(1, host_slot) if slots else host_slot) + _inverse(by_host) + first

    # Rows that are not there go to column C, which is cut off.
    original_at = torch.where(layout.real, original_place, capacity)
    anchor_at = torch.where(inserted, anchor_place, capacity)
    slot = torch.arange(slots, device=real.device).expand(batch, -1)

    def lay(at_originals: Tensor, at_anchors: Tensor) -> Tensor:
        row = torch.full((batch, capacity + 1), -1, dtype=torch.int64, device=real.device)
        row.scatter_(1, original_at, at_originals).scatter_(1, anchor_at, at_anchors)
        return row[:, :capacity].contiguous()

    source = lay(slot, layout.mover_slot)
    is_anchor = torch.zeros(batch, capacity + 1, dtype=torch.bool, device=real.device)
    is_anchor = is_anchor.scatter_(1, anchor_at, True)[:, :capacity].contiguous()
    present = source >= 0
    if problem.inherit:
        position_ids = problem.position_ids if problem.position_ids is not None else (real_through - 1).unsqueeze(0)
        seat = lay(slot, host_slot).clamp_min(0).expand(len(position_ids), -1, -1)
        position_ids = position_ids.gather(2, seat) if slots else torch.zeros_like(seat)
    else:
        position_ids = (present.cumsum(1) - 1).unsqueeze(0)

    copy_place = torch.full_like(slot, -1).scatter_(1, layout.mover_slot, torch.where(inserted, anchor_place, -1))
    return Plan(
        position_ids=position_ids.masked_fill(~present, 0),
        attention_mask=present.long(),
        source=source,
        is_anchor=is_anchor,
        host=_per_mover(problem, layout, torch.where(inserted, host_slot if problem.merges else host, -1), -1),
        score=_per_mover(problem, layout, score.float(), -torch.inf),
        places=torch.stack([torch.where(layout.real, original_place, -1), copy_place, layout.feature], 1).int(),
    )


def _per_mover(problem: Problem, layout: Layout, packed: Tensor, missing: float) -> Tensor:
    """Packed movers back at their slots, as `merge_sequence` reports them; `build_sequence` packs nothing."""
    if not problem.merges:
        return packed
    spread = torch.full((problem.batch, problem.slots), missing, dtype=packed.dtype, device=packed.device)
    return spread.scatter_(1, layout.mover_slot, packed)


# --- Copy and its transpose ------------------------------------------------------------------------------------------


def assemble(image: Tensor, text: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): every output row a copy of the row that `source` names; zeros in padding. Linear in image and text."""
    hidden = text.shape[-1]
    images, texts = image.reshape(-1, hidden), text.reshape(-1, hidden)
    row = _table_rows(source, places, len(images), image.dim() == 2)
    if source.device.type == "cpu":
        return _copy_runs(row.flatten(), images, texts).view(*source.shape, hidden)
    table = torch.cat([images, texts.new_full((1, hidden), torch.nan), texts, texts.new_zeros(1, hidden)])
    return table.index_select(0, torch.where(row < 0, len(table) - 1, row).flatten()).view(*source.shape, hidden)


def _table_rows(source: Tensor, places: Tensor, image_count: int, merges: bool) -> Tensor:
    """(B, L) int64 rows of the table [all images; one row of NaN; all texts] that the output rows copy, -1 = padding.

    The row between them stands for a feature that is missing, and keeps images and texts apart as runs.
    """
    feature = places[:, 2].long()
    batch, slots = feature.shape
    if slots == 0:
        return source
    texts = slots if merges else slots - image_count // max(batch, 1)
    # Text rows are the last of their sample's slots.
    at = torch.arange(slots, device=feature.device) - (slots - texts)
    text_row = at + texts * torch.arange(batch, device=feature.device).unsqueeze(1)
    row_of_slot = torch.where(feature < 0, image_count + 1 + text_row, feature.clamp_max(image_count))
    return torch.where(source < 0, source, row_of_slot.gather(1, source.clamp_min(0)))


def _copy_runs(row: Tensor, images: Tensor, texts: Tensor) -> Tensor:
    """The rows of the table [images; NaN; texts], copied in runs: between two anchors the image rows are contiguous."""
    if len(row) == 0:
        return images.new_empty(0, images.shape[1])
    padding = row < 0
    follows = (padding[1:] == padding[:-1]) & (padding[1:] | (row.diff() == 1))
    starts = torch.cat([row.new_zeros(1), (~follows).nonzero().squeeze(1) + 1])
    lengths = torch.diff(starts, append=starts.new_tensor([len(row)]))
    pieces = []
    for first, count in zip(row[starts].tolist(), lengths.tolist(), strict=True):
        if first < 0:
            pieces.append(images.new_zeros(1, images.shape[1]).expand(count, -1))
        elif first < len(images):
            pieces.append(images[first : first + count])
        else:
            pieces.append(texts[first - len(images) - 1 :][:count])
    return torch.cat(pieces)


class _Routes(NamedTuple):
    """For every row of one input, flattened over the batch: output rows of its original and of its copy, -1 = none."""

    original: Tensor
    copy: Tensor


def _routes(places: Tensor, length: int, image_shape: tuple[int, ...]) -> tuple[_Routes, _Routes]:
    """Routes of the image rows and of the text rows."""
    shift = torch.arange(len(places), device=places.device).view(-1, 1, 1) * length
    routes = torch.where(places[:, :2] < 0, -1, places[:, :2] + shift)
    if len(image_shape) == 3:
        image, text = routes.split([image_shape[1], routes.shape[2] - image_shape[1]], dim=2)
        return _Routes(*image.transpose(0, 1).flatten(1)), _Routes(*text.transpose(0, 1).flatten(1))
    routes, feature = routes.transpose(0, 1).flatten(1), places[:, 2].long().flatten()
    is_text, count = feature < 0, image_shape[0]
    at = torch.where(is_text, count, feature.clamp_max(count)).expand_as(routes)
    by_feature = routes.new_full((2, count + 1), -1).scatter_(1, at, routes)[:, :count]
    return _Routes(*by_feature), _Routes(*routes.masked_fill(~is_text, -1))


def assemble_backward(
    grad: Tensor,
    source: Tensor,
    places: Tensor,
    image_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    """For each input row the sum of the gradients of its original and its copy; an empty tensor where not needed."""
    flat = grad.reshape(-1, text_shape[-1])
    image_routes, text_routes = _routes(places, source.shape[1], image_shape)
    return (
        _gather(flat, image_routes).view(image_shape) if need_image else grad.new_empty(0),
        _gather(flat, text_routes).view(text_shape) if need_text else grad.new_empty(0),
    )


def _gather(grad: Tensor, routes: _Routes) -> Tensor:
    """The sum of two rows is rounded once, in any dtype."""
    if len(grad) == 0:
        return grad.new_zeros(len(routes.original), grad.shape[1])
    rows = grad.index_select(0, routes.original.clamp_min(0))
    rows.masked_fill_((routes.original < 0).unsqueeze(1), 0)
    copied = routes.copy >= 0
    if grad.device.type == "cpu":
        at = copied.nonzero().squeeze(1)
        if len(at):
            rows[at] += grad[routes.copy[at]]
        return rows
    return rows + grad.index_select(0, routes.copy.clamp_min(0)).masked_fill_(~copied.unsqueeze(1), 0)
