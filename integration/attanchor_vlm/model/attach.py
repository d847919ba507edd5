"""`attach` and `detach`: an instance's class is swapped for a subclass of the same name that rewrites its calls.

`prepare_inputs` rewrites a call for trainers that go past the model's forward.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attanchor_vlm.model import check as checking
from attanchor_vlm.model import generate as generation
from attanchor_vlm.model import guard
from attanchor_vlm.model.calls import Calls
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.families import FamilyAdapter, adapter_for
from attanchor_vlm.model.plan import AnchorPlan, AnchorStats, taking_part
from attanchor_vlm.model.rewrite import by_name, check_call, given_cache, is_prepared, needs_rewriting, rewrite
from attanchor_vlm.settings import check_one_of

_Model: Any = object  # what the mixin is mixed into, a model of transformers, has no type here


def attach(model: nn.Module, config: AttAnchorConfig | None = None, *, check: str = "auto") -> nn.Module:
    """Insert anchors in every call of `model` that has images: `forward`, with or without labels, and `generate`.

    Both then take an `anchor_mask`: (B, S) bool over `input_ids`, the text tokens that take part (`encode_chat` makes
    it); without one, everything after the first image does, less special tokens. Logits are those of the new sequence;
    ``model.attanchor_plan`` says where its tokens come from, ``model.attanchor_stats`` how many were inserted: those of
    the calling thread's last call, so that threads may share a model. `generate` returns the caller's own prompt
    followed by the new tokens.

    Args:
        model: A model of transformers, or a PeftModel around one, whose base model is attached. Attach before wrapping
            it for distributed training; one on several devices (`device_map`) as any other. Attached again, the
            settings are replaced, once the calls under way in other threads have returned. The first time, no call
            should be under way.
        config: None takes the settings that the model was saved with, in ``model.config.attanchor``.
        check: Whether the first call with an image also checks, by three further forwards of its first sample, that
            anchors are right in this model, and refuses with a `FamilyError` if not: "auto" in families whose adapter
            no test has shown to be right, "always", or "never". Of this model object alone, not saved with it.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` or `config` is something else.
        ValueError: a family without an adapter, settings that the family does not allow, or another `check`.
        RuntimeError: inside a call of the model.
    """
    target = base_of(model)
    if config is None:
        stored = getattr(target.config, "attanchor", None)
        if stored is None:
            raise ValueError("config is None and model.config.attanchor holds no settings; pass an AttAnchorConfig")
        config = AttAnchorConfig.from_dict(stored)
    if not isinstance(config, AttAnchorConfig):
        raise TypeError(f"config is {type(config).__name__}; it should be an AttAnchorConfig")
    check_one_of("check", check, checking.WHEN)
    adapter = adapter_for(target)
    if not target.can_generate():
        raise TypeError(
            f"model is {type(target).__name__}, which has no language modelling head; it should be the whole model, as "
            "AutoModelForImageTextToText or AutoModelForMultimodalLM loads it"
        )
    _check_settings(target, adapter, config)

    if is_attached(target):
        with target._attanchor_calls.none_running():
            target.config.attanchor, target._attanchor_calls.check = config.to_dict(), check
    else:
        target.config.attanchor, target._attanchor_calls = config.to_dict(), Calls(check)
        _change_class(target, _attached_class(type(target)))  # type: ignore[arg-type]
        guard.install(target)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: class, hooks, attributes and ``model.config.attanchor``. Does nothing to a model not attached.

    Waits for the calls under way in other threads; those that begin meanwhile are the plain model's.

    Raises:
        RuntimeError: inside a call of the model.
    """
    target = base_of(model)
    if is_attached(target):
        with target._attanchor_calls.none_running(close=True):
            guard.remove(target)
            _change_class(target, type(target).attanchor_original)
            del target._attanchor_calls, target.config.attanchor
    return model


def is_attached(model: nn.Module) -> bool:
    """Whether `model`, or the base model of a PeftModel, is attached."""
    return isinstance(base_of(model), AttAnchorMixin)


def base_of(model: nn.Module) -> Any:
    """The transformers model inside a PeftModel, or `model` itself; Any, as what `attach` adds to it has no type."""
    target: Any = model
    if not isinstance(target, PreTrainedModel) and hasattr(target, "get_base_model"):
        target = target.get_base_model()
    if not isinstance(target, PreTrainedModel):
        raise TypeError(
            f"model is {type(model).__name__}; it should be a transformers model or a PeftModel around one (before "
            "it is wrapped by DDP, torch.compile and the like)"
        )
    return target


def config_of(model: nn.Module) -> AttAnchorConfig:
    """The settings of an attached model, or of one inside a PeftModel."""
    return base_of(model).attanchor_config


def prepare_inputs(model: nn.Module, *, padding_side: str | None = None, **arguments: Any) -> dict[str, Any]:
    """What `model`, attached, would hand to the untouched forward: for training loops that bypass `model.forward`.

    Call it inside `compute_loss` of a trainer that calls the base model itself (TRL's SFTTrainer), and pass the result
    on. Not for FSDP, whose parameters are sharded outside of forward.

    Args:
        model: An attached model, or a PeftModel around one.
        padding_side: "right" or "left"; None for the side that `attention_mask` pads.
        arguments: Those of the model's forward, with `anchor_mask` if there is one.

    Returns:
        The arguments themselves, less `anchor_mask`, if tau >= 1 or there is no image; otherwise the rewritten ones.

    Raises:
        ValueError: the model is not attached; and as `model` itself.
    """
    target = base_of(model)
    if not is_attached(target):
        raise ValueError(f"{type(model).__name__} is not attached; it should be a model given to attach")
    settings, adapter = target.attanchor_config, adapter_for(target)
    anchor_mask = arguments.pop("anchor_mask", None)
    check_call(adapter, settings, arguments, anchor_mask)
    if not needs_rewriting(adapter, settings, arguments):
        return arguments
    checking.check_once(target, adapter, settings, arguments, anchor_mask)
    prepared = rewrite(target, adapter, settings, arguments, anchor_mask, padding_side)
    target.record_plan(prepared.plan)
    return prepared.for_forward()


class AttAnchorMixin(_Model):
    """What an attached model has besides its own class. `forward` is made per class, with the original's signature."""

    attanchor_original: type[Any]
    _attanchor_calls: Calls

    @property
    def attanchor_config(self) -> AttAnchorConfig:
        return AttAnchorConfig.from_dict(self.config.attanchor)

    @property
    def attanchor_plan(self) -> AnchorPlan | None:
        """Of this thread's last call; None if it was handed through."""
        return self._attanchor_calls.plan

    @property
    def attanchor_stats(self) -> AnchorStats:
        """Of this thread's last call."""
        return AnchorStats(self.attanchor_plan)

    @property
    def attanchor_calls(self) -> int:
        """Calls rewritten since `attach`, in all threads."""
        return self._attanchor_calls.rewritten

    @attanchor_calls.setter
    def attanchor_calls(self, count: int) -> None:
        self._attanchor_calls.rewritten = count

    def record_plan(self, plan: AnchorPlan | None) -> None:
        self._attanchor_calls.record(plan)

    @torch.no_grad()
    def generate(  # type: ignore[override]
        self, inputs: Tensor | None = None, *positional: Any, anchor_mask: Tensor | None = None, **kwargs: Any
    ) -> Any:
        """As the model's own, with `anchor_mask`. Sequences are the caller's prompt followed by the new tokens."""
        calls = vars(self).get("_attanchor_calls")
        if calls is None or not calls.begin():  # detached since this method was looked up
            masked = {} if anchor_mask is None else {"anchor_mask": anchor_mask}
            return self.generate(inputs, *positional, **kwargs, **masked)
        try:
            return self._generate_anchored(super().generate, inputs, positional, kwargs, anchor_mask)  # type: ignore
        finally:
            calls.end()

    def _generate_anchored(
        self,
        original: Callable[..., Any],
        inputs: Tensor | None,
        positional: tuple[Any, ...],
        kwargs: dict[str, Any],
        anchor_mask: Tensor | None,
    ) -> Any:
        arguments = by_name(self.attanchor_original.generate, (inputs, *positional), kwargs)
        del arguments["inputs"]
        if inputs is not None and arguments.get("input_ids") is None:
            arguments["input_ids"] = inputs
        settings, adapter = self.attanchor_config, adapter_for(self)
        check_call(adapter, settings, arguments, anchor_mask)
        if not needs_rewriting(adapter, settings, arguments):
            checking.abstain(self, settings)
            self.record_plan(None)
            with guard.inside_attached_call(self):
                return original(inputs, *positional, **kwargs)

        route = generation.route_for(self, adapter, settings.route or adapter.routes[0], arguments)
        settings = dataclasses.replace(settings, route=route)
        input_ids = arguments["input_ids"]
        if arguments.get("attention_mask") is None:
            arguments["attention_mask"] = generation.infer_mask(self, input_ids, arguments)
        checking.check_once(self, adapter, settings, arguments, anchor_mask)
        prepared = rewrite(self, adapter, settings, arguments, anchor_mask, "left")
        self.record_plan(prepared.plan)
        arguments = prepared.for_generate()
        length = prepared.plan.input_ids.shape[1]
        generation.lengthen_limits(self, arguments, length - input_ids.shape[1])
        if arguments.get("streamer") is not None:
            arguments["streamer"] = generation.CallersPromptStreamer(arguments["streamer"], input_ids)
        with guard.inside_attached_call(self):
            output = original(**arguments)
        return generation.with_callers_prompt(output, input_ids, length)

    def __reduce_ex__(self, protocol: Any):
        """Pickle by the original class: the subclass has its name, but no import finds it."""
        reduced: Any = super().__reduce_ex__(protocol)
        return _new_attached, (self.attanchor_original,), *reduced[2:]


def _forward_anchored(model: Any, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    anchor_mask = kwargs.pop("anchor_mask", None)
    settings, adapter = model.attanchor_config, adapter_for(model)
    if model.training:
        release_frozen_tower(model, adapter.vision_tower(model))
    arguments = by_name(original, args, kwargs)
    check_call(adapter, settings, arguments, anchor_mask)
    with guard.inside_attached_call(model):
        if not needs_rewriting(adapter, settings, arguments):
            checking.abstain(model, settings)
            # A step of a caller's own decoding loop, and what `prepare_inputs` made, keep the plan.
            if given_cache(arguments) is None and not is_prepared(arguments):
                model.record_plan(None)
            return original(model, *args, **kwargs)
        checking.check_once(model, adapter, settings, arguments, anchor_mask)
        prepared = rewrite(model, adapter, settings, arguments, anchor_mask, None)
        model.record_plan(prepared.plan)
        return original(model, **prepared.for_forward())


def _new_attached(original: type[PreTrainedModel]) -> PreTrainedModel:
    attached = _attached_class(original)  # type: ignore[arg-type]
    return attached.__new__(attached)


@functools.cache
def _attached_class(original: Any) -> type[PreTrainedModel]:
    """A subclass with the original's name, which `save_pretrained` writes into config.json."""
    body = {
        "__doc__": original.__doc__,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "attanchor_original": original,
        "forward": _attached_forward(original.forward),
    }
    return type(original.__name__, (AttAnchorMixin, original), body)


def _attached_forward(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self, *args: Any, **kwargs: Any):
        calls = vars(self).get("_attanchor_calls")
        if calls is not None and guard.inside(self):  # generate has rewritten the prompt, or had nothing to rewrite
            kwargs.pop("anchor_mask", None)
            return original(self, *args, **kwargs)
        # Detached since the forward was looked up; or a wrapper on the instance kept it (accelerate's for autocast).
        if calls is None or not calls.begin():
            return original(self, *args, **kwargs)
        try:
            return _forward_anchored(self, original, args, kwargs)
        finally:
            calls.end()

    # Trainer drops every column of a data set that the signature does not name.
    signature = inspect.signature(original)
    anchor_mask = inspect.Parameter("anchor_mask", inspect.Parameter.KEYWORD_ONLY, default=None)
    parameters = list(signature.parameters.values())
    variable = parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD
    parameters.insert(len(parameters) - bool(variable), anchor_mask)
    forward.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return forward


def _change_class(model: Any, kind: Any) -> None:
    """Make `model` one of class `kind`, also for the hook of accelerate that it may have around its forward.

    A model on several devices (`device_map`), or offloaded, calls the forward that its class had when it was loaded.
    """
    hooked, before = vars(model).get("_old_forward"), type(model).forward
    model.__class__ = kind
    if getattr(hooked, "__func__", None) is before:
        model._old_forward = kind.forward.__get__(model)
        model.forward.__wrapped__ = model._old_forward  # whose signature Trainer reads


def _check_settings(model: PreTrainedModel, adapter: FamilyAdapter, config: AttAnchorConfig) -> None:
    family = model.config.model_type
    route = config.route or adapter.routes[0]
    if route not in adapter.routes:
        raise ValueError(f"route is {route!r}; for {family} it should be one of {', '.join(map(repr, adapter.routes))}")
    if config.pause_tokens:
        _check_pause_token(model, config.pause_token_id)
    if (config.positions or adapter.positions) != "inherit" or adapter.positions_per_token > 1:
        return
    attention = getattr(model.config.get_text_config(), "_attn_implementation", None) or ""
    if config.keep is not None and ("flash" not in attention or config.force_inherit):
        return  # gaps and repeats are taken as they are where a mask is passed, as it always is
    if not config.force_inherit or "flash" in attention:
        raise ValueError(
            f"positions is 'inherit', but {family} has one position per token: repeated positions are then taken for "
            "packed sequences, and attention is cut at every anchor (without an attention mask; by flash-attention "
            "even with one). Use 'sequential'"
            + (", or other attention code" if config.force_inherit else ", or insist with force_inherit=True")
        )


def _check_pause_token(model: PreTrainedModel, token: int | None) -> None:
    known: Any = model.get_input_embeddings()
    if token is None or token >= known.num_embeddings:
        raise ValueError(f"pause_token_id is {token}; the model's vocabulary has {known.num_embeddings} tokens")
    if token == getattr(model.config, "image_token_id", None):
        raise ValueError(f"pause_token_id is {token}, the model's image placeholder; it should be another token")


def anchor_counts(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """(3,) of the last call, on the device and without a sync: inserted, text tokens taking part, sum of the inserted
    ones' scores."""
    mask, plan = inputs.get("anchor_mask"), base_of(model).attanchor_plan
    if plan is None or mask is None:  # handed through: nothing could be inserted
        counts = torch.zeros(3, device=inputs["input_ids"].device)
        counts[1] = 0 if mask is None else mask.sum()
        return counts
    candidates = taking_part(plan, mask)
    inserted = plan.host >= 0
    score = plan.score.masked_fill(~inserted, 0).sum()
    return torch.stack([inserted.sum().float(), candidates.to(score.device).float(), score.float()])


def set_tau(model: nn.Module, tau: float) -> None:
    """Change the threshold of an attached model (or of a PeftModel around one), and nothing else."""
    base_of(model).config.attanchor = dataclasses.replace(config_of(model), tau=tau).to_dict()


def tau_of(model: Any) -> float:
    """The threshold of an attached model."""
    return config_of(model).tau


def release_frozen_tower(model: PreTrainedModel, tower: nn.Module | None) -> None:
    """Remove the hooks by which gradient checkpointing makes a frozen tower's patch embeddings require gradients.

    `enable_input_require_grads` puts one on the input embedding of every model inside the model. On a tower in which
    nothing is trained it only keeps all activations alive. Does nothing while any parameter of the tower is trained.
    """
    if tower is None or any(parameter.requires_grad for parameter in tower.parameters()):
        return
    for module in tower.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if _makes_inputs_require_grads(hook)]:
            del hooks[key]


def _makes_inputs_require_grads(hook: object) -> bool:
    # A closure of transformers, known by its name alone.
    return "enable_input_require_grads" in getattr(hook, "__qualname__", "")
