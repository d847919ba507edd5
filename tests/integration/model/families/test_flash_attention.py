"""Flash attention in the language model, where a GPU and the flash-attn package are there.

It takes no mask of its own choosing: padding comes out by lengths, and repeated positions would be read as borders of
packed sequences. So anchors, which lengthen sequences and under M-RoPE repeat positions, are tested with it.
"""

from __future__ import annotations

import pytest
import torch
from builders import FAMILIES
from shared import GREEDY, MIXED, NEW, attached, both_sides
from tiny import difference, plain
from transformers.utils import is_flash_attn_2_available

FLASH = "flash_attention_2"
# PaliGemma and Gemma 3 let tokens see later ones, which flash attention cannot.
CAUSAL = [family for family in FAMILIES if family.name not in ("paligemma", "gemma3")]

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and is_flash_attn_2_available()),
    reason="flash attention needs a GPU and the flash-attn package",
)
every_causal_family = pytest.mark.parametrize("family", CAUSAL, ids=str)


def on_gpu(batch: dict) -> dict:
    return {
        name: value.to("cuda", torch.bfloat16 if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }


def with_attention(model, implementation: str):
    """Of the language model alone: the image encoder, and so what is matched, stays the same."""
    model.set_attn_implementation({"text_config": implementation})
    assert model.config.get_text_config()._attn_implementation == implementation
    return model


@both_sides
@every_causal_family
def test_flash_attention_agrees_with_sdpa(family, side):
    model, batch = attached(family).to("cuda", torch.bfloat16), on_gpu(family.prompts(MIXED, side)[0])
    logits = {}
    for implementation in ("sdpa", FLASH):
        with torch.no_grad():
            found = with_attention(model, implementation)(**batch).logits
        real = model.attanchor_plan.attention_mask.bool()
        assert model.attanchor_plan.is_anchor.any()
        logits[implementation] = found[real].float()
    scale = float(logits["sdpa"].std())
    assert difference(logits["sdpa"], logits[FLASH]) < 0.15 * scale + 0.05


@every_causal_family
def test_a_sample_alone_is_not_cut_at_its_anchors(family):
    """One sample without a mask: where flash attention looks for packed sequences in the positions."""
    model, (_, alone) = attached(family).to("cuda", torch.bfloat16), family.prompts([2])
    batch, logits = on_gpu(alone[0]), []
    del batch["attention_mask"]
    for implementation in ("sdpa", FLASH):
        with torch.no_grad():
            logits.append(with_attention(model, implementation)(**batch).logits.float())
    assert model.attanchor_plan.is_anchor.any()
    assert difference(*logits) < 0.15 * float(logits[0].std()) + 0.05


@every_causal_family
def test_it_generates(family):
    batch = on_gpu(family.prompts(MIXED, "left")[0])
    model = with_attention(attached(family).to("cuda", torch.bfloat16), FLASH)
    tokens = model.generate(**batch, **GREEDY)
    assert tokens.shape[1] == batch["input_ids"].shape[1] + NEW
    assert model.attanchor_plan.is_anchor.any()
    untouched = with_attention(family.model().to("cuda", torch.bfloat16), FLASH)
    assert untouched.generate(**plain(batch), **GREEDY).shape == tokens.shape
