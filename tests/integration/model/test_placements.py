"""The controls: copies at other places, in everything else what the operator builds."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import IMAGE as IMAGE_ID
from tiny import difference, plain, prompts, tiny_llava, with_labels

from attanchor_kernels import merge_sequence
from attanchor_vlm import AttAnchorConfig, attach, load_settings, save_settings
from attanchor_vlm.model import config as known
from attanchor_vlm.model import placements
from attanchor_vlm.model.placements import Placement, register_placement

PADDING, TEXT, IMAGE, ANCHOR, SILENT = range(5)


def problem():
    """Three prompts: text, an image of 5 tokens, words; two images with a silent row; no image."""
    generator = torch.Generator().manual_seed(0)
    rows = [
        [TEXT] * 3 + [IMAGE] * 5 + [ANCHOR] * 4 + [TEXT],
        [TEXT] + [IMAGE] * 3 + [SILENT] + [ANCHOR] * 2 + [IMAGE] * 2 + [ANCHOR] * 3,
        [TEXT] * 2 + [ANCHOR] * 3,
    ]
    length = max(map(len, rows)) + 1
    roles = torch.tensor([row + [PADDING] * (length - len(row)) for row in rows], dtype=torch.uint8)
    text = torch.randn(3, length, 16, generator=generator)
    image = torch.randn(int(((roles == IMAGE) | (roles == SILENT)).sum()), 16, generator=generator)
    return text, image, roles


def turns(roles):
    """The second prompt's words behind its second image are of a later turn."""
    turn = torch.zeros(roles.shape, dtype=torch.int32)
    first = (roles[1] == IMAGE).nonzero()[3]
    turn[1, first:] = 1
    return turn


def place(text, image, roles, tau, placement, seed=0, turn=None, padding_side="right"):
    """The sequence of a placement; "matched" by the operator."""
    if placement == "matched":
        return merge_sequence(text, image, roles, tau, turn=turn, padding_side=padding_side)
    config = AttAnchorConfig(tau=tau, placement=placement, placement_seed=seed)
    options = {"turn": turn, "positions": "sequential", "position_ids": None, "padding_side": padding_side}
    return placements.place(config, text, image, roles, kept={}, copy=True, **options)


def test_random_places_hold_the_same_tokens_at_images_that_their_turn_allows():
    text, image, roles = problem()
    turn = turns(roles)
    matched = place(text, image, roles, 0.1, "matched", turn=turn)
    drawn = place(text, image, roles, 0.1, "random", turn=turn)
    assert torch.equal(drawn.host >= 0, matched.host >= 0)
    assert torch.equal(drawn.score, matched.score)
    assert not torch.equal(drawn.host, matched.host)
    for sample, mover in (drawn.host >= 0).nonzero().tolist():
        host = int(drawn.host[sample, mover])
        assert roles[sample, host] == IMAGE
        assert turn[sample, host] >= turn[sample, mover]
    anchors = drawn.source[drawn.is_anchor]
    assert sorted(anchors.tolist()) == sorted(matched.source[matched.is_anchor].tolist())


def test_random_places_depend_on_the_prompt_and_the_seed_alone():
    text, image, roles = problem()
    host = place(text, image, roles, -1.0, "random", seed=3).host
    first, count = (roles[0] != PADDING).nonzero()[:, 0], int((roles[0] == IMAGE).sum())
    alone = place(text[:1, first], image[:count], roles[:1, first], -1.0, "random", seed=3).host
    assert torch.equal(alone[0], host[0, first])
    shift = roles.shape[1] - len(first)
    left = place(
        torch.nn.functional.pad(text[:1, first], (0, 0, shift, 0)), image[:count],
        torch.nn.functional.pad(roles[:1, first], (shift, 0)), -1.0, "random", seed=3, padding_side="left",
    ).host  # fmt: skip
    assert torch.equal(torch.where(left >= 0, left - shift, -1)[0, shift:], alone[0])
    assert not torch.equal(place(text, image, roles, -1.0, "random", seed=4).host, host)
    other = text.clone()
    other[0, 8] += 1  # another word in the question
    assert not torch.equal(place(other, image, roles, -1.0, "random", seed=3).host[0], host[0])
    other = text.clone()
    other[0, 12] += 1  # another word of the answer
    assert torch.equal(place(other, image, roles, -1.0, "random", seed=3).host[0], host[0])


def test_random_places_are_even():
    """Chi-squared over 16 places and 4,000 draws: 37.7 is exceeded by chance once in a thousand."""
    samples, words, patches = 200, 20, 16
    roles = torch.tensor([[TEXT] + [IMAGE] * patches + [ANCHOR] * words] * samples, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(samples, roles.shape[1], 8, generator=generator)
    image = torch.randn(samples * patches, 8, generator=generator)
    host = place(text, image, roles, -1.0, "random").host
    counts = torch.bincount(host[host >= 0] - 1, minlength=patches).float()
    expected = samples * words / patches
    assert counts.sum() == samples * words
    assert float(((counts - expected) ** 2 / expected).sum()) < 37.7


def test_front_puts_the_whole_question_in_front_of_the_first_image():
    text, image, roles = problem()
    out = place(text, image, roles, 0.99, "front")
    assert out.source[0, :12].tolist() == [0, 1, 2, 8, 9, 10, 11, 3, 4, 5, 6, 7]
    assert out.source[1, :7].tolist() == [0, 5, 6, 9, 10, 11, 1]
    assert out.source[2, :6].tolist() == [0, 1, 2, 3, 4, -1]  # no image, no copies
    assert out.is_anchor.sum(1).tolist() == [4, 5, 0]
    assert out.position_ids[0, :17].tolist() == list(range(17))


# --- In a model. -----------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:anchor_mask selects")
@pytest.mark.parametrize("route", ["embeds", "ids"])
@pytest.mark.parametrize("placement", ["random", "front"])
def test_an_attached_model_gets_the_placement(placement, route):
    model, batch = attach(tiny_llava(), AttAnchorConfig(tau=0.0, route=route)), with_labels(prompts([1, 2]))
    before = model(**batch)
    theirs = model.attanchor_plan
    attach(model, AttAnchorConfig(tau=0.0, route=route, placement=placement, placement_seed=1))
    inside = model(**batch)
    ours = model.attanchor_plan
    assert not torch.equal(ours.source, theirs.source)
    assert torch.equal(ours.score, theirs.score)
    assert difference(inside.loss, before.loss) > 1e-4
    if placement == "random":
        assert ours.is_anchor.sum() == theirs.is_anchor.sum()


@pytest.mark.parametrize("keep", [None, 1 / 3])
@pytest.mark.parametrize("placement", ["random", "front"])
def test_both_routes_and_generation_agree(placement, keep):
    """Cached generation against a forward over the whole text, in a left-padded batch."""
    model, batch = tiny_llava(), prompts([1, 1], "left")
    settings = {"tau": 0.0, "placement": placement, "placement_seed": 1, "keep": keep}
    tokens = {}
    for route in ("embeds", "ids"):
        attach(model, AttAnchorConfig(**settings, route=route))
        tokens[route] = model.generate(**batch, max_new_tokens=4, do_sample=False)
    assert torch.equal(tokens["embeds"], tokens["ids"])
    new = tokens["embeds"][:, batch["input_ids"].shape[1] :]
    attach(model, AttAnchorConfig(**settings, route="embeds"))
    for count in range(4):
        given = {
            "input_ids": torch.cat([batch["input_ids"], new[:, :count]], 1),
            "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, count), value=1),
            "anchor_mask": torch.nn.functional.pad(batch["anchor_mask"], (0, count)),
            "pixel_values": batch["pixel_values"],
        }
        assert torch.equal(model(**given).logits[:, -1].argmax(-1), new[:, count])


@pytest.mark.parametrize("positions", ["sequential", "inherit"])
def test_copies_at_random_stand_among_the_survivors_that_matched_ones_have(positions):
    batch, plans = prompts([1, 2], "left"), {}
    for placement in ("matched", "random"):
        config = AttAnchorConfig(tau=0.0, keep=1 / 4, positions=positions, placement=placement)
        model = attach(tiny_llava(), config)
        model(**batch)
        plans[placement] = model.attanchor_plan
    matched, drawn = plans.values()
    assert matched.source.shape == drawn.source.shape
    for row in range(2):
        own = [plan.source[row][(plan.source[row] >= 0) & ~plan.is_anchor[row]] for plan in (matched, drawn)]
        assert torch.equal(*own)
        assert set(drawn.host[row][drawn.host[row] >= 0].tolist()) <= set(own[0].tolist())
        if positions == "inherit":
            where = [plan.position_ids[row][(plan.source[row] >= 0) & ~plan.is_anchor[row]] for plan in plans.values()]
            assert torch.equal(*where)
    assert not torch.equal(matched.host, drawn.host)


def test_tau_one_is_the_untouched_model_in_every_placement():
    model, batch = tiny_llava(), prompts([1])
    untouched = model(**plain(batch)).logits
    attach(model, AttAnchorConfig(tau=1.0, placement="front"))
    assert torch.equal(model(**batch).logits, untouched)
    dropped = attach(tiny_llava(), AttAnchorConfig(tau=1.0, keep=0.5))(**batch).logits
    assert torch.equal(attach(model, AttAnchorConfig(tau=1.0, keep=0.5, placement="front"))(**batch).logits, dropped)


def test_what_cannot_be_placed_is_refused():
    with pytest.raises(ValueError, match="placement is 'left'; it should be one of 'matched', 'random', 'front'"):
        AttAnchorConfig(tau=0.0, placement="left")
    with pytest.raises(ValueError, match="only copies of text can be placed"):
        AttAnchorConfig(tau=0.0, placement="random", direction="image_into_text")


def test_a_placement_of_ones_own(monkeypatch, request):
    """Every inserted token behind the last image token."""
    monkeypatch.setattr(placements, "_PLACEMENTS", dict(placements._PLACEMENTS))
    request.addfinalizer(lambda: known.PLACEMENTS.remove("last"))

    def last(matched, seed):
        slots = torch.arange(matched.roles.shape[1]).expand_as(matched.roles)
        end = torch.where(matched.roles == IMAGE, slots, -1).amax(-1, keepdim=True)
        return torch.where(matched.host >= 0, end, -1)

    register_placement("last", Placement(last))
    model, batch = attach(tiny_llava(), AttAnchorConfig(tau=0.0, placement="last")), prompts([1, 1])
    model(**batch)
    host = model.attanchor_plan.host
    assert (host >= 0).any()
    for row in range(2):
        images = (batch["input_ids"][row] == IMAGE_ID).nonzero()[:, 0]
        assert set(host[row][host[row] >= 0].tolist()) == {int(images[-1])}


def test_an_earlier_controls_adapter_keeps_its_placement(tmp_path):
    """It said so in a file of its own, beside the settings."""
    save_settings(AttAnchorConfig(tau=0.3), tmp_path)
    assert load_settings(tmp_path).placement == "matched"
    (tmp_path / "placement.json").write_text(json.dumps({"placement": "random", "seed": 7}))
    assert load_settings(tmp_path) == AttAnchorConfig(tau=0.3, placement="random", placement_seed=7)
    (tmp_path / "placement.json").write_text(json.dumps({"placement": "elsewhere", "seed": 0}))
    with pytest.raises(ValueError, match="placement is 'elsewhere'"):
        load_settings(tmp_path)
