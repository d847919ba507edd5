"""Copy rows to their places, and the transpose of it: the reference's half of the work that is linear in its inputs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


def assemble(image: Tensor, text: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): every output row a copy of the row that `source` names; zeros in padding. Linear in image and text."""
    hidden = text.shape[-1]
    images, texts = image.reshape(-1, hidden), text.reshape(-1, hidden)
    row = _table_rows(source, places, len(images), image.dim() == 2)
    embeds = text.new_empty(*source.shape, hidden)  # written through a view: what is returned must not be one
    if source.device.type == "cpu":
        _copy_runs(row.flatten(), images, texts, embeds.view(-1, hidden))
        return embeds
    table = torch.cat([images, texts.new_full((1, hidden), torch.nan), texts, texts.new_zeros(1, hidden)])
    row = torch.where(row < 0, len(table) - 1, row).flatten()
    torch.index_select(table, 0, row, out=embeds.view(-1, hidden))
    return embeds


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


def _copy_runs(row: Tensor, images: Tensor, texts: Tensor, out: Tensor) -> None:
    """The rows of the table [images; NaN; texts], copied in runs: between two anchors the image rows are contiguous."""
    if len(row) == 0:
        return
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
    torch.cat(pieces, out=out)


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
    places: Tensor,
    image_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    """For each input row the sum of the gradients of its original and its copy; an empty tensor where not needed."""
    flat = grad.reshape(-1, text_shape[-1])
    image_routes, text_routes = _routes(places, grad.shape[1], image_shape)
    return (
        _gather(flat, image_routes, image_shape) if need_image else grad.new_empty(0),
        _gather(flat, text_routes, text_shape) if need_text else grad.new_empty(0),
    )


def _gather(grad: Tensor, routes: _Routes, shape: tuple[int, ...]) -> Tensor:
    """The sum of two rows is rounded once, in any dtype."""
    gathered = grad.new_empty(shape)  # written through a view: what is returned must not be one
    rows = gathered.view(-1, shape[-1])
    if len(grad) == 0:
        rows.zero_()
        return gathered
    torch.index_select(grad, 0, routes.original.clamp_min(0), out=rows)
    absent, copied = routes.original < 0, routes.copy >= 0
    if grad.device.type == "cpu":
        rows[absent.nonzero().squeeze(1)] = 0
        at = copied.nonzero().squeeze(1)
        rows[at] += grad[routes.copy[at]]
        return gathered
    rows.masked_fill_(absent.unsqueeze(1), 0)
    rows += grad.index_select(0, routes.copy.clamp_min(0)).masked_fill_(~copied.unsqueeze(1), 0)
    return gathered
