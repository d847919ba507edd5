"""What the class token of a CLIP encoder attends to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attanchor_vlm.model.plan import Call


@torch.no_grad()
def clip_attention(model: Any, arguments: Call, encoded: Any) -> Tensor | None:
    """(N, P) float32: the class token's attention to each patch of N images, mean over the heads, in the layer behind
    the one that the features come from (in LLaVA, the last).

    It is one query row, computed anew from the layer's input: the encoder's own attention code returns no weights
    where it is fused. None if the encoder is no CLIP, or if its features are those of the last layer or hold the class
    token itself.
    """
    tower: Any = getattr(model.base_model, "vision_tower", None)
    strategy = arguments.get("vision_feature_select_strategy") or model.config.vision_feature_select_strategy
    if not hasattr(getattr(tower, "embeddings", None), "class_embedding") or strategy != "default":
        return None
    chosen, layers = arguments.get("vision_feature_layer"), tower.encoder.layers
    chosen = model.config.vision_feature_layer if chosen is None else chosen
    number = max(layer % (len(layers) + 1) for layer in ([chosen] if isinstance(chosen, int) else chosen))
    if number == len(layers):
        return None
    hidden = getattr(encoded, "hidden_states", None)
    if hidden is None or hidden[number] is None:
        raise ValueError(
            "keep_by 'salience' needs the hidden states of the image encoder, and mm_encoder_outputs holds none; pass "
            "the pixels"
        )
    return _class_attention(layers[number], hidden[number])


def _class_attention(layer: Any, hidden: Tensor) -> Tensor:
    attention: Any = layer.self_attn
    hidden = layer.layer_norm1(hidden)
    heads = (attention.num_heads, attention.head_dim)
    query, key = attention.q_proj(hidden[:, :1]).unflatten(-1, heads), attention.k_proj(hidden).unflatten(-1, heads)
    weights = torch.einsum("nqhd,nkhd->nhk", query, key).float() * attention.scale
    return weights.softmax(-1).mean(1)[:, 1:]
