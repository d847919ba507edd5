"""The language half of every family that can be served without its images: the same tokens as `generate`."""

from __future__ import annotations

import checkpoints
import pytest
import torch
from builders import BY_NAME
from checkpoints import picture
from transformers import AutoModelForCausalLM, AutoTokenizer

from attanchor_vlm import AttAnchorConfig, attach, encode_chat
from attanchor_vlm.inference.export import ServingError, check_servable, export_language_model, prompt_embeds

NEW = 8
QUESTION = "What is to the left of the red dog?"
SERVED = {
    "llava": "LlamaForCausalLM",
    "llava_next": "LlamaForCausalLM",
    "llava_onevision": "Qwen2ForCausalLM",
    "internvl": "Qwen2ForCausalLM",
    "idefics3": "LlamaForCausalLM",
    "smolvlm": "LlamaForCausalLM",
}
REFUSED = {
    "qwen2_vl": r"3 positions each \(M-RoPE",
    "qwen2_5_vl": r"3 positions each \(M-RoPE",
    "qwen3_vl": r"M-RoPE.*; further image features are added in its first layers \(deepstack\)",
    "gemma3": "bidirectional attention",
    "paligemma": "bidirectional attention",
}


def chat(images: int):
    return [{"role": "user", "content": [*[{"type": "image"}] * images, {"type": "text", "text": QUESTION}]}]


@pytest.mark.parametrize("name", SERVED)
def test_the_exported_language_model_says_what_generate_says(name, tmp_path, monkeypatch):
    model, processor = checkpoints.write(tmp_path / "model", name, monkeypatch)
    attach(model, AttAnchorConfig(tau=-1, max_anchors=5))
    folder = export_language_model(model, processor, tmp_path / "lm")
    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(plain).__name__ == SERVED[name]
    assert processor.tokenizer.get_vocab().items() <= AutoTokenizer.from_pretrained(folder).get_vocab().items()

    for images in ([picture(0)], [picture(1), picture(2)]):
        batch = encode_chat(processor, [chat(len(images))], [images], add_generation_prompt=True)
        expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[0, batch["input_ids"].shape[1] :]
        plan = model.attanchor_plan
        assert int(plan.is_anchor.sum()) == 5

        embeds, positions, ids = prompt_embeds(model, processor, chat(len(images)), images)
        assert torch.equal(positions, torch.arange(len(embeds)))
        assert torch.equal(ids, plan.input_ids[0])
        found = plain.generate(
            inputs_embeds=embeds[None],
            attention_mask=torch.ones(1, len(embeds), dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=False,
        )[0]
        assert torch.equal(found, expected)
        with torch.no_grad():  # beyond tokens, of which tiny random models may repeat one
            assert torch.allclose(plain(inputs_embeds=embeds[None]).logits, model(**batch).logits, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED)
def test_families_whose_prompts_are_more_than_rows_are_refused(name, tmp_path):
    model = attach(BY_NAME[name].model(), AttAnchorConfig(tau=0.1))
    for attempt in (
        lambda: check_servable(model),
        lambda: export_language_model(model, None, tmp_path / "lm"),
        lambda: prompt_embeds(model, None, chat(1), [picture(0)]),
    ):
        with pytest.raises(ServingError, match=rf"^{name} cannot be served by prompt embeddings: .*{REFUSED[name]}"):
            attempt()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
def test_sequential_positions_make_m_rope_prompts_rows(name, tmp_path, monkeypatch):
    """Served by the whole model, whose language half has no checkpoint of its own."""
    model, processor = checkpoints.write(tmp_path / "model", name, monkeypatch)
    attach(model, AttAnchorConfig(tau=-1, max_anchors=5, positions="sequential"))
    embeds, positions, _ = prompt_embeds(model, processor, chat(1), [picture(0)])
    assert torch.equal(positions, torch.arange(len(embeds)))
    batch = encode_chat(processor, [chat(1)], [[picture(0)]], add_generation_prompt=True)
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.allclose(model(inputs_embeds=embeds[None]).logits, expected, atol=1e-5)
    with pytest.raises(ServingError, match="no causal language model for"):
        export_language_model(model, processor, tmp_path / "lm")


def test_every_family_is_served_or_refused():
    assert BY_NAME.keys() == SERVED.keys() | REFUSED.keys()
