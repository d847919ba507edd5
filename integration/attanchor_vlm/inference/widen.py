"""Wider attention heads that compute the same: vLLM's attention on a CPU has kernels for some widths alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def widen_heads(model: Any, head_dim: int) -> None:
    """Fill the heads of a Llama or Mistral language model up with zeros, in place.

    A wider head turns its pairs by other angles: of w times as many, every w-th is the old one. And it divides its
    scores by the root of its width, which the queries are multiplied by beforehand.

    Args:
        model: A transformers model.
        head_dim: A multiple of the width that the heads have.
    """
    text = model.config.get_text_config()
    old = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if text.model_type not in ("llama", "mistral") or text.rope_parameters.get("rope_type") != "default":
        raise ValueError(f"head_dim is {head_dim}, but heads of {text.model_type} with its RoPE cannot be widened")
    if head_dim % old:
        raise ValueError(f"head_dim is {head_dim}; it should be a multiple of {old}, the model's")
    halves = torch.arange(old) % (old // 2) * (head_dim // old) + torch.arange(old) // (old // 2) * (head_dim // 2)
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        for name, places, factor in (
            ("q_proj", halves, (head_dim / old) ** 0.5),
            ("k_proj", halves, 1.0),
            ("v_proj", torch.arange(old), 1.0),
        ):
            setattr(attention, name, _wider(getattr(attention, name), places, head_dim, factor))
        output = attention.o_proj
        columns = _spread(output.weight.T, torch.arange(old), head_dim).T.contiguous()
        attention.o_proj = _linear(columns, output.bias)
        attention.head_dim, attention.scaling = head_dim, head_dim**-0.5
    text.head_dim = head_dim
    model.get_decoder().rotary_emb = type(model.get_decoder().rotary_emb)(text)


def _wider(layer: nn.Linear, places: Tensor, head_dim: int, factor: float) -> nn.Linear:
    bias = None if layer.bias is None else _spread(layer.bias[:, None], places, head_dim)[:, 0] * factor
    return _linear(_spread(layer.weight, places, head_dim) * factor, bias)


def _spread(rows: Tensor, places: Tensor, head_dim: int) -> Tensor:
    """(heads * head_dim, D): row i of each head of `rows` at its place, zeros between."""
    heads = rows.unflatten(0, (-1, len(places)))
    wide = rows.new_zeros(len(heads), head_dim, rows.shape[1])
    wide[:, places] = heads
    return wide.flatten(0, 1)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    made.weight = nn.Parameter(weight)
    if bias is not None:
        made.bias = nn.Parameter(bias)
    return made
