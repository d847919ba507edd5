"""`generate` of every family against forwards of the whole sequence without a cache."""

from __future__ import annotations

import torch
from shared import (
    GREEDY,
    LOGITS,
    MIXED,
    NEW,
    attached,
    both_directions,
    check_cached_generation,
    every_route,
)
from tiny import difference
from tiny_families import VOCABULARY


@both_directions
@every_route
def test_cached_generation_agrees_with_uncached_forwards(family, route, direction):
    check_cached_generation(family, route, direction)


@every_route
def test_a_right_padded_batch_generates_as_its_samples_alone(family, route):
    model, (batch, alone) = attached(family, route), family.prompts(MIXED, "right")
    together = model.generate(**batch, **GREEDY)[:, -NEW:]
    assert model.attanchor_plan.attention_mask[:, -1].all()  # padded on the left, whatever the caller did
    for row, sample in enumerate(alone):
        assert torch.equal(together[row], model.generate(**sample, **GREEDY)[0, -NEW:])


@every_route
def test_the_score_of_beams_is_that_of_an_uncached_forward(family, route, **settings):
    # By ids, image into text lengthens what beams repeat: the features, and the placeholders that tell whose they are.
    direction = "image_into_text" if route == "ids" else "text_into_image"
    model, (batch, _) = attached(family, route, direction, **settings), family.prompts(MIXED, "left")
    beams = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.0}
    output = model.generate(**batch, **GREEDY, **beams, return_dict_in_generate=True, output_scores=True)
    for beam in range(2):
        new = output.sequences[beam::2, -NEW:]
        with torch.no_grad():
            logits = model(**family.longer(batch, new)).logits[:, -NEW - 1 : -1]
        expected = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
        assert torch.allclose(output.sequences_scores[beam::2], expected, atol=1e-4)


CACHES = {"use_cache": False, "cache_implementation": "static", "prefill_chunk_size": 8}
# Tokens that see later ones: chunks change them, anchors or not.
OTHERWISE = dict.fromkeys(("paligemma", "gemma3"), ("prefill_chunk_size",))


@every_route
def test_other_ways_to_prefill_and_to_cache_change_nothing(family, route):
    other_ways_change_nothing(family, route, OTHERWISE.get(family.name, ()))


def other_ways_change_nothing(family, route, otherwise):
    model, (batch, _) = attached(family, route), family.prompts(MIXED, "left")
    expected = model.generate(**batch, **GREEDY)
    for option in CACHES.keys() - set(otherwise):
        assert torch.equal(model.generate(**batch, **GREEDY, **{option: CACHES[option]}), expected), option


@every_route
def test_pauses_of_think_mode_come_in_front_of_what_is_generated(family, route):
    settings = {"pause_tokens": 3, "pause_token_id": VOCABULARY - 1}
    model, (batch, _) = attached(family, route, "image_into_text", **settings), family.prompts(MIXED, "left")
    output = model.generate(**batch, **GREEDY, **LOGITS)
    plan, new = model.attanchor_plan, output.sequences[:, -NEW:]
    assert plan.is_anchor.any()
    assert [int(row) for row in (plan.attention_mask.bool() & (plan.source < 0)).sum(-1)] == [3, 3, 0]
    longer = family.longer(batch, new)
    longer["labels"] = torch.cat([torch.full_like(batch["input_ids"], -100), new], 1)  # in front of what is learned
    with torch.no_grad():
        logits = model(**longer).logits[:, -NEW - 1 : -1]
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5
