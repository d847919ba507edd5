"""Image tokens left out by the CUDA kernels, run on a CPU over an emulated device: who stays, and where all rows go."""

import math

import emulated
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNEL_DTYPES, build_arguments, examples, merge_arguments

from attanchor_kernels import checks
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import assert_keeps_contract

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run here: tests/gpu", allow_module_level=True)
if emulated.missing():
    pytest.skip(f"the emulator was left out: {emulated.missing()}", allow_module_level=True)

from checking import check, emulator, launch, run, schedules


@examples(60)
@given(st.data())
def test_build(poisoned_empty, data):
    """Every option of build_sequence, half of the time dropping tokens, ragged and empty inputs, any strides, on every
    variant and a random device."""
    problem = checks.build_call(**data.draw(build_arguments(KERNEL_DTYPES, drops=True, tau_tensors=True))).problem
    check(problem, data.draw(schedules(problem)))


@examples(60)
@given(st.data())
def test_merge(poisoned_empty, data):
    """The same of merge_sequence and plan_sequence, roles in any order and pictures with newlines."""
    problem = checks.merge_call(**data.draw(merge_arguments(KERNEL_DTYPES, drops=True, tau_tensors=True))).problem
    check(problem, data.draw(schedules(problem)))


# Around a word of 32 slots, two words, all tokens and more.
KEEPS = (0, 1, 31, 32, 33, 64, 110, 400)


def pictures(seed: int, width: int, dtype: torch.dtype = torch.float32, slots: int = 190, **options) -> Problem:
    """One sample for each of KEEPS: pictures in rows of `width`, each row with its newline, and text between them.

    Rows take few values, so that many relevances are equal.
    """
    generator = torch.Generator().manual_seed(seed)
    slot = torch.arange(slots)
    picture = (slot % 95 < 78).expand(len(KEEPS), -1)
    roles = torch.where(picture, torch.where(slot % (width + 1) == width, 4, 2), 3).to(torch.uint8)
    roles[:, 90:93] = torch.tensor([4, 0, 1], dtype=torch.uint8)  # a newline of its own block
    text = torch.randint(-1, 2, (len(KEEPS), slots, 8), generator=generator).to(dtype)
    image = torch.randint(-1, 2, (int(((roles == 2) | (roles == 4)).sum()), 8), generator=generator).to(dtype)
    turn = (slot >= 95).int().expand(len(KEEPS), -1).contiguous()
    keep = torch.tensor(KEEPS, dtype=torch.int32)
    return Problem(image, text, **{"tau": 0.7, "roles": roles, "turn": turn, "keep_each": keep, **options})


def rules(problem: Problem, rule: str) -> Problem:
    """The problem with `salience`, `cells`, both or neither."""
    generator = torch.Generator().manual_seed(len(rule))
    count = problem.image.shape[:-1]
    values = torch.tensor([math.nan, -math.inf, -0.0, 0.0, 1.0, math.inf, -3.0])
    salience = values[torch.randint(len(values), count, generator=generator)]
    cells = torch.randint(-1, 40, count, generator=generator, dtype=torch.int32)
    return problem._replace(
        salience=salience if rule in ("salience", "both") else None, cells=cells if rule in ("cells", "both") else None
    )


@pytest.mark.parametrize(("seed", "rule"), enumerate(["relevance", "salience", "cells", "both"]))
@pytest.mark.parametrize("image_into_text", [False, True], ids=["text into image", "image into text"])
def test_long_samples(poisoned_empty, seed, rule, image_into_text):
    """Several words of slots, rows of an image longer than a word and shorter, counts on all sides of both.

    Every rule meets both lengths of rows, and so does every direction; each with each is for random problems.
    """
    long = (seed + image_into_text) % 2 == 0
    width, options = (41, {"inherit": True}) if long else (5, {"pad_left": True, "max_anchors": 20})
    problem = rules(pictures(seed, width, image_into_text=image_into_text, **options), rule)
    check(problem, (launch.Tuning(tile_rows=16, lag=2), 5, seed))


@pytest.mark.parametrize("image_into_text", [False, True], ids=["text into image", "image into text"])
def test_every_variant_agrees(poisoned_empty, image_into_text):
    """Tiles of any size, alone or split over a cluster, and any number of blocks: the same tokens stay."""
    problem = rules(pictures(4, 11, torch.bfloat16, image_into_text=image_into_text, max_anchors=9), "cells")
    results = []
    for seed, tuning in enumerate(launch.variants(torch.bfloat16, drops=True)):
        schedule = tuning._replace(tile_rows=8 + 8 * seed), tuning.cluster * (3 - seed), seed
        results.append(run(problem, schedule, plan=seed == 0)[0])
    assert_keeps_contract(results[0], problem, trimmed=False)
    for result in results[1:]:
        for one, other in zip(result, results[0], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("merges", [False, True], ids=["build", "merge"])
def test_as_many_as_there_are_changes_nothing(poisoned_empty, merges):
    """K of at least the number of tokens: every field is, bit for bit, that of a call without `keep`."""
    if merges:
        problem = pictures(6, 13, max_anchors=30)._replace(keep_each=None)
    else:
        image, text = torch.randint(-1, 2, (2, 2, 70, 5), generator=torch.Generator().manual_seed(6)).float()
        problem = Problem(image, text, 0.5, image_mask=image.sum(-1) > -2, max_anchors=30, pad_left=True)
    expected = launch.run(problem, copy=True, tuning=launch.Tuning(hold=0))
    embeds, made = launch.run(problem._replace(keep=problem.images), copy=True)
    assert torch.equal(embeds, expected[0])
    for name, one, other in zip(made._fields, made, expected[1], strict=True):
        assert name == "relevance" or torch.equal(one, other), name


def test_missing_features_stay_last(poisoned_empty):
    """Placeholders without a feature are candidates of relevance -inf, without salience and without a cell."""
    problem = rules(pictures(7, 9), "both")
    count = len(problem.image) // 3
    problem = problem._replace(image=problem.image[:count].clone())
    for cut in (problem, problem._replace(salience=None), problem._replace(cells=None)):
        there = {
            name: None if (value := getattr(cut, name)) is None else value[:count] for name in ("salience", "cells")
        }
        check(cut._replace(**there), (launch.Tuning(), 4, 7))


@pytest.mark.parametrize("resident", [1, 2, 3, 16])
def test_barrier_on_any_device(resident):
    """More match tiles than blocks run at once, several samples, every lag: no deadlock, one result."""
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(5, 150, 8, generator=generator, dtype=torch.float16)
    text = torch.randn(5, 6, 8, generator=generator, dtype=torch.float16)
    problem = Problem(image, text, 0.3, max_anchors=3, keep=40)
    results = []
    for seed, lag in enumerate((1, 2, 5)):  # blocks: the device's number, then a grid of one and of two
        tuning = launch.Tuning(64, 1, tile_rows=4, lag=lag, blocks=seed)
        results.append(run(problem, (tuning, resident, seed), plan=False)[0])
    assert_keeps_contract(results[0], problem, trimmed=False)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


def test_very_long_sample(poisoned_empty):
    """More words of slots than a block has threads; few of the slots are matched."""
    roles = torch.full((1, 8300), 1, dtype=torch.uint8)
    roles[0, 30::400], roles[0, 31::400] = 2, 4
    roles[0, 8200:8260] = 2
    roles[0, -3:] = 3
    generator = torch.Generator().manual_seed(10)
    image = torch.randn(int((roles % 2 == 0).sum()), 4, generator=generator)
    problem = Problem(image, torch.randn(1, 8300, 4, generator=generator), 0.1, roles=roles, max_anchors=2, keep=40)
    check(problem, (launch.Tuning(), 3, 10))


def test_room_for_fewer_rows_than_slots(poisoned_empty):
    """No row at all is left: `relevance`, `host`, `score` and `places` are written all the same."""
    image = torch.randn(2, 37, 8, generator=torch.Generator().manual_seed(8))
    problem = Problem(image, image[:, :0], 0.5, keep=0)
    assert problem.capacity == 0
    check(problem, (launch.Tuning(), 3, 8))
    check(problem._replace(image_into_text=True, max_anchors=0), (launch.Tuning(), 3, 8))


def test_tiles_are_not_kept_on_chip():
    """Where tokens are dropped every launch is of a variant that can; asking for another is an error."""
    problem = Problem(torch.zeros(1, 100, 2048), torch.zeros(1, 9, 2048), 0.5, keep=50)
    emulator.configure(16, 0)
    assert launch.launched(problem)[:3] == (32, 8, False)
    with pytest.raises(RuntimeError, match="and none are dropped"):
        launch.launched(problem, tuning=launch.Tuning(hold=1))
