"""Configurations as small as can be of the families of the table: each size stands here once."""

from __future__ import annotations

from typing import Any

import tiny_families
from tiny_families import END, IMAGE, PATCH, SIDE, SOUND, START, VIDEO, VOCABULARY
from transformers import AutoConfig

# By the name of a field, wherever it stands in a language model's configuration or a vision tower's.
TEXT: dict[str, Any] = {
    **tiny_families.TEXT,
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "n_routed_experts": 4,
    "num_experts": 4,
    "num_local_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "qk_head_dim": 16,
    "sliding_window": 24,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# … or in that of a vision tower, an audio encoder, or whatever else stands beside it.
OTHER: dict[str, Any] = {
    "hidden_size": 32,
    "embed_dim": 32,
    "d_model": 32,
    "intermediate_size": 64,
    "mlp_dim": 64,
    "depth": 2,
    "num_hidden_layers": 2,
    "num_heads": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "image_size": SIDE,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 32,
    "text_hidden_size": 32,
    "num_position_embeddings": 64,
    "projection_dim": 32,
    "projector_input_dim": 32,
    "projector_output_dim": 32,
    "fullatt_block_indexes": [1],
    "window_size": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "output_dim": 32,
    "downsample_hidden_size": 8,
}
IDS = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "audio_token_id": SOUND,
    "audio_token_index": SOUND,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "image_start_token_id": START,
    "image_end_token_id": END,
    "image_patch_id": IMAGE,
    "boi_token_id": START,
    "eoi_token_id": END,
    "tie_word_embeddings": False,
}


def config(model_type: str, own: dict[str, Any]) -> Any:
    """The family's configuration, as small as the tables say where they know a field, with what is given besides."""
    full = AutoConfig.for_model(model_type)
    known = {key: value for key, value in IDS.items() if key in vars(full)}
    return AutoConfig.for_model(model_type, **_merge({**known, **_parts(full)}, own))


def _parts(whole: Any) -> dict[str, Any]:
    parts = {}
    for name, part in vars(whole).items():
        if hasattr(part, "model_type"):
            sizes = TEXT if name in ("text_config", "encoder_config") else OTHER
            known = {key: value for key, value in sizes.items() if key in vars(part)}
            parts[name] = {"model_type": part.model_type, **known, **_parts(part)}
    return parts


def _merge(known: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    both = {
        key: _merge(known.get(key, {}), value) if key.endswith("_config") else value for key, value in given.items()
    }
    return {**known, **both}
