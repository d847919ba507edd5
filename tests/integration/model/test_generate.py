"""`generate` of a LLaVA with anchors: what the caller gives it and gets to see. What holds for every family is tested
in families/test_family_generate.py, on LLaVA too."""

from __future__ import annotations

import pytest
import torch
from builders import BY_NAME
from shared import NEW, greedy_by_forward
from tiny import IMAGE, PAD, plain, prompts, tiny_llava
from transformers import GenerationConfig, LlavaForConditionalGeneration, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from attanchor_vlm import AttAnchorConfig, attach

TAU = 0.1
ROUTES = ["embeds", "ids"]


def attached(route: str = "embeds", **settings):
    return attach(tiny_llava(), AttAnchorConfig(**{"tau": TAU, "route": route, **settings}))


@pytest.mark.parametrize("route", ROUTES)
def test_assisted_decoding_is_refused(route):
    model, batch = attached(route), prompts([1], "left")
    for option in ({"prompt_lookup_num_tokens": 2}, {"assistant_model": tiny_llava()}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is given, but assisted decoding cannot"):
            model.generate(**batch, max_new_tokens=NEW, **option)
    attach(model, AttAnchorConfig(tau=1))
    model.generate(**batch, max_new_tokens=NEW, do_sample=False, prompt_lookup_num_tokens=2)


class NamedAsIn524(LlavaForConditionalGeneration):
    def forward(self, input_ids=None, pixel_values=None, cache=None, past_key_values=None, **others):
        past = past_key_values if cache is None else cache
        return super().forward(input_ids, pixel_values, past_key_values=past, **others)


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_callers_own_decoding_loop(name):
    model, batch = tiny_llava(), prompts([1, 2], "left")
    model.__class__ = NamedAsIn524
    attach(model, AttAnchorConfig(tau=TAU))
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)[:, -NEW:]
    with torch.no_grad():
        output = model(**batch, use_cache=True)
        plan, tokens = model.attanchor_plan, []
        mask, position = plan.attention_mask, plan.position_ids[:, -1:]
        for _ in range(NEW):
            token = output.logits[:, -1:].argmax(-1)
            tokens.append(token)
            mask, position = torch.cat([mask, torch.ones_like(token)], 1), position + 1
            past = {name: output.past_key_values}
            output = model(input_ids=token, attention_mask=mask, position_ids=position, **past)
    assert model.attanchor_plan is plan
    assert torch.equal(torch.cat(tokens, 1), expected)


# --- Ways of decoding. -----------------------------------------------------------------------------------------------


def test_both_routes_decode_alike():
    batch = prompts([1, 2, 0], "left")
    for options in (
        {"do_sample": False},
        {"do_sample": True, "top_k": 5},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"do_sample": False, "repetition_penalty": 1.7},
    ):
        outputs = []
        for route in ROUTES:
            model = attached(route)
            torch.manual_seed(7)
            outputs.append(model.generate(**batch, max_new_tokens=NEW, **options))
        count = options.get("num_return_sequences", 1)
        assert outputs[0].shape == (3 * count, batch["input_ids"].shape[1] + NEW)
        assert torch.equal(outputs[0], outputs[1]), options
        prompt = batch["input_ids"].repeat_interleave(count, 0)
        assert torch.equal(outputs[0][:, : prompt.shape[1]], prompt)


@pytest.mark.parametrize("route", ROUTES)
def test_generate_does_not_change_what_it_was_given(route):
    model, batch = attached(route), prompts([1, 2], "left")
    encoded = model.get_image_features(batch["pixel_values"])
    given = {name: value for name, value in batch.items() if name != "pixel_values"}
    images, rows = {"image": encoded}, [row.clone() for row in encoded.pooler_output]
    expected = model.generate(**batch, max_new_tokens=NEW, num_beams=3, do_sample=False)
    for _ in range(2):  # beam search extends the dictionary it gets
        found = model.generate(**given, mm_encoder_outputs=images, max_new_tokens=NEW, num_beams=3, do_sample=False)
        assert torch.equal(found, expected)
    assert images["image"] is encoded
    assert len(encoded.pooler_output) == len(rows)
    assert all(torch.equal(a, b) for a, b in zip(encoded.pooler_output, rows, strict=True))


# --- What the caller sees. -------------------------------------------------------------------------------------------


class Recorder(BaseStreamer):
    def __init__(self):
        self.chunks, self.ended = [], False

    def put(self, value):
        self.chunks.append(value.clone())

    def end(self):
        self.ended = True


@pytest.mark.parametrize("route", ROUTES)
def test_a_streamer_gets_the_callers_prompt_and_the_new_tokens(route):
    model, batch, streamer = attached(route), prompts([1]), Recorder()
    output = model.generate(**batch, max_new_tokens=NEW, do_sample=False, streamer=streamer)
    assert model.attanchor_plan.is_anchor.any()
    assert torch.equal(streamer.chunks[0], batch["input_ids"])
    assert torch.equal(torch.cat([chunk.flatten() for chunk in streamer.chunks]), output[0])
    assert streamer.ended


class SeenIds(LogitsProcessor):
    def __init__(self):
        self.ids = []

    def __call__(self, input_ids, scores):
        self.ids.append(input_ids.clone())
        return scores


@pytest.mark.parametrize("route", ROUTES)
def test_logits_processors_see_the_lengthened_prompt(route):
    model, batch, seen = attached(route), prompts([1, 2], "left"), SeenIds()
    model.generate(**batch, max_new_tokens=2, do_sample=False, logits_processor=LogitsProcessorList([seen]))
    assert torch.equal(seen.ids[0], model.attanchor_plan.input_ids)
    assert seen.ids[1].shape[1] == seen.ids[0].shape[1] + 1


@pytest.mark.parametrize("route", ROUTES)
def test_length_limits_do_not_count_anchors(route):
    model, batch = attached(route), prompts([1, 2], "left")
    length = batch["input_ids"].shape[1]
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert model.attanchor_plan.input_ids.shape[1] > length + 4
    assert expected.shape[1] == length + 4
    config = GenerationConfig(max_length=length + 4, do_sample=False, pad_token_id=PAD)
    assert torch.equal(model.generate(**batch, max_length=length + 4, do_sample=False), expected)
    assert torch.equal(model.generate(**batch, generation_config=config), expected)
    assert config.max_length == length + 4
    model.generation_config.max_length = length + 4
    assert torch.equal(model.generate(**batch, do_sample=False), expected)
    assert model.generate(**batch, max_new_tokens=2, do_sample=False).shape[1] == length + 2
    model.generation_config.max_length = None

    # min_length likewise: the end of sequence is forbidden until then.
    first = int(expected[0, length])
    model.generation_config.eos_token_id = first
    short = model.generate(**prompts([1], "left"), max_new_tokens=6, do_sample=False)
    assert short.shape[1] <= length + 6
    batch = {name: value[:1] for name, value in batch.items()}
    free = model.generate(**batch, max_new_tokens=6, do_sample=False)
    held = model.generate(**batch, max_new_tokens=6, min_length=length + 3, do_sample=False)
    assert free.shape[1] == length + 1
    assert (held[0, length : length + 3] != first).all()


def test_inputs_may_be_positional_and_the_mask_inferred_from_padding():
    model, batch = attached(), prompts([1, 2], "left")
    expected = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    config = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=PAD)
    found = model.generate(
        batch["input_ids"], config, pixel_values=batch["pixel_values"], anchor_mask=batch["anchor_mask"]
    )
    assert torch.equal(found, expected)
    plan = model.attanchor_plan
    assert plan.attention_mask.sum() == batch["attention_mask"].sum() + plan.is_anchor.sum()


def test_without_a_mask_everything_after_the_image_takes_part():
    model, batch = attached(), prompts([1], "left")
    mask = torch.zeros_like(batch["anchor_mask"])
    mask[:, int((batch["input_ids"][0] == IMAGE).nonzero()[-1]) + 1 :] = True
    expected = model.generate(**{**batch, "anchor_mask": mask}, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(model.generate(**plain(batch), max_new_tokens=NEW, do_sample=False), expected)


# --- Handed through. -------------------------------------------------------------------------------------------------


def test_text_alone_generates_as_the_untouched_model():
    model, batch = tiny_llava(), plain(prompts([0, 0], "left"))
    before = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    attach(model, AttAnchorConfig(tau=-1))
    assert torch.equal(model.generate(**batch, max_new_tokens=NEW, do_sample=False), before)
    embeds = model.get_input_embeddings()(batch["input_ids"])
    batch = {"inputs_embeds": embeds, "attention_mask": batch["attention_mask"]}
    found = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert torch.equal(found, before[:, -NEW:])


def test_refused_calls():
    model, batch = attached(), prompts([1])
    ids, mask = batch["input_ids"], batch["anchor_mask"]
    with pytest.raises(ValueError, match="anchor_mask is given without pixel_values"):
        model.generate(input_ids=ids, anchor_mask=mask)
    with pytest.raises(ValueError, match="anchor_mask is given with inputs_embeds"):
        model.generate(inputs_embeds=model.get_input_embeddings()(ids), anchor_mask=mask)
    cache = model(**batch, use_cache=True).past_key_values
    for name in ("past_key_values", "cache"):
        with pytest.raises(ValueError, match="KV cache that is not empty"):
            model.generate(**batch, **{name: cache}, max_new_tokens=2)


def test_generation_after_an_error_still_inserts():
    model, batch = attached(), prompts([1])
    with pytest.raises(ValueError, match="not used by the model"):
        model.generate(**batch, max_new_tokens=2, no_such_argument=1)
    calls = model.attanchor_calls
    model(**batch)
    assert model.attanchor_calls == calls + 1


def test_a_lora_model_generates():
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(2)
    targets = r".*language_model\..*\.(q|v)_proj"
    model = get_peft_model(tiny_llava(), LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()
    attach(model, AttAnchorConfig(tau=TAU))
    batch = prompts([1, 2], "left")
    found = model.generate(**batch, max_new_tokens=NEW, do_sample=False)
    assert model.attanchor_plan.is_anchor.any()
    tokens, _ = greedy_by_forward(BY_NAME["llava"], model, batch)
    assert torch.equal(found[:, -NEW:], tokens)
