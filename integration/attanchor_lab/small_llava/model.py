"""A small real LLaVA: CLIP vision tower, two-layer projector, Llama, LlavaProcessor; about 0.4 M parameters.

The classes are the ones that a user's own checkpoint has, so whatever runs on this model runs on theirs. It is kept in
the package (`assets`): the sizes; a byte-level BPE in which every word of the scenes is one token, and every other text
falls apart into pieces; LLaVA-1.5's prompt, with an end-of-turn token behind each answer so that generation learns to
stop; and stage-1 weights, which `attanchor demo-stage1` makes.
"""

from __future__ import annotations

from pathlib import Path

from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attanchor_lab.scenes import dataset as scenes

SIDE = scenes.GRID * scenes.CELL
SHIPPED = Path(__file__).parent / "assets"


def build_processor() -> LlavaProcessor:
    processor = LlavaProcessor.from_pretrained(SHIPPED)
    processor.image_processor = CLIPImageProcessorPil.from_pretrained(SHIPPED)
    return processor


def build_model() -> LlavaForConditionalGeneration:
    """The model with random weights; the caller seeds."""
    model = LlavaForConditionalGeneration(LlavaConfig.from_pretrained(SHIPPED))
    model.generation_config = GenerationConfig.from_pretrained(SHIPPED)
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
