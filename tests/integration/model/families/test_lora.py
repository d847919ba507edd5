"""LoRA goes on every family's language model and projector, and on nothing of its vision tower."""

import re

import pytest
import torch
from builders import FAMILIES
from table_families import TABLE

from attanchor_vlm.errors import SetupError
from attanchor_vlm.training.lora import add_lora

PROJECTOR = re.compile(
    r"projector|resampler|(?<!vit_)merger|connector|(?<!generation_)aligner|vision_adapter|(embed|layerwise|spatial)_vision"
    r"|(vision|image)_proj|visual_embeddings"
)
LANGUAGE = re.compile(r"(language_model|text_model)\.(?!lm_head)|^model\.layers\.")
FEED_FORWARD = re.compile(r"\.(gate|up|down)_proj$|\.gate$")
# Whose projectors, or parts of them, are a bare parameter, an embedding, a convolution.
WHOLE = ("gemma3", "ovis2", "deepseek_vl_hybrid")
VOCABULARY = ("chameleon", "emu3")  # whose images are words, which nothing projects
UNNAMED = ("inkling_mm_model",)  # whose projector is the last of the tower's layers, called as all are


@pytest.mark.parametrize("family", [*FAMILIES, *TABLE], ids=str)
def test_lora_covers_language_model_and_projector_alone(family):
    with torch.device("meta"):
        model = family.build()
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    if family.name in UNNAMED:
        with pytest.raises(SetupError, match="nothing of a projector is found"):
            add_lora(model, rank=32, alpha=64, dropout=0.05)
        return
    expected = {name for name in linear if PROJECTOR.search(name) or LANGUAGE.search(name)}
    if any("experts" in name and parameter.dim() == 3 for name, parameter in model.named_parameters()):
        expected = {name for name in expected if not FEED_FORWARD.search(name)}
    adapted = add_lora(model, rank=32, alpha=64, dropout=0.05)
    names = {name for name, module in adapted.get_base_model().named_modules() if hasattr(module, "lora_A")}
    assert names == expected
    trained = [name for name, parameter in adapted.named_parameters() if parameter.requires_grad]
    assert any(PROJECTOR.search(name) for name in trained) != (family.name in VOCABULARY)
    assert all("lora_" in name for name in trained) != (family.name in WHOLE)
