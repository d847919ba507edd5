"""Which image tokens stay: `keep` and `keep_by` of the settings, as the operators' `keep`, `salience` and `cells`.

Every image has a budget of its own; the operators take one for a sample. A sample's is the sum of its images'. Among
them it is spent by cells that no two images share, as many in an image as it has budget, and by ranks that count within
an image. Only hosts of anchors, which always stay, can take a place from the least of another image of the sample.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import Role
from attanchor_vlm.model import config as settings
from attanchor_vlm.model.families import FamilyAdapter
from attanchor_vlm.model.families.grid import Shape
from attanchor_vlm.model.placements import rank_within
from attanchor_vlm.model.plan import Call


class Images(NamedTuple):
    """What a score of `keep_by` is made from: the T image features of a call, of B prompts of S slots.

    Attributes:
        rows: (T, D), as they stand in the prompt.
        text_embeds: (B, S, D), of the prompt's tokens.
        roles: (B, S) uint8, `attanchor_kernels.Role`; features have the image slots in row-major order.
        turn: (B, S) int32, or None, as in `attanchor_kernels.merge_sequence`.
        image: (T,) int64, the image of the call that each feature is of, -1 for newline rows.
        budget: (T,) int64, how many tokens of that image stay.
        seed: `AttAnchorConfig.placement_seed`, for what is drawn.
        attention: Gives (T,) float32, how much the image encoder's class token attends to each feature; None where the
            encoder has none.
    """

    rows: Tensor
    text_embeds: Tensor
    roles: Tensor
    turn: Tensor | None
    image: Tensor
    budget: Tensor
    seed: int
    attention: Callable[[], Tensor | None]


class Rule(NamedTuple):
    """A way to choose. `score` gives (T,) float32 by which tokens are ranked within their image, or None for their
    relevance, the best cosine over the question's tokens; `cells` spreads the survivors over the image; `pooled` makes
    each the mean of its cell, before anything is matched."""

    score: Callable[[Images], Tensor | None] | None = None
    cells: bool = False
    pooled: bool = False


_RULES = {
    "cells": Rule(cells=True),
    "salience": Rule(lambda images: images.attention()),
    "relevance": Rule(),
    "pooling": Rule(cells=True, pooled=True),
}


def register_rule(name: str, rule: Rule) -> None:
    """Make a rule known as a value of `AttAnchorConfig.keep_by`."""
    _RULES[name] = rule
    if name not in settings.KEEP_BY:
        settings.KEEP_BY.append(name)


def survivors(
    config: settings.AttAnchorConfig,
    adapter: FamilyAdapter,
    model: Any,
    arguments: Call,
    encoded: Any,
    rows: Tensor,
    silent: Tensor | None,
    text_embeds: Tensor,
    roles: Tensor,
    turn: Tensor | None,
) -> tuple[Tensor, dict[str, Any]]:
    """The features that the sequence is built of, and `keep`, `salience` and `cells` of
    `attanchor_kernels.merge_sequence`, none of them if nothing is to be dropped.

    Args:
        arguments: Those of the call.
        encoded: From `FamilyAdapter.encode_images`.
        rows: (T, D), its features.
        silent: (T,) bool, those that are no image content, or None.
        text_embeds, roles, turn: What the operator is given, on one device.
    """
    if config.keep is None:
        return rows, {}
    total, slots, device = len(rows), roles.shape[1], roles.device
    content = torch.ones(total, dtype=torch.bool, device=device) if silent is None else ~silent.to(device)
    count = total if silent is None else int(content.sum())
    shapes = adapter.token_shapes(model, arguments, count)
    if sum(map(_tokens, shapes)) != count:
        shapes = _lines(encoded, content)
    budgets = [_budgets(config.keep, grids) for grids in shapes]

    # By content feature, in order: its image, that image's budget, and its cell, counted over all images of the call.
    sizes = torch.tensor([_tokens(grids) for grids in shapes], dtype=torch.long)
    each = torch.tensor([sum(own) for own in budgets], dtype=torch.long)
    image = torch.arange(len(shapes)).repeat_interleave(sizes)
    first = (each.cumsum(0) - each).repeat_interleave(sizes)
    cell = torch.cat([_cells(grids, own) for grids, own in zip(shapes, budgets, strict=True)] or [image])
    known = torch.stack([image, each.repeat_interleave(sizes), torch.where(cell < 0, -1, cell + first)]).to(device)
    at = content.cumsum(0).sub_(1).clamp_(min=0)
    image, budget, cell = (torch.where(content, values[at], -1) for values in known) if len(image) else known

    # Features fill the placeholders in row-major order. How many there are of each is checked by the operator.
    holds = roles.eq(Role.IMAGE) | roles.eq(Role.SILENT_IMAGE)
    slot = (~holds).flatten().byte().argsort(stable=True)
    slot = slot[torch.arange(total, device=device).clamp(max=max(len(slot) - 1, 0))]
    sample = slot // slots
    # An image that takes no part (the leak rule) is not dropped from and has no budget.
    dropped_from = roles.flatten()[slot].eq(Role.IMAGE) & content
    entry = image % (len(shapes) + 1)  # newline rows come behind all images
    of_image = torch.zeros(len(shapes) + 1, dtype=torch.long, device=device)
    owner = of_image.scatter(0, entry, sample)
    part = of_image.scatter_reduce(0, entry, dropped_from.long(), "amax")
    budgets_of = torch.nn.functional.pad(each.to(device), (0, 1))
    per_sample = torch.zeros(len(roles), dtype=torch.long, device=device)
    keep = per_sample.index_add(0, owner, budgets_of * part)
    chosen = {"keep": keep.int()}

    rule = _RULES[config.keep_by]
    if rule.score is not None:
        attention = functools.partial(adapter.class_token_attention, model, arguments, encoded)
        given = Images(rows, text_embeds, roles, turn, image, budget, config.placement_seed, attention)
        with torch.no_grad():
            score = rule.score(given)
        if score is not None:
            chosen["salience"] = _within_images(score.to(device), image, budget)
    if rule.cells:
        spent = per_sample.index_add(0, owner, budgets_of)
        chosen["cells"] = torch.where(cell < 0, -1, cell - (spent.cumsum(0) - spent)[sample]).int()
    if rule.pooled:
        rows, first_of_cell = _pooled(rows, torch.where(dropped_from, cell, -1))
        chosen["salience"] = first_of_cell.float()
    return rows, chosen


def _pooled(rows: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of every cell in place of its first row and zeros in place of its others, which no cosine above 0 ever
    chooses; and (T,) bool, the rows that are first. Rows of no cell stay as they are."""
    first = torch.full((len(rows) + 1,), len(rows), device=rows.device)
    place = torch.arange(len(rows), device=rows.device)
    own = torch.where(cell < 0, len(rows), cell)  # what is in no cell shares one that is not looked at
    is_first = first.scatter_reduce(0, own, place, "amin")[own] == place
    count = torch.zeros(len(rows) + 1, device=rows.device).index_add(0, own, torch.ones_like(own, dtype=torch.float))
    share = rows / count[own][:, None].to(rows.dtype)
    means = torch.zeros(len(rows) + 1, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add(0, own, share)
    pooled = means[own] * is_first[:, None]
    return torch.where((cell < 0)[:, None], rows, pooled), is_first | (cell < 0)


def _lines(encoded: Any, content: Tensor) -> list[list[Shape]]:
    """Each image as one line of tokens: for families that tell no grids that fit."""
    lengths = [part.numel() // part.shape[-1] for part in encoded.pooler_output]
    return [[(1, int(part.sum()))] for part in content.split(lengths)]


def _tokens(grids: list[Shape]) -> int:
    return sum(rows * columns for rows, columns in grids)


def _budgets(keep: float, grids: list[Shape]) -> list[int]:
    """How many tokens of each grid of an image stay: the image's budget, divided by their sizes."""
    ends = [0, *itertools.accumulate(rows * columns for rows, columns in grids)]
    size = ends[-1]
    most = keep if isinstance(keep, int) else max(1, int(keep * size + 0.5))
    shares = [min(most, size) * end // max(size, 1) for end in ends]
    return [stop - start for start, stop in itertools.pairwise(shares)]


def _cells(grids: list[Shape], budgets: list[int]) -> Tensor:
    """The cell of every token of an image's grids, counted on from grid to grid; -1 in a grid without a budget."""
    parts, first = [], 0
    for shape, count in zip(grids, budgets, strict=True):
        parts.append(cells_of(shape, count) + first if count else torch.full((shape[0] * shape[1],), -1))
        first += count
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.long)


def cells_of(shape: Shape, count: int) -> Tensor:
    """(rows * columns,) int64: a grid cut into `count` rectangles, none of them empty, in reading order.

    The grid is cut into bands of lines, about as high as a square cell would be, and each band into its share of cells.
    """
    rows, columns = shape
    bands = round((count * rows / columns) ** 0.5)
    bands = min(max(bands, -(-count // columns)), rows, count)
    line, column = torch.arange(rows)[:, None], torch.arange(columns)
    band = line * bands // rows
    first, stop = band * count // bands, (band + 1) * count // bands
    return (first + column * (stop - first) // columns).flatten()


def _within_images(score: Tensor, image: Tensor, budget: Tensor) -> Tensor:
    """(T,) float32 that ranks a sample's tokens so that its best are the best `budget` of each image, by `score`."""
    rank = rank_within(score.nan_to_num(-torch.inf, torch.inf, -torch.inf), image)
    return -(rank / budget.clamp(min=1)).float()
