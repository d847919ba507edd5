"""From the caller's arguments to those of the lengthened prompt: roles, merge, and everything that follows `source`."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from attanchor_kernels import AnchoredSequence, Role
from attanchor_vlm.constants import IGNORE_INDEX, context_of
from attanchor_vlm.model.candidates import frame_labels, mask_from_ids
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.dropping import survivors
from attanchor_vlm.model.families import FamilyAdapter
from attanchor_vlm.model.media import Media, encode
from attanchor_vlm.model.pauses import add_pauses
from attanchor_vlm.model.placements import place
from attanchor_vlm.model.plan import AnchorPlan, Call


class PreparedImages(dict):
    """`mm_encoder_outputs` of a prompt that has its anchors: not to be rewritten again."""


class Prepared(NamedTuple):
    """The rewritten prompt, and the call's other arguments as they were."""

    plan: AnchorPlan
    prompt: dict[str, Any]  # inputs_embeds, or input_ids and the encoded images
    others: dict[str, Any]

    def for_forward(self) -> dict[str, Any]:
        labels = {} if self.plan.labels is None else {"labels": self.plan.labels}
        return {
            **self.others,
            **self.prompt,
            "attention_mask": self.plan.attention_mask,
            "position_ids": self.plan.position_ids,
            **labels,
        }

    def for_generate(self) -> dict[str, Any]:
        # The ids go beside inputs_embeds, so that logits processors see the prompt.
        arguments = {**self.for_forward(), "input_ids": self.plan.input_ids}
        arguments.pop("labels", None)
        return arguments


def by_name(function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of a method, those given by position as well."""
    return {**kwargs, **dict(zip(parameters(function), args, strict=False))}


@functools.cache
def parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    """Parameter names of a method, in order, without `self`."""
    return tuple(inspect.signature(function).parameters)[1:]


def given_cache(arguments: Call) -> Any:
    """A call's KV cache, which transformers names `past_key_values` up to 5.23 and `cache` from 5.24 on; or None."""
    given = (arguments.get(name) for name in ("cache", "past_key_values"))
    return next((cache for cache in given if cache is not None), None)


def is_prepared(arguments: Call) -> bool:
    """Whether a call's arguments may be those of `prepare_inputs`."""
    encoded = arguments.get("mm_encoder_outputs")
    return arguments.get("inputs_embeds") is not None or isinstance(encoded, PreparedImages)


def needs_rewriting(adapter: FamilyAdapter, settings: AttAnchorConfig, arguments: Call) -> bool:
    """Whether anchors are to be inserted in a call."""
    prepared = isinstance(arguments.get("mm_encoder_outputs"), PreparedImages)
    return not settings.changes_nothing and adapter.has_images(arguments) and not prepared


def check_call(adapter: FamilyAdapter, settings: AttAnchorConfig, arguments: Call, anchor_mask: Tensor | None) -> None:
    """Refuse calls that cannot mean what the caller wants, whatever tau is."""
    images, embeds = adapter.has_images(arguments), arguments.get("inputs_embeds") is not None
    if anchor_mask is not None:
        if embeds:
            raise ValueError("anchor_mask is given with inputs_embeds; it belongs to input_ids, so pass those")
        if not images:
            raise ValueError(
                f"anchor_mask is given without {adapter.image_arguments[0]}; text tokens are matched with image "
                "tokens, so leave it out of a call without images"
            )
    unknown = arguments.get("pixel_values_videos") is not None and not adapter.video_arguments
    if unknown and not settings.changes_nothing:
        raise ValueError(
            "pixel_values_videos is given, but it is not known how this family's model encodes videos; leave them out, "
            "or detach the model"
        )
    if settings.keep is not None and "video" in adapter.kinds(arguments):
        raise ValueError(f"keep is {settings.keep} in a call with videos; tokens of images alone can be dropped")
    if not needs_rewriting(adapter, settings, arguments):
        return
    if embeds or arguments.get("input_ids") is None:
        raise ValueError(
            f"{adapter.image_arguments[0]} is given with inputs_embeds; anchors are inserted by token, so pass "
            "input_ids, or detach the model"
        )
    cache = given_cache(arguments)
    if cache is not None and int(cache.get_seq_length()) > 0:
        raise ValueError(
            "images are given together with a KV cache that is not empty; which tokens are inserted depends on the "
            "whole prompt, so pass the whole conversation and no cache"
        )


def rewrite(
    model: PreTrainedModel,
    adapter: FamilyAdapter,
    settings: AttAnchorConfig,
    arguments: Call,
    anchor_mask: Tensor | None,
    padding_side: str | None,
) -> Prepared:
    """Insert the anchors of one call that has images or videos.

    Args:
        model: The attached model; its embedding and image encoder are called.
        arguments: Unknown ones are handed on.
        anchor_mask: (B, S) bool or None, which falls back on everything after the first image.
        padding_side: "right", "left", or None for the side that the attention mask pads.
    """
    ids = arguments["input_ids"]
    check_shapes(ids, arguments, anchor_mask)
    mask, labels = arguments.get("attention_mask"), arguments.get("labels")
    inherit = (settings.positions or adapter.positions) == "inherit"
    if not inherit and arguments.get("position_ids") is not None:
        raise ValueError(
            "position_ids is given, but with positions='sequential' the positions of the new prompt are counted; "
            "leave it out"
        )

    media = encode(model, adapter, arguments)
    rows = media.rows
    silent = adapter.silent_features(model, rows)
    is_image = adapter.placeholders(model, ids)
    is_real = torch.ones_like(is_image) if mask is None else mask.bool()
    if anchor_mask is None:
        anchor_mask = mask_from_ids(model, settings, ids, is_real, is_image, labels)
        if (grids := arguments.get("video_grid_thw")) is not None:
            anchor_mask &= ~frame_labels(adapter.video_placeholders(model, ids) & is_real, grids[:, 0].tolist())
    elif labels is not None:
        _warn_of_answers(model, anchor_mask, labels)
    if (sound := getattr(model.config, "audio_token_id", None)) is not None:
        anchor_mask = anchor_mask & (ids != sound)  # each of which one row of the encoded sound fills
    if padding_side is None:
        padding_side = _side_of(mask)
    pauses = None
    if settings.pause_tokens:
        has_image = (is_image & is_real).any(-1)
        arguments, anchor_mask, pauses = add_pauses(settings, arguments, anchor_mask, has_image, adapter.token_types)
        ids, mask, labels = arguments["input_ids"], arguments["attention_mask"], arguments.get("labels")
        is_image, is_real = pauses.lengthen(is_image, False), mask.bool()
    # A valid id at placeholders and padding: some image and padding ids lie outside the table.
    text_embeds = model.get_input_embeddings()(ids.masked_fill(is_image | ~is_real, 0))
    rows = rows.to(text_embeds.device, text_embeds.dtype)  # under autocast the projector's dtype is another one
    turn, takes_part = (None, is_real) if labels is None else _leak_rule(labels, is_image & is_real)
    roles = _roles(is_real, is_image, anchor_mask, takes_part, _to(silent, ids.device))
    positions = _plain_positions(model, adapter, arguments) if inherit else None
    route = settings.route or adapter.routes[0]

    device = text_embeds.device
    roles, turn = roles.to(device), _to(turn, device)
    try:
        encoded = media.encoded.get("image")
        rows, kept = survivors(settings, adapter, model, arguments, encoded, rows, silent, text_embeds, roles, turn)
        frames = None
        if settings.max_anchors_per_frame is not None and not settings.inserts_nothing:
            frame = media.frames(model, adapter, arguments, silent).to(device)
            holds = (is_image & is_real).to(device)
            frames = torch.full_like(roles, -1, dtype=torch.long)
            if len(frame) == int(holds.sum()):  # else the operator tells, as of `_roles`
                frames = frames.masked_scatter(holds, frame)
        built = place(
            settings,
            text_embeds,
            rows,
            roles,
            turn=turn,
            kept=kept,
            copy=route == "embeds",
            frames=frames,
            positions="inherit" if inherit else "sequential",
            position_ids=_to(positions, device),
            padding_side=padding_side,
        )
    except ValueError as error:
        placeholders = int((is_image & is_real).sum())
        if placeholders != len(rows):
            raise ValueError(
                f"the prompts have {placeholders} image placeholders and the images {len(rows)} features; they should "
                "be as many (were images left out, or prompts made by another processor?)"
            ) from error
        raise
    _check_length(model, built.source.shape[1])

    positions_per_token = adapter.positions_per_token
    if positions_per_token > 1 and built.position_ids.dim() == 2:  # the same on every axis
        built = built._replace(position_ids=built.position_ids.expand(positions_per_token, -1, -1))
    plan = _plan(model, built, ids.to(device), _to(labels, device))
    adapter.remember_positions(model, plan)
    others = {
        name: value
        for name, value in arguments.items()
        if name not in ("input_ids", "attention_mask", "position_ids", "labels", "mm_encoder_outputs")
        and name not in (*adapter.image_arguments, *adapter.video_arguments)
    }
    for name, anchor_value in adapter.token_types.items():
        if others.get(name) is not None:
            others[name] = _follow(others[name].to(device), plan, anchor_value)
    # What else is encoded, such as sound, keeps its order.
    encoded = {k: v for k, v in (arguments.get("mm_encoder_outputs") or {}).items() if k not in ("image", "video")}
    if route == "embeds":
        prompt: dict[str, Any] = {"inputs_embeds": built.embeds}
    else:
        prompt = {"input_ids": plan.input_ids}
        encoded |= _regrouped(adapter, plan, media, rows, (is_image & is_real).to(device))
    if encoded:
        prompt["mm_encoder_outputs"] = PreparedImages(encoded)
    return Prepared(plan if pauses is None else pauses.in_callers_slots(plan), prompt, others)


def _regrouped(
    adapter: FamilyAdapter, plan: AnchorPlan, media: Media, rows: Tensor, holds_image: Tensor
) -> dict[str, Any]:
    """The image features in the order of the new prompt's placeholders."""
    row_of_slot = holds_image.flatten().cumsum(0).view_as(holds_image) - 1
    source = plan.source.clamp(min=0)
    is_image = holds_image.gather(1, source) & (plan.source >= 0)
    return media.regrouped(adapter, rows, row_of_slot.gather(1, source)[is_image], is_image.sum(-1).tolist())


def _plan(model: PreTrainedModel, built: AnchoredSequence, ids: Tensor, labels: Tensor | None) -> AnchorPlan:
    padding = built.source < 0
    source = built.source.clamp(min=0)
    new_labels = None
    if labels is not None:
        new_labels = labels.gather(1, source).masked_fill(padding | built.is_anchor, IGNORE_INDEX)
    return AnchorPlan(
        input_ids=ids.gather(1, source).masked_fill(padding, _padding_id(model)),
        attention_mask=built.attention_mask,
        position_ids=built.position_ids,
        source=built.source,
        is_anchor=built.is_anchor,
        host=built.host,
        score=built.score,
        labels=new_labels,
    )


def _follow(values: Tensor, plan: AnchorPlan, anchor_value: int | None) -> Tensor:
    """(B, L) from (B, S) per-token values, 0 in padding."""
    values = values.gather(1, plan.source.clamp(min=0)).masked_fill(plan.source < 0, 0)
    return values if anchor_value is None else values.masked_fill(plan.is_anchor, anchor_value)


def _leak_rule(labels: Tensor, is_image: Tensor) -> tuple[Tensor, Tensor]:
    """Keep every answer from seeing what follows it. With c, the number of supervised tokens so far:

    A copy is put behind a host only if no supervised token stands between the host and a later mover: c[host] >=
    c[mover], the operators' `turn`. That alone leaves a way: a mover that could choose between hosts in front of an
    answer and behind it, or a budget shared by both, tells the answer by what is *missing* in front of it. So only what
    stands up to the turn of the first image takes part, which with one supervised turn is everything.

    Returns:
        (B, S) int32 `turn` and (B, S) bool, the tokens that may take part.
    """
    turn = (labels != IGNORE_INDEX).cumsum(-1)
    first = turn.masked_fill(~is_image, labels.shape[1]).amin(-1, keepdim=True)
    return turn.int(), (turn <= first) & (labels == IGNORE_INDEX)


def _roles(is_real: Tensor, is_image: Tensor, anchor_mask: Tensor, takes_part: Tensor, silent: Tensor | None) -> Tensor:
    roles = torch.full(is_real.shape, Role.TEXT, dtype=torch.uint8, device=is_real.device)
    roles.masked_fill_(anchor_mask & takes_part, Role.ANCHOR_TEXT)
    roles.masked_fill_(is_image, Role.IMAGE).masked_fill_(~is_real, Role.PADDING)
    holds_image = roles.eq(Role.IMAGE)
    # masked_scatter reads past the end of a short source; the operator reports the wrong number of features.
    if silent is not None and len(silent) == int(holds_image.sum()):
        roles = roles.masked_scatter(holds_image, torch.where(silent, Role.SILENT_IMAGE, Role.IMAGE).to(roles))
    return roles.masked_fill_(holds_image & ~takes_part, Role.SILENT_IMAGE)


def _plain_positions(model: PreTrainedModel, adapter: FamilyAdapter, arguments: Call) -> Tensor | None:
    given = arguments.get("position_ids")
    if given is not None:
        # Qwen's four rows begin with text positions, which flash-attention reads for borders of packed sequences.
        return given[-adapter.positions_per_token :] if given.dim() == 3 else given
    return adapter.plain_positions(model, arguments["input_ids"], arguments.get("attention_mask"), arguments)


def _side_of(mask: Tensor | None) -> str:
    """The side on which the mask pads; right if it does not."""
    return "left" if mask is not None and mask.numel() and bool((mask[:, 0] == 0).any()) else "right"


def _padding_id(model: PreTrainedModel) -> int:
    text = model.config.get_text_config()
    for config in (model.generation_config, model.config, text):
        token = getattr(config, "pad_token_id", None)
        if token is not None and 0 <= token < text.vocab_size:  # the model looks it up
            return token
    return 0


def _to(value: Tensor | None, device: torch.device) -> Tensor | None:
    return None if value is None else value.to(device)


def check_shapes(ids: Tensor, arguments: Call, anchor_mask: Tensor | None) -> None:
    if ids.dim() != 2:
        raise ValueError(f"input_ids has shape {tuple(ids.shape)}; it should be (B, S)")
    for name, value in (
        ("attention_mask", arguments.get("attention_mask")),
        ("labels", arguments.get("labels")),
        ("anchor_mask", anchor_mask),
    ):
        if value is None:
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} is {type(value).__name__}; it should be a (B, S) tensor")
        if value.shape != ids.shape:
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; input_ids has {tuple(ids.shape)}, it should be the same"
            )
    if anchor_mask is not None and anchor_mask.dtype != torch.bool:
        raise TypeError(f"anchor_mask has dtype {anchor_mask.dtype}; it should be torch.bool")


def _check_length(model: PreTrainedModel, length: int) -> None:
    context = context_of(model.config)
    if context is not None and length > context:
        raise ValueError(
            f"the prompt with its anchors has {length} tokens and the model's context {context}; nothing is cut off "
            "silently: shorten the prompt, set max_anchors, or raise tau"
        )


def _warn_of_answers(model: Any, anchor_mask: Tensor, labels: Tensor) -> None:
    """Once: an answer token in the mask is taken out, as it would leak the label. Off the CPU looked for once only."""
    calls = model._attanchor_calls
    if calls.warned or (labels.device.type != "cpu" and calls.rewritten):
        return
    if bool((anchor_mask & (labels != IGNORE_INDEX)).any()):
        calls.warned = True
        warnings.warn(
            "anchor_mask selects tokens that labels supervises; they are left out, since a copy in front of the answer "
            "would leak it and does not exist at inference",
            stacklevel=2,
        )
