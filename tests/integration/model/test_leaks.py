"""No answer sees itself or what follows it, neither through a copy nor through one that is missing."""

from __future__ import annotations

import warnings

import pytest
import torch
from tiny import IMAGE, PATCHES, difference, prompts, tiny_llava, with_labels

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.model.config import DIRECTIONS

BOTH = list(DIRECTIONS)


@pytest.mark.parametrize("direction", BOTH)
def test_answer_tokens_never_become_anchors(direction):
    model, batch = tiny_llava(), with_labels(prompts([1, 1]))
    batch["anchor_mask"] = batch["anchor_mask"] | (batch["labels"] != -100)  # a careless mask
    attach(model, AttAnchorConfig(tau=-1, direction=direction))
    with pytest.warns(UserWarning, match="anchor_mask selects tokens that labels supervises"):
        before = model(**batch)
    plan = model.attanchor_plan
    changed = {name: value.clone() for name, value in batch.items()}
    answers = batch["labels"] != -100
    changed["input_ids"][answers] = 4 + (changed["input_ids"][answers] - 4 + 17) % 60
    changed["labels"][answers] = changed["input_ids"][answers]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once
        after = model(**changed)
    assert torch.equal(plan.source, model.attanchor_plan.source)
    supervised = plan.labels != -100
    before_answer = (supervised.cumsum(-1) == 0) & (plan.source >= 0)
    assert before_answer.sum() > 2 * PATCHES
    assert torch.equal(before.logits[before_answer], after.logits[before_answer])
    assert difference(before.logits[supervised], after.logits[supervised]) > 0.01  # the change does arrive


def two_turns(layout: str = "IqaQA", seed: int = 3) -> tuple[dict, dict[str, slice]]:
    """A conversation of images I and J, questions q and Q, and supervised answers a and A; and the slots of each."""
    generator = torch.Generator().manual_seed(seed)
    ids, parts = [1], {}
    for part in layout:
        content = [IMAGE] * PATCHES if part in "IJ" else torch.randint(4, 64, (5,), generator=generator).tolist()
        parts[part] = slice(len(ids), len(ids) + len(content))
        ids += content
    ids = torch.tensor([ids])
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids, dtype=torch.bool)
    for part in "aA":
        labels[:, parts[part]] = ids[:, parts[part]]
    for part in "qQ":
        mask[:, parts[part]] = True
    pixels = torch.randn(sum(part in "IJ" for part in layout), 3, 16, 16, generator=generator)
    return {"input_ids": ids, "labels": labels, "anchor_mask": mask, "pixel_values": pixels}, parts


DROPPING = [{"keep": 1 / 4}, {"keep": 1 / 4, "keep_by": "relevance"}, {"keep": 3, "keep_by": "salience", "tau": 1}]


@pytest.mark.parametrize("settings", [{}, {"max_anchors": 3}, *DROPPING], ids=str)
@pytest.mark.parametrize("direction", BOTH)
@pytest.mark.parametrize("layout", ["IqaQA", "IqaJQA", "qaIQA", "qIaJQA", "IJqaQA"])
def test_answer_1_does_not_see_what_follows_it(layout, direction, settings):
    """Neither as a copy nor as one that went elsewhere: hosts behind an answer and a budget compete for the copies.
    Nor as what was dropped: which image tokens stay in front of an answer is not for a later question to say."""
    model = tiny_llava()
    attach(model, AttAnchorConfig(**{"tau": -1, "direction": direction, **settings}))
    for seed in range(3):
        batch, parts = two_turns(layout, seed)

        def answer_1(batch: dict, stop: int) -> torch.Tensor:
            logits, plan = model(**batch).logits, model.attanchor_plan
            return logits[(plan.labels != -100) & (plan.source < stop)]

        before = answer_1(batch, parts["a"].stop)
        assert len(before) == 5
        assert model.attanchor_plan.is_anchor.any() == ("tau" not in settings)
        if "keep" in settings:
            images = batch["input_ids"] == IMAGE
            plan = model.attanchor_plan
            assert ((plan.input_ids == IMAGE) & ~plan.is_anchor).sum() < images.sum()
        assert not torch.isfinite(model.attanchor_plan.score[batch["labels"] != -100]).any()
        changed = {name: value.clone() for name, value in batch.items()}
        changed["input_ids"][:, parts["Q"]] = 4 + (batch["input_ids"][:, parts["Q"]] + 11) % 60
        if layout.index("J" if "J" in layout else "I") > layout.index("a"):
            changed["pixel_values"][-1] = batch["pixel_values"][-1].flip(-1) * 3
        # As long as nothing new enters in front of the answer, its logits are the same to the last bits (the longer
        # sequence may be summed in another order).
        assert difference(before, answer_1(changed, parts["a"].stop)) < 1e-5


def test_question_2_is_not_copied_in_front_of_answer_1():
    model = tiny_llava()
    batch, parts = two_turns()
    attach(model, AttAnchorConfig(tau=-1))
    model(**batch)
    host = model.attanchor_plan.host[0]
    assert (host[parts["q"]] >= 0).all()
    assert (host[parts["Q"]] < 0).all()


def test_one_sample_a_turn_gives_question_2_its_anchors():
    model = tiny_llava()
    batch, parts = two_turns()
    batch["labels"][:, parts["a"]] = -100
    attach(model, AttAnchorConfig(tau=-1))
    model(**batch)
    assert (model.attanchor_plan.host[0][parts["Q"]] >= 0).all()
