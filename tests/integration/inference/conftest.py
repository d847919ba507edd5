"""A sample as `attanchor sample` writes it, and its model with anchors; one for each file."""

from __future__ import annotations

import pytest
import torch
from infer_toy import TAU
from peft import LoraConfig, get_peft_model

from attanchor_lab.sample import write_sample
from attanchor_vlm import load, save_settings
from attanchor_vlm.training.lora import lora_targets


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infer") / "sample"
    write_sample(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(sample):
    return load(str(sample / "model"), tau=TAU)


@pytest.fixture(scope="module")
def adapter(sample, tmp_path_factory):
    """An adapter that changes both the language model and the projector, much enough to change answers."""
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load(str(sample / "model"), tau=-1, max_anchors=3)  # what random adapters leave of the scores is low
    torch.manual_seed(1)
    targets = LoraConfig(r=4, lora_alpha=16, target_modules=lora_targets(model), init_lora_weights=False)
    wrapped = get_peft_model(model, targets)
    wrapped.save_pretrained(folder)
    save_settings(wrapped, folder)
    return folder
