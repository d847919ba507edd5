"""Positions: inherited under M-RoPE, refused elsewhere unless insisted on."""

from __future__ import annotations

import pytest
import torch
from shared import FLAT, GREEDY, MIXED, MROPE, NEW, attached, both_directions, both_sides, check_generates
from tiny import plain
from tiny_families import IMAGE


@both_directions
@both_sides
@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_anchors_take_the_positions_of_their_hosts(family, side, direction):
    model, (batch, _) = attached(family, direction=direction), family.prompts(MIXED, side)
    given = {name: batch[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    plain_positions, _ = model.base_model.get_rope_index(batch["input_ids"], **given)
    with torch.no_grad():
        model(**batch)
    plan = model.attanchor_plan
    assert plan.position_ids.shape == (3, *plan.input_ids.shape)
    for row in range(len(MIXED)):
        source, copied = plan.source[row], plan.is_anchor[row]
        own = source[(source >= 0) & ~copied]
        assert torch.equal(own, batch["attention_mask"][row].nonzero()[:, 0])
        assert torch.equal(plan.position_ids[:, row, (source >= 0) & ~copied], plain_positions[:, row, own])
        hosts = plan.host[row][source[copied]]
        assert torch.equal(plan.position_ids[:, row, copied], plain_positions[:, row, hosts])
    moved = plain_positions[:, batch["input_ids"] == IMAGE]
    assert (moved[0] != moved[1]).any()  # the axes differ, or nothing is tested
    assert (moved[1] != moved[2]).any()


@pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(family, route, id=f"{family}-{route}") for family in MROPE for route in family.routes],
)
def test_mrope_generation_continues_where_the_untouched_model_would(family, route):
    batch, positions = family.prompts(MIXED, "left")[0], []

    def record(module, args, kwargs):
        positions.append(kwargs["position_ids"][-3:, :, -1])  # Qwen puts a row of text positions in front

    for model in (family.model(), attached(family, route)):
        model.base_model.language_model.register_forward_pre_hook(record, with_kwargs=True)
        model.generate(**batch if hasattr(model, "attanchor_plan") else plain(batch), **GREEDY)
    assert model.attanchor_plan.is_anchor.any()
    assert len(positions) == 2 * NEW
    for before, after in zip(positions[:NEW], positions[NEW:], strict=True):
        assert torch.equal(before, after)
        assert torch.equal(after[0], after[1])


@both_directions
@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_positions_may_be_flat(family, direction):
    batch = family.prompts(MIXED, "left")[0]
    for route in family.routes:
        model = attached(family, route, direction, positions="sequential")
        check_generates(family, model, batch)
        plan = model.attanchor_plan
        counted = (plan.attention_mask.cumsum(-1) - 1).masked_fill(plan.attention_mask == 0, 0)
        assert torch.equal(plan.position_ids, counted.expand(3, -1, -1))
        assert plan.is_anchor.any()


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_positions_that_are_given_are_inherited(family):
    model, batch = attached(family), family.prompts(MIXED)[0]
    given = {name: batch[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    positions, _ = model.base_model.get_rope_index(batch["input_ids"], **given)
    text = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[None]
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, position_ids=positions).logits, expected)
        assert torch.equal(model(**batch, position_ids=torch.cat([text, positions])).logits, expected)
    assert len(model.attanchor_plan.position_ids) == 3  # no text positions, which would repeat at anchors


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_needs_to_know_the_grids(family):
    model, batch = attached(family), family.prompts([1])[0]
    del batch["mm_token_type_ids"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"mm_token_type_ids \(1 at image tokens.*\) is missing"):
            call(**batch)
    attached(family, positions="sequential")(**batch)


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_a_decoding_loop_without_positions_continues_after_the_anchors(family):
    model, batch = attached(family), family.prompts([2], "left")[0]
    expected = model.generate(**batch, **GREEDY)[:, -NEW:]
    tokens = []
    with torch.no_grad():
        output = model(**batch, use_cache=True)
        for _ in range(NEW):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    assert torch.equal(torch.cat(tokens, 1), expected)


@pytest.mark.parametrize("family", FLAT, ids=str)
def test_inherit_needs_insisting_where_tokens_have_one_position(family):
    with pytest.raises(ValueError, match=f"{family} has one position per token: repeated positions are then taken"):
        attached(family, positions="inherit")
    batch = family.prompts(MIXED, "left")[0]
    model = attached(family, positions="inherit", force_inherit=True)
    with torch.no_grad():
        model(**batch)
    assert torch.equal(model.attanchor_plan.position_ids.amax(-1), batch["attention_mask"].sum(-1) - 1)
    check_generates(family, model, batch)
