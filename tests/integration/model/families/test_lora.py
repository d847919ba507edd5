"""LoRA goes on every family's language model and projector, and on nothing of its vision tower."""

import re
from types import SimpleNamespace

import pytest
import torch
from builders import BY_NAME, FAMILIES

from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.families import structure
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
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(PROJECTOR.search(name) for name in trained)
    assert not [name for name in trained if "lora_" not in name and family.name != "gemma3"]


def test_a_projector_that_is_not_found_is_no_silence(monkeypatch):
    model = BY_NAME["llava"].model()
    monkeypatch.setattr(structure, "_PROJECTOR", SimpleNamespace(search=lambda name: None))
    with pytest.raises(SetupError, match="nothing of a projector is found in LlavaForConditionalGeneration"):
        add_lora(model, rank=4, alpha=8, dropout=0.0)
