"""The bookkeeping of `generate` around a lengthened prompt: the caller sees only the prompt that was passed."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from attanchor_vlm.model.families import FamilyAdapter


def infer_mask(model: PreTrainedModel, input_ids: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """The mask that transformers' `generate` infers from padding tokens when it gets none; None if it infers none."""
    pad, eos = (_option(model, arguments, name) for name in ("pad_token_id", "eos_token_id"))
    if pad is None or pad in (eos if isinstance(eos, (list, tuple)) else [eos]):
        return None
    mask = input_ids != pad
    return None if bool(mask.all()) else mask.long()


def lengthen_limits(model: PreTrainedModel, arguments: dict[str, Any], growth: int) -> None:
    """Add the anchors to `max_length` and `min_length`, which count the prompt; in place, the caller's config copied.

    `max_new_tokens` and `min_new_tokens` do not count it and, where given, win.
    """
    for limit, wins in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
        value = _option(model, arguments, limit)
        if not value or _option(model, arguments, wins) is not None:
            continue
        config = arguments.get("generation_config")
        if config is not None and arguments.get(limit) is None:
            arguments["generation_config"] = config = copy.deepcopy(config)
            setattr(config, limit, value + growth)
        else:
            arguments[limit] = value + growth


def route_for(model: PreTrainedModel, adapter: FamilyAdapter, route: str, arguments: dict[str, Any]) -> str:
    """The route that a generate call can take, preferably `route`."""
    for name in ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp"):
        if _option(model, arguments, name):
            # The first step already holds proposed tokens, which have no place beside inputs_embeds or image features:
            # transformers then answers wrongly without saying so.
            raise ValueError(f"{name} is given, but assisted decoding cannot be combined with anchors; leave it out")
    if _option(model, arguments, "prefill_chunk_size") is not None:
        if "ids" not in adapter.routes:
            raise ValueError(
                "prefill_chunk_size is given, which with anchors needs route 'ids', and the family has none"
            )
        return "ids"  # inputs_embeds are not cut into chunks
    return route


def _option(model: PreTrainedModel, arguments: dict[str, Any], name: str) -> Any:
    """A generation setting as `generate` resolves it: argument, passed config, the model's config."""
    if arguments.get(name) is not None:
        return arguments[name]
    for config in (arguments.get("generation_config"), model.generation_config):
        if isinstance(config, GenerationConfig) and getattr(config, name, None) is not None:
            return getattr(config, name)
    return None


def with_callers_prompt(output: Any, input_ids: Tensor, prompt_length: int) -> Any:
    """`output` of a generate call on a prompt of `prompt_length` tokens, as if that prompt were `input_ids`."""
    sequences = output if isinstance(output, Tensor) else output.sequences
    repeats = sequences.shape[0] // input_ids.shape[0]  # num_return_sequences
    prompt = input_ids.to(sequences.device).repeat_interleave(repeats, 0)
    sequences = torch.cat([prompt, sequences[:, prompt_length:]], dim=1)
    if isinstance(output, Tensor):
        return sequences
    output.sequences = sequences
    return output


class CallersPromptStreamer:
    """Hands a streamer the caller's prompt in place of the lengthened one, which `generate` puts first."""

    def __init__(self, streamer: Any, input_ids: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = input_ids

    def put(self, value: Tensor) -> None:
        if self._prompt is not None:
            value, self._prompt = self._prompt.to(value.device), None
        self._streamer.put(value)

    def end(self) -> None:
        self._streamer.end()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._streamer, name)
