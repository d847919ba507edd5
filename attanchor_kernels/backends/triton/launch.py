"""From a `Problem` to launches: shapes, strides and choices in, freshly allocated and fully written tensors out."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager

import torch
import triton
from torch import Tensor

from attanchor_kernels.backends.triton import schedule as schedules
from attanchor_kernels.backends.triton import workspace
from attanchor_kernels.backends.triton.arguments import Config, CopyConfig, Inputs, Outputs
from attanchor_kernels.backends.triton.kernels import assemble_kernel, construct_kernel, transpose_kernel
from attanchor_kernels.problem import Plan, Problem

INTERPRETED = triton.knobs.runtime.interpret
# A NaN tau is an error earlier; cosines lie in [-1, 1], so these bounds decide as tau does and fit in float32.
LEAST_TAU, NEVER = -2.0, 2.0
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
    batch, slots, capacity, hidden = problem.batch, problem.slots, problem.capacity, problem.hidden
    image, text = rows_contiguous(problem.image), rows_contiguous(problem.text)
    axes = 1 if problem.position_ids is None else problem.position_ids.shape[0]
    device = text.device
    aligned = alignment(image, text)

    def empty(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    embeds = empty(batch, capacity, hidden, dtype=text.dtype) if copy else None
    made = Plan(
        position_ids=empty(axes, batch, capacity, dtype=torch.int64),
        attention_mask=empty(batch, capacity, dtype=torch.int64),
        source=empty(batch, capacity, dtype=torch.int64),
        is_anchor=empty(batch, capacity, dtype=torch.bool),
        host=empty(batch, problem.movers, dtype=torch.int64),
        score=empty(batch, problem.movers, dtype=torch.float32),
        places=empty(batch, 3, slots, dtype=torch.int32),
    )
    if batch == 0 or capacity == 0:
        return embeds, made

    merges = problem.merges
    images = min(slots, image.shape[0]) if merges else image.shape[1]
    if schedule is None:
        schedule = schedules.construct(device, text.element_size(), batch, images, text.shape[1], hidden, aligned)
    image_tiles = max(1, triton.cdiv(images, schedule.block_images))
    row_tiles = triton.cdiv(capacity, schedule.block_rows)
    lag = min(schedule.lag, batch)
    items = image_tiles * (schedule.slices if schedule.split else 1)
    image_batch_stride, image_row_stride = (0, image.stride(0)) if merges else image.stride()[:2]
    budget = problem.movers if problem.max_anchors is None else problem.max_anchors
    tau = NEVER if problem.tau >= 1 or budget == 0 else max(problem.tau, LEAST_TAU)

    with on_device(device):
        state = workspace.state(
            device,
            batch,
            problem.movers,
            tiles=image_tiles if schedule.split else 0,
            scratch=batch * items * partial_size(schedule) if schedule.split else 0,
        )
        construct_kernel[(schedule.programs if schedule.persistent else batch * (items + row_tiles),)](
            image,
            text,
            Inputs(
                roles=contiguous(problem.roles),
                turn=contiguous(problem.turn),
                image_mask=as_bytes(problem.image_mask),
                text_mask=as_bytes(problem.text_mask),
                anchor_mask=as_bytes(problem.anchor_mask),
                position_ids=contiguous(problem.position_ids),
            ),
            Outputs(embeds, *made._replace(is_anchor=made.is_anchor.view(torch.uint8))),
            state,
            tau,
            batch=batch,
            images=0 if merges else image.shape[1],
            texts=text.shape[1],
            slots=slots,
            features=image.shape[0] if merges else batch * image.shape[1],
            movers=problem.movers,
            capacity=capacity,
            axes=axes,
            budget=budget,
            image_batch_stride=image_batch_stride,
            image_row_stride=image_row_stride,
            text_batch_stride=text.stride(0),
            text_row_stride=text.stride(1),
            image_tiles=image_tiles,
            row_tiles=row_tiles,
            lag=lag,
            config=Config(
                hidden=hidden,
                alignment=aligned,
                merges=merges,
                image_into_text=problem.image_into_text,
                budgeted=tau != NEVER and budget < problem.movers,
                inherit=problem.inherit,
                pad_left=problem.pad_left,
                interpreted=INTERPRETED,
                block_images=schedule.block_images,
                block_texts=schedule.block_texts,
                block_hidden=schedule.block_hidden,
                slice_hidden=schedule.slice_hidden,
                slices=schedule.slices,
                split=schedule.split,
                persistent=schedule.persistent,
                block_rows=schedule.block_rows,
                block_columns=schedule.block_columns,
            ),
            **compilation(schedule.num_warps, schedule.num_stages, schedule.registers),
        )
    return embeds, made


def assemble(image: Tensor, text: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): every row copied to its places, zeros in padding."""
    batch, length = source.shape
    slots, hidden = places.shape[2], text.shape[2]
    embeds = torch.empty((batch, length, hidden), dtype=text.dtype, device=text.device)
    if embeds.numel() == 0:
        return embeds
    image, text = rows_contiguous(image), rows_contiguous(text)
    merges = image.dim() == 2
    image_batch_stride, image_row_stride = (0, image.stride(0)) if merges else image.stride()[:2]
    tiles = schedules.copying(text.element_size(), hidden)
    row_tiles = triton.cdiv(max(slots, length), tiles.block_rows)
    with on_device(text.device):
        assemble_kernel[(batch * row_tiles,)](
            image,
            text,
            source.contiguous(),
            places.contiguous(),
            embeds,
            images=0 if merges else image.shape[1],
            features=image.shape[0] if merges else batch * image.shape[1],
            slots=slots,
            length=length,
            row_tiles=row_tiles,
            image_batch_stride=image_batch_stride,
            image_row_stride=image_row_stride,
            text_batch_stride=text.stride(0),
            text_row_stride=text.stride(1),
            config=CopyConfig(
                hidden, alignment(image, text), merges, INTERPRETED, tiles.block_rows, tiles.block_columns
            ),
            **compilation(tiles.num_warps),
        )
    return embeds


def assemble_backward(
    grad: Tensor,
    source: Tensor,
    places: Tensor,
    image_shape: tuple[int, ...],
    text_shape: tuple[int, ...],
    need_image: bool,
    need_text: bool,
) -> tuple[Tensor, Tensor]:
    """The transpose of `assemble`, a gather over input rows; (0,) for a gradient that is not needed."""
    batch, slots, hidden = places.shape[0], places.shape[2], text_shape[2]
    image_grad = grad.new_empty(image_shape if need_image else (0,))
    text_grad = grad.new_empty(text_shape if need_text else (0,))
    if image_grad.numel() + text_grad.numel() == 0:
        return image_grad, text_grad
    grad = rows_contiguous(grad)
    merges = len(image_shape) == 2
    tiles = schedules.adding(grad.element_size(), hidden)
    row_tiles = triton.cdiv(slots, tiles.block_rows)
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


def rows_contiguous(value: Tensor) -> Tensor:
    """The tensor, or a copy if the elements of a row do not lie side by side."""
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()


def contiguous(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.contiguous()


def as_bytes(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask.contiguous().view(torch.uint8)


def alignment(*values: Tensor) -> int:
    """The largest power of two, in elements and up to 16 bytes, that divides the place of every row."""
    size = values[0].element_size()
    strides = [v.stride(axis) for v in values for axis in range(v.dim() - 1) if v.shape[axis] > 1]
    return math.gcd(16, *(size * stride for stride in strides), *(v.data_ptr() for v in values)) // size


def compilation(num_warps: int, num_stages: int = 1, registers: int | None = None) -> dict:
    """Compiler options; ROCm knows no limit of registers."""
    limit = {} if registers is None or torch.version.hip else {"maxnreg": registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **limit}


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, where there is such a thing: Triton launches on the current device."""
    return torch.cuda.device(device if device.type == "cuda" else -1)
