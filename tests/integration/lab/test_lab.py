"""The laboratory: arms that differ in placement alone, training that is the same for all, measures that are true."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from lab_toy import TOY

from attanchor_lab import placements
from attanchor_lab.scenes import questions
from attanchor_lab.scenes import world as scenes
from attanchor_lab.scenes.alignment import alignment_loss, match_counts, match_quality
from attanchor_lab.scenes.questions import Mixture
from attanchor_lab.synthetic import arms, checks, measure, model, training
from attanchor_lab.synthetic.arms import ARMS, Asker


@pytest.fixture
def untrained():
    return checks._untrained(TOY, "cpu")


# --- Placement. ------------------------------------------------------------------------------------------------------


def test_the_checks_hold(untrained):
    checks.identity(*untrained)
    checks.same_as_attach(*untrained)
    for name in ARMS:
        checks.wiring(name, *untrained)


def _one_patch_off(embedded, features, roles, host, place=arms.place_sequence, **options):
    return place(embedded, features, roles, torch.where(host > 1, host - 1, host), **options)


def test_the_checks_see_a_misplaced_anchor(untrained, monkeypatch):
    monkeypatch.setattr(arms, "place_sequence", _one_patch_off)
    with pytest.raises(checks.CheckError, match="differs from attach"):
        checks.same_as_attach(*untrained)
    for name in ("true", "end"):
        with pytest.raises(checks.CheckError, match=name):
            checks.wiring(name, *untrained)


def test_the_checks_see_an_arm_that_inserts_nothing(untrained, monkeypatch):
    monkeypatch.setattr(Asker, "takes_part", lambda self, batch: torch.zeros_like(batch.is_image))
    for name in ("t2i", "random", "front"):
        with pytest.raises(checks.CheckError, match=name):
            checks.wiring(name, *untrained)


def test_true_patches_are_those_of_the_object_asked_for():
    world = TOY.world
    drawn = scenes.draw(world, 200, torch.Generator().manual_seed(0))
    asked = questions.ask(world, drawn, 1, Mixture(), torch.Generator().manual_seed(1)).flat()
    holds = questions.holders(drawn, asked.words)
    patch = placements.true_patches(holds, asked.target, torch.Generator().manual_seed(2))
    content = questions.is_content(asked.words)
    there = (asked.target >= 0)[:, None] & content
    assert patch[there].equal(asked.target[:, None].expand_as(patch)[there])
    assert (patch[~content] == -1).all()
    absent = (asked.target < 0)[:, None] & content
    assert (patch[absent] >= 0).any()
    assert (patch[absent] < 0).any()


# --- Training. -------------------------------------------------------------------------------------------------------


def test_packed_questions_are_answered_as_separate_prompts(untrained):
    made, _ = untrained
    generator = torch.Generator().manual_seed(3)
    drawn = scenes.draw(TOY.world, 3, generator)
    asked = questions.ask(TOY.world, drawn, 4, TOY.mixture, generator)
    pixels = scenes.render(TOY.world, drawn, generator)
    with torch.no_grad():
        features = torch.stack(list(made.get_image_features(pixels, return_dict=True).pooler_output))
        packed = training.packed_answers(made, features, asked.words)
        index = torch.arange(3).repeat_interleave(4)
        batch = arms.encode(made, drawn[index], asked.flat(), pixels[index])
        alone = Asker(made, ARMS["plain"], 1.0, generator)(batch).logits
    assert (packed.flatten(0, 1) - alone).abs().max() < 1e-4


def test_all_arms_of_a_seed_see_the_same_data_from_the_same_weights(monkeypatch):
    seen: dict[str, list] = {}
    new_batch = training.new_batch

    def recorded(setting, base, *more):
        batch = new_batch(setting, base, *more)
        first = not seen[current]
        weights = base.lm_head.weight.detach().clone() if first else None
        seen[current].append((batch.ids, batch.questions.answer, batch.scenes.where, weights))
        return batch

    monkeypatch.setattr(training, "new_batch", recorded)
    monkeypatch.setattr(training, "starting_tau", lambda setting, asker, generator: 0.1)
    state, _ = training.stage1(TOY, 0, "cpu")
    for current in ("plain", "t2i", "random", "true", "i2t"):
        seen[current] = []
        training.stage2(TOY, ARMS[current], 0, state, "cpu")
    for arm, batches in seen.items():
        assert len(batches) == 3
        for ours, theirs in zip(batches, seen["plain"], strict=True):
            assert all(a.equal(b) for a, b in zip(ours[:3], theirs[:3], strict=True)), arm
        assert batches[0][3].equal(state["lm_head.weight"])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_stage_2_trains_what_it_should_and_nothing_else(method):
    setting = dataclasses.replace(TOY, stage2=dataclasses.replace(TOY.stage2, method=method))
    state, _ = training.stage1(setting, 0, "cpu")
    asker, log = training.stage2(setting, ARMS["t2i-inherit"], 0, state, "cpu")
    after = {name.replace(".base_layer", ""): value for name, value in asker.model.state_dict().items()}
    changed = {name for name, value in state.items() if not after[name].equal(value)}
    assert not any("vision_tower" in name for name in changed)
    assert bool(changed) == (method == "full")
    assert 0 < log["trained_parameters"] < sum(value.numel() for value in state.values())
    adapters = [value for name, value in asker.model.state_dict().items() if "lora_B" in name]
    assert any(value.any() for value in adapters) == (method == "lora")


def test_without_stage_1_the_weights_are_random_and_the_encoder_is_not():
    setting = dataclasses.replace(TOY, stage1=dataclasses.replace(TOY.stage1, steps=0, encoder_steps=40))
    state, measured = training.stage1(setting, 0, "cpu")
    torch.manual_seed(0)
    fresh = model.build(TOY.world, TOY.shape).state_dict()
    differ = {name for name in state if not state[name].equal(fresh[name])}
    assert differ
    assert all("vision_tower" in name for name in differ)
    assert measured["encoder"]["colour"] > 0.5


def test_the_alignment_loss_is_least_where_patches_are_their_words():
    drawn = scenes.draw(TOY.world, 20, torch.Generator().manual_seed(0))
    table = torch.eye(len(questions.WORDS))
    colour, shape = drawn.on_patches(drawn.colour), drawn.on_patches(drawn.shape)
    empty = (shape < 0)[..., None]
    of_objects = table[colour + questions.COLOUR] + table[shape + questions.SHAPE]
    right = torch.where(empty, table[questions.ID["empty"]], of_objects)
    wrong_word = torch.where(empty, table[questions.ID["the"]], of_objects)
    half = torch.where(empty, right, table[colour + questions.COLOUR])
    swapped = torch.where(empty, of_objects.roll(1, 0), table[questions.ID["empty"]])
    best, *others = (
        alignment_loss(one, table[training._ALIGNED], drawn, 0.05) for one in (right, wrong_word, half, swapped)
    )
    assert best < 0.1
    assert all(other > best + 0.3 for other in others)


def test_matching_is_counted_against_the_true_patches():
    """Two scenes by hand: a red circle at patch 3, a blue ring at patch 5, and the second with nothing asked for."""
    where, colour = torch.tensor([[3, 5]] * 2), torch.tensor([[0, 4]] * 2)
    drawn = scenes.Scenes(where, colour, torch.tensor([[0, 5]] * 2), torch.ones(2, 2, dtype=torch.bool), where, 16)
    words = torch.tensor([[questions.ID[word] for word in ("where", "is", "the", "red", "ring", "?")]] * 2)
    best = torch.tensor([[0, 0, 0, 3, 5, 0], [0, 0, 0, 3, 2, 0]])
    host = torch.tensor([[-1, -1, -1, 3, -1, 7], [-1, -1, -1, -1, 2, -1]])
    found = match_quality(match_counts(host, best, words, drawn, torch.tensor([3, -1])))
    assert found["hit"] == 3 / 4
    assert found["chance"] == pytest.approx(1 / 16)
    assert found["hit_referred"] == 1 / 2  # of red and ring in the first scene, red stands at the patch asked for
    assert found["precision"] == 1 / 3
    assert found["recall"] == 1 / 4
    assert found["share"] == 3 / 12


def test_tau_is_chosen_for_a_share():
    scores = torch.linspace(0, 1, 101)
    tau = training.tau_for(scores, 0.25)
    assert (scores >= tau).float().mean() == pytest.approx(0.25, abs=0.01)
    assert training.tau_for(scores, 1.0) == -1.0


def test_a_held_share_follows_the_scores_and_a_fixed_tau_does_not():
    state, _ = training.stage1(TOY, 0, "cpu")
    long = dataclasses.replace(TOY.stage2, steps=20, batch=32, lr=2e-2)
    taus = {}
    for hold in (True, False):
        setting = dataclasses.replace(TOY, stage2=dataclasses.replace(long, hold_share=hold))
        _, log = training.stage2(setting, ARMS["t2i"], 0, state, "cpu")
        taus[hold] = {line["tau"] for line in log["log"]}
        assert log["log"][0]["share"] == pytest.approx(setting.stage2.share, abs=0.13)
    assert len(taus[False]) == 1
    assert len(taus[True]) > 1


def test_measures_say_what_the_answers_were(monkeypatch):
    """A model that always says yes."""
    state, _ = training.stage1(TOY, 0, "cpu")
    asker, _ = training.stage2(TOY, ARMS["t2i"], 0, state, "cpu")
    setting = dataclasses.replace(TOY, test_scenes=60, blur_test=(0.0, 0.8))
    call = Asker.__call__

    def yes(self, batch, copies=True, **more):
        answered = call(self, batch, copies, **more)
        logits = torch.zeros_like(answered.logits)
        logits[:, questions.YES] = 9
        return answered._replace(logits=logits)

    monkeypatch.setattr(Asker, "__call__", yes)
    found = measure.measure(setting, asker, 0, "cpu", pictures=True)
    test = found["test"]["0"]
    assert test["yes_share"] == 1
    assert test["present"] == 1
    assert set(test["negatives"].values()) == {0}
    assert 0.4 < test["existence"] < 0.6
    assert test["colour"] == test["place"] == 0
    assert test["mean"] == pytest.approx(test["existence"] / 3)
    assert set(found["test"]) == {"0", "0.8"}
    assert 0.1 < test["matching"]["share"] < 0.4
    attention = found["attention"]
    assert attention["with_copies"]["copies"] > 0
    assert attention["without_copies"]["copies"] == 0
    assert sum(attention["with_copies"][key] for key in ("image", "copies")) <= 1
    json.dumps(found, allow_nan=False)
    for picture in found["pictures"]:
        assert len(picture["attention"]) == TOY.world.patches
        assert 0 < sum(picture["attention"]) <= 1
        assert picture["question"].endswith("?")


def asked_for_a_place(made, arm, target=None):
    """An asker, and a batch of questions for a place, or as if the object stood at `target`."""
    generator = torch.Generator().manual_seed(3)
    drawn = scenes.draw(TOY.world, 5, generator)
    asked = questions.ask(TOY.world, drawn, 1, Mixture((0, 0, 1)), generator).flat()
    if target is not None:
        asked.target.fill_(target)
    batch = arms.encode(made, drawn, asked, scenes.render(TOY.world, drawn, generator))
    return Asker(made, ARMS[arm], 1.0, generator), batch


@torch.no_grad()
def test_attention_is_counted_at_the_true_patch(untrained, monkeypatch):
    """Attention that goes to the true patch alone is all there; with copies, all goes to the copies."""
    asker, batch = asked_for_a_place(untrained[0], "true")
    length = asker(batch).built.source.shape[1]

    def to(slot):
        attentions = torch.zeros(2, 5, 2, length, length)
        attentions[:, torch.arange(5), :, :, slot] = 1
        return lambda *_: (attentions, asker(batch).built)

    # Both words are copied behind the true patch, so it stands where it would, and they right behind it.
    for offset, (patch, copies) in {0: (1, 0), 1: (0, 1), 2: (0, 1), 3: (0, 0)}.items():
        monkeypatch.setattr(measure, "_attentions", to(batch.questions.target + 1 + offset))
        found = measure._attended(asker, batch, True)
        assert (found["patch"], found["copies"]) == (patch, copies), offset


@torch.no_grad()
def test_copies_behind_the_last_patch_are_not_at_it(untrained):
    """The whole question behind the image stands behind its last patch, and means none."""
    asker, batch = asked_for_a_place(untrained[0], "end", TOY.world.patches - 1)
    found = measure._attended(asker, batch, True)
    assert found["patch"] > 0
    assert found["copies"] == 0
