"""From a `Problem` to launches: shapes, strides and choices in, freshly allocated and fully written tensors out."""

from __future__ import annotations

import math

import torch
import triton
from torch import Tensor

from attanchor_kernels.backends.common import (
    NEVER,
    contiguous,
    empty_embeds,
    empty_gradients,
    on_device,
    rows_contiguous,
    selection,
)
from attanchor_kernels.backends.triton import schedule as schedules
from attanchor_kernels.backends.triton import state as states
from attanchor_kernels.backends.triton.kernels import assemble_kernel, construct_kernel, transpose_kernel
from attanchor_kernels.backends.triton.types import Config, CopyConfig, Inputs, Outputs
from attanchor_kernels.problem import Plan, Problem

INTERPRETED = triton.knobs.runtime.interpret
TAIL_PROGRAMS = 64


def construct(problem: Problem) -> tuple[Tensor, Plan]:
    """The new sequence (B, C, D) at capacity C and the plan that made it, in one launch."""
    embeds, plan = run(problem, copy=True)
    assert embeds is not None
    return embeds, plan


def plan(problem: Problem) -> Plan:
    """The plan alone, in one launch: nothing is copied."""
    return run(problem, copy=False)[1]


def run(problem: Problem, *, copy: bool, schedule: schedules.Schedule | None = None) -> tuple[Tensor | None, Plan]:
    """Launch the construct kernel; `schedule` overrides the choice by shape."""
    embeds = empty_embeds(problem) if copy else None
    made = Plan.empty(problem)
    if problem.batch and max(problem.capacity, problem.slots):
        outputs = Outputs(embeds, *made)._replace(
            is_anchor=made.is_anchor.view(torch.uint8), relevance=made.relevance if problem.drops else None
        )
        _launch(problem, outputs, schedule)
    return embeds, made


def match(problem: Problem, *, schedule: schedules.Schedule | None = None) -> tuple[Tensor, Tensor]:
    """The match alone, in one launch: what every mover is most similar to, before threshold and budget.

    Returns:
        score: (B, movers) float32, the best cosine; -inf where a mover takes no part or has no candidate.
        host: (B, movers) int64, the host that it is reached at, counted as in `Plan`; -1 where there is none.
    """
    made = Plan.empty(problem)
    if made.score.numel():
        nothing = Outputs(*[None] * len(Outputs._fields))
        _launch(problem, nothing._replace(host=made.host, score=made.score), schedule)
    return made.score, made.host


def _launch(problem: Problem, outputs: Outputs, schedule: schedules.Schedule | None) -> None:
    """The construct kernel, which makes what `outputs` has a tensor for."""
    batch, slots, hidden, merges = problem.batch, problem.slots, problem.hidden, problem.merges
    image, text = rows_contiguous(problem.image), rows_contiguous(problem.text)
    aligned = alignment(image, text)
    images = min(slots, image.shape[0]) if merges else image.shape[1]
    drops = problem.drops and outputs.source is not None
    if schedule is None:
        schedule = schedules.construct(text.device, text.element_size(), batch, images, slots, hidden, aligned)
    image_tiles = max(1, -(-images // schedule.block_images))
    items = image_tiles * (schedule.slices if schedule.split else 1)
    assembles = outputs.source is not None
    row_tiles = -(-max(problem.capacity, slots) // schedule.block_rows) if assembles else 0
    ring = min(schedule.ring, batch * image_tiles) if schedule.split else 0
    chosen = selection(problem)
    ranks = max(1, batch * problem.images) if drops else 0

    with on_device(text.device):
        state = states.allocate(
            text.device,
            batch,
            problem.movers,
            ring=ring,
            scratch=ring * schedule.slices * partial_size(schedule),
            relevances=0 if problem.image_into_text else ranks,
            ranks=ranks if problem.cells is None else 2 * ranks,
            survivors=2 * batch * (-(-slots // 32) + 1) if drops else 0,
        )
        construct_kernel[(batch * (items + row_tiles),)](
            image,
            text,
            Inputs(
                roles=contiguous(problem.roles),
                turn=contiguous(problem.turn),
                image_mask=as_bytes(problem.image_mask),
                text_mask=as_bytes(problem.text_mask),
                anchor_mask=as_bytes(problem.anchor_mask),
                position_ids=contiguous(problem.position_ids) if assembles else None,
                tau=problem.tau_tensor if assembles and chosen.tau < NEVER else None,
                keep_each=contiguous(problem.keep_each) if drops else None,
                salience=contiguous(problem.salience) if drops else None,
                cells=contiguous(problem.cells) if drops else None,
            ),
            outputs,
            state,
            chosen.tau,
            batch=batch,
            texts=text.shape[1],
            slots=slots,
            movers=problem.movers,
            capacity=problem.capacity,
            axes=1 if problem.position_ids is None else problem.position_ids.shape[0],
            budget=chosen.budget,
            **row_places(image, text),
            image_tiles=image_tiles,
            row_tiles=row_tiles,
            lag=min(schedule.lag, batch) if assembles else batch,
            keep=problem.keep if drops else None,
            slices=schedule.slices if schedule.split else None,
            slice_blocks=schedule.slice_blocks if schedule.split else None,
            ring=ring if schedule.split else None,
            config=Config(
                hidden=hidden,
                alignment=aligned,
                merges=merges,
                image_into_text=problem.image_into_text,
                budgeted=(problem.max_anchors is not None or drops) and assembles,
                drops=drops,
                inherit=problem.inherit and assembles,
                pad_left=problem.pad_left and assembles,
                interpreted=INTERPRETED,
                amd=amd_generation(text.device),
                block_images=schedule.block_images,
                block_texts=schedule.block_texts,
                block_hidden=schedule.block_hidden,
                slices=0 if schedule.split else schedule.slices,
                slice_blocks=0 if schedule.split else schedule.slice_blocks,
                split=schedule.split,
                block_rows=schedule.block_rows,
                block_columns=schedule.block_columns,
            ),
            **compilation(schedule.num_warps, schedule.num_stages, schedule.registers),
        )


def assemble(image: Tensor, text: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): every row copied to its places, zeros in padding."""
    batch, length = source.shape
    slots, hidden = places.shape[2], text.shape[2]
    embeds = torch.empty((batch, length, hidden), dtype=text.dtype, device=text.device)
    if embeds.numel() == 0:
        return embeds
    image, text = rows_contiguous(image), rows_contiguous(text)
    tiles = schedules.copying(text.element_size(), hidden)
    row_tiles = -(-max(slots, length) // tiles.block_rows)
    with on_device(text.device):
        assemble_kernel[(batch * row_tiles,)](
            image,
            text,
            source.contiguous(),
            places.contiguous(),
            embeds,
            slots=slots,
            length=length,
            row_tiles=row_tiles,
            **row_places(image, text),
            config=CopyConfig(
                hidden, alignment(image, text), image.dim() == 2, INTERPRETED, tiles.block_rows, tiles.block_columns
            ),
            **compilation(tiles.num_warps),
        )
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
    batch, slots, hidden = places.shape[0], places.shape[2], text_shape[2]
    image_grad, text_grad = empty_gradients(grad, image_shape, text_shape, need_image, need_text)
    if image_grad.numel() + text_grad.numel() == 0:
        return image_grad, text_grad
    grad = rows_contiguous(grad)
    merges = len(image_shape) == 2
    tiles = schedules.adding(grad.element_size(), hidden)
    row_tiles = -(-slots // tiles.block_rows)
    tail = TAIL_PROGRAMS if merges and need_image else 0
    with on_device(grad.device):
        transpose_kernel[(batch * row_tiles + tail,)](
            grad,
            places.contiguous(),
            image_grad if need_image else None,
            text_grad if need_text else None,
            batch=batch,
            images=0 if merges else image_shape[1],
            texts=text_shape[1],
            features=image_shape[0] if merges else batch * image_shape[1],
            slots=slots,
            row_tiles=row_tiles,
            grad_batch_stride=grad.stride(0),
            grad_row_stride=grad.stride(1),
            config=CopyConfig(hidden, alignment(grad), merges, INTERPRETED, tiles.block_rows, tiles.block_columns),
            **compilation(tiles.num_warps),
        )
    return image_grad, text_grad


def partial_size(schedule: schedules.Schedule) -> int:
    """float32 of one slice's products and squared norms."""
    return schedule.block_images * schedule.block_texts + schedule.block_images + schedule.block_texts


def row_places(image: Tensor, text: Tensor) -> dict[str, int]:
    """Where the kernels find a row: the lengths and strides of `types.Rows`."""
    merges = image.dim() == 2
    return {
        "images": 0 if merges else image.shape[1],
        "features": image.shape[0] if merges else image.shape[0] * image.shape[1],
        "image_batch_stride": 0 if merges else image.stride(0),
        "image_row_stride": image.stride(0 if merges else 1),
        "text_batch_stride": text.stride(0),
        "text_row_stride": text.stride(1),
    }


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def alignment(*values: Tensor) -> int:
    """The largest power of two, in elements and up to 16 bytes, that divides the place of every row."""
    size = values[0].element_size()
    strides = [v.stride(axis) for v in values for axis in range(v.dim() - 1) if v.shape[axis] > 1]
    return math.gcd(16, *(size * stride for stride in strides), *(v.data_ptr() for v in values)) // size


def amd_generation(device: torch.device) -> str:
    """First letters of an AMD architecture, "gfx9" or "gfx1"; "" for anything else."""
    if torch.version.hip is None or device.type != "cuda":
        return ""
    return torch.cuda.get_device_properties(device).gcnArchName[:4]


def compilation(num_warps: int, num_stages: int = 1, registers: int | None = None) -> dict:
    """Compiler options; ROCm knows no limit of registers."""
    limit = {} if registers is None or torch.version.hip else {"maxnreg": registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **limit}
