"""What reaches a model's language model in one forward, and what it makes of it."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from attanchor_vlm.model.families.structure import language_model
from attanchor_vlm.model.rewrite import by_name


@dataclasses.dataclass
class Recording:
    """One forward: B samples of S tokens.

    Attributes:
        arguments: Every tensor that the language model was called with, by name ("deepstack_visual_embeds[0]").
        positions: (B, S) or (P, B, S), the position ids among them; None if there were none.
        masks: What each layer got as its mask.
        output: (B, S, D), what the language model returned.
    """

    arguments: dict[str, Tensor] = dataclasses.field(default_factory=dict)
    positions: Tensor | None = None
    masks: list[Any] = dataclasses.field(default_factory=list)
    output: Tensor | None = None


# Positions and masks have rules of their own; the rest is nothing of a token's.
_APART = ("attention_mask", "position_ids", "position_embeddings", "cache_position", "past_key_values", "cache")


def record(model: Any, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> Recording:
    """Call ``forward(model, **arguments)``, and watch the language model inside."""
    decoder, found, thread = language_model(model), Recording(), threading.get_ident()
    lists = [part for part in decoder.children() if isinstance(part, nn.ModuleList)]
    layers: list[nn.Module] = list(max(lists, key=len, default=()))

    def watch(take: Callable[..., None]) -> Callable[..., None]:
        # Other threads' calls are not looked at; one may meet the hook while it is taken away, and then without kwargs.
        def hook(module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
            if threading.get_ident() == thread:
                take(by_name(type(module).forward, args, kwargs or {}), output)

        return hook

    def at_decoder(given: dict[str, Any], _: Any) -> None:
        if decoder is not model.base_model:  # else they are the whole model's: what the first layer gets must do
            found.arguments.update(_tensors({k: v for k, v in given.items() if k not in _APART}))
            found.positions = given.get("position_ids")

    def at_layer(given: dict[str, Any], _: Any) -> None:
        if not found.masks and isinstance(given.get("hidden_states"), Tensor):
            found.arguments["hidden_states"] = given["hidden_states"]
        found.masks.append(given.get("attention_mask"))

    def behind_decoder(given: dict[str, Any], output: Any) -> None:
        found.output = output if isinstance(output, Tensor) else output[0]

    with ExitStack() as hooks:
        for module, take in ((decoder, at_decoder), *((layer, at_layer) for layer in layers)):
            hooks.callback(module.register_forward_pre_hook(watch(take), with_kwargs=True).remove)
        hooks.callback(decoder.register_forward_hook(watch(behind_decoder), with_kwargs=True).remove)
        forward(model, **arguments)
    return found


def _tensors(values: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Tensors by name, those in lists, tuples and mappings as well."""
    for name, value in values.items():
        if isinstance(value, Tensor):
            yield name, value
        elif isinstance(value, Mapping):
            yield from _tensors({f"{name}[{key!r}]": inner for key, inner in value.items()})
        elif isinstance(value, (list, tuple)):
            yield from _tensors({f"{name}[{index}]": inner for index, inner in enumerate(value)})


def visible(mask: Any, batch: int, length: int) -> Tensor | None:
    """(B, S, S) bool, which keys (last) each query sees, of a layer's mask; None for a merely causal one."""
    if mask is None or (isinstance(mask, Tensor) and mask.dim() < 4):  # padding alone, told to fused attention
        return None
    if hasattr(mask, "mask_mod"):  # flex attention's, whose own dense form is by blocks
        from torch.nn.attention.flex_attention import create_mask

        mask = create_mask(mask.mask_mod, batch, None, length, length, device=str(mask.kv_num_blocks.device))
    if not isinstance(mask, Tensor):
        raise ValueError(f"a layer's mask is {type(mask).__name__}")
    seen = mask[:, 0, -length:, :length]
    seen = seen > torch.finfo(seen.dtype).min / 2 if seen.is_floating_point() else seen.bool()
    return seen.expand(batch, -1, -1)
