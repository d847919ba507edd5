"""From a `Problem` to the binary's operators: freshly allocated, fully written tensors out; no wait for the device."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels.backends.common import (
    contiguous,
    empty_embeds,
    empty_gradients,
    on_device,
    rows_contiguous,
    selection,
)
from attanchor_kernels.backends.workspace import zeroed
from attanchor_kernels.problem import Plan, Problem

_construct = torch.ops.attanchor_cuda.construct.default
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


BY_SHAPE = Tuning()
MOST_INT = 2**31 - 1


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
    embeds, plan = run(problem, copy=True)
    assert embeds is not None
    return embeds, plan


def plan(problem: Problem) -> Plan:
    """The plan alone, in one launch: nothing is copied."""
    return run(problem, copy=False)[1]


def run(problem: Problem, *, copy: bool, tuning: Tuning | None = None) -> tuple[Tensor | None, Plan]:
    """Launch the construct kernel; `tuning` overrides `BY_SHAPE`."""
    return _run(problem, copy, tuning)[:2]


def launched(problem: Problem, *, copy: bool = True, tuning: Tuning | None = None) -> Launched | None:
    """How `run` launches with these arguments, found out by a launch; None where there is nothing to launch."""
    return _run(problem, copy, tuning)[2]


def _run(problem: Problem, copy: bool, tuning: Tuning | None) -> tuple[Tensor | None, Plan, Launched | None]:
    batch, movers, device = problem.batch, problem.movers, problem.text.device
    image, text = rows_contiguous(problem.image), rows_contiguous(problem.text)
    embeds = empty_embeds(problem) if copy else None
    made = Plan.empty(problem)
    slots, drops = problem.slots, problem.drops
    if batch == 0 or problem.capacity == slots == 0:
        return embeds, made, None

    chosen = selection(problem)
    stream = current_stream(device)
    # A cache line for the ticket and for the counters of each sample, then keys (B, movers) and cuts (B,).
    words = 16 * (1 + batch) + batch * (movers + 1)
    if drops:  # Ranks (B, S), survivors (B, S // 32 + 1), the best of each cell (B, images).
        words += batch * (slots + slots // 32 + 1 + (0 if problem.cells is None else problem.images))
    with on_device(device):
        state = zeroed(device, words)
    way = _construct(
        image,
        text,
        contiguous(problem.roles),
        contiguous(problem.turn),
        contiguous(problem.image_mask),
        contiguous(problem.text_mask),
        contiguous(problem.anchor_mask),
        contiguous(problem.position_ids),
        contiguous(problem.keep_each),
        contiguous(problem.salience),
        contiguous(problem.cells),
        problem.tau_tensor if chosen.tau < 1 else None,
        embeds,
        *made[:-2],
        made.relevance if drops else None,
        made.places,
        state,
        chosen.tau,
        chosen.budget,
        0 if problem.keep is None else min(problem.keep, MOST_INT),
        problem.image_into_text,
        problem.inherit,
        problem.pad_left,
        *(BY_SHAPE if tuning is None else tuning),
        stream,
    )
    return embeds, made, Launched(*way)


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
