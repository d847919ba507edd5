"""From a `Problem` to launches: shapes, strides and choices in, freshly allocated and fully written tensors out."""

from __future__ import annotations

import math
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor

from attanchor_kernels.backends.common import (
    NEVER,
    allocator,
    empty_embeds,
    empty_gradients,
    on_device,
    rows_contiguous,
    selection,
)
from attanchor_kernels.backends.triton import schedule as schedules
from attanchor_kernels.backends.triton.kernels import assemble_kernel, construct_kernel, transpose_kernel
from attanchor_kernels.backends.triton.prepared import Launch, compilation, prepared
from attanchor_kernels.backends.triton.schedule import Schedule
from attanchor_kernels.backends.triton.state import States
from attanchor_kernels.backends.triton.types import Config, CopyConfig, Inputs, Outputs
from attanchor_kernels.problem import Plan, Problem

T = TypeVar("T", Tensor, Tensor | None)

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


def run(problem: Problem, *, copy: bool, schedule: Schedule | None = None) -> tuple[Tensor | None, Plan]:
    """Launch the construct kernel; `schedule` overrides the choice by shape."""
    if problem.batch == 0 or (problem.slots == 0 and problem.capacity == 0):
        return empty_embeds(problem) if copy else None, Plan.empty(problem)
    made = _launch(problem, Outputs._fields if copy else Outputs._fields[1:], schedule)
    return made[0] if copy else None, Plan(*made[-8:])


def match(problem: Problem, *, schedule: Schedule | None = None) -> tuple[Tensor, Tensor]:
    """The match alone, in one launch: what every mover is most similar to, before threshold and budget.

    Returns:
        score: (B, movers) float32, the best cosine; -inf where a mover takes no part or has no candidate.
        host: (B, movers) int64, the host that it is reached at, counted as in `Plan`; -1 where there is none.
    """
    if problem.batch == 0 or problem.movers == 0:
        nothing = Plan.empty(problem)
        return nothing.score, nothing.host
    host, score = _launch(problem, ("host", "score"), schedule)
    return score, host


def _launch(problem: Problem, names: tuple[str, ...], schedule: Schedule | None) -> list[Tensor]:
    """The outputs `names`, which the construct kernel makes, and nothing beside them."""
    image, text = rows_contiguous(problem.image), rows_contiguous(problem.text)
    assembles = "source" in names
    drops = problem.drops and assembles
    chosen = selection(problem)
    inputs = Inputs(
        *map(
            aligned,
            (
                problem.roles,
                problem.turn,
                problem.image_mask,
                problem.text_mask,
                problem.anchor_mask,
                problem.position_ids if assembles else None,
                problem.tau_tensor if assembles and chosen.tau < NEVER else None,
                *((problem.keep_each, problem.salience, problem.cells) if drops else (None, None, None)),
            ),
        )
    )
    key = (
        *(names, text.device, text.dtype, *place_of(image), *place_of(text), chosen.budget),
        *(problem.max_anchors, problem.keep, problem.image_into_text, problem.inherit, problem.pad_left),
        None if problem.position_ids is None else problem.position_ids.shape[0],
        *[pointer is None for pointer in inputs],
        # `tune` replaces the choice by shape.
        schedules.construct if schedule is None else schedule,
    )
    outputs, state, launch = prepared(key, _prepare, problem, image, text, names, chosen.budget, schedule)
    with on_device(text.device):
        made, pointers = outputs.make()
        launch(image, text, inputs, pointers, state.take(), chosen.tau)
    return made


class _Outputs:
    """Allocates the outputs `names` of one shape."""

    def __init__(self, problem: Problem, names: tuple[str, ...]) -> None:
        like = Outputs(empty_embeds(problem), *Plan.empty(problem))._asdict()
        self.patterns = [(tuple(like[name].shape), like[name].stride(), like[name].dtype) for name in names]
        self.device = problem.text.device
        at = {name: index for index, name in enumerate(names)}
        if not problem.drops:
            at.pop("relevance", None)  # of no elements
        self.at = [at.get(name) for name in Outputs._fields]

    def make(self) -> tuple[list[Tensor], Outputs]:
        """The tensors, unwritten, and what the kernel is given of them."""
        empty = allocator(self.device)
        made = [empty(*pattern) for pattern in self.patterns]
        return made, Outputs(*[None if index is None else made[index] for index in self.at])


def _prepare(
    problem: Problem, image: Tensor, text: Tensor, names: tuple[str, ...], budget: int, schedule: Schedule | None
) -> tuple[_Outputs, States, Launch]:
    """What launches of one shape share."""
    assembles = "source" in names
    batch, slots, hidden, merges = problem.batch, problem.slots, problem.hidden, problem.merges
    alike = alignment(image, text)
    images = min(slots, image.shape[0]) if merges else image.shape[1]
    drops = problem.drops and assembles
    if schedule is None:
        schedule = schedules.construct(text.device, text.element_size(), batch, images, slots, hidden, alike)
    image_tiles = max(1, -(-images // schedule.block_images))
    items = image_tiles * (schedule.slices if schedule.split else 1)
    row_tiles = -(-max(problem.capacity, slots) // schedule.block_rows) if assembles else 0
    ring = min(schedule.ring, batch * image_tiles) if schedule.split else 0
    ranks = max(1, batch * problem.images) if drops else 0
    state = States(
        text.device,
        batch,
        problem.movers,
        ring=ring,
        scratch=ring * schedule.slices * partial_size(schedule),
        relevances=0 if problem.image_into_text else ranks,
        ranks=ranks if problem.cells is None else 2 * ranks,
        survivors=2 * batch * (-(-slots // 32) + 1) if drops else 0,
    )
    config = Config(
        hidden=hidden,
        alignment=alike,
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
    )
    launch = Launch(
        construct_kernel,
        batch * (items + row_tiles),
        compilation(schedule.num_warps, schedule.num_stages, schedule.registers),
        batch=batch,
        texts=text.shape[1],
        slots=slots,
        movers=problem.movers,
        capacity=problem.capacity,
        axes=1 if problem.position_ids is None else problem.position_ids.shape[0],
        budget=budget,
        **row_places(image, text),
        match_items=items,
        row_tiles=row_tiles,
        lag=min(schedule.lag, batch) if assembles else batch,
        keep=problem.keep if drops else None,
        slices=schedule.slices if schedule.split else None,
        slice_blocks=schedule.slice_blocks if schedule.split else None,
        ring=ring if schedule.split else None,
        config=config,
    )
    return _Outputs(problem, names), state, launch


def assemble(image: Tensor, text: Tensor, source: Tensor, places: Tensor) -> Tensor:
    """(B, L, D): every row copied to its places, zeros in padding."""
    embeds = torch.empty((*source.shape, text.shape[2]), dtype=text.dtype, device=text.device)
    if embeds.numel() == 0:
        return embeds
    image, text, places = rows_contiguous(image), rows_contiguous(text), aligned(places)
    key = text.device, text.dtype, *place_of(image), *place_of(text), places.shape[2], source.shape
    launch = prepared(key, _prepare_assemble, image, text, places.shape[2], source.shape)
    with on_device(text.device):
        launch(image, text, aligned(source), places, embeds)
    return embeds


def _prepare_assemble(image: Tensor, text: Tensor, slots: int, shape: tuple[int, int]) -> Launch:
    (batch, length), hidden = shape, text.shape[2]
    tiles = schedules.copying(text.element_size(), hidden)
    row_tiles = -(-max(slots, length) // tiles.block_rows)
    config = CopyConfig(
        hidden, alignment(image, text), image.dim() == 2, INTERPRETED, tiles.block_rows, tiles.block_columns
    )
    lengths = {"slots": slots, "length": length, "row_tiles": row_tiles, **row_places(image, text)}
    return Launch(assemble_kernel, batch * row_tiles, compilation(tiles.num_warps), **lengths, config=config)


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
    grad, places = rows_contiguous(grad), aligned(places)
    shapes = places.shape[2], image_shape, text_shape
    key = grad.device, grad.dtype, *place_of(grad), *shapes, need_image, need_text
    launch = prepared(key, _prepare_backward, grad, *shapes, need_image)
    with on_device(grad.device):
        launch(grad, places, image_grad if need_image else None, text_grad if need_text else None)
    return image_grad, text_grad


def _prepare_backward(
    grad: Tensor, slots: int, image_shape: tuple[int, ...], text_shape: tuple[int, ...], need_image: bool
) -> Launch:
    batch, hidden, merges = len(grad), text_shape[2], len(image_shape) == 2
    tiles = schedules.adding(grad.element_size(), hidden)
    row_tiles = -(-slots // tiles.block_rows)
    return Launch(
        transpose_kernel,
        batch * row_tiles + (TAIL_PROGRAMS if merges and need_image else 0),
        compilation(tiles.num_warps),
        batch=batch,
        images=0 if merges else image_shape[1],
        texts=text_shape[1],
        features=image_shape[0] if merges else batch * image_shape[1],
        slots=slots,
        row_tiles=row_tiles,
        grad_batch_stride=grad.stride(0),
        grad_row_stride=grad.stride(1),
        config=CopyConfig(hidden, alignment(grad), merges, INTERPRETED, tiles.block_rows, tiles.block_columns),
    )


def partial_size(schedule: Schedule) -> int:
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


def aligned(value: T) -> T:
    """The tensor, or a copy that is contiguous and begins at 16 bytes; others would be compiled for apart."""
    if value is None or (value.is_contiguous() and value.data_ptr() % 16 == 0):
        return value
    return value.clone(memory_format=torch.contiguous_format)


def place_of(rows: Tensor) -> tuple[Any, ...]:
    """What of a tensor of rows a launch depends on."""
    return rows.shape, rows.stride(), rows.data_ptr() % 16


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
