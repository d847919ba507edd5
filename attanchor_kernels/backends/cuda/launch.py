"""From a `Problem` to the binary's operators: freshly allocated, fully written tensors out; no wait for the device."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_kernels.backends.common import (
    empty_embeds,
    empty_gradients,
    on_device,
    rows_contiguous,
    selection,
)
from attanchor_kernels.backends.workspace import zeroed
from attanchor_kernels.problem import Plan, Problem

_state_words = functools.lru_cache(4096)(torch.ops.attanchor_cuda.state_words.default)
_construct = torch.ops.attanchor_cuda.construct.default._op  # its `__call__`, in Python, does no more than call this
_assemble = torch.ops.attanchor_cuda.assemble.default
_assemble_backward = torch.ops.attanchor_cuda.assemble_backward.default


class Tuning(NamedTuple):
    """How a construct launch is cut into tiles; 0, or -1 where that is the default, leaves it to the shape.

    Nothing here changes a decision beyond rounding, nor any row. tile_images, cluster and hold are taken literally:
    what is not compiled (csrc/instantiations) or does not run on the device is a RuntimeError.
    """

    tile_images: int = 0  # image rows of a match tile
    cluster: int = 0  # blocks that share the columns of a match tile
    tile_rows: int = 0  # slots of an assemble tile, at most 32
    lag: int = -1  # samples between match and assemble
    blocks: int = 0  # most that run at once, at least a cluster; 0: as many as the device runs
    hold: int = -1  # 1: keep tiles on chip between match and copy, 0: read them again
    bulk: int = -1  # 0: tiles that are kept on chip come and go without bulk copies


# Replaced by a Tuning where every launch is to have one.
BY_SHAPE: Tuning | tuple[()] = ()


class Launched(NamedTuple):
    """How a construct launch was cut into tiles, and what the device was found to run at once."""

    tile_images: int
    cluster: int
    hold: bool
    bulk: bool
    tile_rows: int  # 0, like lag, where tiles are kept on chip
    lag: int
    blocks: int
    resident: int  # blocks
    shared_bytes: int  # of a block


def variants(dtype: torch.dtype, drops: bool = False) -> list[Tuning]:
    """Every compiled way of construct, for tests and tuning; with `drops`, those that leave image tokens out.

    Clusters need a GPU of compute capability 9.0 or more.
    """
    if drops:
        tiles = [(32, 1), (32, 8)] if dtype == torch.float32 else [(64, 1), (32, 8), (64, 8)]
        return [Tuning(rows, cluster, hold=0) for rows, cluster in tiles]
    if dtype == torch.float32:
        return [
            Tuning(32, 1, hold=0),
            Tuning(32, 8, hold=0),
            Tuning(32, 8, hold=1, bulk=0),
            Tuning(32, 8, hold=1, bulk=1),
        ]
    held = [Tuning(rows, cluster, hold=1) for rows in (32, 64) for cluster in (4, 8)]
    return [
        Tuning(16, 1, hold=0),
        Tuning(64, 1, hold=0),
        *(tuning._replace(hold=0) for tuning in held),
        *(tuning._replace(bulk=bulk) for tuning in held for bulk in (0, 1)),
    ]


def construct(problem: Problem) -> tuple[Tensor, Plan]:
    """The new sequence (B, C, D) at capacity C and the plan that made it, in one launch."""
    embeds, plan, _ = _run(problem, True, BY_SHAPE)
    assert embeds is not None
    return embeds, plan


def plan(problem: Problem) -> Plan:
    """The plan alone, in one launch: nothing is copied."""
    return run(problem, copy=False)[1]


def run(problem: Problem, *, copy: bool, tuning: Tuning | None = None) -> tuple[Tensor | None, Plan]:
    """Launch the construct kernel; `tuning` overrides `BY_SHAPE`."""
    return _run(problem, copy, BY_SHAPE if tuning is None else tuning)[:2]


def launched(problem: Problem, *, copy: bool = True, tuning: Tuning | None = None) -> Launched | None:
    """How `run` launches with these arguments, found out by a launch; None where there is nothing to launch."""
    way = _run(problem, copy, tuning or BY_SHAPE or Tuning())[2]
    return Launched(*way) if way else None


def _run(problem: Problem, copy: bool, tuning: Tuning | tuple[()]) -> tuple[Tensor | None, Plan, list[Any]]:
    """What was made, and the fields of `Launched` for who names a tuning."""
    device, chosen = problem.text.device, selection(problem)
    ranked = problem.slots if problem.drops else 0
    celled = 0 if problem.cells is None else problem.images
    with on_device(device):
        state = zeroed(device, _state_words(problem.batch, problem.movers, ranked, celled))
    try:
        embeds, *fields, way = _construct(
            problem.image,
            problem.text,
            problem.roles,
            problem.turn,
            problem.image_mask,
            problem.text_mask,
            problem.anchor_mask,
            problem.position_ids,
            problem.keep_each,
            problem.salience,
            problem.cells,
            problem.tau_tensor if chosen.tau < 1 else None,
            state,
            chosen.tau,
            chosen.budget,
            problem.keep,
            problem.capacity,
            copy,
            problem.image_into_text,
            problem.inherit,
            problem.pad_left,
            tuning,
            current_stream(device),
        )
    except RuntimeError:
        # On its way here an error of the allocator lost its type, torch.OutOfMemoryError, and what it said.
        rows_contiguous(problem.image), rows_contiguous(problem.text)
        if copy:
            empty_embeds(problem)
        Plan.empty(problem)
        raise
    return embeds, Plan(*fields), way


def assemble(image: Tensor, text: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): every row copied to its places, zeros in padding."""
    embeds = torch.empty((*source.shape, text.shape[2]), dtype=text.dtype, device=text.device)
    if embeds.numel():
        image, text = rows_contiguous(image), rows_contiguous(text)
        _assemble(image, text, source.contiguous(), places.contiguous(), embeds, current_stream(text.device))
    return embeds


def assemble_backward(
    grad: Tensor,
    places: Tensor,
    image_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    """The transpose of `assemble`, a gather over input rows; (0,) for a gradient that is not needed."""
    image_grad, text_grad = empty_gradients(grad, image_shape, text_shape, need_image, need_text)
    if image_grad.numel() + text_grad.numel() == 0:
        return image_grad, text_grad
    _assemble_backward(
        rows_contiguous(grad),
        places.contiguous(),
        # The shape of a gradient that nobody needs still says how the slots are made up; it has one element.
        image_grad if need_image else grad.new_empty(1).expand(image_shape),
        text_grad if need_text else grad.new_empty(1).expand(text_shape),
        need_image,
        need_text,
        current_stream(grad.device),
    )
    return image_grad, text_grad


def current_stream(device: torch.device) -> int:
    """Handle of the stream to launch on."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
