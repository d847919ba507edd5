"""LoRA goes on every family's language model and projector, and on nothing of its vision tower."""

import re

import pytest
import torch
from builders import FAMILIES

from attanchor_vlm.training.lora import add_lora

PROJECTOR = re.compile(r"multi_modal_projector|visual\.(merger|deepstack)|connector")
LANGUAGE = re.compile(r"(language_model|text_model)\.layers\.")


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_lora_covers_language_model_and_projector_alone(family):
    model = family.model()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {name for name in linear if PROJECTOR.search(name) or LANGUAGE.search(name)}
    adapted = add_lora(model, rank=32, alpha=64, dropout=0.05)
    names = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert names == expected
    assert any(PROJECTOR.search(name) for name in names) != (family.name == "gemma3")
