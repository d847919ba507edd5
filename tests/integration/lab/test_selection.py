"""The controls of which image tokens stay: each chooses what it says, in an attached model."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tiny import IMAGE, PATCHES, prompts, tiny_llava
from torch.nn import functional as F

from attanchor_lab import selection
from attanchor_vlm import AttAnchorConfig, attach, prepare_inputs

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


@torch.no_grad()
@pytest.mark.parametrize("tau", [1.0, 0.1])
def test_pooling_is_torch_s_average_pooling(tau):
    """Of a quarter of the tokens, each is the mean of two by two, and anchors stand behind the means they match."""
    batch = prompts([1, 2, 0], "left")
    model = attach(tiny_llava(), AttAnchorConfig(tau=tau, keep=PATCHES // 4, keep_by="pooling"))
    prepared = prepare_inputs(model, **batch)
    plan, images = model.attanchor_plan, batch["input_ids"] == IMAGE
    side = int(PATCHES**0.5)
    pooled = F.avg_pool2d(rows_of(batch).mT.unflatten(-1, (side, side)), 2).flatten(2).mT.flatten(0, 1)
    placed = images.gather(1, plan.source.clamp(min=0)) & (plan.source >= 0) & ~plan.is_anchor
    torch.testing.assert_close(prepared["inputs_embeds"][placed], pooled)
    if tau < 1:
        words = model.get_input_embeddings()(batch["input_ids"].masked_fill(images, 0))
        inserted = plan.host >= 0
        assert inserted.any()
        sample = inserted.nonzero()[:, 0]
        count = (images.sum(1) // 4).tolist()
        for row, score, number in zip(words[inserted], plan.score[inserted], sample, strict=True):
            own = pooled.split(count)[int(number)]
            assert score == pytest.approx(float(F.cosine_similarity(row[None], own).max()), abs=1e-5)


def test_pooling_sends_its_gradient_to_every_token_of_a_cell():
    model = attach(tiny_llava(), AttAnchorConfig(tau=1.0, keep=4, keep_by="pooling"))
    seen = []
    hook = model.model.multi_modal_projector.register_forward_hook(
        lambda module, given, made: (made.retain_grad(), seen.append(made))[1]
    )
    batch = prompts([1])
    labels = torch.where(torch.arange(batch["input_ids"].shape[1]) >= batch["input_ids"].shape[1] - 2, 5, -100)[None]
    model(**batch, labels=labels).loss.backward()
    hook.remove()
    (rows,) = seen
    assert (rows.grad.abs().sum(-1) > 0).all()


def test_pooling_needs_a_tau_above_0():
    with pytest.raises(ValueError, match=r"keep_by is 'pooling' with tau 0; it needs a tau above 0"):
        AttAnchorConfig(tau=0.0, keep=4, keep_by="pooling")


@torch.no_grad()
def test_a_downsampled_input_has_fewer_tokens_and_the_encoder_s_own_interpolated_positions():
    model, batch = tiny_llava(), prompts([1])
    small = F.interpolate(batch["pixel_values"], size=(8, 8))
    wanted = model.model.vision_tower(small, interpolate_pos_encoding=True, output_hidden_states=True)
    wanted = model.model.multi_modal_projector(wanted.hidden_states[-2][:, 1:])
    processor = SimpleNamespace(
        patch_size=4, image_processor=SimpleNamespace(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    )
    selection.downsample(model, processor, 8)
    assert processor.image_processor.crop_size == {"height": 8, "width": 8}
    torch.testing.assert_close(torch.stack(list(model.get_image_features(small).pooler_output)), wanted)
    ids = torch.cat([batch["input_ids"][:, :3], torch.full((1, 4), IMAGE), batch["input_ids"][:, -4:]], 1)
    attach(model, AttAnchorConfig(tau=0.1, keep=2))
    model(input_ids=ids, pixel_values=small)
    assert int((model.attanchor_plan.input_ids == IMAGE).sum()) == 2
    with pytest.raises(ValueError, match=r"side is 10; it should be a multiple of the patch size, 4"):
        selection.downsample(model, processor, 10)
