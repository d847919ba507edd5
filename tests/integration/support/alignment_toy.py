"""A CLIP that knows nothing, and words to ask it about."""

from __future__ import annotations

import torch
from tiny import byte_level_tokenizer
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attanchor_vlm.data.rows import Sample

WORDS = ["red", "dog", "sky", "small cube", "grey"]


def make_clip(folder):
    """A tiny random CLIP with its processor: 4 x 4 patches."""
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        projection_dim=24,
        logit_scale_init_value=2.0,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side), tokenizer).save_pretrained(folder)
    return folder


def sample(name: str | None, question: str, answer: str, row: int = 0) -> Sample:
    return Sample(row, (("user", question), ("assistant", answer)), (name,) if name else ())
