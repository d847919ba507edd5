"""Anchors that are configured but never inserted: fail, rather than train or score a plain model unnoticed.

Some trainers replace an instance's forward or call the base model past it (TRL's SFTTrainer, Liger's instance patch).
A hook on the base model sees every such call; `expect_anchors` asks, after the fact, whether any call was rewritten.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.rewrite import by_name, needs_rewriting

# Ids of the base models whose attached forward or generate is running in this thread.
_inside_call: ContextVar[tuple[int, ...]] = ContextVar("attanchor_inside_call", default=())


@contextmanager
def inside_attached_call(model: PreTrainedModel) -> Iterator[None]:
    """Mark what `model` is called with in this block as rewritten, or as needing no rewriting."""
    token = _inside_call.set((*_inside_call.get(), id(model.base_model)))
    try:
        yield
    finally:
        _inside_call.reset(token)


def inside(model: PreTrainedModel) -> bool:
    """Whether `model`'s attached forward or generate is running, and this is a call that it makes itself."""
    return id(model.base_model) in _inside_call.get()


def install(model: PreTrainedModel) -> None:
    """Watch the base model of an attached model, if it has one inside."""
    if model.base_model is not model:
        model.base_model.register_forward_pre_hook(refuse_bypass, with_kwargs=True)


def remove(model: PreTrainedModel) -> None:
    hooks = model.base_model._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if hook is refuse_bypass]:
        del hooks[key]
        model.base_model._forward_pre_hooks_with_kwargs.pop(key, None)


def refuse_bypass(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Forward pre-hook of the base model: images may only come in through the attached forward."""
    stored = getattr(module.config, "attanchor", None)
    if stored is None or id(module) in _inside_call.get():
        return
    settings = AttAnchorConfig.from_dict(stored)
    if needs_rewriting(adapter_for(module), settings, by_name(type(module).forward, args, kwargs)):
        raise RuntimeError(
            f"AttAnchor is attached with tau={settings.tau}, but {type(module).__name__} was called with images past "
            "the attached forward, so the prompt would stay as it is. Trainers that call the base model themselves "
            "(TRL, Liger) need `inputs = attanchor_vlm.prepare_inputs(model, **inputs)` in compute_loss; for a plain "
            "call, detach the model"
        )


@contextmanager
def expect_anchors(model: nn.Module) -> Iterator[None]:
    """A block in which at least one call must be rewritten, if the model is attached with tau < 1 or `keep`.

    Args:
        model: An attached model, or a PeftModel around one.

    Raises:
        RuntimeError: at the end of the block, no call with an image came through the attached forward or generate.
    """
    attached: Any = model
    if not hasattr(attached, "attanchor_calls"):
        raise ValueError(f"{type(model).__name__} is not attached; it should be a model given to attach")
    before = attached.attanchor_calls
    yield
    settings = attached.attanchor_config
    if not settings.changes_nothing and attached.attanchor_calls == before:
        raise RuntimeError(
            f"AttAnchor is attached with tau={settings.tau}, but no call was rewritten: either no call had images, or "
            "something replaced the model's forward"
        )
