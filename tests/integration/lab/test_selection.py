"""The controls of which image tokens stay: each chooses what it says, in an attached model."""

from __future__ import annotations

import pytest
import torch
from tiny import IMAGE, PATCHES, prompts, tiny_llava
from torch.nn import functional as F

from attanchor_lab import selection
from attanchor_vlm import AttAnchorConfig, attach

RULES = ("random", "strided", "lowest-cosine", "diverse", "salience-cells")
KEEP = 5


@torch.no_grad()
def stayed(rule, batch, keep=KEEP, seed=0, tau=1.0):
    """(images, patches) bool: who stays in each image of a batch."""
    config = AttAnchorConfig(tau=tau, keep=keep, keep_by=rule, placement_seed=seed)
    model = attach(tiny_llava(), config)
    model(**batch)
    plan, images = model.attanchor_plan, batch["input_ids"] == IMAGE
    own = torch.where(plan.is_anchor, -1, plan.source) + 1
    present = torch.zeros(images.shape[0], images.shape[1] + 1, dtype=torch.bool).scatter_(1, own, True)[:, 1:]
    return present[images].view(-1, PATCHES)


@torch.no_grad()
def rows_of(batch):
    return torch.stack(list(tiny_llava().get_image_features(batch["pixel_values"]).pooler_output))


@pytest.mark.parametrize("rule", RULES)
def test_every_image_keeps_its_share_whatever_the_batch(rule):
    batch = prompts([1, 2, 0], "left")
    together = stayed(rule, batch)
    assert together.sum(1).tolist() == [KEEP] * 3
    real = batch["attention_mask"][0].bool()
    alone = {name: batch[name][:1, real] for name in ("input_ids", "attention_mask", "anchor_mask")}
    assert torch.equal(stayed(rule, {**alone, "pixel_values": batch["pixel_values"][:1]}), together[:1])
    assert stayed(rule, batch, tau=0.1).sum() == 3 * KEEP


def test_random_depends_on_the_seed_and_is_even():
    batch = prompts([1, 2])
    draws = [stayed("random", batch, seed=seed) for seed in range(40)]
    assert torch.equal(draws[0], stayed("random", batch))
    assert not torch.equal(draws[0], draws[1])
    counts = torch.stack(draws).sum(0).float()  # of 40 draws of 5 in 16: 12.5, deviation 2.9
    assert (counts - 12.5).abs().max() < 4.5 * 2.9


def test_strided_is_every_nth():
    found = stayed("strided", prompts([1, 2]), keep=4)
    assert all(row.nonzero()[:, 0].tolist() == [3, 7, 11, 15] for row in found)


def test_lowest_cosine_is_the_reverse_of_relevance():
    batch = prompts([1])
    high, low = stayed("relevance", batch, keep=8), stayed("lowest-cosine", batch, keep=8)
    assert torch.equal(high, ~low)


def test_diverse_takes_the_farthest_each_time():
    batch = prompts([1, 2])
    for rows, found in zip(rows_of(batch), stayed("diverse", batch), strict=True):
        distance = 1 - F.cosine_similarity(rows[:, None].double(), rows[None].double(), dim=-1)
        away = distance + torch.eye(PATCHES) * 9
        chosen = [int(away.amin(1).argmax())]
        while len(chosen) < KEEP:
            others = [patch for patch in range(PATCHES) if patch not in chosen]
            chosen.append(max(others, key=lambda patch: float(distance[patch, chosen].min())))
        assert sorted(chosen) == found.nonzero()[:, 0].tolist()


def test_newline_rows_have_no_place_in_an_image():
    place, size = selection._places(torch.tensor([0, 0, -1, 0, 1, 1, -1]))
    assert place[[0, 1, 3, 4, 5]].tolist() == [0, 1, 2, 0, 1]
    assert size[[0, 1, 3, 4, 5]].tolist() == [3, 3, 3, 2, 2]
