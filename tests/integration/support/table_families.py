"""Small random models of the families that are served by facts alone: one line each, on sizes that stand here once."""

from __future__ import annotations

from typing import Any

import tiny_families
import torch
from builders import TILES, Family, Image, grid, square, tiled
from tiny_families import END, IMAGE, PATCH, PINPOINTS, QWEN_PATCH, SIDE, SOUND, START, VIDEO, VOCABULARY
from transformers import AutoConfig, AutoModelForImageTextToText

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


def _family(
    name: str, image: Any, *, text: Any = None, vision: Any = None, own: Any = None, tower: Any = None, **facts: Any
) -> Family:
    """`tower`: in place of one of timm's, which is not installed."""
    parts = {name: part for name, part in (("text_config", text), ("vision_config", vision)) if part}

    def build() -> Any:
        made = config(name, {**(own or {}), **parts})
        if tower is not None:
            object.__setattr__(made, "vision_config", AutoConfig.for_model(**tower))
        return AutoModelForImageTextToText.from_config(made)

    return Family(name, build, image, **{"routes": ("ids",), **facts})


# --- Images. ---------------------------------------------------------------------------------------------------------


def _sized(generator: torch.Generator, index: int) -> Image:
    """Of its own shape, in a canvas as large as all."""
    sizes = [(16, 24), (24, 16), (16, 16)][index % 3]
    return {
        "pixel_values": torch.randn(1, 3, 24, 24, generator=generator),
        "image_sizes": torch.tensor([sizes]),
    }


def _still(generator: torch.Generator, index: int) -> Image:
    """A grid of patches of one frame."""
    shape = grid(generator, index)["image_grid_thw"]
    return {
        "pixel_values": torch.randn(int(shape.prod()), 3, QWEN_PATCH, QWEN_PATCH, generator=generator),
        "image_grid_thw": shape,
    }


def _flat(generator: torch.Generator, index: int) -> Image:
    image = _still(generator, index)
    return {**image, "pixel_values": image["pixel_values"].flatten(1)}


def _merged(generator: torch.Generator, index: int) -> Image:
    return {**_flat(generator, index), "image_merge_sizes": torch.tensor([2])}


def _one_tile(generator: torch.Generator, index: int) -> Image:
    return {"pixel_values": square(generator, index)["pixel_values"][:, None]}


def _twice(generator: torch.Generator, index: int) -> Image:
    """DeepSeek's, of two resolutions."""
    names = ("pixel_values", "high_res_pixel_values")
    return {name: square(generator, index)["pixel_values"] for name in names}


def _blocks(generator: torch.Generator, index: int) -> Image:
    """Inkling 2's: blocks of two by two patches, and their grid."""
    height, width = [(2, 3), (3, 2), (2, 2)][index % 3]
    return {
        "pixel_values": torch.randn(height * width, 2 * PATCH, 2 * PATCH, 3, generator=generator),
        "image_grid_thw": torch.tensor([[1, height, width]]),
    }


def _video_llava(generator: torch.Generator, index: int) -> Image:
    return {"pixel_values_images": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def _positioned(generator: torch.Generator, index: int) -> Image:
    """Gemma 4's: patches in a row, with their places; padding has -1."""
    height, width = [(6, 6), (6, 12), (12, 6)][index % 3]
    places = torch.full((1, 72, 2), -1)
    places[0, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width)).flip(-1)
    return {
        "pixel_values": torch.rand(1, 72, 3 * PATCH**2, generator=generator),
        "image_position_ids": places,
    }


def _shaped(generator: torch.Generator, index: int) -> Image:
    """SigLIP 2's: patches in a row, padded to as many."""
    height, width = [(4, 6), (6, 4), (4, 4)][index % 3]
    return {
        "pixel_values": torch.randn(1, 24, 3 * PATCH**2, generator=generator),
        "spatial_shapes": torch.tensor([[height, width]]),
        "pixel_attention_mask": (torch.arange(24) < height * width)[None].long(),
    }


def _targets(generator: torch.Generator, index: int) -> Image:
    """MiniCPM's: patches of all images in one row."""
    height, width = [(4, 8), (8, 4), (8, 8)][index % 3]
    return {
        "pixel_values": torch.randn(1, 3, PATCH, PATCH * height * width, generator=generator),
        "target_sizes": torch.tensor([[height, width]]),
    }


def _in_a_row(samples: list[list[Image]]) -> Image:
    pictures = [picture for sample in samples for picture in sample]
    return {
        "pixel_values": torch.cat([picture["pixel_values"] for picture in pictures], -1),
        "target_sizes": torch.cat([picture["target_sizes"] for picture in pictures]),
    }


def _local(generator: torch.Generator, index: int) -> Image:
    """A view of the whole, and up to two crops."""
    crops = index % 3
    local = torch.randn(crops, 3, SIDE, SIDE, generator=generator)
    return {
        "pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator),
        "pixel_values_local": local,
        "num_local_patches": torch.tensor([crops]),
    }


def _locals(samples: list[list[Image]]) -> Image:
    pictures = [picture for sample in samples for picture in sample]
    stacked = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    if not len(stacked["pixel_values_local"]):
        del stacked["pixel_values_local"], stacked["num_local_patches"]
    return stacked


def _unmasked(generator: torch.Generator, index: int) -> Image:
    """Granite Docling's tiles, of which a mask says which are real."""
    tiles = 1 + index % 2
    return {
        "pixel_values": torch.randn(1, tiles, 3, SIDE, SIDE, generator=generator),
        "pixel_attention_mask": torch.ones(1, tiles, dtype=torch.bool),
    }


def _large_patches(generator: torch.Generator, index: int) -> Image:
    """Gemma 4 Unified's: as Gemma 4's, with pixels of what is pooled elsewhere."""
    image = _positioned(generator, index)
    return {**image, "pixel_values": torch.rand(1, 72, 3 * (3 * PATCH) ** 2, generator=generator)}


def _pooled(generator: torch.Generator, index: int) -> Image:
    """Molmo 2's: which patches are pooled to each token."""
    rows = torch.arange(16).view(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)
    return {
        "pixel_values": torch.randn(1, 16, 3 * PATCH**2, generator=generator),
        "image_token_pooling": rows,
        "image_grids": torch.tensor([[2, 2, 0, 0]]),
    }


def _pooled_together(samples: list[list[Image]]) -> Image:
    pictures = [picture for sample in samples for picture in sample]
    stacked = {name: torch.cat([picture[name] for picture in pictures]) for name in pictures[0]}
    stacked["image_token_pooling"] += torch.arange(len(pictures)).repeat_interleave(4)[:, None] * 16
    return stacked


MROPE = {"image": grid, "token_types": "mm_token_type_ids", "inherits": True}
STILL = {**MROPE, "image": _still}
BOTH = {"routes": ("ids", "embeds")}


def _rope(*sections: int, **further: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections], **further}}


SECTIONS, GLM = _rope(2, 1, 1), _rope(2, 1, 1, partial_rotary_factor=1.0)
HYBRID = {**SECTIONS, "layer_types": ["linear_attention", "full_attention"]}
WINDOWED = {"layer_types": ["sliding_attention", "full_attention"]}
BIDIRECTIONAL = {**WINDOWED, "use_bidirectional_attention": "vision"}
SPARSE = {"mlp_layer_types": ["dense", "sparse"]}
GEMMA4_TOWER = {
    "model_type": "gemma4_vision",
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "patch_size": PATCH,
    "position_embedding_size": 64,
}
RESNET = {
    "model_type": "resnet",
    "hidden_size": 32,
    "hidden_sizes": [32],
    "depths": [1],
    "embedding_size": 8,
    "layer_type": "basic",
}
MUSE = {
    "text": {"layer_rope_theta": [10000.0, 0]},
    "vision": {"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
}
MUSE_PROJECTOR = {"out_hidden_size": 128, "projector_hidden_size": 32}
MUSE_EARS = {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "out_hidden_size": 32}
SAM = {"global_attn_indexes": [1], "window_size": 4, "output_channels": 32}
OMNI = {"audio_config": {"n_window": 4, "num_mel_bins": 16, "max_source_positions": 16}, "vision_start_token_id": START}

TABLE = [
    _family("qwen3_5", **MROPE, **BOTH, text=HYBRID),
    _family("qwen3_5_moe", **MROPE, **BOTH, text=HYBRID),
    _family("gemma4", _positioned, token_types="mm_token_type_ids", text=BIDIRECTIONAL, vision=GEMMA4_TOWER),
    _family("qwen3_vl_moe", **MROPE, text=SECTIONS, vision={"deepstack_visual_indexes": [0, 1]}),
    _family("mistral3", _sized, **BOTH),
    _family("glm4v", **MROPE, **BOTH, text=GLM),
    _family("glm46v", **MROPE, **BOTH, text=GLM),
    _family("glm4v_moe", **MROPE, **BOTH, text=GLM),
    _family("glm_ocr", **MROPE, **BOTH, text=GLM),
    _family("paddleocr_vl", **STILL, **BOTH, text=SECTIONS),
    _family("kimi_k25", _still, **BOTH, text={"num_key_value_heads": 4}, own={"projection_hidden_size": 32}),
    _family("lfm2_vl", _shaped, **BOTH, own={"projector_hidden_size": 32}),
    _family("lighton_ocr", _sized, **BOTH),
    _family(
        "minicpmv4_6",
        _targets,
        stack=_in_a_row,
        **BOTH,
        text=HYBRID,
        vision={"insert_layer_id": 0},
        own={"image_size": SIDE},
    ),
    _family("qwen2_5_omni_thinker", grid, inherits=True, **BOTH, text=SECTIONS, own=OMNI),
    _family(
        "qwen3_omni_moe_thinker",
        grid,
        inherits=True,
        text=SECTIONS,
        vision={"deepstack_visual_indexes": [0, 1]},
        own=OMNI,
    ),
    _family("aya_vision", square, **BOTH),
    _family("cohere2_vision", square, **BOTH, own={"alignment_intermediate_size": 64}),
    _family("got_ocr2", square, **BOTH),
    _family("idefics2", **TILES, **BOTH),
    _family("aria", square, **BOTH, own={"projector_patch_to_query_dict": {16: 4}}),
    _family("deepseek_vl", square, **BOTH),
    _family("llava_next_video", tiled, newlines=True, **BOTH, own={"image_grid_pinpoints": PINPOINTS}),
    _family("video_llava", _video_llava, **BOTH),
    _family("vipllava", square, **BOTH, own={"vision_feature_layer": [-1, -2]}),
    _family("video_llama_3", _merged, **BOTH),
    _family("exaone4_5", grid, text=WINDOWED),
    _family(
        "ernie4_5_vl_moe",
        **{**MROPE, "image": _flat},
        text={**_rope(1, 1, 2), **SPARSE, "moe_intermediate_size": [16, 16]},
    ),
    _family(
        "minimax_m3_vl",
        grid,
        **BOTH,
        text={"dense_intermediate_size": 64, "shared_intermediate_size": 16, "rotary_dim": 8, **SPARSE},
        own={"projector_hidden_size": 32, "merged_hidden_size": 128},
    ),
    _family("muse_glimmer", grid, **BOTH, **MUSE, own=MUSE_PROJECTOR),
    _family("muse_spark", grid, **MUSE, own={**MUSE_PROJECTOR, "audio_config": MUSE_EARS}),
    _family("mistral_large4", _sized, **BOTH, text={"num_key_value_heads": 4}),
    _family(
        "lfm3_vl",
        grid,
        **BOTH,
        text={"layer_types": ["conv", "full_attention"]},
        vision={"layer_types": ["conv", "full_attention"]},
        own={"projector_hidden_size": 32},
    ),
    _family(
        "qwen4_exp",
        **MROPE,
        text={
            **SECTIONS,
            "layer_types": ["linear_attention", "indexed_attention"],
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 64,
            "indexer_compress_ratio": 1,
            "ngram_vocab_size_base": 32,
            "split_ngram_parts": 1,
            "ple_embed_dim": 32,
            "hc_lowrank": 4,
        },
    ),
    _family("cosmos3_omni", **MROPE, text=SECTIONS, vision={"deepstack_visual_indexes": [0, 1]}),
    _family("hyperclovax_vision_v2", grid),
    _family("qianfan_ocr", square, **BOTH),
    _family(
        "gemma4_unified",
        _large_patches,
        token_types="mm_token_type_ids",
        text=WINDOWED,
        vision={
            "model_type": "gemma4_unified_vision",
            "patch_size": PATCH,
            "mm_embed_dim": 32,
            "mm_posemb_size": 64,
            "output_proj_dims": 32,
        },
    ),
    _family(
        "hunyuan_vl",
        **{**MROPE, "image": _flat},
        **BOTH,
        text=_rope(1, 1, 1, 1),
        vision={"max_image_size": 64, "temporal_patch_size": 1},
    ),
    _family(
        "ovis2",
        square,
        vision={"vocab_size": 32},
        own={"vocab_size": VOCABULARY, "hidden_size": 32, "visual_indicator_token_ids": [START, END, 7, 7, 7]},
    ),
    _family(
        "step3p7",
        _local,
        stack=_locals,
        **BOTH,
        text={
            "rope_parameters": {
                name: {"rope_type": "default", "rope_theta": 10000.0}
                for name in ("full_attention", "sliding_attention")
            },
            "num_sliding_attention_heads": 4,
            "share_expert_dim": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 24,
            **SPARSE,
        },
    ),
    _family(
        "molmo2",
        _pooled,
        stack=_pooled_together,
        token_types="mm_token_type_ids",
        vision={"image_size": [SIDE, SIDE], "num_position_embeddings": 16},
        text={"additional_vocab_size": 2, "rope_scaling_layers": [0, 1]},
        own={"adapter_config": {"vision_feature_layer": [1, 0], "num_key_value_heads": 2}},
    ),
    _family(
        "janus",
        square,
        **BOTH,
        vision={"num_image_tokens": 16},
        own={
            "vq_config": {
                "base_channels": 32,
                "latent_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "num_embeddings": 16,
                "num_patches": 4,
                "image_token_embed_dim": 32,
                "projection_dim": 32,
            }
        },
    ),
    _family(
        "granite_docling",
        _unmasked,
        stack=TILES["stack"],
        vision={"scale_factor": 2, "deepstack_visual_indexes": [0]},
        text={},
    ),
    _family("minicpm_ocr", _targets, stack=_in_a_row, **BOTH, text=HYBRID, own={"image_size": SIDE}),
    _family(
        "minicpmv4_7",
        _targets,
        stack=_in_a_row,
        token_types="mm_token_type_ids",
        inherits=True,
        **BOTH,
        text=HYBRID,
        own={"image_size": SIDE},
    ),
    _family(
        "cohere_compass",
        **MROPE,
        text={
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
                "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
            },
            "layer_types": ["full_attention", "full_attention"],
        },
        vision={"deepstack_visual_indexes": [0]},
    ),
    _family("cosmos3_edge", **{**MROPE, "image": _flat}, text=SECTIONS),
    _family(
        "deepseek_ocr2",
        _local,
        stack=_locals,
        **BOTH,
        text={"num_experts_per_tok": 2, **SPARSE},
        vision={"sam_config": {**SAM, "downsample_channels": [32, 32]}},
    ),
    _family(
        "llama4",
        square,
        **BOTH,
        vision={
            "vision_output_dim": 32,
            "intermediate_size": 128,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        text={
            "intermediate_size_mlp": 64,
            "moe_layers": [1],
            "num_experts_per_tok": 1,
            "layer_types": ["chunked_attention", "full_attention"],
            "attention_chunk_size": 512,
            "no_rope_layers": [1, 0],
        },
    ),
    _family(
        "granite4_vision",
        tiled,
        newlines=True,
        vision={"hidden_size": 64},
        own={
            "image_grid_pinpoints": PINPOINTS,
            "downsample_rate": "1/2",
            "deepstack_layer_map": [[-1, 0]],
            "spatial_target_layers": [1, 1, 1, 1],
            "qformer_config": {"hidden_size": 64, "num_attention_heads": 1},
        },
    ),
    _family("glmga", **MROPE, **BOTH, text=GLM),
    _family("fast_vlm", square, vision=RESNET),
    _family(
        "perception_lm",
        _one_tile,
        vision={"model_type": "siglip_vision_model", "model_args": {"embed_dim": 32}, **tiny_families.TOWER},
        own={"vision_use_cls_token": False, "projector_pooling_ratio": 2},
    ),
    _family(
        "gemma3n",
        square,
        token_types="token_type_ids",
        tower={**RESNET, "vocab_offset": VOCABULARY, "vocab_size": 16, "rms_norm_eps": 1e-6},
        text={**WINDOWED, "num_kv_shared_layers": 0, "laurel_rank": 4},
        own={
            "vision_soft_tokens_per_image": 16,
            "audio_config": {
                "input_feat_size": 16,
                "conf_num_hidden_layers": 1,
                "conf_num_attention_heads": 2,
                "sscp_conv_channel_size": [8, 4],
                "vocab_offset": VOCABULARY + 16,
                "vocab_size": 16,
            },
        },
    ),
    _family("deepseek_vl_hybrid", _twice, own={"high_res_vision_config": SAM}),
    _family("pp_chart2table", square),
    _family(
        "glm5_next",
        grid,
        token_types="mm_token_type_ids",
        text={
            "num_key_value_heads": 4,
            "qk_rope_head_dim": 0,
            "layer_types": ["linear_attention", "full_attention"],
        },
    ),
    _family(
        "unlimited_ocr",
        square,
        vision={
            "sam_config": {**SAM, "downsample_channels": [32, 32]},
            "encoder_config": {"image_size": 4, "patch_size": 1},
        },
    ),
    _family(
        "inkling2",
        _blocks,
        text={
            "swa_num_attention_heads": 4,
            "swa_num_key_value_heads": 2,
            "swa_head_dim": 8,
            "sliding_window_size": 24,
            "unpadded_vocab_size": VOCABULARY,
            "d_rel": 4,
            "rel_extent": 64,
        },
        vision={"projection_hidden_dim": 32, "posemb_grid_size": 8},
    ),
]
