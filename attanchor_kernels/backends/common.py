"""What the launchers of the kernel backends share: options as kernels take them, strides, outputs. Torch alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels.problem import Problem

# Cosines lie in [-1, 1], so these bounds decide as any tau beyond them does, and fit in float32.
LEAST_TAU, NEVER = -2.0, 2.0


class Selection(NamedTuple):
    """Threshold and budget as kernels take them: a finite float32, and a count that is never more than the movers."""

    tau: float  # NEVER, or overruled where the problem has a tensor
    budget: int


def selection(problem: Problem) -> Selection:
    """`tau >= 1` and a budget of 0 become a threshold that no cosine reaches. (A NaN tau is an error earlier.)

    Where text moves and images drop, every host can stay: there are no more copies than `keep`.
    """
    movers, most = problem.movers, problem.max_anchors
    budget = movers if most is None or most > movers else most
    if problem.keep is not None and not problem.image_into_text:
        budget = min(budget, problem.keep)
    tau = LEAST_TAU if problem.tau_tensor is not None else max(problem.tau, LEAST_TAU)
    if tau >= 1 or budget == 0:
        return Selection(NEVER, movers)
    return Selection(tau, budget)


def allocator(device: torch.device) -> Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]:
    """What makes an unwritten tensor of a shape, strides and dtype on `device`, which must be the current one.

    Where there is one, the function that inductor's code allocates with, which does not go through the dispatcher.
    """

    def usual(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty_strided(shape, strides, dtype=dtype, device=device)

    return getattr(torch._C._dynamo.guards, f"_empty_strided_{device.type}", usual)


def empty_embeds(problem: Problem) -> Tensor:
    """(B, C, D) of the inputs' dtype, unwritten."""
    shape = (problem.batch, problem.capacity, problem.hidden)
    return torch.empty(shape, dtype=problem.text.dtype, device=problem.text.device)


def empty_gradients(
    grad: Tensor, image_shape: tuple[int, ...], text_shape: tuple[int, ...], need_image: bool, need_text: bool
) -> tuple[Tensor, Tensor]:
    """The gradients of image and text, unwritten; (0,) for one that is not needed."""
    return grad.new_empty(image_shape if need_image else (0,)), grad.new_empty(text_shape if need_text else (0,))


def rows_contiguous(value: Tensor) -> Tensor:
    """The tensor, or a copy if the elements of a row do not lie side by side."""
    return value if value.stride(-1) == 1 or value.shape[-1] <= 1 else value.contiguous()


_AS_IT_IS = nullcontext()


def on_device(device: torch.device) -> AbstractContextManager:
    """Makes `device` the current one, where there is such a thing: launches and captures are the current device's."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _AS_IT_IS
    return torch.cuda.device(device)
