"""The public functions: check, choose a backend, run, trim."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import backends, checks, ops, reference, trimming
from attanchor_kernels.problem import Plan, Problem


class AnchoredSequence(NamedTuple):
    """A sequence with its anchors inserted. L is its padded length; without a batch axis in, none out.

    Attributes:
        embeds: (B, L, D), dtype of the inputs. Bit-identical copies of input rows, zeros in padding; differentiable in
            both inputs. None from `plan_sequence`.
        position_ids: (B, L) or (P, B, L) int64 RoPE positions, 0 in padding.
        attention_mask: (B, L) int64, 1 = real, 0 = padding.
        source: (B, L) int64, the row of the plain concatenation (`merge_sequence`: the slot) that each output row
            copies; -1 = padding.
        is_anchor: (B, L) bool, True where the row is an inserted copy.
        host: (B, N) int64, the image index that each text token was inserted after, -1 = not inserted.
            Image-into-text: (B, M), text indices. `merge_sequence`: (B, S), slots.
        score: float32, the shape of `host`: the mover's best cosine, also where it was not inserted; -inf where it
            takes no part or has no candidate host. For float64 inputs it is rounded after the decision, which is made
            in float64: a score may so equal float32(tau) and its mover stand on either side of tau.
        relevance: With `keep` (B, M) float32, by `merge_sequence` (B, S): the best cosine of each image token over the
            text tokens that take part and may use it, also where it was dropped; -inf without one. Else None.
    """

    embeds: Tensor | None
    position_ids: Tensor
    attention_mask: Tensor
    source: Tensor
    is_anchor: Tensor
    host: Tensor
    score: Tensor
    relevance: Tensor | None = None


def build_sequence(
    img: Tensor,
    txt: Tensor,
    tau: float | Tensor,
    *,
    img_mask: Tensor | None = None,
    txt_mask: Tensor | None = None,
    anchor_mask: Tensor | None = None,
    max_anchors: int | None = None,
    keep: int | None = None,
    salience: Tensor | None = None,
    cells: Tensor | None = None,
    direction: str = "text_into_image",
    positions: str = "sequential",
    position_ids: Tensor | None = None,
    padding_side: str = "right",
    trim: bool = True,
    backend: str = "auto",
) -> AnchoredSequence:
    """Copy each text token to right behind its most similar image token and append the whole text.

    Algorithm 1 of AttAnchor (arXiv 2509.23109); with ``direction="image_into_text"``, Algorithm 2.

    Args:
        img: (B, M, D) or (M, D) projected image features; float16, bfloat16, float32 or float64.
        txt: (B, N, D) or (N, D) prompt embeddings, same dtype and device. Under autocast dtypes may differ: image rows
            are then cast to that of the text, as transformers' merges do.
        tau: Cosine threshold: a number, or a 0-dim float32 tensor on the device of the inputs, which may change without
            a new compilation or capture and is never read by the host. A token is inserted if its best cosine is at
            least tau; ``tau >= 1``, and a NaN in a tensor, insert nothing.
        img_mask: (B, M) bool, True = a real token. Masked rows are dropped from the output.
        txt_mask: (B, N) bool, likewise.
        anchor_mask: (B, N) bool, the text tokens that take part in matching (image-into-text: that may host).
            Default: every real one.
        max_anchors: Only that many copies of a sample are inserted, those of the best scores.
        keep: Number of image tokens of a sample that stay; the others are dropped in the same pass. First those that
            host an anchor (text into image; there are never more than `keep`), then, with `cells`, the best of every
            cell in which none stays yet, then the best of all. By default no image token is dropped.
        salience: (B, M) float32, what image tokens are ranked by, NaN last; default: their `relevance`.
        cells: (B, M) int32, the cell of each image token within its sample, below M; negative: in none.
        direction: "text_into_image" or "image_into_text".
        positions: "sequential" (0, 1, 2, … over the new sequence: the paper's method), or "inherit": original rows keep
            their position in the plain concatenation and an anchor takes that of its host.
        position_ids: (B, M+N) or (P, B, M+N) int64 positions of the plain concatenation; only with "inherit".
        padding_side: "right" or "left".
        trim: Cut the output to the longest real sequence of the batch. Costs a device sync; pass False inside a CUDA
            graph and get M + N + K rows (K = ``max_anchors``, default N, or M in image-into-text; with ``keep``,
            min(keep, M) + N + K, where K is by default at most ``keep``). Under ``torch.compile(fullgraph=True)`` the
            length stays part of the one graph; without it, or before PyTorch 2.13, that takes
            ``torch._dynamo.config.capture_dynamic_output_shape_ops = True``.
        backend: "auto", "reference", "triton" or "cuda"; beats the environment variable ATTANCHOR_BACKEND.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: a wrong shape, device or option, or a backend that is not available (saying why).
    """
    call = checks.build_call(
        img,
        txt,
        tau,
        img_mask,
        txt_mask,
        anchor_mask,
        max_anchors,
        direction,
        positions,
        position_ids,
        padding_side,
        keep,
        salience,
        cells,
    )
    return _run(call, trim, backend)


def merge_sequence(
    text_embeds: Tensor,
    image_embeds: Tensor,
    roles: Tensor,
    tau: float | Tensor,
    *,
    turn: Tensor | None = None,
    max_anchors: int | None = None,
    keep: int | Tensor | None = None,
    salience: Tensor | None = None,
    cells: Tensor | None = None,
    direction: str = "text_into_image",
    positions: str = "sequential",
    position_ids: Tensor | None = None,
    padding_side: str = "right",
    trim: bool = True,
    backend: str = "auto",
) -> AnchoredSequence:
    """Merge image features into a prompt's placeholders and insert the anchors, in one pass.

    Replaces the ``masked_scatter`` of a vision-language model's embedding merge. All images of a sample host together.

    Args:
        text_embeds: (B, S, D) or (S, D), the embedding look-up of the prompt; rows at placeholders are ignored.
        image_embeds: (T, D), the image features of the whole batch, in row-major order of the placeholders.
        roles: (B, S) or (S,) uint8: 0 padding, 1 text, 2 image placeholder, 3 text that takes part in matching,
            4 image placeholder that takes no part in it (newline rows).
        tau: As in `build_sequence`.
        turn: (B, S) int32: a mover may only use hosts with ``turn[host] >= turn[mover]``.
        max_anchors, direction, positions, padding_side, trim, backend: As in `build_sequence`; capacity is S + K,
            K = S by default.
        keep: As in `build_sequence`, or (B,) int32 with a number for each sample. Image tokens are those of role 2; a
            row of role 4 goes with the image tokens right before it, if there are any: it stays if one of them does.
        salience: (T,) float32, as in `build_sequence`, by feature row.
        cells: (T,) int32, likewise; below S.
        position_ids: (B, S) or (P, B, S) int64; only with "inherit".

    Returns:
        AnchoredSequence: `source` and `host` count slots; `host` and `score` are (B, S).

    Raises:
        TypeError, ValueError: as `build_sequence`; also an unknown role, or T unequal to the number of placeholders
            (checked on the CPU, and elsewhere with ``trim=True``).
    """
    call = checks.merge_call(
        text_embeds,
        image_embeds,
        roles,
        tau,
        turn,
        max_anchors,
        direction,
        positions,
        position_ids,
        padding_side,
        keep,
        salience=salience,
        cells=cells,
    )
    return _run(call, trim, backend)


def plan_sequence(
    text_embeds: Tensor,
    image_embeds: Tensor,
    roles: Tensor,
    tau: float | Tensor,
    *,
    turn: Tensor | None = None,
    max_anchors: int | None = None,
    keep: int | Tensor | None = None,
    salience: Tensor | None = None,
    cells: Tensor | None = None,
    direction: str = "text_into_image",
    positions: str = "sequential",
    position_ids: Tensor | None = None,
    padding_side: str = "right",
    trim: bool = True,
    backend: str = "auto",
) -> AnchoredSequence:
    """`merge_sequence` without the copy: the same fields, with ``embeds=None``.

    For models that must be given token ids: gather them through `source`.
    """
    call = checks.merge_call(
        text_embeds,
        image_embeds,
        roles,
        tau,
        turn,
        max_anchors,
        direction,
        positions,
        position_ids,
        padding_side,
        keep,
        salience=salience,
        cells=cells,
    )
    return _run(call, trim, backend, copy=False)


def place_sequence(
    text_embeds: Tensor,
    image_embeds: Tensor,
    roles: Tensor,
    host: Tensor,
    *,
    ahead: bool = False,
    positions: str = "sequential",
    position_ids: Tensor | None = None,
    padding_side: str = "right",
    trim: bool = True,
    copy: bool = True,
    backend: str = "auto",
) -> AnchoredSequence:
    """Merge as `merge_sequence` does, with copies behind hosts that the caller chose: no cosine is taken.

    For controls of the method: the same tokens at other places, or other tokens.

    Args:
        text_embeds, image_embeds, roles, positions, position_ids, padding_side: As in `merge_sequence`.
        host: (B, S) or (S,) int64, the slot that a copy of each slot is put behind; -1 = no copy.
        ahead: Put copies in front of their hosts instead.
        trim: As in `merge_sequence`; capacity is 2 S.
        copy: False gives ``embeds=None``, as `plan_sequence` does.
        backend: What copies the rows; as in `build_sequence`.

    Returns:
        AnchoredSequence: as from `merge_sequence`; `score` is -inf.

    Raises:
        TypeError, ValueError: as `merge_sequence`; on the CPU also a host that is no slot, or padding that would be
            copied or host, which elsewhere is not inserted.
    """
    call = checks.place_call(text_embeds, image_embeds, roles, host, ahead, positions, position_ids, padding_side)
    for name, value in (("trim", trim), ("copy", copy)):
        _check_flag(name, value)
    backend = _choose(call, backend)
    if trim and torch.compiler.is_compiling():
        raise ValueError("trim is True, whose result has a data-dependent length; under torch.compile pass trim=False")
    if trim:
        _check_can_read(call.problem)
    plan = reference.place(call.problem, host.unsqueeze(0) if call.unbatched else host, ahead)
    return _finished(call, trimming.trim(call.problem, plan) if trim else plan, backend, copy)


def _run(call: checks.Call, trim: bool, backend: str, copy: bool = True) -> AnchoredSequence:
    _check_flag("trim", trim)
    backend = _choose(call, backend)
    if not trim:
        if copy:
            return _result(call, *ops.construct_at_capacity(call, backend))
        return _result(call, None, *ops.plan_at_capacity(call, backend))
    # Match, one read of the length, then copy into an output of just that length.
    _check_can_read(call.problem)
    if call.problem.max_anchors is not None:  # rows beyond what can be inserted would be cut off again
        most = min(call.problem.max_anchors, call.problem.movers)
        call = call._replace(problem=call.problem._replace(max_anchors=most))
    return _finished(call, ops.plan_trimmed(call.problem, backend), backend, copy)


def _check_flag(name: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} is {type(value).__name__}; it should be a bool")


def _choose(call: checks.Call, backend: str) -> str:
    """The backend, so that an error comes first; under compilation the operator chooses when it runs."""
    if torch.compiler.is_compiling():
        return backend
    return backends.choose(backend, call.problem.text.device, call.problem.text.dtype)


def _check_can_read(problem: Problem) -> None:
    """Whether the length, which depends on the data, can be read here."""
    if torch.compiler.is_compiling():
        return
    if problem.text.is_cuda and torch.cuda.is_current_stream_capturing():
        raise ValueError(
            "trim is True, which reads the length from the device; under CUDA graph capture pass trim=False"
        )
    if problem.text.is_meta:
        raise ValueError("trim is True, and tensors on meta have no values to read a length from; pass trim=False")


def _finished(call: checks.Call, plan: Plan, backend: str, copy: bool) -> AnchoredSequence:
    """The result of a plan, trimmed or not."""
    *fields, places = plan
    embeds = ops.assemble(call.problem, plan.source, places, backend) if copy else None
    if embeds is not None and call.unbatched:
        embeds = embeds.squeeze(0)
    return _result(call, embeds, *ops.public_fields(tuple(fields), call.unbatched, call.flat_positions))


def _result(call: checks.Call, embeds: Tensor | None, *fields: Tensor) -> AnchoredSequence:
    return AnchoredSequence(embeds, *(fields if call.problem.drops else fields[:-1]))
