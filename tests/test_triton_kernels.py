"""What is peculiar to the Triton backend: tickets and barrier, workspace, tiles. Parity is in test_parity.py."""

import math

import pytest
import torch
from torch import Tensor

from attanchor_kernels import reference
from attanchor_kernels.backends import triton as backend
from attanchor_kernels.backends import workspace
from attanchor_kernels.backends.triton import launch, schedule, slots
from attanchor_kernels.problem import Plan, Problem
from attanchor_kernels.testing.contract import BAND
from attanchor_kernels.testing.oracle import Sample

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SCHEDULE = schedule.Schedule(
    block_images=16,
    block_texts=16,
    block_hidden=16,
    slices=1,
    slice_blocks=3,
    split=False,
    ring=2,
    lag=1,
    block_rows=16,
    block_columns=32,
    num_warps=4,
    num_stages=2,
    registers=255,
)


def random_rows(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def build_problem(dtype: torch.dtype = torch.float32, **options) -> Problem:
    """Two samples of 26 image and 18 text rows with ragged masks and some exact copies."""
    image, text = random_rows(2, 26, 40, seed=0, dtype=dtype), random_rows(2, 18, 40, seed=1, dtype=dtype)
    text[:, 4] = text[:, 9] = image[:, 17]
    image[1, 21] = image[1, 17]
    kept = torch.rand(2, 44, generator=torch.Generator().manual_seed(2)).to(DEVICE) < 0.85
    kept[:, [17, 30, 35]] = True
    masks = {"image_mask": kept[:, :26], "text_mask": kept[:, 26:]}
    return Problem(image, text, **{"tau": 0.2, "max_anchors": 6, **masks, **options})


def merge_problem(dtype: torch.dtype = torch.float32, **options) -> Problem:
    """Three prompts of 37 slots; sample 1 has no image."""
    generator = torch.Generator().manual_seed(5)
    roles = torch.randint(0, 5, (3, 37), generator=generator, dtype=torch.uint8)
    roles[1] = torch.where((roles[1] == 2) | (roles[1] == 4), 3, roles[1])
    features = int(((roles == 2) | (roles == 4)).sum())
    turn = torch.randint(0, 2, (3, 37), generator=generator, dtype=torch.int32).sort(1).values
    image, text = random_rows(features, 40, seed=6, dtype=dtype), random_rows(3, 37, 40, seed=7, dtype=dtype)
    return Problem(
        image, text, **{"tau": 0.1, "max_anchors": 5, "roles": roles.to(DEVICE), "turn": turn.to(DEVICE), **options}
    )


PROBLEMS = {
    "build": lambda: build_problem(),
    "image into text": lambda: build_problem(image_into_text=True, pad_left=True),
    "no budget": lambda: build_problem(torch.bfloat16, max_anchors=None, inherit=True),
    "merge": lambda: merge_problem(),
    "merge, image into text": lambda: merge_problem(torch.float16, image_into_text=True, max_anchors=None),
}
problems = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())


def assert_same(result: tuple[Tensor | None, Plan], expected: tuple[Tensor | None, Plan]) -> None:
    """Bit for bit."""
    for name, one, other in zip(Plan._fields, result[1], expected[1], strict=True):
        assert torch.equal(one, other), name
    if result[0] is not None and expected[0] is not None:
        assert torch.equal(result[0].view(torch.uint8), expected[0].view(torch.uint8))


def assert_transposed(problem: Problem, embeds: Tensor, made: Plan) -> None:
    """Random gradients of the rows come to what the reference makes of them, bit for bit."""
    grad = torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0)).to(embeds)
    arguments = grad, made.places, tuple(problem.image.shape), tuple(problem.text.shape), True, True
    for one, other in zip(backend.assemble_backward(*arguments), reference.assemble_backward(*arguments), strict=True):
        assert torch.equal(one, other)


def assert_workspace_zero() -> None:
    kept = workspace.held(DEVICE)
    assert kept
    assert all(not words.any() for words in kept)


@problems
def test_any_lag(make):
    """Any lag: the same bits, the reference's decisions, and all state back at zero."""
    problem = make()
    expected = reference.construct(problem)
    single = launch.run(problem, copy=True, schedule=SCHEDULE)
    assert_same((single[0], single[1]._replace(score=expected[1].score)), expected)
    torch.testing.assert_close(single[1].score, expected[1].score, rtol=0, atol=2e-6)
    assert_workspace_zero()
    for lag in (0, 2):
        assert_same(launch.run(problem, copy=True, schedule=SCHEDULE._replace(lag=lag)), single)
        assert_workspace_zero()


@problems
def test_slices_of_the_columns(make):
    """Sums over slices make the same decisions, and the same bits if slices are shared out, in a ring of any size."""
    problem = make()
    whole = launch.run(problem, copy=True, schedule=SCHEDULE)
    schedule = SCHEDULE._replace(slice_blocks=1, slices=3)
    sliced = launch.run(problem, copy=True, schedule=schedule)
    assert_same((sliced[0], sliced[1]._replace(score=whole[1].score)), whole)
    torch.testing.assert_close(sliced[1].score, whole[1].score, rtol=0, atol=1e-6)
    for ring in (1, 99):  # elsewhere 2
        assert_same(launch.run(problem, copy=True, schedule=schedule._replace(split=True, ring=ring)), sliced)
        assert_workspace_zero()


@problems
def test_plan_and_assemble_alone(make):
    """The plan without the copy, and the copy without the plan, are what construct makes in one launch."""
    problem = make()
    embeds, made = backend.construct(problem)
    assert_same((None, backend.plan(problem)), (None, made))
    alone = backend.assemble(problem.image, problem.text, made.source, made.places)
    assert torch.equal(alone.view(torch.uint8), embeds.view(torch.uint8))


@pytest.mark.skipif(DEVICE.type == "cuda", reason="a compiled kernel has its constants in it")
@pytest.mark.parametrize("options", [{}, {"image_into_text": True, "keep": 3}], ids=["plain", "image into text, keep"])
def test_first_features_are_counted_or_published(monkeypatch, options):
    """Where a sample's features begin, its programs count themselves or are told by an earlier one: the same."""
    problem = merge_problem(**options)
    counted = backend.construct(problem), backend.match(problem)
    for samples in (1, 2):  # that count
        monkeypatch.setattr(slots, "COUNTED", (samples - 1) * problem.slots)
        assert_same(backend.construct(problem), counted[0])
        assert_workspace_zero()
        assert all(map(torch.equal, backend.match(problem), counted[1]))
        assert_workspace_zero()


def assert_matches(problem: Problem, score: Tensor, host: Tensor) -> None:
    """Against the float64 oracle: the best cosine of every mover, a host that reaches it, the first of equal ones."""
    problem = problem._replace(**{name: v.cpu() for name, v in problem._asdict().items() if isinstance(v, Tensor)})
    for index in range(problem.batch):
        sample = Sample(problem, index)
        for mover, (got, at) in enumerate(zip(score[index].tolist(), host[index].tolist(), strict=True)):
            cosines = sample.cosines.get(mover + problem.mover_offset, {})
            if not cosines:
                assert (got, at) == (-math.inf, -1)
                continue
            assert abs(got - max(cosines.values())) <= BAND
            found = at + problem.host_offset
            assert cosines[found] >= max(cosines.values()) - BAND
            assert not any(torch.equal(sample.rows[h], sample.rows[found]) for h in cosines if h < found)


@problems
@pytest.mark.parametrize("schedule", [None, SCHEDULE._replace(slice_blocks=1, slices=3, split=True)])
def test_match_alone(make, schedule, poisoned_empty):
    """Score and host of every mover before threshold and budget, below tau and at tau >= 1 too."""
    problem = make()
    score, host = launch.match(problem, schedule=schedule)
    assert_matches(problem, score, host)
    assert_workspace_zero()
    again = launch.match(problem._replace(tau=2.0, max_anchors=0), schedule=schedule)
    assert torch.equal(again[0], score)
    assert torch.equal(again[1], host)
    made = launch.run(problem, copy=False, schedule=schedule)[1]
    assert torch.equal(made.score, score)
    assert torch.equal(made.host, torch.where(made.host >= 0, host, -1))


@problems
def test_outputs_are_fully_written(make, poisoned_empty):
    """Whatever memory the outputs are given holds nothing of it afterwards."""
    problem = make()
    embeds, made = expected = reference.construct(problem)
    got = backend.construct(problem)
    assert_same((got[0], got[1]._replace(score=made.score)), expected)
    assert_transposed(problem, embeds, made)


@pytest.mark.parametrize("max_anchors", [1, 130])
@pytest.mark.parametrize("image_into_text", [False, True])
def test_budget_of_many_movers(max_anchors, image_into_text):
    """Above 128 movers the budget's cut is searched by one program: exact also among equal scores."""
    many, few = random_rows(2, 300, 8, seed=9), random_rows(2, 20, 8, seed=10)
    many[:, 100:160] = many[:, 40:100]
    image, text = (many, few) if image_into_text else (few, many)
    problem = Problem(image, text, tau=0.3, max_anchors=max_anchors, image_into_text=image_into_text)
    made = backend.plan(problem)
    inserted = reference.select(made.score, problem.tau, max_anchors)
    assert torch.equal(made.host >= 0, inserted)
    assert inserted.sum(1).tolist() == [max_anchors] * 2
    assert_workspace_zero()


def test_more_text_blocks_than_one():
    """Texts beyond one block, split and not: equal texts in different blocks score the same bits."""
    text = random_rows(1, 70, 40, seed=11)
    text[:, 64] = text[:, 3]
    problem = Problem(random_rows(1, 33, 40, seed=12), text, tau=-1.0, max_anchors=9)
    for split in (False, True):
        made = launch.run(problem, copy=False, schedule=SCHEDULE._replace(slice_blocks=1, slices=3, split=split))[1]
        assert made.score[0, 64] == made.score[0, 3]
        reverse = problem._replace(image_into_text=True)
        hosts = launch.run(reverse, copy=False, schedule=SCHEDULE._replace(slice_blocks=1, slices=3, split=split))[1]
        expected = reference.plan(reverse)
        assert torch.equal(hosts.host, expected.host)
        assert 64 not in hosts.host


def test_missing_features_are_nan_and_surplus_ones_get_no_gradient():
    """The raw operator on a GPU cannot count: what it makes of too few and of too many features."""
    problem = merge_problem()
    count = len(problem.image)
    short = problem._replace(image=problem.image[: count - 2])
    embeds, made = backend.construct(short)
    missing = made.places[:, 2] >= count - 2
    assert int(missing.sum()) == 2
    assert not (made.host[missing] >= 0).any()
    at = made.places[:, 0][missing].long()
    sample = missing.nonzero()[:, 0]
    assert embeds[sample, at].isnan().all()
    assert int(embeds.isnan().any(-1).sum()) == 2

    surplus = problem._replace(image=torch.cat([problem.image, problem.image[:3]]))
    embeds, made = backend.construct(surplus)
    assert torch.equal(embeds, backend.construct(problem)[0])
    shapes = tuple(surplus.image.shape), tuple(surplus.text.shape)
    grad = random_rows(*embeds.shape, seed=13)
    image_grad, text_grad = backend.assemble_backward(grad, made.places, *shapes, True, True)
    assert not image_grad[count:].any()
    assert image_grad[:count].abs().sum(1).min() > 0
    only_image, nothing = backend.assemble_backward(grad, made.places, *shapes, True, False)
    assert torch.equal(only_image, image_grad)
    assert nothing.shape == (0,)
    nothing, only_text = backend.assemble_backward(grad, made.places, *shapes, False, True)
    assert torch.equal(only_text, text_grad)
    assert nothing.shape == (0,)


@pytest.mark.parametrize("shape", [(0, 4, 3, 8), (2, 0, 0, 8), (2, 0, 3, 8), (2, 4, 0, 8), (2, 4, 3, 0)])
@pytest.mark.parametrize("max_anchors", [None, 2])
def test_empty_inputs(shape, max_anchors, poisoned_empty):
    """No samples, no rows, no columns."""
    batch, images, texts, hidden = shape
    problem = Problem(
        random_rows(batch, images, hidden, seed=0),
        random_rows(batch, texts, hidden, seed=1),
        tau=-1.0,
        max_anchors=max_anchors,
    )
    embeds, made = backend.construct(problem)
    assert_same((None, made), (None, reference.plan(problem)))
    assert torch.equal(backend.match(problem)[0], made.score)
    rows = torch.cat([problem.image, problem.text], 1)
    at = made.source.clamp_min(0).unsqueeze(-1).expand(-1, -1, hidden)
    expected = rows.gather(1, at) if rows.numel() else torch.zeros_like(embeds)
    assert torch.equal(embeds, expected.masked_fill((made.source < 0).unsqueeze(-1), 0))


def test_large_hidden_is_accumulated_in_slices():
    """Above 8192 columns no accumulator runs over all of them."""
    for itemsize in (2, 4):
        chosen = schedule.construct(DEVICE, itemsize, 999, 576, 626, 12288, 16 // itemsize)
        assert chosen.slices >= 3
        assert chosen.slice_blocks * chosen.block_hidden <= 4096
        assert chosen.slices * chosen.slice_blocks * chosen.block_hidden >= 12288


def test_few_compilations(monkeypatch):
    """One model is compiled at most twice, whatever its batches and the lengths of its prompts and pictures."""
    monkeypatch.setattr(schedule, "multiprocessors", lambda device: 132)
    schedule.construct.cache_clear()
    compiled = ("block_images", "block_texts", "block_hidden", "block_rows", "block_columns", "num_warps", "num_stages")
    for hidden in (512, 896, 2048, 4096):
        found = set()
        for batch in range(1, 65):
            for images in (1, 64, 256, 576, 729, 2880, 9216):
                for texts in (1, 8, 9, 16, 17, 50, 64, 65, 200, 1000, 4000):
                    shape = (batch, images, images + texts, hidden, 8)
                    chosen = schedule.construct(DEVICE, 2, *shape)
                    slices = None if chosen.split else (chosen.slices, chosen.slice_blocks)
                    found.add((*(getattr(chosen, name) for name in compiled), chosen.split, slices, chosen.registers))
        assert len(found) <= 2, found
    schedule.construct.cache_clear()
