"""A small real LLaVA: CLIP vision tower, two-layer projector, Llama, LlavaProcessor; about 0.4 M parameters.

The classes are the ones that a user's own checkpoint has, so whatever runs on this model runs on theirs. Its stage-1
weights come from `attanchor demo-stage1` and are kept in the package (`assets`).
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attanchor_lab.scenes import dataset as scenes

SIDE = scenes.GRID * scenes.CELL
SHIPPED = Path(__file__).parent / "assets"

# The prompt of LLaVA-1.5, with an end-of-turn token behind each answer so that generation learns to stop.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() }}:{% if message['content'] is string %}"
    "{{ ' ' + message['content'] }}{% else %}{% for part in message['content'] %}{% if part['type'] == 'image' %}"
    "{{ ' <image>\n' }}{% else %}{{ (' ' if message['role'] == 'assistant' else '') + part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE: every word of the scenes is one token, every other text falls apart into pieces."""
    words = [*scenes.COLOURS, *scenes.SHAPES, scenes.EMPTY]
    objects = [f"{colour} {shape}" for colour, shape in product(scenes.COLOURS, scenes.SHAPES)]
    corpus = [
        f"USER: \nIs there {article} {name} in the picture? ASSISTANT: yes"
        for name in objects
        for article in ("a", "an")
    ]
    corpus += [f"USER: \nWhere is the {name}? ASSISTANT: no" for name in objects]
    corpus += [
        f"USER: \nWhat colour is the {shape}? ASSISTANT: {place}"
        for shape, place in product(scenes.SHAPES, scenes.PLACES)
    ]
    corpus += [f" {word}" for word in words] * 2
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=["<pad>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        additional_special_tokens=["<image>"],
        padding_side="right",
        model_max_length=1024,
    )


def build_processor() -> LlavaProcessor:
    side = {"height": SIDE, "width": SIDE}
    images = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=side)
    return LlavaProcessor(
        images,
        build_tokenizer(),
        patch_size=scenes.CELL,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        num_additional_image_tokens=1,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """The model with random weights; the caller seeds."""
    tokenizer = processor.tokenizer
    vision = CLIPVisionConfig(
        hidden_size=64,
        intermediate_size=256,
        projection_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=SIDE,
        patch_size=scenes.CELL,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        initializer_range=0.08,  # the default suits widths of thousands: at 64, learning starts too slowly
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=scenes.GRID**2,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def word_id(processor: LlavaProcessor, word: str) -> int:
    """The token of a word as it stands inside a question, with its leading space.

    Raises:
        ValueError: the tokenizer does not have it as one token.
    """
    ids = processor.tokenizer(f" {word}", add_special_tokens=False).input_ids
    if len(ids) != 1:
        raise ValueError(f"{word!r} is {len(ids)} tokens; it should be one")
    return ids[0]
