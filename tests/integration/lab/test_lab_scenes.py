"""The laboratory's scenes and questions: every answer is true, every kind of negative is what it says."""

from __future__ import annotations

import torch
from lab_toy import objects, truth

from attanchor_lab.scenes import questions
from attanchor_lab.scenes import world as scenes
from attanchor_lab.scenes.questions import COLOUR, ID, NEGATIVES, SHAPE, WORDS, Mixture
from attanchor_lab.scenes.world import COLOURS, KINDS, SHAPES

WORLD = scenes.World(least=3, most=7)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_scenes_hold_distinct_objects_on_distinct_patches():
    drawn = scenes.draw(WORLD, 300, generator())
    counts = drawn.there.sum(1)
    assert set(counts.tolist()) == set(range(3, 8))
    for index in range(len(drawn)):
        found = objects(drawn, index)
        assert len(found) == counts[index]
        taken = [*drawn.where[index].tolist(), *drawn.clutter[index].tolist()]
        assert len(set(taken)) == len(taken)
    assert (drawn.on_patches(drawn.shape) >= 0).sum(1).equal(counts)
    assert drawn.pairs().sum(1).equal(counts)


def test_no_scene_holds_more_objects_than_its_world():
    """Also the easy ones that training begins with, where patches are few."""
    small = scenes.World(2, 2, least=1, most=2, distractors=2)
    assert scenes.draw(small, 50, generator(), 1, 4).there.sum(1).max() == 2


def test_popular_pairs_are_more_frequent():
    share = scenes.draw(WORLD, 3000, generator()).pairs().float().mean(0)
    popular = scenes.frequencies().topk(scenes.POPULAR).indices
    others = torch.ones(scenes.PAIRS, dtype=torch.bool)
    others[popular] = False
    assert share[popular].mean() > 1.8 * share[others].mean()


def test_answers_are_true_of_the_scenes():
    drawn = scenes.draw(WORLD, 200, generator())
    asked = questions.ask(WORLD, drawn, 6, Mixture(), generator(1))
    popular = {
        (COLOURS[pair // len(SHAPES)], SHAPES[pair % len(SHAPES)])
        for pair in scenes.frequencies().topk(scenes.POPULAR).indices.tolist()
    }
    seen = dict.fromkeys((*KINDS, *NEGATIVES), 0)
    for index in range(len(drawn)):
        there = objects(drawn, index)
        for number in range(6):
            text = questions.text_of(asked.words[index, number]).rstrip("?").split()
            answer = WORDS[int(asked.answer[index, number])]
            kind = KINDS[int(asked.kind[index, number])]
            negative, target = int(asked.negative[index, number]), int(asked.target[index, number])
            seen[kind] += 1
            expected, (colour, shape) = truth(kind, text, there, WORLD)
            assert answer.replace("-", " ") == expected
            assert (negative >= 0) == (answer == "no")
            assert target == there.get((colour, shape), -1)
            if negative >= 0:
                seen[NEGATIVES[negative]] += 1
            if negative == NEGATIVES.index("adversarial"):
                assert colour in {c for c, _ in there}
                assert shape in {s for _, s in there}
            if negative == NEGATIVES.index("popular"):
                assert (colour, shape) in popular
    assert min(seen.values()) > 60


def test_a_mixture_is_what_was_asked_for():
    drawn = scenes.draw(WORLD, 400, generator())
    mixture = Mixture(kinds=(1, 0, 0), yes=0.8, negatives=("random",))
    asked = questions.ask(WORLD, drawn, 5, mixture, generator(1))
    assert (asked.kind == 0).all()
    assert 0.77 < (asked.answer == questions.YES).float().mean() < 0.83
    assert set(asked.negative.unique().tolist()) == {-1, 0}


def test_objects_are_drawn_at_their_patches_and_nowhere_else():
    world = scenes.World(noise=0.0, distractors=3)
    drawn = scenes.draw(world, 50, generator())
    image = scenes.render(world, drawn, generator(1))
    assert image.shape == (50, 3, 48, 48)
    cells = image.unflatten(2, (6, 8)).unflatten(4, (6, 8)).permute(0, 2, 4, 1, 3, 5).reshape(50, 36, 3, 64)
    spread = cells.std(-1).amax(-1)  # a patch of bare ground is one colour
    marked = drawn.on_patches(drawn.shape) >= 0
    marked = marked.scatter(1, drawn.clutter, True)
    assert spread[~marked].max() < 1e-6
    assert spread[marked].min() > 0.002
    # Colours: the middle of a filled shape is of its colour.
    red = (drawn.colour == ID["red"] - COLOUR) & (drawn.shape == ID["circle"] - SHAPE) & drawn.there
    scene, place = red.nonzero(as_tuple=True)
    middle = cells[scene, drawn.where[scene, place]].unflatten(-1, (8, 8))[..., 3:5, 3:5].mean((-1, -2))
    assert (middle[:, 0] > middle[:, 1] + 0.3).all()


def test_blur_leaves_the_scene_and_takes_detail():
    world = scenes.World(noise=0.0)
    drawn = scenes.draw(world, 10, generator())
    sharp, soft = (scenes.render(world, drawn, generator(1), blur) for blur in (0.0, 0.8))
    assert soft.shape == sharp.shape
    assert (sharp.mean((2, 3)) - soft.mean((2, 3))).abs().max() < 0.01
    assert soft.diff(dim=-1).abs().mean() < 0.8 * sharp.diff(dim=-1).abs().mean()


def test_holders_are_the_patches_that_hold_a_word():
    drawn = scenes.draw(WORLD, 30, generator())
    words = torch.tensor([ID["red"], ID["ring"], ID["the"]]).expand(30, -1)
    holds = questions.holders(drawn, words)
    for index in range(30):
        there = objects(drawn, index)
        assert set(holds[index, 0].nonzero()[:, 0].tolist()) == {p for (c, _), p in there.items() if c == "red"}
        assert set(holds[index, 1].nonzero()[:, 0].tolist()) == {p for (_, s), p in there.items() if s == "ring"}
    assert not holds[:, 2].any()


def test_the_same_seed_gives_the_same_scenes_and_another_seed_others():
    first, second, third = (scenes.draw(WORLD, 20, generator(seed)) for seed in (3, 3, 4))
    assert first.where.equal(second.where)
    assert not first.where.equal(third.where)
