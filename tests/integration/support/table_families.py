"""Small random models of the families that are served by facts alone: one line each."""

from __future__ import annotations

from typing import Any

import table_images as images
import table_sizes
import tiny_families
from builders import TILES, Family, grid, square, tiled
from tiny_families import END, IMAGE, PATCH, PINPOINTS, SIDE, START, VOCABULARY
from transformers import AutoConfig

from attanchor_vlm.model.load import auto_class


def _family(
    name: str, image: Any, *, text: Any = None, vision: Any = None, own: Any = None, tower: Any = None, **facts: Any
) -> Family:
    """`tower`: in place of one of timm's, which is not installed."""
    parts = {name: part for name, part in (("text_config", text), ("vision_config", vision)) if part}

    def build() -> Any:
        made = table_sizes.config(name, {**(own or {}), **parts})
        if tower is not None:
            object.__setattr__(made, "vision_config", AutoConfig.for_model(**tower))
        return auto_class(made).from_config(made)

    return Family(name, build, image, **{"routes": ("ids",), **facts})


MROPE = {"image": grid, "token_types": "mm_token_type_ids", "inherits": True}
STILL = {**MROPE, "image": images.still}
BOTH = {"routes": ("ids", "embeds")}


def _rope(*sections: int, **further: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [*sections], **further}}


SECTIONS, GLM = _rope(2, 1, 1), _rope(2, 1, 1, partial_rotary_factor=1.0)
HYBRID = {**SECTIONS, "layer_types": ["linear_attention", "full_attention"]}
KINDS = ("full_attention", "sliding_attention")
DEEPSTACK = {"deepstack_visual_indexes": [0, 1]}
LOCAL = {"image": images.local, "stack": images.locals, **BOTH}
MINICPM = {"image": images.targets, "stack": images.in_a_row, **BOTH, "text": HYBRID, "own": {"image_size": SIDE}}
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
INKLING = {
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    "sliding_window_size": 24,
    "d_rel": 4,
    "rel_extent": 64,
}
MUSE = {
    "text": {"layer_rope_theta": [10000.0, 0]},
    "vision": {"pos_emb_height": 8, "pos_emb_width": 8, "max_position_embeddings": 64},
}
MUSE_PROJECTOR = {"out_hidden_size": 128, "projector_hidden_size": 32}
MUSE_EARS = {"num_hidden_layers": 1, "patch_sizes": [4], "hidden_sizes": [16], "depths": [1], "out_hidden_size": 32}
SAM = {"global_attn_indexes": [1], "window_size": 4, "output_channels": 32}
# Words of the vocabulary that stand for what an image is made of, behind all others.
CODES = range(VOCABULARY, VOCABULARY + 64)
VQ = {"base_channels": 32, "channel_multiplier": [1, 1, 1], "num_res_blocks": 1}
OMNI = {"audio_config": {"n_window": 4, "num_mel_bins": 16, "max_source_positions": 16}, "vision_start_token_id": START}

TABLE = [
    _family("qwen3_5", **MROPE, **BOTH, text=HYBRID),
    _family("qwen3_5_moe", **MROPE, **BOTH, text=HYBRID),
    _family("gemma4", images.positioned, token_types="mm_token_type_ids", text=BIDIRECTIONAL, vision=GEMMA4_TOWER),
    _family("qwen3_vl_moe", **MROPE, text=SECTIONS, vision=DEEPSTACK),
    _family("mistral3", images.sized, **BOTH),
    _family("glm4v", **MROPE, **BOTH, text=GLM),
    _family("glm46v", **MROPE, **BOTH, text=GLM),
    _family("glm4v_moe", **MROPE, **BOTH, text=GLM),
    _family("glm_ocr", **MROPE, **BOTH, text=GLM),
    _family("paddleocr_vl", **STILL, **BOTH, text=SECTIONS),
    _family("kimi_k25", images.still, **BOTH, text={"num_key_value_heads": 4}, own={"projection_hidden_size": 32}),
    _family("lfm2_vl", images.shaped, **BOTH, own={"projector_hidden_size": 32}),
    _family("lighton_ocr", images.sized, **BOTH),
    _family("minicpmv4_6", **MINICPM, vision={"insert_layer_id": 0}),
    _family("qwen2_5_omni_thinker", grid, inherits=True, **BOTH, text=SECTIONS, own=OMNI),
    _family("qwen3_omni_moe_thinker", grid, inherits=True, text=SECTIONS, vision=DEEPSTACK, own=OMNI),
    _family("aya_vision", square, **BOTH),
    _family("cohere2_vision", square, **BOTH, own={"alignment_intermediate_size": 64}),
    _family("got_ocr2", square, **BOTH),
    _family("idefics2", **TILES, **BOTH),
    _family("aria", square, **BOTH, own={"projector_patch_to_query_dict": {16: 4}}),
    _family("deepseek_vl", square, **BOTH),
    _family("llava_next_video", tiled, newlines=True, **BOTH, own={"image_grid_pinpoints": PINPOINTS}),
    _family("video_llava", images.video_llava, **BOTH),
    _family("vipllava", square, **BOTH, own={"vision_feature_layer": [-1, -2]}),
    _family("video_llama_3", images.merged, **BOTH),
    _family("exaone4_5", grid, text=WINDOWED),
    _family(
        "ernie4_5_vl_moe",
        **{**MROPE, "image": images.flat},
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
    _family("mistral_large4", images.sized, **BOTH, text={"num_key_value_heads": 4}),
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
    _family("cosmos3_omni", **MROPE, text=SECTIONS, vision=DEEPSTACK),
    _family("hyperclovax_vision_v2", grid),
    _family("qianfan_ocr", square, **BOTH),
    _family(
        "gemma4_unified",
        images.large_patches,
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
        newlines=True,
        **{**MROPE, "image": images.flat},
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
        **LOCAL,
        text={
            "rope_parameters": {kind: {"rope_type": "default", "rope_theta": 10000.0} for kind in KINDS},
            "num_sliding_attention_heads": 4,
            "share_expert_dim": 16,
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": 24,
            **SPARSE,
        },
    ),
    _family(
        "molmo2",
        images.pooled,
        stack=images.pooled_together,
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
        images.unmasked,
        stack=TILES["stack"],
        vision={"scale_factor": 2, "deepstack_visual_indexes": [0]},
        text={},
    ),
    _family("minicpm_ocr", **MINICPM),
    _family("minicpmv4_7", **MINICPM, token_types="mm_token_type_ids", inherits=True),
    _family(
        "cohere_compass",
        **MROPE,
        text={
            "rope_parameters": {kind: {**SECTIONS["rope_parameters"]} for kind in KINDS},
            "layer_types": ["full_attention", "full_attention"],
        },
        vision={"deepstack_visual_indexes": [0]},
    ),
    _family("cosmos3_edge", **{**MROPE, "image": images.flat}, text=SECTIONS),
    _family(
        "deepseek_ocr2",
        **LOCAL,
        text={"num_experts_per_tok": 2, "max_position_embeddings": 4096, **SPARSE},
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
        images.one_tile,
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
    _family("deepseek_vl_hybrid", images.twice, own={"high_res_vision_config": SAM}),
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
        newlines=True,
        vision={
            "sam_config": {**SAM, "downsample_channels": [32, 32]},
            "encoder_config": {"image_size": 4, "patch_size": 1},
        },
    ),
    _family(
        "inkling2",
        images.blocks,
        text={**INKLING, "unpadded_vocab_size": VOCABULARY},
        vision={"projection_hidden_dim": 32, "posemb_grid_size": 8},
    ),
    _family(
        "inkling_mm_model",
        images.folded,
        **BOTH,
        text={
            **INKLING,
            "layer_types": ["hybrid", "hybrid_sliding"],
            "mlp_layer_types": ["dense", "sparse"],
            "logits_mup_width_multiplier": 1.0,
        },
        vision={"num_hidden_layers": 4},
        own={"audio_config": {"n_mel_bins": 8, "mel_vocab_size": 16}},
    ),
    _family(
        "nemotron_h_omni",
        images.high_and_wide,
        **BOTH,
        text={
            "layers_block_type": ["linear_attention", "full_attention", "moe"],
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 16,
            "moe_shared_expert_intermediate_size": 16,
        },
        vision={"max_img_size": 64, "video_temporal_patch_size": 2},
        own={"vision_hidden_size": 32, "projector_hidden_size": 32},
    ),
    _family(
        "dots3_note",
        images.flat,
        **BOTH,
        text={
            **{"layer_types": ["indexed_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"]},
            **{"num_key_value_heads": 4, "head_dim": 16, "shared_experts_intermediate_size": 16},
            **{"index_topk": 256, "index_head_dim": 8, "index_n_heads": 2},
            **{"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16},
            **{"swa_kv_lora_rank": 8, "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8},
        },
        vision={"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["dense", "dense"]},
        own={"audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32}},
    ),
    _family(
        "chameleon",
        square,
        **BOTH,
        own={
            **{name: value for name, value in tiny_families.TEXT.items() if name != "head_dim"},
            "vocab_size": CODES.stop,
            # Digits are letters here: A for 0.
            "vocabulary_map": {
                "<image>": IMAGE,
                **{
                    f"IMGIMG{''.join('ABCDEFGHIJ'[int(digit)] for digit in str(code))}Z": at
                    for code, at in enumerate(CODES)
                },
            },
            "vq_config": {**VQ, "latent_channels": 32, "embed_dim": 32, "num_embeddings": len(CODES)},
        },
    ),
    _family(
        "emu3",
        images.sized,
        newlines=True,
        **BOTH,
        text={"vocab_size": CODES.stop + 1},
        own={
            "vocabulary_map": {
                "<image>": IMAGE,
                "<|extra_200|>": CODES.stop,
                **{f"<|visual token {code:06}|>": at for code, at in enumerate(CODES)},
            },
            "vq_config": {**VQ, "attn_resolutions": [2], "hidden_size": 32, "codebook_size": len(CODES)},
        },
    ),
]


def phi4_multimodal(**vision: Any) -> Any:
    """Which has no `get_image_features`: its test makes its own prompts."""
    text = {name: value for name, value in tiny_families.TEXT.items() if name != "head_dim"}
    parts = {
        "max_position_embeddings": 4096,
        "vision_config": {"crop_size": SIDE, "image_token_id": IMAGE, "feature_layer": -1, **vision},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 8,
            "input_size": 16,
        },
    }
    config = table_sizes.config("phi4_multimodal", {**text, **parts})
    return auto_class(config).from_config(config)
