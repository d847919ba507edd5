"""What a served model's prompts are made of, without an engine: rows, positions, the span that they cover."""

from __future__ import annotations

import checkpoints
import pytest
import table_families
import torch
from builders import BY_NAME
from checkpoints import picture

from attanchor_vlm import AttAnchorConfig, attach, encode_chat
from attanchor_vlm.inference.export import ServingError
from attanchor_vlm.inference.vllm import front
from attanchor_vlm.inference.vllm.front import Front, overrides, settings_of

SERVED = ["llava", "llava_next", "qwen2_5_vl", "idefics3"]
REFUSED = {"gemma3": "bidirectional attention", "paligemma": "bidirectional attention"}
QUESTION = "What is to the left of the red dog?"


def chat(text=QUESTION, images=1):
    parts = [*[{"type": "image"}] * images, {"type": "text", "text": text}]
    return [{"role": "system", "content": [{"type": "text", "text": "You"}]}, {"role": "user", "content": parts}]


def front_of(folder, name, monkeypatch, **settings):
    """A checkpoint's attached model, its processor, and what an engine has in front of its language model."""
    model, processor = checkpoints.write(folder, name, monkeypatch)
    attach(model, AttAnchorConfig(**settings))
    return model, processor, Front(str(folder), model.config, torch.float32, "cpu")


@pytest.mark.parametrize("settings", [{"tau": -1, "max_anchors": 5}, {"tau": -1, "keep": 0.3}, {"tau": 1}], ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_a_prompt_is_that_of_the_whole_model(name, settings, tmp_path, monkeypatch):
    model, processor, made = front_of(tmp_path, name, monkeypatch, **settings)
    assert len(made.model.get_decoder().layers) == 0
    images = [picture(0), picture(1)]
    prompt = made.prompt(made.encode(chat(images=2), images, {}))

    encoded = encode_chat(processor, [chat(images=2)], [images], add_generation_prompt=True)
    with torch.no_grad():
        expected = model(**encoded).logits
        rows = model.get_input_embeddings()(torch.tensor([prompt.ids]))
        rows[0, prompt.start : prompt.start + len(prompt.rows)] = prompt.rows
        positions = {} if prompt.positions is None else {"position_ids": prompt.positions[:, None]}
        assert torch.allclose(model(inputs_embeds=rows, **positions).logits, expected, atol=1e-5)
    plan, special = model.attanchor_plan, model.config.image_token_id
    assert (prompt.positions is not None) == name.startswith("qwen")
    assert prompt.inserted == (0 if settings["tau"] == 1 else int(plan.is_anchor.sum()))
    assert prompt.kept == prompt.ids.count(special)
    assert prompt.start == prompt.ids.index(special) > 0  # what stands in front can be found in a prefix cache
    assert prompt.start + len(prompt.rows) < len(prompt.ids)


def test_prompts_that_differ_in_the_question_alone_have_other_digests(tmp_path, monkeypatch):
    _, _, made = front_of(tmp_path, "llava", monkeypatch, tau=-1, max_anchors=2)

    def asked(text, image):
        return made.prompt(made.encode(chat(text), [picture(image)], {}))

    dog, cat, other = asked("the red dog?", 0), asked("is the sky grey", 0), asked("the red dog?", 1)
    assert len(dog.rows) == len(cat.rows) == len(other.rows)
    assert len({dog.digest, cat.digest, other.digest}) == 3
    assert dog.digest == asked("the red dog?", 0).digest


@pytest.mark.parametrize("name", REFUSED)
def test_models_that_cannot_be_served_are_refused_by_their_config(name):
    config = BY_NAME[name].model().config
    config.attanchor = {"tau": 0.5}
    with pytest.raises(ServingError, match=f"^{name} cannot be served with anchors: .*{REFUSED[name]}"):
        settings_of(config)


def test_other_language_models_are_refused(monkeypatch):
    config = BY_NAME["llava"].model().config
    config.attanchor = {"tau": 0.5}
    settings_of(config)
    monkeypatch.setattr(front, "LANGUAGE_MODELS", {"qwen2": "Qwen2ForCausalLM"})
    with pytest.raises(ServingError, match=r"^llava cannot be served with anchors: its language model is a llama; .*"):
        settings_of(config)
    config = next(family for family in table_families.TABLE if family.name == "qwen3_5").build().config
    config.attanchor = {"tau": 0.5}
    with pytest.raises(ServingError, match=r"^qwen3_5 .*: its language model has layers of linear_attention, whose"):
        settings_of(config)


def test_features_of_further_layers_stand_behind_the_rows(tmp_path, monkeypatch):
    """As vLLM's language model of Qwen3-VL takes them, and as wide as vLLM is told."""
    model, processor, made = front_of(tmp_path, "qwen3_vl", monkeypatch, tau=-1, max_anchors=5)
    prompt = made.prompt(made.encode(chat(), [picture(0)], {}))
    width = model.config.text_config.hidden_size
    assert overrides(model.config)["text_config"] == {"projection_dim": prompt.rows.shape[-1]}
    rows, *deeper = prompt.rows.split(width, -1)
    assert len(deeper) == 2
    embeds = model.get_input_embeddings()(torch.tensor([prompt.ids]))
    embeds[0, prompt.start : prompt.start + len(rows)] = rows
    holds = torch.tensor([prompt.ids]) == model.config.image_token_id
    assert all(not layer[~holds[0, prompt.start : prompt.start + len(rows)]].any() for layer in deeper)  # at anchors
    with torch.no_grad():
        found = model.get_decoder()(
            inputs_embeds=embeds,
            position_ids=prompt.positions[:, None],
            visual_pos_masks=holds,
            deepstack_visual_embeds=[layer[holds[0, prompt.start : prompt.start + len(rows)]] for layer in deeper],
        )
        batch = encode_chat(processor, [chat()], [[picture(0)]], add_generation_prompt=True)
        assert torch.allclose(model.lm_head(found.last_hidden_state), model(**batch).logits, atol=1e-5)
    assert prompt.inserted == 5


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (None, "holds no AttAnchor settings; start it with `attanchor serve`"),
        ({"tau": 0.5, "positions": "inherit", "force_inherit": True}, "engines count the positions"),
        ({"tau": 0.5, "positions": "inherit"}, "Use 'sequential'"),
        ({"tau": "high"}, "tau is str"),
    ],
    ids=["none", "forced", "inherit", "damaged"],
)
def test_settings_that_cannot_be_served_are_refused(settings, reason):
    config = BY_NAME["llava"].model().config
    if settings is not None:
        config.attanchor = settings
    with pytest.raises(ServingError, match=reason):
        settings_of(config)
