"""The self-check: on its first call with images, a model of a family that no test covers shows that anchors are right.

The call's first sample with all that the call brings (images, videos) is run three times more, without gradient and
without randomness: as it is, with its prompt rewritten but nothing inserted, and with anchors. `rules.py` has what must
hold between the three.
"""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from attanchor_vlm.constants import context_of
from attanchor_vlm.errors import FamilyError, SetupError
from attanchor_vlm.model import guard, rules
from attanchor_vlm.model.candidates import mask_from_ids
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.families import FamilyAdapter, is_tested
from attanchor_vlm.model.media import encode
from attanchor_vlm.model.plan import Call
from attanchor_vlm.model.recording import record
from attanchor_vlm.model.rewrite import Prepared, check_shapes, parameters, rewrite
from attanchor_vlm.model.rules import RULES, Finding, Prompts

WHEN = ("auto", "always", "never")
MOST_ANCHORS = 64


def check_once(
    model: Any, adapter: FamilyAdapter, settings: AttAnchorConfig, arguments: Call, mask: Tensor | None
) -> None:
    """`findings`, at a model's first call, and no more once it has passed; see `attach` for when."""
    calls = model._attanchor_calls
    if not _is_wanted(model):
        return
    with calls.checking:
        kinds = set(adapter.kinds(arguments))
        if kinds <= calls.checked:
            return
        found = findings(model, adapter, settings, arguments, mask)
        if broken := [f"{RULES[one.rule]} ({one.rule}): {one.found}" for one in found if one.found]:
            raise FamilyError(
                f"AttAnchor would be wrong in {type(model).__name__} (model_type {model.config.model_type!r}): what "
                f"should hold, and what was found: {'; '.join(broken)}. The adapter, {type(adapter).__name__}, answers "
                "wrongly for this model, or the model allows no anchors; `attanchor check --model PATH` shows it by "
                "rule, attach(..., check='never') insists"
            ) from next((one.cause for one in found if one.cause), None)
        if found:  # of a model that is shared, all kinds: other processes had others, and none may vote alone later
            calls.checked |= {"image", "video"} if _sharing(model) else kinds


def abstain(model: Any, settings: AttAnchorConfig) -> None:
    """Vote against the check in a call without images: other processes that share the model may have some."""
    if not settings.changes_nothing and not model._attanchor_calls.checked and _is_wanted(model):
        _everywhere(False, _sharing(model))


def _is_wanted(model: Any) -> bool:
    when = model._attanchor_calls.check
    tested = when == "auto" and is_tested(model.config.model_type)
    return not tested and when != "never" and not torch.compiler.is_compiling()


def findings(
    model: Any, adapter: FamilyAdapter, settings: AttAnchorConfig, arguments: Call, mask: Tensor | None
) -> list[Finding]:
    """What each rule finds at one call of an attached model; an empty list if there was no text to copy.

    Args:
        arguments: The call's, those of `generate` included.
        mask: Its `anchor_mask`; without one, or if none of the sample's is set, all text is copied.
    """
    forward = type(model).attanchor_original.forward
    names = {*parameters(forward), *adapter.image_arguments, *adapter.video_arguments, *adapter.token_types}
    names |= {"mm_encoder_outputs", *_POSITIONS}
    names -= {"labels", "past_key_values", "cache", "position_ids"}
    call = {name: value for name, value in arguments.items() if name in names and value is not None}
    check_shapes(call["input_ids"], call, mask)
    call.setdefault("attention_mask", torch.ones_like(call["input_ids"]))
    context, groups = context_of(model.config), _sharing(model)
    room = MOST_ANCHORS if context is None else min(MOST_ANCHORS, context - call["input_ids"].shape[1])
    if not _everywhere(room > 0, groups):
        return []
    # What else a user chose (tau, positions, what is kept) is right or wrong whatever the family.
    settings = AttAnchorConfig(tau=-1, max_anchors=room, direction=settings.direction, route=settings.route)
    options = {name: value for name, value in _OPTIONS.items() if name in parameters(forward)}
    with _undisturbed(model), guard.inside_attached_call(model):
        try:
            one, mask, same = _first_sample(model, adapter, settings, call, mask, crop=not groups)
            new = rewrite(model, adapter, settings, one, mask, None)
        except Exception as error:  # of the model's own code, or of an adapter that expects other code
            if groups or _is_of_the_call(error, lambda: forward(model, **{**call, **options})):
                raise
            return [_failed("encoding the images and rewriting the prompt", error)]
        if not _everywhere(bool(new.plan.is_anchor.any()), groups):
            return []
        plain = record(model, forward, {**one, **options})
        try:
            unchanged, changed = (record(model, forward, {**each.for_forward(), **options}) for each in (same, new))
        except Exception as error:
            return [_failed("the model's forward", error)]
        ids, is_real = one["input_ids"], one["attention_mask"].bool()
        is_image = adapter.placeholders(model, ids) & is_real
        before, after = (Prompts(is_real, is_image, each.plan) for each in (same, new))
        return [
            rules.parity(plain, unchanged, before),
            rules.arguments(plain, changed, after, adapter.token_types),
            rules.rows(plain, encode(model, adapter, one).rows, before),
            rules.positions(plain, changed, after),
            *rules.sight(plain, changed, after),
        ]


_POSITIONS = ("second_per_grid_ts",)  # read from further arguments
_OPTIONS = {"use_cache": False, "logits_to_keep": 1}  # the head is the same in all


def _sharing(model: Any) -> list[tuple[Any, Any]]:
    """Groups of processes that gather the parameters of this model together (FSDP), and so must run the same forwards;
    each with the device that it communicates by."""
    if not (dist.is_available() and dist.is_initialized()):
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    if wrapped := next((part for part in model.modules() if isinstance(part, FullyShardedDataParallel)), None):
        return [(wrapped.process_group, wrapped.compute_device)]
    parameters = list(model.parameters())
    if any(hasattr(parameter, "ds_id") for parameter in parameters):
        raise SetupError(
            f"{type(model).__name__} is sharded by DeepSpeed (ZeRO-3), under which it cannot check itself; run "
            "`attanchor check --model PATH` before, and attach(..., check='never')"
        )
    sharded = next((parameter for parameter in parameters if isinstance(parameter, DTensor)), None)
    if sharded is None:
        return []
    mesh = sharded.device_mesh
    return [(mesh.get_group(axis), mesh.device_type) for axis, part in enumerate(sharded.placements) if part.is_shard()]


def _everywhere(flag: bool, groups: list[tuple[Any, Any]]) -> bool:
    """Whether it is set in all processes of the groups."""
    for group, device in groups:
        vote = torch.tensor(int(flag), device=device)
        dist.all_reduce(vote, dist.ReduceOp.MIN, group=group)
        flag = bool(vote)
    return flag


def _failed(what: str, error: Exception) -> Finding:
    if isinstance(error, torch.OutOfMemoryError):  # which says nothing of the model or its adapter
        raise error
    return Finding("arguments", f"{what} fails: {type(error).__name__}: {error}", cause=error)


def _is_of_the_call(error: Exception, untouched: Callable[[], object]) -> bool:
    """Whether AttAnchor refuses the call itself, or the untouched model does not take it either."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if isinstance(error, ValueError) and str(frame.f_globals.get("__name__")).startswith("attanchor"):
        return True
    try:
        untouched()
    except Exception:
        return True
    return False


def _first_sample(
    model: Any, adapter: FamilyAdapter, settings: AttAnchorConfig, call: dict[str, Any], mask: Tensor | None, crop: bool
) -> tuple[dict[str, Any], Tensor, Prepared]:
    """The call for one sample, less padding, or for all; what may be copied; the call with nothing inserted."""

    def nothing_inserted(one: dict[str, Any]) -> Prepared:
        return rewrite(model, adapter, settings, one, torch.zeros_like(one["input_ids"], dtype=torch.bool), None)

    one, own = _cropped(model, adapter, call, mask) if crop else (call, mask)
    try:
        same = nothing_inserted(one)
    except (ValueError, RuntimeError, IndexError):  # whose image is whose was guessed wrongly: then all samples
        if one is call:  # nothing was guessed
            raise
        one, own, same = call, mask, nothing_inserted(call)
    ids, is_real = one["input_ids"], one["attention_mask"].bool()
    is_image = adapter.placeholders(model, ids) & is_real
    for found in (own, mask_from_ids(model, settings, ids, is_real, is_image)):
        if found is not None and bool(found.any()):
            return one, found, same
    return one, is_real & ~is_image, same  # all text stands in front of the image


def _cropped(
    model: Any, adapter: FamilyAdapter, call: dict[str, Any], mask: Tensor | None
) -> tuple[dict[str, Any], Tensor | None]:
    """The first sample that has all kinds of media of the call, or all samples if none has or if there is sound; media
    are divided as placeholders are, which need not be right."""
    ids, is_real = call["input_ids"], call["attention_mask"].bool()
    held = adapter.placeholders(model, ids) & is_real
    is_video = adapter.video_placeholders(model, ids)
    shown = (held & ~is_video).any(-1).byte() + (held & is_video).any(-1).byte()
    sample = int(shown.argmax())
    sound = inspect.signature(getattr(model.base_model, "get_audio_features", lambda: None)).parameters
    if int(shown[sample]) < len(adapter.kinds(call)) or {*sound} & {*call}:
        return call, mask

    def of_tokens(value: Tensor) -> Tensor:
        return value[sample : sample + 1, is_real[sample].to(value.device)]

    def of_media(value: Any, own: Tensor) -> Any:
        counts, total = own.sum(-1).tolist(), max(int(own.sum()), 1)
        if not isinstance(value, Tensor) or value.dim() == 0 or not sum(counts):
            return value
        if len(value) == len(ids):
            return value[sample : sample + 1]
        return value[len(value) * sum(counts[:sample]) // total : len(value) * sum(counts[: sample + 1]) // total]

    one = {}
    for name, value in call.items():
        if name in adapter.image_arguments:
            one[name] = of_media(value, held & ~is_video)
        elif name in adapter.video_arguments or name in _POSITIONS:
            one[name] = of_media(value, held & is_video)
        else:
            one[name] = of_tokens(value) if isinstance(value, Tensor) and value.shape[:2] == ids.shape else value
    return one, None if mask is None else of_tokens(mask)


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Evaluation without gradient; afterwards nothing is as if there had been any."""
    training = [module for module in model.modules() if module.training]
    gpus = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(gpus)):
        for module in training:
            module.training = False
        try:
            yield
        finally:
            for module in training:
                module.training = True
