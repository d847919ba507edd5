"""Argument checks: errors come before anything runs, and say what was wrong and what would be right."""

from __future__ import annotations

import operator
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import UninitializedParameter

from attanchor_kernels.problem import Problem, Role

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
DIRECTIONS = ("text_into_image", "image_into_text")
POSITIONS = ("sequential", "inherit")
PADDING_SIDES = ("right", "left")
MOST_ROWS = 2**30  # rows are counted in 32 bits


class Call(NamedTuple):
    """A batched problem and how to shape its results for the caller."""

    problem: Problem
    unbatched: bool  # the inputs had no batch axis
    flat_positions: bool  # position_ids come without the P axis


def _dense(name: str, value: Tensor, otherwise: str = "") -> None:
    # To ask whether something is a parameter takes long, and most tensors are none.
    if type(value) is not Tensor and (not isinstance(value, Tensor) or isinstance(value, UninitializedParameter)):
        raise TypeError(f"{name} is {type(value).__name__}; it should be a torch.Tensor{otherwise}")
    if value.layout != torch.strided or value.is_nested:
        layout = "nested" if value.is_nested else value.layout
        raise TypeError(f"{name} has layout {layout}; it should be a dense tensor")


def _floating(name: str, value: Tensor) -> None:
    _dense(name, value)
    if value.dtype not in DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}; it should be float16, bfloat16, float32 or float64")


def _pair(image_name: str, image: Tensor, text_name: str, text: Tensor) -> Tensor:
    """Check image and text rows; returns the image rows, under autocast in the dtype of the text.

    There a projector's dtype naturally differs from an embedding's, and transformers' merges cast likewise.
    """
    _floating(image_name, image)
    _floating(text_name, text)
    if text.dim() and text.shape[-1] == 0:
        raise ValueError(f"{text_name} has shape {tuple(text.shape)}; its hidden size D should be at least 1")
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():  # within a dual_level
        _refuse_forward_mode(image_name, image)
        _refuse_forward_mode(text_name, text)
    if image.device != text.device:
        raise ValueError(
            f"{image_name} is on {image.device} and {text_name} is on {text.device}; they should be on one device"
        )
    if image.dtype == text.dtype:
        return image
    if not torch.is_autocast_enabled(text.device.type):
        raise TypeError(
            f"{image_name} has dtype {image.dtype} and {text_name} has {text.dtype}; they should be the same "
            "(under autocast the image rows are cast)"
        )
    return image.to(text.dtype)


def _refuse_forward_mode(name: str, value: Tensor) -> None:
    """PyTorch would give the result no tangent, without a word."""
    if forward_ad.unpack_dual(value).tangent is not None:
        raise RuntimeError(
            f"{name} is a dual tensor; embeds can be differentiated in reverse mode alone (torch.autograd.grad)"
        )


def _companion(name: str, value: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...], like: Tensor) -> None:
    """An optional tensor that goes with the embeddings: its dtype, shape and device."""
    if value is None:
        return
    _dense(name, value, " or None")
    if value.dtype != dtype:
        raise TypeError(f"{name} has dtype {value.dtype}; it should be {dtype}")
    if value.shape != shape:
        raise ValueError(f"{name} has shape {tuple(value.shape)}; it should be {tuple(shape)}")
    if value.device != like.device:
        raise ValueError(f"{name} is on {value.device}; it should be on {like.device}, where the embeddings are")


def _threshold(tau, like: Tensor) -> tuple[float, Tensor | None]:
    """`tau` and `tau_tensor` of a problem."""
    if isinstance(tau, Tensor):
        _companion("tau", tau, torch.float32, (), like)
        return 1.0, tau.detach()
    if isinstance(tau, bool) or not isinstance(tau, (int, float, Real)):
        raise TypeError(f"tau is {type(tau).__name__}; it should be a number, or a 0-dim float32 tensor")
    if tau != tau:  # NaN; math.isnan cannot be traced
        raise ValueError("tau is NaN; it should be a number (tau >= 1 inserts nothing)")
    if isinstance(tau, int) and abs(tau) >= 2**1023:
        raise ValueError("tau is an integer that no float holds; it should be a number of usual size, such as 0.5")
    return float(tau), None


def _options(direction: str, positions: str, position_ids, padding_side: str) -> tuple[bool, bool, bool]:
    """`image_into_text`, `inherit` and `pad_left` of a problem, which are strings outside."""
    for name, value, allowed in (
        ("direction", direction, DIRECTIONS),
        ("positions", positions, POSITIONS),
        ("padding_side", padding_side, PADDING_SIDES),
    ):
        if not isinstance(value, str) or value not in allowed:  # an array is not even comparable
            raise ValueError(f"{name} is {value!r}; it should be {allowed[0]!r} or {allowed[1]!r}")
    if position_ids is not None and positions != "inherit":
        raise ValueError(
            f"position_ids is given with positions={positions!r}, which counts its own; "
            "pass positions='inherit' or leave position_ids out"
        )
    return direction == "image_into_text", positions == "inherit", padding_side == "left"


def _count(name: str, value, each: tuple[int, ...] | None = None):
    """A number of rows as an int (or a SymInt under compilation); None stays None. `each`: a tensor would do too."""
    if value is None or isinstance(value, torch.SymInt):
        return value
    try:
        if isinstance(value, (bool, Tensor)):  # reading a tensor would sync
            raise TypeError
        count = value if isinstance(value, int) else operator.index(value)
    except TypeError:
        tensor = "" if each is None else f", an int32 tensor of shape {tuple(each)}"
        raise TypeError(f"{name} is {type(value).__name__}; it should be an int{tensor} or None") from None
    if not 0 <= count <= MOST_ROWS:
        raise ValueError(f"{name} is {count}; it should be 0 or more and at most {MOST_ROWS}, or None for no limit")
    return count


def _dropping(keep, keep_each, salience, cells, per_sample: tuple[int, ...] | None, per_image: tuple[int, ...], like):
    """Check what says which image tokens stay: `keep` an int, `keep_each` a tensor of shape `per_sample`.

    Returns `keep` as a count and `salience` outside any graph.
    """
    if keep is None and keep_each is None and salience is None and cells is None:
        return None, None
    if keep is not None and keep_each is not None:
        raise ValueError("keep and keep_each are both given; they should be one count for all samples, or one for each")
    if per_sample is not None:
        _companion("keep", keep_each, torch.int32, per_sample, like)
    for name, value in (("salience", salience), ("cells", cells)):
        if value is not None and keep is None and keep_each is None:
            raise ValueError(f"{name} is given without keep; pass keep, the number of image tokens that stay")
    _companion("salience", salience, torch.float32, per_image, like)
    _companion("cells", cells, torch.int32, per_image, like)
    return _count("keep", keep, per_sample), None if salience is None else salience.detach()


def _positions(position_ids: Tensor, shape: tuple[int, ...], like: Tensor) -> None:
    """`position_ids` is `shape`, or (P, *shape) with P >= 1."""
    _dense("position_ids", position_ids, " or None")
    axes = position_ids.shape[: position_ids.dim() - len(shape)]
    if len(axes) > 1 or 0 in axes or position_ids.shape[len(axes) :] != shape:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; it should be {tuple(shape)}, or "
            f"(P, {', '.join(map(str, shape))}) with P >= 1"
        )
    _companion("position_ids", position_ids, torch.int64, position_ids.shape, like)


def build_call(
    img,
    txt,
    tau,
    img_mask=None,
    txt_mask=None,
    anchor_mask=None,
    max_anchors=None,
    direction="text_into_image",
    positions="sequential",
    position_ids=None,
    padding_side="right",
    keep=None,
    salience=None,
    cells=None,
) -> Call:
    """Check the arguments of `build_sequence` and give them the batch axis."""
    img = _pair("img", img, "txt", txt)
    image_shape, text_shape = tuple(img.shape), tuple(txt.shape)
    if len(image_shape) not in (2, 3):
        raise ValueError(f"img has shape {image_shape}; it should be (B, M, D) or (M, D)")
    of_image, of_text = image_shape[:-1], text_shape[:-1]
    if len(text_shape) != len(image_shape) or text_shape[-1] != image_shape[-1] or of_text[:-1] != of_image[:-1]:
        expected = ", ".join(map(str, (*of_image[:-1], "N", image_shape[-1])))
        raise ValueError(f"txt has shape {text_shape}; with img {image_shape} it should be ({expected})")
    tau, tau_tensor = _threshold(tau, img)
    image_into_text, inherit, pad_left = _options(direction, positions, position_ids, padding_side)
    max_anchors = _count("max_anchors", max_anchors)
    _companion("img_mask", img_mask, torch.bool, of_image, img)
    _companion("txt_mask", txt_mask, torch.bool, of_text, img)
    _companion("anchor_mask", anchor_mask, torch.bool, of_text, img)
    if position_ids is not None:
        _positions(position_ids, (*of_image[:-1], of_image[-1] + of_text[-1]), img)
    keep, salience = _dropping(keep, None, salience, cells, None, of_image, img)
    return _call(
        Problem(
            img,
            txt,
            tau,
            image_mask=img_mask,
            text_mask=txt_mask,
            anchor_mask=anchor_mask,
            max_anchors=max_anchors,
            image_into_text=image_into_text,
            inherit=inherit,
            position_ids=position_ids,
            pad_left=pad_left,
            keep=keep,
            salience=salience,
            cells=cells,
            tau_tensor=tau_tensor,
        )
    )


def merge_call(
    text_embeds,
    image_embeds,
    roles,
    tau,
    turn=None,
    max_anchors=None,
    direction="text_into_image",
    positions="sequential",
    position_ids=None,
    padding_side="right",
    keep=None,
    keep_each=None,
    salience=None,
    cells=None,
) -> Call:
    """Check the arguments of `merge_sequence` or `plan_sequence` and give them the batch axis."""
    image_embeds = _pair("image_embeds", image_embeds, "text_embeds", text_embeds)
    shape = tuple(text_embeds.shape)
    if len(shape) not in (2, 3):
        raise ValueError(f"text_embeds has shape {shape}; it should be (B, S, D) or (S, D)")
    slots, hidden = shape[:-1], shape[-1]
    if image_embeds.dim() != 2 or image_embeds.shape[-1] != hidden:
        raise ValueError(f"image_embeds has shape {tuple(image_embeds.shape)}; it should be (T, {hidden})")
    tau, tau_tensor = _threshold(tau, text_embeds)
    image_into_text, inherit, pad_left = _options(direction, positions, position_ids, padding_side)
    max_anchors = _count("max_anchors", max_anchors)
    _dense("roles", roles)
    _companion("roles", roles, torch.uint8, slots, text_embeds)
    _companion("turn", turn, torch.int32, slots, text_embeds)
    if position_ids is not None:
        _positions(position_ids, slots, text_embeds)
    if isinstance(keep, Tensor) and keep_each is None:
        keep, keep_each = None, keep
    keep, salience = _dropping(keep, keep_each, salience, cells, slots[:-1], image_embeds.shape[:1], text_embeds)
    return _call(
        Problem(
            image_embeds,
            text_embeds,
            tau,
            roles,
            turn,
            max_anchors=max_anchors,
            image_into_text=image_into_text,
            inherit=inherit,
            position_ids=position_ids,
            pad_left=pad_left,
            keep=keep,
            keep_each=keep_each,
            salience=salience,
            cells=cells,
            tau_tensor=tau_tensor,
        )
    )


def place_call(text_embeds, image_embeds, roles, host, ahead, positions, position_ids, padding_side) -> Call:
    """Check the arguments of `place_sequence`; all but `host` get the batch axis."""
    call = merge_call(
        text_embeds,
        image_embeds,
        roles,
        tau=1.0,
        positions=positions,
        position_ids=position_ids,
        padding_side=padding_side,
    )
    _dense("host", host)
    _companion("host", host, torch.int64, text_embeds.shape[:-1], text_embeds)
    if not isinstance(ahead, bool):
        raise TypeError(f"ahead is {type(ahead).__name__}; it should be a bool")
    if text_embeds.device.type != "cpu" or torch.compiler.is_compiling():
        return call
    contents(call.problem)
    slots = text_embeds.shape[-2]
    if ((host < -1) | (host >= slots)).any():
        raise ValueError(f"host holds {int(host.min())} to {int(host.max())}; it should hold -1 or slots below {slots}")
    real, copied = roles.ne(Role.PADDING), host >= 0
    if copied.any() and not (real[copied].all() and real.gather(-1, host.clamp_min(0))[copied].all()):
        raise ValueError("host puts a copy of padding, or one at padding; both slots should be real")
    return call


# Fields that lack an axis where the inputs have no batch axis.
_OF_SAMPLES = {
    True: ("text", "roles", "turn", "keep_each"),  # the merge form
    False: ("image", "text", "image_mask", "text_mask", "anchor_mask", "salience", "cells"),
}


def _call(problem: Problem) -> Call:
    """A call of what has been checked, given the axes that it lacks."""
    axes, position_ids = problem.text.dim(), problem.position_ids
    unbatched, flat = axes == 2, position_ids is None or position_ids.dim() == axes - 1
    if unbatched:
        given = {name: getattr(problem, name) for name in _OF_SAMPLES[problem.merges]}
        problem = problem._replace(**{name: v.unsqueeze(0) for name, v in given.items() if v is not None})
    if position_ids is not None:
        position_ids = position_ids.unsqueeze(-2) if unbatched else position_ids
        problem = problem._replace(position_ids=position_ids.unsqueeze(0) if flat else position_ids)
    return Call(problem, unbatched, flat)


def check_roles(counts: tuple[int, int], features: int) -> None:
    """Hold what `roles` has, the number of placeholders and the largest role, to what `merge_sequence` demands."""
    placeholders, largest = counts
    if largest > max(Role):
        raise ValueError(
            f"roles holds {largest}; it should hold 0 (padding), 1 (text), 2 (image placeholder), "
            "3 (text that is matched) or 4 (image placeholder that is not matched)"
        )
    if placeholders != features:
        raise ValueError(
            f"image_embeds has {features} rows; it should have {placeholders}, "
            "one for each placeholder (2 or 4) in roles"
        )


def contents(problem: Problem) -> None:
    """Checks that read a tensor: made on the CPU alone, since elsewhere they would cost a device sync."""
    if problem.text.device.type != "cpu":
        return
    if problem.roles is not None:
        roles = problem.roles
        placeholders = int((roles.eq(Role.IMAGE) | roles.eq(Role.SILENT_IMAGE)).sum())
        check_roles((placeholders, int(roles.max()) if roles.numel() else 0), problem.image.shape[0])
    if problem.keep_each is not None and (problem.keep_each < 0).any():
        raise ValueError(f"keep holds {int(problem.keep_each.min())}; it should hold 0 or more")
    if problem.cells is not None and (problem.cells >= problem.images).any():
        raise ValueError(
            f"cells holds {int(problem.cells.max())}; a cell should be below {problem.images}, the most image tokens "
            "that a sample could have, or negative for a token in none"
        )
