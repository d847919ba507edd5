"""An attached LLaVA's forward: Algorithms 1 and 2, what it tells, and what it refuses. What holds for every family is
tested in families/test_families.py, on LLaVA too."""

from __future__ import annotations

import inspect

import pytest
import torch
from tiny import IMAGE, PAD, VOCABULARY, difference, plain, prompts, tiny_llava, with_labels
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration

from attanchor_vlm import AttAnchorConfig, attach, detach, is_attached
from attanchor_vlm.model.config import DIRECTIONS

TAU = 0.1  # about half of the candidates of a tiny model
MIXED = [1, 2, 0]
ROUTES = ["embeds", "ids"]
BOTH = list(DIRECTIONS)


# --- Nothing to insert. -----------------------------------------------------------------------------------------------


def test_tau_one_passes_the_callers_own_arguments(monkeypatch):
    model, batch, seen = tiny_llava(), prompts([1]), {}
    original = LlavaForConditionalGeneration.forward

    def spy(self, *args, **kwargs):
        seen.update(args=args, kwargs=kwargs)
        return original(self, *args, **kwargs)

    spy.__signature__ = inspect.signature(original)
    monkeypatch.setattr(type(model), "forward", spy)
    fresh = type("LlavaForConditionalGeneration", (type(model),), {"__module__": __name__})
    model.__class__ = fresh  # a class that no earlier test attached
    attach(model, AttAnchorConfig(tau=1))
    model(batch["input_ids"], batch["pixel_values"], anchor_mask=batch["anchor_mask"], use_cache=False)
    assert [id(value) for value in seen["args"]] == [id(batch["input_ids"]), id(batch["pixel_values"])]
    assert seen["kwargs"] == {"use_cache": False}
    assert model.attanchor_plan is None
    assert float(model.attanchor_stats.share_of_candidates) == 0


def test_a_batch_without_images_is_the_untouched_model():
    model, batch = tiny_llava(), plain(prompts([0, 0]))
    before = model(**batch).logits
    attach(model, AttAnchorConfig(tau=-1))
    assert torch.equal(before, model(**batch).logits)
    assert model.attanchor_plan is None


@pytest.mark.parametrize("route", ROUTES)
def test_detach_gives_the_model_back(route):
    model, batch = tiny_llava(), prompts(MIXED)
    before, attributes, settings = model(**plain(batch)).logits, set(vars(model)), model.config.to_dict()
    hooks = len(model.model._forward_pre_hooks)
    attach(model, AttAnchorConfig(tau=TAU, route=route))
    model(**batch)
    assert is_attached(model)
    assert detach(model) is model
    assert not is_attached(model)
    assert type(model) is LlavaForConditionalGeneration
    assert set(vars(model)) == attributes
    assert model.config.to_dict() == settings
    assert len(model.model._forward_pre_hooks) == hooks
    assert torch.equal(before, model(**plain(batch)).logits)
    detach(model)  # a second time changes nothing
    assert type(model) is LlavaForConditionalGeneration


# --- With anchors. ----------------------------------------------------------------------------------------------------


def by_hand(model, batch: dict, row: int, tau: float, direction: str) -> tuple[list[int], list[bool]]:
    """Slots of a sample's new sequence and which are copies, worked out token by token from the model's own parts."""
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    with torch.no_grad():
        features = torch.cat(list(model.get_image_features(batch["pixel_values"]).pooler_output))
        embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = features
    slots = [slot for slot in range(ids.shape[1]) if real[row, slot]]
    images = [slot for slot in slots if ids[row, slot] == IMAGE]
    texts = [slot for slot in slots if batch["anchor_mask"][row, slot]]
    movers, hosts = (texts, images) if direction == "text_into_image" else (images, texts)
    copies: dict[int, list[int]] = {}
    if hosts:
        for mover in movers:
            scores = F.cosine_similarity(embeds[row, mover].double(), embeds[row, hosts].double())
            if float(scores.max()) >= tau:
                copies.setdefault(hosts[int(scores.argmax())], []).append(mover)
    sequence = [
        (slot, copied) for host in slots for slot, copied in [(host, False), *((m, True) for m in copies.get(host, []))]
    ]
    return [slot for slot, _ in sequence], [copied for _, copied in sequence]


@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_plan_is_algorithm_1_or_2_over_the_models_own_embeddings(side, direction):
    model, batch = tiny_llava(), with_labels(prompts(MIXED, side), answers=2)
    attach(model, AttAnchorConfig(tau=TAU, direction=direction))
    output = model(**batch)
    plan = model.attanchor_plan
    inserted = 0
    for row in range(3):
        source, copied = by_hand(model, batch, row, TAU, direction)
        real = plan.source[row] >= 0
        assert plan.source[row][real].tolist() == source
        assert plan.is_anchor[row][real].tolist() == copied
        assert plan.input_ids[row][real].tolist() == batch["input_ids"][row][source].tolist()
        assert plan.position_ids[row][real].tolist() == list(range(len(source)))
        labels = batch["labels"][row][source].masked_fill(torch.tensor(copied), -100)
        assert torch.equal(plan.labels[row][real], labels)
        inserted += sum(copied)
    padding = plan.attention_mask == 0
    assert torch.equal(padding, plan.source < 0)
    assert (plan.labels[padding] == -100).all()
    assert (plan.input_ids[padding] == PAD).all()
    assert padding[:, 0 if side == "left" else -1].any()
    assert not padding[:, -1 if side == "left" else 0].any()
    assert output.logits.shape[:2] == plan.source.shape
    assert inserted > 3
    # The loss is that of the lengthened labels.
    flat = output.logits[:, :-1].flatten(0, 1), plan.labels[:, 1:].flatten()
    assert difference(output.loss, F.cross_entropy(*flat)) < 1e-5


def test_statistics():
    model, batch = tiny_llava(), prompts(MIXED)
    attach(model, AttAnchorConfig(tau=TAU))
    model(**batch)
    stats, plan = model.attanchor_stats, model.attanchor_plan
    candidates, inserted = int(batch["anchor_mask"][:2].sum()), int(plan.is_anchor.sum())
    assert 0 < inserted < candidates
    assert float(stats.inserted) == inserted
    assert float(stats.candidates) == candidates
    assert float(stats.share_of_candidates) == pytest.approx(inserted / candidates)
    best = plan.score[torch.isfinite(plan.score)]
    assert float(stats.mean_score) == pytest.approx(float(best[best >= TAU].mean()))
    assert float(stats.mean_candidate_score) == pytest.approx(float(best.mean()))


def test_encoded_images_serve_in_place_of_pixels():
    model, batch = tiny_llava(), prompts([1, 2])
    attach(model, AttAnchorConfig(tau=TAU))
    expected = model(**batch).logits
    encoded = model.get_image_features(batch["pixel_values"])
    given = {name: value for name, value in batch.items() if name != "pixel_values"}
    assert torch.equal(model(**given, mm_encoder_outputs={"image": encoded}).logits, expected)


def test_under_autocast_features_take_the_dtype_of_the_embeddings():
    model, batch = tiny_llava(), prompts([1])
    attach(model, AttAnchorConfig(tau=TAU))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.get_image_features(batch["pixel_values"]).pooler_output[0].dtype == torch.bfloat16
        logits = model(**batch).logits
    assert torch.isfinite(logits).all()
    assert model.attanchor_plan.is_anchor.any()


def test_an_image_id_outside_the_embedding_table():
    model, batch = tiny_llava(), prompts([1])
    attach(model, AttAnchorConfig(tau=TAU))
    expected = model(**batch).logits
    model.config.image_token_id = 5000
    batch["input_ids"] = batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE, 5000)
    assert torch.equal(model(**batch).logits, expected)


@pytest.mark.parametrize("token", [-1, VOCABULARY])
def test_a_padding_id_outside_the_embedding_table(token):
    model, batch = tiny_llava(), prompts([1, 2])
    attach(model, AttAnchorConfig(tau=TAU, route="ids"))
    expected = model(**batch).logits
    for config in (model.generation_config, model.config, model.config.text_config):
        config.pad_token_id = token
    assert torch.equal(model(**batch).logits, expected)


# --- Calls that are refused. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [TAU, 1])
def test_an_anchor_mask_without_an_image_or_with_embeds_is_refused(tau):
    model, batch = tiny_llava(), prompts([1])
    attach(model, AttAnchorConfig(tau=tau))
    ids, mask = batch["input_ids"], batch["anchor_mask"]
    with pytest.raises(ValueError, match="anchor_mask is given without pixel_values"):
        model(input_ids=ids, anchor_mask=mask)
    with pytest.raises(ValueError, match="anchor_mask is given with inputs_embeds"):
        model(inputs_embeds=model.get_input_embeddings()(ids), anchor_mask=mask)


@pytest.mark.parametrize("keep", [None, 0.5])
def test_refused_calls(keep):
    model, batch = tiny_llava(), prompts([1, 1])
    attach(model, AttAnchorConfig(tau=TAU, keep=keep))
    ids = batch["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    with pytest.raises(ValueError, match="pass input_ids"):
        model(inputs_embeds=embeds, pixel_values=batch["pixel_values"])
    with pytest.raises(ValueError, match="32 image placeholders and the images 16 features"):
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    with pytest.raises(ValueError, match="32 image placeholders and the images 64 features"):
        model(**{**batch, "pixel_values": batch["pixel_values"].repeat(2, 1, 1, 1)})
    with pytest.raises(ValueError, match=r"anchor_mask has shape \(2, 3\)"):
        model(**{**batch, "anchor_mask": torch.ones(2, 3, dtype=torch.bool)})
    with pytest.raises(TypeError, match=r"anchor_mask has dtype torch.int64"):
        model(**{**batch, "anchor_mask": batch["anchor_mask"].long()})
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(**{**batch, "attention_mask": batch["attention_mask"][:, :-1]})
    with pytest.raises(ValueError, match="position_ids is given"):
        model(**batch, position_ids=torch.arange(ids.shape[1]).expand_as(ids))
    cache = model(**batch, use_cache=True).past_key_values
    for name in ("past_key_values", "cache"):  # its name up to transformers 5.23, and from 5.24 on
        with pytest.raises(ValueError, match="KV cache that is not empty"):
            model(**batch, **{name: cache})


def test_a_prompt_longer_than_the_context_is_an_error():
    model, batch = tiny_llava(max_position_embeddings=30), prompts([1])
    length = batch["input_ids"].shape[1]
    assert length <= 30
    attach(model, AttAnchorConfig(tau=-1))
    model(**{**batch, "anchor_mask": torch.zeros_like(batch["anchor_mask"])})
    batch["anchor_mask"][:, -5:] = True
    model.config.text_config.max_position_embeddings = length
    with pytest.raises(ValueError, match=r"has \d+ tokens and the model's context"):
        model(**batch)
