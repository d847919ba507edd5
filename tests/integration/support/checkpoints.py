"""Small random checkpoints of the families on disk, in the files that the Hub's checkpoints of them have.

Tokenizers are byte-level, LLaVA's is Llama's kind; they know each family's markers. Sizes are tiny. Processors are
loaded from their JSON by the package itself, so that nothing here names a class that needs torchvision.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import table_families
import table_sizes
import tiny_families
import transformers
from builders import FAMILIES, Family, square
from PIL import Image
from tiny import CHATML, VICUNA, byte_level_tokenizer, metaspace_tokenizer
from tiny_families import IMAGE, PATCH, PINPOINTS, QWEN_PATCH, SIDE
from tokenizers.pre_tokenizers import Punctuation, Sequence

from attanchor_vlm.model.processors import load_processor

SQUARE = {"height": SIDE, "width": SIDE}
IMAGENET = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_convert_rgb": True}

# As published with Qwen2-VL and Qwen2.5-VL.
QWEN = (
    "{% set image_count = namespace(value=0) %}{% set video_count = namespace(value=0) %}{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    "{% endif %}<|im_start|>{{ message['role'] }}\n{% if message['content'] is string %}{{ message['content'] }}"
    "<|im_end|>\n{% else %}{% for content in message['content'] %}{% if content['type'] == 'image' or 'image' in "
    "content or 'image_url' in content %}{% set image_count.value = image_count.value + 1 %}{% if add_vision_id %}"
    "Picture {{ image_count.value }}: {% endif %}<|vision_start|><|image_pad|><|vision_end|>{% elif content['type'] == "
    "'video' or 'video' in content %}{% set video_count.value = video_count.value + 1 %}{% if add_vision_id %}Video "
    "{{ video_count.value }}: {% endif %}<|vision_start|><|video_pad|><|vision_end|>{% elif 'text' in content %}"
    "{{ content['text'] }}{% endif %}{% endfor %}<|im_end|>\n{% endif %}{% endfor %}{% if add_generation_prompt %}"
    "<|im_start|>assistant\n{% endif %}"
)
INTERNVL = CHATML.replace("<image>", "<IMG_CONTEXT>")
SMOLVLM = (  # as published with SmolVLM and Idefics3
    "<|im_start|>{% for message in messages %}{{message['role'] | capitalize}}{% if message['content'][0]['type'] == "
    "'image' %}{{':'}}{% else %}{{': '}}{% endif %}{% for line in message['content'] %}{% if line['type'] == 'text' %}"
    "{{line['text']}}{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>\n"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
# As Gemma's writes it: BOS, texts without the space around them, the assistant is called model.
GEMMA = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{% for part in ([{'type': 'text', 'text': m['content']}] if m['content'] is string else m['content']) %}"
    "{% if part['type'] == 'image' %}<start_of_image>{% else %}{{ part['text'] | trim }}{% endif %}{% endfor %}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
VISION = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
TILES = {
    "size": {"longest_edge": 2 * SIDE},
    "max_image_size": {"longest_edge": SIDE},
    "do_image_splitting": True,
    **IMAGENET,
}


def tokenizer(markers: list[str] | None = None, **named: str) -> transformers.PreTrainedTokenizerFast:
    """With further special tokens, and those that processors ask their tokenizer for by name."""
    plain = byte_level_tokenizer()
    plain.add_special_tokens({"additional_special_tokens": [*(markers or ()), *named.values()]})
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=plain.backend_tokenizer,
        pad_token=plain.pad_token,
        bos_token=plain.bos_token,
        eos_token=plain.eos_token,
        extra_special_tokens=named or ["<image>", *(markers or ())],
    )


def _write(folder: Path, tokens: Any, template: str | None, **files: dict[str, Any]) -> None:
    tokens.save_pretrained(folder)
    if template is not None:
        files["chat_template"] = {"chat_template": template}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")


def _qwen(folder: Path, name: str) -> None:
    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}.get(name, "Qwen3VL")
    images = {
        "image_processor_type": "Qwen2VLImageProcessor" + "Fast" * (kind == "Qwen3VL"),
        "processor_class": f"{kind}Processor",
        "patch_size": QWEN_PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "min_pixels": 4 * (2 * QWEN_PATCH) ** 2,
        "max_pixels": 12 * (2 * QWEN_PATCH) ** 2,
        **IMAGENET,
    }
    if kind == "Qwen3VL":  # its files say it so
        images["size"] = {"shortest_edge": images.pop("min_pixels"), "longest_edge": images.pop("max_pixels")}
    _write(folder, tokenizer(VISION), QWEN, preprocessor_config=images)


def _glm4v(folder: Path, name: str) -> None:
    kind = "Glm46V" if name == "glm46v" else "Glm4v"
    images = {
        "image_processor_type": f"{kind}ImageProcessor",
        "processor_class": f"{kind}Processor",
        "patch_size": QWEN_PATCH,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 8 * (2 * QWEN_PATCH) ** 2, "longest_edge": 24 * (2 * QWEN_PATCH) ** 2},
        **IMAGENET,
    }
    markers = [f"<|{part}{kind}|>" for kind in ("image", "video") for part in ("begin_of_", "", "end_of_")]
    template = CHATML.replace("<image>\n", "<|begin_of_image|><|image|><|end_of_image|>")
    _write(folder, tokenizer(markers), template, preprocessor_config=images)


def _paddleocr_vl(folder: Path, name: str) -> None:
    images = {
        "image_processor_type": "PaddleOCRVLImageProcessor",
        "processor_class": "PaddleOCRVLProcessor",
        "patch_size": QWEN_PATCH,
        "merge_size": 2,
        "size": {"shortest_edge": 4 * (2 * QWEN_PATCH) ** 2, "longest_edge": 12 * (2 * QWEN_PATCH) ** 2},
        **IMAGENET,
    }
    template = CHATML.replace("<image>\n", "<|IMAGE_START|><|IMAGE_PLACEHOLDER|><|IMAGE_END|>")
    tokens = tokenizer(["<|IMAGE_START|>", "<|IMAGE_END|>"], image_token="<|IMAGE_PLACEHOLDER|>")
    _write(folder, tokens, template, preprocessor_config=images)


def _mistral3(folder: Path, name: str) -> None:
    images = {"image_processor_type": "PixtralImageProcessor", "size": {"longest_edge": 24}, **IMAGENET}
    own = {"patch_size": PATCH, "spatial_merge_size": 2, "processor_class": "PixtralProcessor"}
    markers = ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    template = CHATML.replace("<image>\n", "[IMG]")
    _write(folder, tokenizer(markers), template, preprocessor_config=images, processor_config=own)


def _aya_vision(folder: Path, name: str) -> None:
    images = {"image_processor_type": "GotOcr2ImageProcessor", "size": SQUARE, "max_patches": 4, **IMAGENET}
    own = {"patch_size": PATCH, "img_size": SIDE, "downsample_factor": 2, "processor_class": "AyaVisionProcessor"}
    tiles = ["TILE_GLOBAL", *(f"TILE_{tile + 1}" for tile in range(4))]
    markers = ["<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", *tiles]
    _write(folder, tokenizer(markers), CHATML, preprocessor_config=images, processor_config=own)


def _phi4_multimodal(folder: Path, name: str) -> None:
    images = {"image_processor_type": "Phi4MultimodalImageProcessor", "dynamic_hd": 2, **IMAGENET}
    images |= {"size": {"height": PHI4_SIDE, "width": PHI4_SIDE}, "patch_size": 1}
    sound = {"feature_extractor_type": "Phi4MultimodalFeatureExtractor"}
    own = {"processor_class": "Phi4MultimodalProcessor", "image_processor": images, "audio_processor": sound}
    template = CHATML.replace("<image>\n", "<|endoftext10|>")
    tokens = tokenizer(image_token="<|endoftext10|>", audio_token="<|endoftext11|>")
    _write(folder, tokens, template, preprocessor_config={**images, **sound}, processor_config=own)


def _gemma4(folder: Path, name: str) -> None:
    named = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
    named |= {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"}
    named |= {"video_token": "<|video|>"}
    turns = {"sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}
    images = {"image_processor_type": "Gemma4ImageProcessor", "patch_size": PATCH, "max_soft_tokens": 70, **IMAGENET}
    parts = {"feature_extractor": {"feature_extractor_type": "Gemma4AudioFeatureExtractor"}, "image_processor": images}
    own = {"image_seq_length": 70, "processor_class": "Gemma4Processor", **parts}
    template = GEMMA.replace("<start_of_image>", "<|image|>")
    _write(folder, tokenizer(**named, **turns), template, preprocessor_config=images, processor_config=own)


def _internvl(folder: Path, name: str) -> None:
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    images = {"image_processor_type": "GotOcr2ImageProcessorFast", "size": SQUARE, "max_patches": 6, **IMAGENET}
    own = {"image_seq_length": 4, "processor_class": "InternVLProcessor"}
    _write(folder, tokenizer(**named), INTERNVL, preprocessor_config=images, processor_config=own)


def _llava(folder: Path, name: str) -> None:
    images = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": SIDE},
        "crop_size": SQUARE,
        "do_center_crop": True,
        **IMAGENET,
    }
    own = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": "default",
        "num_additional_image_tokens": 1,
        "processor_class": "LlavaProcessor",
    }
    if name == "llava_next":
        images |= {"image_processor_type": "LlavaNextImageProcessor", "image_grid_pinpoints": PINPOINTS}
        own |= {"processor_class": "LlavaNextProcessor"}
    if name == "llava_onevision":
        images |= {
            "image_processor_type": "LlavaOnevisionImageProcessor",
            "image_grid_pinpoints": PINPOINTS,
            "do_center_crop": False,
            "size": SQUARE,
        }
        own = {"num_image_tokens": (SIDE // PATCH) ** 2, "vision_feature_select_strategy": "full"}
        own |= {"processor_class": "LlavaOnevisionProcessor"}
        del images["crop_size"]
        markers = ["<video>"]
    else:
        markers = []
    if name == "llava":  # as LLaVA-1.5 is: Llama's kind of tokenizer, Vicuna's prompts
        tokens = metaspace_tokenizer()
        # So little text was it trained on that "dog?" has become one token; in Llama's, signs are tokens of their own.
        words = tokens.backend_tokenizer.pre_tokenizer
        tokens.backend_tokenizer.pre_tokenizer = Sequence([words, Punctuation()])
        _write(folder, tokens, VICUNA, preprocessor_config=images, processor_config=own)
    else:
        _write(folder, tokenizer(markers), CHATML, preprocessor_config=images, processor_config=own)


def _idefics(folder: Path, name: str) -> None:
    kind = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}[name]
    rows = [f"<row_{row + 1}_col_{column + 1}>" for row in range(2) for column in range(2)]
    markers = [*rows, "<fake_token_around_image>", "<global-img>", "<end_of_utterance>"]
    images = {"image_processor_type": f"{kind}ImageProcessor", **TILES}
    own = {"image_seq_len": 4, "processor_class": f"{kind}Processor"}
    _write(folder, tokenizer(markers), SMOLVLM, preprocessor_config=images, processor_config=own)


def _gemma3(folder: Path, name: str) -> None:
    named = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    named |= {"sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}
    images = {"image_processor_type": "Gemma3ImageProcessor", "size": SQUARE, "do_pan_and_scan": None, **IMAGENET}
    own = {"image_seq_length": 4, "processor_class": "Gemma3Processor"}
    _write(folder, tokenizer(**named), GEMMA, preprocessor_config=images, processor_config=own)


def _paligemma(folder: Path, name: str) -> None:
    images = {"image_processor_type": "SiglipImageProcessor", "image_seq_length": (SIDE // PATCH) ** 2, "size": SQUARE}
    files = {**IMAGENET, **images, "processor_class": "PaliGemmaProcessor"}
    _write(folder, tokenizer(), None, preprocessor_config=files)


WRITERS = {
    **dict.fromkeys(("llava", "llava_next", "llava_onevision"), _llava),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl"), _qwen),
    "internvl": _internvl,
    **dict.fromkeys(("idefics3", "smolvlm"), _idefics),
    "paligemma": _paligemma,
    "gemma3": _gemma3,
}
# Of the families that are served by facts alone, some that are used most.
FURTHER = {
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen3_vl_moe"), _qwen),
    "gemma4": _gemma4,
    **dict.fromkeys(("glm4v", "glm46v"), _glm4v),
    "mistral3": _mistral3,
    "aya_vision": _aya_vision,
    "paddleocr_vl": _paddleocr_vl,
    "phi4_multimodal": _phi4_multimodal,
}
# What the processors of some cannot do without.
NEEDS = {"smolvlm": "num2words", "mistral3": "torchvision", "phi4_multimodal": "torchvision"}
PHI4_SIDE = 32  # its processor counts 16 x 16 tokens a view, each of 2 x 2 patches
LOCATIONS = 1024 + 128  # tokens that PaliGemma's processor adds


def write(folder: Path, name: str, monkeypatch: Any) -> tuple[Any, Any]:
    """Write a checkpoint of a family into `folder`; its model, in evaluation mode, and its processor as loaded."""
    if name in NEEDS:
        pytest.importorskip(NEEDS[name], reason=f"transformers' processor of {name} needs it")
    folder.mkdir(parents=True, exist_ok=True)
    (WRITERS | FURTHER)[name](folder, name)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)
    size = len(tokens) + LOCATIONS * (name == "paligemma")
    monkeypatch.setitem(tiny_families.TEXT, "vocab_size", size)
    for field in ("vocab_size", "vocab_size_per_layer_input"):
        monkeypatch.setitem(table_sizes.TEXT, field, size)
    phi4 = functools.partial(table_families.phi4_multimodal, image_size=PHI4_SIDE, crop_size=PHI4_SIDE, patch_size=1)
    further = [*table_families.TABLE, Family("phi4_multimodal", phi4, square)]
    model = next(family for family in (*FAMILIES, *further) if family.name == name).model()
    _set_token_ids(model.config, tokens)
    model.save_pretrained(folder)
    return model, load_processor(str(folder))


def _set_token_ids(config: Any, tokens: Any) -> None:
    known, parts = tokens.get_vocab(), [config, config.vision_config, getattr(config, "audio_config", None)]
    for name, markers in {
        "image_token_id": (
            *("<|image_pad|>", "<IMG_CONTEXT>", "<image_soft_token>", "<|image|>"),
            *("[IMG]", "<|IMG_PATCH|>", "<|IMAGE_PLACEHOLDER|>", "<|endoftext10|>", "<image>"),
        ),
        "audio_token_id": ("<|endoftext11|>",),
        "video_token_id": ("<|video_pad|>", "<video>", "<|video|>"),
        "image_end_token_id": ("<|end_of_image|>",),
        "eoi_token_id": ("<image|>",),
        "vision_start_token_id": ("<|vision_start|>",),
        "vision_end_token_id": ("<|vision_end|>",),
        "boi_token_index": ("<start_of_image>",),
        "eoi_token_index": ("<end_of_image>",),
    }.items():
        for part in (part for part in parts if hasattr(part, name)):
            for marker in (marker for marker in markers if marker in known):
                setattr(part, name, known[marker])
                break
    assert getattr(config, "image_token_id", None) != IMAGE or "<image>" in known


def picture(index: int) -> Image.Image:
    """Noise, of a shape that differs by index; none is a square."""
    height, width = [(20, 30), (33, 18), (17, 44)][index % 3]
    return Image.fromarray(np.random.default_rng(index).integers(0, 255, (height, width, 3), dtype=np.uint8))
