"""Weights that are not there are never made up: checkpoints and adapters that lack some, or hold broken ones."""

from __future__ import annotations

import json
import pickle
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from table_families import phi4_multimodal
from tiny_families import TEXT
from transformers import LlamaConfig, Qwen2_5OmniConfig

from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, save_settings
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.load import load, load_pretrained
from attanchor_vlm.training.lora import add_lora


def changed(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})


def spoiled(folder, change):
    """A copy of the shipped model with its weights changed."""
    shutil.copytree(small_llava.SHIPPED, folder)
    changed(folder / "model.safetensors", change)
    return folder


@pytest.mark.parametrize("gone", ["multi_modal_projector", "layers.0.", ""], ids=["projector", "layer", "everything"])
def test_a_model_that_lacks_weights_is_refused(tmp_path, gone):
    def change(tensors):
        for name in [name for name in tensors if gone in name]:
            del tensors[name]

    folder = spoiled(tmp_path / "model", change)
    with pytest.raises(SetupError, match=rf"model {folder} lacks \d+ of its weights, such as \S+, which would be rand"):
        load_pretrained(str(folder))


def test_a_model_with_broken_or_surplus_weights_is_told(tmp_path):
    def broken(tensors):
        tensors[min(tensors)].view(-1)[0] = float("nan")

    def surplus(tensors):
        tensors["nobody.weight"] = tensors[min(tensors)].clone()

    with pytest.raises(SetupError, match="has weights that are NaN or infinite, such as"):
        load_pretrained(str(spoiled(tmp_path / "broken", broken)))
    with pytest.warns(UserWarning, match="has 1 weights that LlavaForConditionalGeneration does not use, such as"):
        load_pretrained(str(spoiled(tmp_path / "surplus", surplus)))


def test_the_config_says_which_auto_class_loads_a_folder(tmp_path, monkeypatch):
    """Phi-4 hears as well: AutoModelForImageTextToText does not know it."""
    processor = SimpleNamespace(image_processor=True, tokenizer=True)  # its own needs torchvision
    monkeypatch.setattr("attanchor_vlm.model.processors.load_processor", lambda folder: processor)
    model = phi4_multimodal()
    model.save_pretrained(tmp_path / "phi4")
    loaded, _ = load_pretrained(str(tmp_path / "phi4"))
    assert type(loaded) is type(model)
    assert all(map(torch.equal, loaded.parameters(), model.parameters()))
    LlamaConfig(**TEXT).save_pretrained(tmp_path / "llama")
    with pytest.raises(SetupError, match=r"LlamaConfig.* for this kind of AutoModel: AutoModelForImageTextToText"):
        load_pretrained(str(tmp_path / "llama"))


def test_what_cannot_be_used_is_told_before_there_are_weights(tmp_path, monkeypatch):
    Qwen2_5OmniConfig().save_pretrained(tmp_path / "omni")
    processor = SimpleNamespace(image_processor=True, tokenizer=True)
    monkeypatch.setattr("attanchor_vlm.model.processors.load_processor", lambda folder: processor)
    with pytest.raises(SetupError, match=r"^AttAnchor cannot .*omni \(qwen2_5_omni\): .* attach to `model.thinker`$"):
        load_pretrained(str(tmp_path / "omni"))
    processor.image_processor = None
    LlamaConfig(**TEXT).save_pretrained(tmp_path / "llama")
    with pytest.raises(SetupError, match=r"llama has no processor for images and text"):
        load_pretrained(str(tmp_path / "llama"))


def test_code_of_a_checkpoint_is_never_run(tmp_path):
    model = tmp_path / "model"
    shutil.copytree(small_llava.SHIPPED, model)
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    with pytest.raises(SetupError, match="cannot be loaded"):
        load_pretrained(str(model))
    assert not (tmp_path / "ran").exists()


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    model, _ = load_pretrained(str(small_llava.SHIPPED))
    add_lora(attach(model, AttAnchorConfig(tau=0.5)), rank=4, alpha=8, dropout=0.0).save_pretrained(folder)
    save_settings(AttAnchorConfig(tau=0.5), folder)
    return folder


def half_of_it(folder):
    def change(tensors):
        for name in sorted(tensors)[::2]:
            del tensors[name]

    changed(folder / "adapter_model.safetensors", change)


def nothing_of_it(folder):
    changed(folder / "adapter_model.safetensors", dict.clear)


def broken_numbers(folder):
    changed(folder / "adapter_model.safetensors", lambda tensors: tensors[min(tensors)].fill_(float("inf")))


def configured(**values):
    def change(folder):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | values))

    return change


class Malicious:
    def __reduce__(self):
        return print, ("this ran",)


def a_pickle(folder):
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"weights": Malicious()}, folder / "adapter_model.bin", pickle_module=pickle)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (half_of_it, r"it lacks \d+ of its \d+ tensors, such as base_model"),
        (nothing_of_it, r"it lacks (\d+) of its \1 tensors"),
        (broken_numbers, "it has tensors that are NaN or infinite, such as base_model"),
        (configured(r=10_000_000), "its rank is 10000000; it should be at most the model's width, 64"),
        (configured(target_modules="(q_proj"), "does not fit model .*unterminated subpattern"),
        (a_pickle, "does not fit model .*Weights only load failed"),
    ],
)
def test_a_damaged_adapter_is_refused(adapter, tmp_path, capsys, spoil, message):
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder)
    load(str(small_llava.SHIPPED), folder)  # as it was, it can be loaded
    spoil(folder)
    with pytest.raises(SetupError, match=message):
        load(str(small_llava.SHIPPED), folder)
    assert "this ran" not in capsys.readouterr().out
