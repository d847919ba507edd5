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
QWEN_TOWER = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": QWEN_PATCH,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
# Sections of a head's frequencies for time, height and width.
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}}
PINPOINTS = [[16, 32], [32, 16], [32, 32]]
VISION_IDS = {"vision_start_token_id": START, "vision_end_token_id": END}


def _model(kind, vision, text, **own):
    config = getattr(transformers, f"{kind}Config")(
        vision_config=vision, text_config=text, tie_word_embeddings=False, **own
    )
    return getattr(transformers, f"{kind}ForConditionalGeneration")(config)


def llava(kind="Llava", **own):
    vision = transformers.CLIPVisionConfig(**TOWER, projection_dim=32)
    return _model(kind, vision, transformers.LlamaConfig(**TEXT), image_token_index=IMAGE, **own)


def llava_next():
    return llava("LlavaNext", image_grid_pinpoints=PINPOINTS)


def llava_onevision():
    vision, text = transformers.SiglipVisionConfig(**TOWER), transformers.Qwen2Config(**TEXT)
    ids = {"image_token_index": IMAGE, "video_token_index": VIDEO}
    return _model("LlavaOnevision", vision, text, **ids, image_grid_pinpoints=PINPOINTS)


def _qwen(kind, vision):
    text = {**TEXT, **MROPE}
    return _model(kind, vision, text, image_token_id=IMAGE, video_token_id=VIDEO, **VISION_IDS)


def qwen2_vl():
    own = ("intermediate_size", "out_hidden_size")  # of later ones
    vision = {name: value for name, value in QWEN_TOWER.items() if name not in own}
    return _qwen("Qwen2VL", {**vision, "embed_dim": 32, "mlp_ratio": 2})


def qwen2_5_vl():
    return _qwen("Qwen2_5_VL", {**QWEN_TOWER, "window_size": 16, "fullatt_block_indexes": [1]})


def qwen3_vl():
    return _qwen("Qwen3VL", {**QWEN_TOWER, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]})


def internvl():
    tower = {**TOWER, "image_size": [SIDE, SIDE], "patch_size": [PATCH, PATCH]}
    vision, text = transformers.InternVLVisionConfig(**tower), transformers.Qwen2Config(**TEXT)
    return _model("InternVL", vision, text, image_token_id=IMAGE)


def idefics3(kind="Idefics3"):
    vision = getattr(transformers, f"{kind}VisionConfig")(**TOWER)
    ids = {"image_token_id": IMAGE, "pad_token_id": PAD}
    return _model(kind, vision, transformers.LlamaConfig(**TEXT), **ids, scale_factor=2)


def smolvlm():
    return idefics3("SmolVLM")


def paligemma():
    vision = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
    return _model("PaliGemma", vision, transformers.GemmaConfig(**TEXT), projection_dim=32, image_token_index=IMAGE)


def gemma3():
    vision = transformers.SiglipVisionConfig(**TOWER, vision_use_head=False)
    # A window shorter than the prompts, on one of the two layers.
    layers = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
    text = transformers.Gemma3TextConfig(**TEXT, **layers, query_pre_attn_scalar=8)
    ids = {"image_token_index": IMAGE, "boi_token_index": START, "eoi_token_index": END}
    return _model("Gemma3", vision, text, **ids, mm_tokens_per_image=4)
