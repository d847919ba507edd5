"""Schemas, fakes and autograd of `torch.ops.attanchor`. Needs torch alone: no Triton, no binary, no GPU.

Public operators (`build_sequence`, `merge_sequence`, `plan_sequence`) check their arguments and decompose into internal
ones, which are opaque to the compiler and dispatch to a backend:

    _construct          match + plan + copy, differentiable in image and text
    _plan               match + plan
    _plan_trimmed       the same, cut to its longest real sequence: one read of the device
    _assemble           copy rows to their places: linear in image and text
    _assemble_backward  its transpose: gather, for every input row, the gradients of its one or two copies
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attanchor_kernels import backends, checks, trimming
from attanchor_kernels.problem import Plan, Problem

_library = torch.library.Library("attanchor", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag,)  # the fakes hold for every input, as `opcheck` tests

_OPTIONS = (
    'SymInt? max_anchors=None, str direction="text_into_image", str positions="sequential", '
    'Tensor? position_ids=None, str padding_side="right", SymInt? keep=None'
)
_SCORES = "Tensor? salience=None, Tensor? cells=None"
_FIELDS = (
    "Tensor position_ids, Tensor attention_mask, Tensor source, Tensor is_anchor, Tensor host, Tensor score, "
    "Tensor relevance"
)
_PROBLEM = (
    "Tensor image, Tensor text, float tau, Tensor? roles, Tensor? turn, Tensor? image_mask, Tensor? text_mask, "
    "Tensor? anchor_mask, SymInt? max_anchors, bool image_into_text, bool inherit, Tensor? position_ids, "
    "bool pad_left, SymInt? keep, Tensor? keep_each, Tensor? salience, Tensor? cells, Tensor? tau_tensor"
)


# The overload with a tensor comes first: a number is refused by it, while a tensor would be read as a number.
for _overload, _tau in ((".tau_tensor", "Tensor tau"), ("", "float tau")):
    _library.define(
        f"build_sequence{_overload}(Tensor img, Tensor txt, {_tau}, Tensor? img_mask=None, Tensor? txt_mask=None, "
        f"Tensor? anchor_mask=None, {_OPTIONS}, {_SCORES}) -> (Tensor embeds, {_FIELDS})",
        tags=_TAGS,
    )
    for _name, _embeds in (("merge_sequence", "Tensor embeds, "), ("plan_sequence", "")):
        _library.define(
            f"{_name}{_overload}(Tensor text_embeds, Tensor image_embeds, Tensor roles, {_tau}, Tensor? turn=None, "
            f"{_OPTIONS}, Tensor? keep_each=None, {_SCORES}) -> ({_embeds}{_FIELDS})",
            tags=_TAGS,
        )
_library.define(f"_construct({_PROBLEM}, str backend) -> (Tensor embeds, {_FIELDS}, Tensor places)", tags=_TAGS)
_library.define(f"_plan({_PROBLEM}, str backend) -> ({_FIELDS}, Tensor places)", tags=_TAGS)
_library.define(
    f"_plan_trimmed({_PROBLEM}, str backend) -> ({_FIELDS}, Tensor places)",
    tags=(*_TAGS, torch.Tag.cudagraph_unsafe),
)
_library.define("_assemble(Tensor image, Tensor text, Tensor source, Tensor places, str backend) -> Tensor", tags=_TAGS)
_library.define(
    "_assemble_backward(Tensor grad, Tensor places, SymInt[] image_shape, SymInt[] text_shape, "
    "bool need_image, bool need_text, str backend) -> (Tensor, Tensor)",
    tags=_TAGS,
)

_construct = torch.ops.attanchor._construct.default
_plan = torch.ops.attanchor._plan.default
_plan_trimmed = torch.ops.attanchor._plan_trimmed.default
_assemble = torch.ops.attanchor._assemble.default
_assemble_backward = torch.ops.attanchor._assemble_backward.default


# --- Real implementations: any device, the backend is chosen at run time. -------------------------------------------


def _uncompiled(function: Any) -> Any:
    """Let dynamo compile nothing of a function, nor of what it calls, where it runs in eager mode behind a graph break.

    A mark on its code, since `torch.compiler.disable` would take time at each call.
    """
    dynamo: Any = torch._C._dynamo.eval_frame
    if hasattr(dynamo, "_FrameExecStrategy"):
        skip = dynamo._FrameAction.SKIP
        dynamo.set_code_exec_strategy(function.__code__, dynamo._FrameExecStrategy(skip, skip))
    return function


def _implement(name: str, key: str = "CompositeExplicitAutograd") -> Callable[..., Any]:
    def register(function: Any) -> Any:
        _library.impl(name, _uncompiled(function), key)
        return function

    return register


def _backend(name: str, tensor: Tensor):
    return backends.load(backends.choose(name, tensor.device, tensor.dtype))


@_implement("_construct")
def _construct_impl(*arguments) -> tuple[Tensor, ...]:
    problem, backend = Problem(*arguments[:-1]), arguments[-1]
    checks.contents(problem)
    embeds, plan = _backend(backend, problem.text).construct(problem)
    return embeds, *plan


@_implement("_plan")
def _plan_impl(*arguments) -> tuple[Tensor, ...]:
    problem, backend = Problem(*arguments[:-1]), arguments[-1]
    checks.contents(problem)
    return tuple(_backend(backend, problem.text).plan(problem))


@_implement("_plan_trimmed")
def _plan_trimmed_impl(*arguments) -> tuple[Tensor, ...]:
    return tuple(trimming.trim(Problem(*arguments[:-1]), Plan(*_plan_impl(*arguments))))


@_implement("_assemble")
def _assemble_impl(image: Tensor, text: Tensor, source: Tensor, places: Tensor, backend: str) -> Tensor:
    return _backend(backend, text).assemble(image, text, source, places)


@_implement("_assemble_backward")
def _assemble_backward_impl(
    grad: Tensor,
    places: Tensor,
    image_shape: list[int],
    text_shape: list[int],
    need_image: bool,
    need_text: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _backend(backend, grad).assemble_backward(
        grad, places, tuple(image_shape), tuple(text_shape), need_image, need_text
    )


# --- Fakes: shapes and dtypes alone. ---------------------------------------------------------------------------------


@torch.library.register_fake("attanchor::_construct", lib=_library)
def _construct_fake(*arguments) -> tuple[Tensor, ...]:
    problem = Problem(*arguments[:-1])
    return problem.text.new_empty((problem.batch, problem.capacity, problem.hidden)), *Plan.empty(problem)


@torch.library.register_fake("attanchor::_plan", lib=_library)
def _plan_fake(*arguments) -> tuple[Tensor, ...]:
    return tuple(Plan.empty(Problem(*arguments[:-1])))


@torch.library.register_fake("attanchor::_plan_trimmed", lib=_library)
def _plan_trimmed_fake(*arguments) -> tuple[Tensor, ...]:
    return tuple(Plan.empty(Problem(*arguments[:-1]), torch.library.get_ctx().new_dynamic_size()))


@torch.library.register_fake("attanchor::_assemble", lib=_library)
def _assemble_fake(image: Tensor, text: Tensor, source: Tensor, places: Tensor, backend: str) -> Tensor:
    return text.new_empty((*source.shape, text.shape[-1]))


@torch.library.register_fake("attanchor::_assemble_backward", lib=_library)
def _assemble_backward_fake(grad, places, image_shape, text_shape, need_image, need_text, backend):
    return grad.new_empty(image_shape if need_image else (0,)), grad.new_empty(text_shape if need_text else (0,))


# --- Autograd. -------------------------------------------------------------------------------------------------------
# Only `places`, which no caller sees, is saved: every output may be changed in place.


def _setup_construct(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[-1])
    ctx.image_shape, ctx.text_shape, ctx.backend = inputs[0].shape, inputs[1].shape, inputs[-1]
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _setup_assemble(ctx, inputs, output) -> None:
    image, text, _source, places, ctx.backend = inputs
    ctx.save_for_backward(places)
    ctx.image_shape, ctx.text_shape = image.shape, text.shape


def _row_gradients(ctx, grad: Tensor | None, *_ignored) -> tuple[Tensor | None, ...]:
    """Gradients of image and text from the gradient of the sequence, each only where it is asked for."""
    need_image, need_text, *others = ctx.needs_input_grad
    if grad is None or not (need_image or need_text):
        return (None,) * (2 + len(others))
    image_grad, text_grad = _assemble_backward(
        grad, *ctx.saved_tensors, ctx.image_shape, ctx.text_shape, need_image, need_text, ctx.backend
    )
    return image_grad if need_image else None, text_grad if need_text else None, *[None] * len(others)


def _setup_assemble_backward(ctx, inputs, output) -> None:
    grad, places, ctx.image_shape, ctx.text_shape, ctx.need_image, ctx.need_text, ctx.backend = inputs
    ctx.save_for_backward(places)
    ctx.length = grad.shape[1]


def _assemble_backward_autograd(ctx, image_tangent: Tensor | None, text_tangent: Tensor | None):
    """The transpose of the transpose: the tangents of the input rows, laid out as the sequence."""
    (places,) = ctx.saved_tensors
    like = image_tangent if image_tangent is not None else text_tangent
    if like is None:
        return (None,) * 7
    if not ctx.need_image or image_tangent is None:
        image_tangent = like.new_zeros(ctx.image_shape)
    if not ctx.need_text or text_tangent is None:
        text_tangent = like.new_zeros(ctx.text_shape)
    source = _source(places, ctx.length)
    return _assemble(image_tangent, text_tangent, source, places, ctx.backend), *[None] * 6


def _source(places: Tensor, length: int) -> Tensor:
    """(B, L) int64, which `places` is the inverse of: the slot that each output row copies, -1 = padding."""
    batch, _, slots = places.shape
    rows = places[:, :2].flatten(1).long()  # of the originals, then of the copies
    slot = torch.arange(slots, device=places.device).repeat(2).expand(batch, -1)
    source = torch.full((batch, length + 1), -1, dtype=torch.int64, device=places.device)
    return source.scatter(1, torch.where(rows < 0, length, rows), slot)[:, :length].contiguous()


def _differentiable(name: str, setup, backward) -> Callable[..., Any]:
    """Register a derivative, as `torch.library.register_autograd` does; that takes five times as long at each call.

    Returns the operator for Python: where nothing stands above autograd, it spares a call the way there.
    """
    operator = getattr(torch.ops.attanchor, name).default

    def forward(ctx, *arguments):
        with torch._C._AutoDispatchBelowAutograd():
            output = operator(*arguments)
        setup(ctx, arguments, output)
        return output

    parts = {"forward": staticmethod(forward), "backward": staticmethod(_uncompiled(backward))}
    function: Any = type(name, (torch.autograd.Function,), parts)

    @_implement(name, "Autograd")
    def dispatch(*arguments):
        if torch.is_grad_enabled() and (arguments[0].requires_grad or arguments[1].requires_grad):
            return function.apply(*arguments)
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    def call(*arguments):
        above = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        return (operator if above else dispatch)(*arguments)

    return call


_call_construct = _differentiable("_construct", _setup_construct, _row_gradients)
_call_assemble = _differentiable("_assemble", _setup_assemble, _row_gradients)
_differentiable("_assemble_backward", _setup_assemble_backward, _assemble_backward_autograd)


# --- Public operators: always at capacity, no device sync. ------------------------------------------------------------


def public_fields(fields: tuple[Tensor, ...], unbatched: bool, flat_positions: bool) -> tuple[Tensor, ...]:
    """Internal fields (position_ids first) in the caller's shape."""
    positions, *others = fields
    if unbatched:
        positions, others = positions.squeeze(1), [field.squeeze(0) for field in others]
    return (positions.squeeze(0) if flat_positions else positions), *others


def _build_sequence_impl(*arguments, **options) -> tuple[Tensor, ...]:
    return construct_at_capacity(checks.build_call(*arguments, **options), "auto")


def _merge_sequence_impl(*arguments, **options) -> tuple[Tensor, ...]:
    return construct_at_capacity(checks.merge_call(*arguments, **options), "auto")


def _plan_sequence_impl(*arguments, **options) -> tuple[Tensor, ...]:
    return plan_at_capacity(checks.merge_call(*arguments, **options), "auto")


for _overload in ("", ".tau_tensor"):
    _library.impl(f"build_sequence{_overload}", _build_sequence_impl, "CompositeImplicitAutograd")
    _library.impl(f"merge_sequence{_overload}", _merge_sequence_impl, "CompositeImplicitAutograd")
    _library.impl(f"plan_sequence{_overload}", _plan_sequence_impl, "CompositeImplicitAutograd")


def construct_at_capacity(call: checks.Call, backend: str) -> tuple[Tensor, ...]:
    """The eight public fields, (…, C, …), in the caller's shape."""
    embeds, *fields, _places = _call_construct(*call.problem, backend)
    embeds = embeds.squeeze(0) if call.unbatched else embeds
    return embeds, *public_fields(tuple(fields), call.unbatched, call.flat_positions)


def plan_at_capacity(call: checks.Call, backend: str) -> tuple[Tensor, ...]:
    """The seven public fields without `embeds`, in the caller's shape."""
    *fields, _places = plan(call.problem, backend)
    return public_fields(tuple(fields), call.unbatched, call.flat_positions)


def plan(problem: Problem, backend: str) -> Plan:
    """The plan at capacity, outside any graph: none of its fields carries a gradient."""
    return Plan(*_plan(*_detached(problem), backend))


def plan_trimmed(problem: Problem, backend: str) -> Plan:
    """The same, cut to the longest real sequence. Waits for the device."""
    return Plan(*_plan_trimmed(*_detached(problem), backend))


def _detached(problem: Problem) -> Problem:
    return problem._replace(image=problem.image.detach(), text=problem.text.detach())


def assemble(problem: Problem, source: Tensor, places: Tensor, backend: str) -> Tensor:
    """(B, L, D): the rows of a plan, possibly trimmed; differentiable in image and text."""
    return _call_assemble(problem.image, problem.text, source, places, backend)
