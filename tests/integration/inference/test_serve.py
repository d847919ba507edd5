"""Serving by prompt embeddings: adapters merged, settings kept, rows made without the language model's layers."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_llava
from transformers import AutoConfig, AutoModelForCausalLM

from attanchor_vlm import AttAnchorConfig, attach, cli, load_settings
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.inference import export as serve
from attanchor_vlm.inference.export import ServingError, prompt_embeds
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.load import load
from attanchor_vlm.training.lora import lora_targets

QUESTION = "Where is the purple triangle?"
TAU = 0.5


@pytest.fixture
def image(sample):
    return infer.open_image(sorted((sample / "images").iterdir())[1])


def chat(text=QUESTION, images=1):
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": text}]}]


@torch.no_grad()
def said_by(plain, rows, processor):
    mask = torch.ones(1, len(rows), dtype=torch.int64)
    tokens = plain.generate(inputs_embeds=rows[None], attention_mask=mask, max_new_tokens=8, do_sample=False)
    return processor.tokenizer.decode(tokens[0], skip_special_tokens=True).strip()


def export(capsys, *arguments):
    assert cli.main(["export-lm", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_an_adapter_is_merged_and_its_settings_are_kept(sample, adapter, image, tmp_path, capsys):
    said = export(capsys, "--model", sample / "model", "--adapter", adapter, "--output", tmp_path / "lm")
    assert said["architecture"] == "LlamaForCausalLM"
    assert said["settings"] == "attanchor.json"
    modes = {path.stat().st_mode for path in (tmp_path / "lm").iterdir()}
    assert len(modes) == 1  # the weights' too: as the umask says
    kept = load_settings(tmp_path / "lm")
    assert (kept.tau, kept.max_anchors) == (-1, 3)

    model, processor = load(str(sample / "model"), adapter)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm").eval()
    expected = infer.answer(model, processor, QUESTION, [image], max_new_tokens=8)
    assert expected.inserted == 3
    assert said_by(plain, prompt_embeds(model, processor, chat(), [image]).embeds, processor) == expected.text

    # The adapter matters: without it, in either half, something else is said.
    base, _ = load(str(sample / "model"), tau=TAU)
    rows = prompt_embeds(model, processor, chat(), [image]).embeds
    assert not torch.equal(rows, prompt_embeds(base, processor, chat(), [image]).embeds)
    with torch.no_grad():
        logits = model.get_base_model()(inputs_embeds=rows[None]).logits
        assert torch.allclose(plain(inputs_embeds=rows[None]).logits, logits, atol=1e-4)
        assert not torch.allclose(base(inputs_embeds=rows[None]).logits, logits, atol=1)


@pytest.mark.parametrize(
    "settings",
    [
        {"tau": 1},
        {"tau": TAU, "route": "ids"},
        {"tau": TAU, "max_anchors": 1},
        {"tau": TAU, "content_words": True},
        {"tau": 0.6, "direction": "image_into_text"},
        {"tau": 0.6, "direction": "image_into_text", "pause_tokens": 2, "pause_token_id": 5},
        {"tau": 1, "direction": "image_into_text", "pause_tokens": 2, "pause_token_id": 5},
    ],
    ids=lambda settings: ", ".join(map(str, settings.values())),
)
def test_rows_follow_the_settings(settings, sample, image):
    model, processor = load(str(sample / "model"), tau=0.5)
    attach(model, AttAnchorConfig(**settings))
    plain = serve.language_model(model)
    expected = infer.answer(model, processor, QUESTION, [image, image], max_new_tokens=8)
    assert bool(expected.inserted) == (settings["tau"] < 1)
    rows = prompt_embeds(model, processor, chat(images=2), [image, image])
    anchors = 0 if settings["tau"] >= 1 else int(model.attanchor_plan.is_anchor.sum())
    prompt = processor.apply_chat_template(chat(images=2), add_generation_prompt=True)
    plainly = processor(text=prompt, images=[image, image], return_tensors="pt")["input_ids"].shape[1]
    assert anchors == expected.inserted
    assert len(rows.embeds) == plainly + anchors + settings.get("pause_tokens", 0) * (settings["tau"] < 1)
    assert said_by(plain, rows.embeds, processor) == expected.text


def test_text_alone_is_looked_up(sample):
    model, processor = load(str(sample / "model"), tau=TAU)
    rows = prompt_embeds(model, processor, chat(images=0))
    assert torch.equal(rows.embeds, model.get_input_embeddings()(rows.input_ids))
    expected = infer.answer(model, processor, QUESTION, max_new_tokens=8).text
    assert said_by(serve.language_model(model), rows.embeds, processor) == expected


def test_rows_need_no_layers_of_the_language_model(sample, image):
    model, processor = load(str(sample / "model"), tau=TAU)
    expected = prompt_embeds(model, processor, chat(), [image]).embeds
    before = sum(parameter.numel() for parameter in model.parameters())
    serve.release_language_layers(model)
    assert sum(parameter.numel() for parameter in model.parameters()) < 0.6 * before
    assert torch.equal(prompt_embeds(model, processor, chat(), [image]).embeds, expected)


@pytest.mark.parametrize("tied", [False, True])
def test_tied_embeddings_stay_tied(tied, tmp_path):
    model = tiny_llava()
    if tied:
        model.config.tie_word_embeddings = True
        model.tie_weights()
    assert (model.lm_head.weight is model.get_input_embeddings().weight) is tied
    model.config.text_config.tie_word_embeddings = not tied  # the whole model's word counts, not this one's
    serve.export_language_model(model, _NoTokenizer(), tmp_path / "lm")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "lm")
    assert plain.config.tie_word_embeddings is tied
    assert (plain.lm_head.weight is plain.get_input_embeddings().weight) is tied
    assert torch.equal(plain.lm_head.weight, model.lm_head.weight)
    assert not (tmp_path / "lm" / "attanchor.json").exists()


class _NoTokenizer:
    def save_pretrained(self, folder):
        pass


def test_a_model_with_its_own_logits_is_refused(monkeypatch, tmp_path):
    model = tiny_llava()
    monkeypatch.setattr(model, "forward", _scaled(model.forward))
    with pytest.raises(ServingError, match="logits of LlamaForCausalLM differ from those of LlavaForConditionalGener"):
        serve.export_language_model(model, _NoTokenizer(), tmp_path / "lm")
    assert not list(tmp_path.iterdir())


def _scaled(forward):
    def scaled(*args, **kwargs):
        output = forward(*args, **kwargs)
        output.logits = output.logits * 0.5
        return output

    return scaled


def test_inherited_positions_are_refused(sample, image, tmp_path):
    model, processor = load(str(sample / "model"), tau=TAU)
    settings = AttAnchorConfig(tau=TAU, positions="inherit", force_inherit=True)
    attach(model, settings)
    with pytest.raises(ServingError, match="positions is 'inherit', but engines count the positions"):
        prompt_embeds(model, processor, chat(), [image])
    with pytest.raises(ServingError, match="positions is 'inherit'"):
        serve.export_language_model(model, processor, tmp_path / "lm")
    assert not list(tmp_path.iterdir())


def test_a_family_that_cannot_be_served_is_refused_before_its_weights_are_loaded(tmp_path, monkeypatch, capsys):
    config = AutoConfig.for_model("qwen2_5_vl", text_config={"num_hidden_layers": 1}, vision_config={"depth": 1})
    config.save_pretrained(tmp_path / "model")
    monkeypatch.setattr(loading, "load_pretrained", None)
    assert cli.main(["export-lm", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "lm")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(
        "error: qwen2_5_vl cannot be served by prompt embeddings: its tokens have 3 positions each ("
    )
    assert len(error.splitlines()) == 1


def test_an_adapter_that_is_not_merged_is_refused(tmp_path):
    model = tiny_llava()
    get_peft_model(model, LoraConfig(r=2, target_modules=lora_targets(model)))
    with pytest.raises(ServingError, match="an adapter stands in the model's layers; merge it first"):
        serve.export_language_model(model, _NoTokenizer(), tmp_path / "lm")
    assert not list(tmp_path.iterdir())


def test_a_model_that_is_not_attached_is_refused(image):
    with pytest.raises(ValueError, match="LlavaForConditionalGeneration is not attached"):
        prompt_embeds(tiny_llava(), None, chat(), [image])


def test_nothing_is_overwritten_or_half_written(sample, tmp_path, monkeypatch, capsys):
    there = tmp_path / "there"
    there.mkdir()
    (there / "thesis.tex").write_text("years of work")
    assert cli.main(["export-lm", "--model", str(sample / "model"), "--output", str(there)]) == 1
    assert f"error: output {there} exists and is not an empty folder" in capsys.readouterr().err

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    model, processor = load(str(sample / "model"), tau=TAU)
    monkeypatch.setattr(type(processor.tokenizer), "save_pretrained", full)  # after the weights
    with pytest.raises(OSError, match="No space left"):
        serve.export_language_model(model, processor, tmp_path / "lm")
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_the_weights_keep_their_dtype_or_get_another(sample, tmp_path, capsys):
    assert export(capsys, "--model", sample / "model", "--output", tmp_path / "a")["dtype"] == "float32"
    said = export(capsys, "--model", sample / "model", "--output", tmp_path / "b", "--dtype", "bfloat16")
    assert said["dtype"] == "bfloat16"
    assert said["settings"] is None
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b", dtype="auto").dtype == torch.bfloat16
    model, processor = load(str(sample / "model"), tau=TAU, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    processor.save_pretrained(tmp_path / "half")
    assert export(capsys, "--model", tmp_path / "half", "--output", tmp_path / "c")["dtype"] == "bfloat16"
