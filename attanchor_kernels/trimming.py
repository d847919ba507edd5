"""The length that a plan's longest sequence really has, read from the device once, and the plan cut to it."""

from __future__ import annotations

import torch
from torch import Tensor

from attanchor_kernels import checks
from attanchor_kernels.problem import Plan, Problem


def trim(problem: Problem, plan: Plan) -> Plan:
    """The plan cut to its longest real sequence; its fields are contiguous.

    Raises:
        ValueError: as `checks.check_roles`.
    """
    length = read_length(problem, plan)
    cut = problem.capacity - length
    if not cut:
        return plan
    # Right-padded sequences start at row 0, left-padded ones end at the last row.
    first = cut if problem.pad_left else 0
    position_ids, attention_mask, source, is_anchor = (
        field.narrow(-1, first, length).contiguous() for field in plan[:4]
    )
    places = shift_places(plan.places, first) if first else plan.places
    return Plan(position_ids, attention_mask, source, is_anchor, plan.host, plan.score, plan.relevance, places)


def read_length(problem: Problem, plan: Plan) -> int:
    """The longest real sequence; where the device must be read anyway, `roles` is checked in the same read."""
    places = plan.places
    if places.numel() == 0:
        return 0
    wanted = [places.amax((0, 2))]  # rows of the last original and the last copy, and the last feature
    if problem.pad_left:
        wanted.append(plan.attention_mask.amax(0).sum(0, keepdim=True))
    if problem.roles is not None:
        wanted.append(problem.roles.amax().view(1))
    original, copy, feature, *others = (torch.cat(wanted) if len(wanted) > 1 else wanted[0]).tolist()
    length = others.pop(0) if problem.pad_left else max(original, copy) + 1
    if others:
        checks.check_roles((feature + 1, others[0]), problem.image.shape[0])
    return length


def shift_places(places: Tensor, first: int) -> Tensor:
    """`places` after the first `first` output rows, all padding, were cut off."""
    shifted = places.clone()
    shifted[:, :2].sub_(first).clamp_min_(-1)
    return shifted
