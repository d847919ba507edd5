"""The smallest model of each family that has all of its parts; random weights."""

from __future__ import annotations

import transformers

PAD, BOS, EOS, IMAGE, VIDEO, START, END, SOUND = range(8)
VOCABULARY = 64
SIDE, PATCH = 16, 4
QWEN_PATCH = 4

TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "tie_word_embeddings": False,
}
# Sections of a head's frequencies for time, height and width.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
VISION_IDS = {"vision_start_token_id": START, "vision_end_token_id": END}


def llava(kind="Llava", **own):
    config = getattr(transformers, f"{kind}Config")(
        vision_config=transformers.CLIPVisionConfig(**TOWER, projection_dim=32),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        tie_word_embeddings=False,
        **own,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def llava_next():
    return llava("LlavaNext", image_grid_pinpoints=PINPOINTS)


def llava_onevision():
    config = transformers.LlavaOnevisionConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=PINPOINTS,
        tie_word_embeddings=False,
    )
    return transformers.LlavaOnevisionForConditionalGeneration(config)


def qwen2_vl():
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": QWEN_PATCH}
    config = transformers.Qwen2VLConfig(
        vision_config={**vision, "spatial_merge_size": 2, "temporal_patch_size": 2},
        text_config={**TEXT, **MROPE},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def qwen2_5_vl():
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config={**TEXT, **MROPE},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen3_vl():
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 32,
        "patch_size": QWEN_PATCH,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    config = transformers.Qwen3VLConfig(
        vision_config=vision,
        text_config={**TEXT, **MROPE},
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        tie_word_embeddings=False,
        **VISION_IDS,
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def internvl():
    config = transformers.InternVLConfig(
        vision_config=transformers.InternVLVisionConfig(
            **{**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
        ),
        text_config=transformers.Qwen2Config(**TEXT),
        image_token_id=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.InternVLForConditionalGeneration(config)


def idefics3(kind="Idefics3"):
    config = getattr(transformers, f"{kind}Config")(
        vision_config=getattr(transformers, f"{kind}VisionConfig")(**TOWER),
        text_config=transformers.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
        tie_word_embeddings=False,
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def smolvlm():
    return idefics3("SmolVLM")


def paligemma():
    config = transformers.PaliGemmaConfig(
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        text_config=transformers.GemmaConfig(**TEXT),
        projection_dim=32,
        image_token_index=IMAGE,
        tie_word_embeddings=False,
    )
    return transformers.PaliGemmaForConditionalGeneration(config)


def gemma3():
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**TOWER, vision_use_head=False),
        # A window shorter than the prompts, on one of the two layers.
        text_config=transformers.Gemma3TextConfig(
            **TEXT, sliding_window=24, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
        ),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
        tie_word_embeddings=False,
    )
    return transformers.Gemma3ForConditionalGeneration(config)
