"""Tiny random LLaVAs, tokenizers and processors, and the prompts that the integration tests put to them."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from tiny_families import BOS, IMAGE, PAD, PATCH, SIDE, TEXT, TOWER, VOCABULARY
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

PATCHES = (SIDE // PATCH) ** 2

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>\n{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As published with LLaVA-1.5: images first, nothing but a space behind an answer.
VICUNA = (
    "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['role'].upper() + ': ' }}{% endif %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% for p in m['content'] | selectattr('type', 'equalto', 'text') %}{{ p['text'] + ' ' }}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def tiny_llava(**text_options) -> LlavaForConditionalGeneration:
    """Two layers each of vision and text, hidden size 32, 16 patches an image; random weights, evaluation mode."""
    torch.manual_seed(0)
    own = {"vocab_size": VOCABULARY, "max_position_embeddings": 512, "initializer_range": 0.3}
    vision, text = CLIPVisionConfig(**TOWER, projection_dim=32), LlamaConfig(**{**TEXT, **own, **text_options})
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, image_seq_length=PATCHES)
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
    return model


def prompts(images: list[int], side: str = "right", seed: int = 0, words: int = 6) -> dict[str, Tensor]:
    """A batch with `images[b]` images in sample b: BOS, some text, each image with text behind it. Lengths differ.

    `anchor_mask` selects the text behind the first image, less the last two tokens (as a generation prompt would be).
    """
    generator = torch.Generator().manual_seed(seed)
    rows, masks = [], []
    for sample, count in enumerate(images):
        row = [BOS, *_words(2 + sample, generator)]
        mask = [False] * len(row)
        for _ in range(count):
            text = _words(words + sample, generator)
            row += [IMAGE] * PATCHES + text
            mask += [False] * PATCHES + [True] * (len(text) - 2) + [False, False]
        rows.append(row)
        masks.append(mask)
    length = max(map(len, rows))

    batch = {
        "input_ids": torch.tensor([pad(row, PAD, length, side) for row in rows]),
        "attention_mask": torch.tensor([pad([1] * len(row), 0, length, side) for row in rows]),
        "anchor_mask": torch.tensor([pad(mask, False, length, side) for mask in masks]),
    }
    if sum(images):
        batch["pixel_values"] = torch.randn(sum(images), 3, SIDE, SIDE, generator=generator)
    return batch


def pad(values: list, value: object, length: int, side: str) -> list:
    filler = [value] * (length - len(values))
    return filler + values if side == "left" else values + filler


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(4, VOCABULARY, (count,), generator=generator).tolist()


def plain(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batch as a model without anchors takes it."""
    return {name: value for name, value in batch.items() if name != "anchor_mask"}


def own_logits(model, logits: Tensor) -> Tensor:
    """The logits at the caller's own tokens, in order, of all samples in one (tokens, V)."""
    plan = model.attanchor_plan
    return logits[(plan.source >= 0) & ~plan.is_anchor]


def with_labels(batch: dict[str, Tensor], answers: int = 3) -> dict[str, Tensor]:
    """The batch with the last `answers` tokens of each sample supervised."""
    rank = batch["attention_mask"].flip(-1).cumsum(-1).flip(-1)
    supervised = (rank <= answers) & batch["attention_mask"].bool()
    return {**batch, "labels": batch["input_ids"].masked_fill(~supervised, -100)}


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


CORPUS = [
    "What is to the left of the red dog? It is a small blue cube.",
    "USER: ASSISTANT: user assistant system You are a helpful assistant.",
    "Is there a cat in the picture? Yes, there are two cats. No. And now? The sky is grey.",
]


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    special = ["<pad>", "<s>", "</s>", "<image>", "<|im_start|>", "<|im_end|>"]
    _train(tokenizer, pre_tokenizers.ByteLevel.alphabet(), special)
    return _wrap(tokenizer, eos="<|im_end|>")


def metaspace_tokenizer(split: bool = True) -> PreTrainedTokenizerFast:
    """Llama's kind: spaces become ▁, BOS in front. With `split=False`, tokens may reach over spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=split)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first", split=split)
    alphabet = sorted(set("".join(CORPUS)) | set("\n▁<>|_0123456789"))
    _train(tokenizer, alphabet, ["<pad>", "<s>", "</s>", "<image>", "<unk>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _wrap(tokenizer, eos="</s>")


def _train(tokenizer: Tokenizer, alphabet: list[str], special: list[str]) -> None:
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)


def _wrap(tokenizer: Tokenizer, eos: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token=eos,
        extra_special_tokens=["<image>", "<|im_start|>"] if "im_end" in eos else ["<image>"],
    )


def llava_processor(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaProcessor:
    side = {"height": SIDE, "width": SIDE}
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side),
        tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        chat_template=template,
        num_additional_image_tokens=1,
    )


def picture(seed: int = 0) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)
    return Image.fromarray(noise)
