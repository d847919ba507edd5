"""Dropping image tokens in the Triton kernels: where these kernels change way. Random problems: test_parity.py."""

import pytest
import torch
from limits import build, merge
from test_triton_kernels import (
    SCHEDULE,
    assert_same,
    assert_transposed,
    assert_workspace_zero,
    build_problem,
    merge_problem,
)
from test_triton_limits import on_device

from attanchor_kernels import AnchoredSequence, reference
from attanchor_kernels.backends import triton as backend
from attanchor_kernels.backends.triton import launch
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import assert_keeps_contract


def ranked(problem: Problem, keep: int, cells: int) -> Problem:
    """The problem with few different saliences and cells."""
    per_image = problem.image.shape[:-1]
    generator = torch.Generator().manual_seed(keep)
    salience = torch.randint(9, per_image, generator=generator).float()
    cell = torch.randint(-1, cells, per_image, generator=generator, dtype=torch.int32)
    return problem._replace(keep=keep, salience=salience, cells=cell)


def rows_of(tokens: int, slots: int) -> torch.Tensor:
    """(1, slots) roles: texts at both ends, between them rows of image tokens, a newline behind each."""
    roles = torch.where(torch.arange(slots) % (tokens + 1) == tokens, 4, 2).to(torch.uint8)
    roles[:3], roles[-3:] = 3, 3
    return roles.unsqueeze(0)


def newlines(tokens: int, slots: int, **options) -> Problem:
    """A picture whose rows cross the blocks that slots are read in."""
    roles = rows_of(tokens, slots)
    image = torch.randn(int(((roles == 2) | (roles == 4)).sum()), 2, generator=torch.Generator().manual_seed(slots))
    text = torch.randn(1, slots, 2, generator=torch.Generator().manual_seed(tokens))
    return Problem(image, text, tau=0.99, roles=roles, **options)


# Slots are read in blocks of 1024, ranks in blocks of 2048; bits stand in words of 32.
LIMITS = {
    "31 slots": lambda: ranked(build(26, 5, 4), 7, 3),
    "32 slots, left": lambda: ranked(build(27, 5, 4, pad_left=True), 7, 3),
    "33 slots, image into text": lambda: ranked(build(28, 5, 4, image_into_text=True), 7, 3),
    "1024 slots": lambda: newlines(30, 1024, keep=40),
    "1025 slots": lambda: newlines(1015, 1025, keep=1),
    "a row of 1030": lambda: newlines(1030, 1070, keep=1),
    "2049 images": lambda: ranked(build(2049, 3, 2), 600, 500),
    "300 movers": lambda: build(20, 300, 4, keep=9, max_anchors=200),
    "129 slots, inherit": lambda: ranked(merge(129), 1, 2),
}


@pytest.mark.parametrize("make", LIMITS.values(), ids=LIMITS.keys())
def test_limit(make, poisoned_empty):
    """The contract, and the workspace as it was."""
    problem = make()
    given = on_device(problem)
    # Few large tiles to assemble, or the interpreter takes minutes.
    rows = 32 if problem.slots < 1000 else 1024
    embeds, made = launch.run(given, copy=True, schedule=SCHEDULE._replace(block_images=64, block_rows=rows))
    result = AnchoredSequence(embeds, *made[:-1])
    assert ((made.places[:, 0] < 0) & (made.places[:, 2] >= 0)).any()  # a dropped image token
    assert_keeps_contract(AnchoredSequence(*(field.cpu() for field in result)), problem, trimmed=False)
    assert_workspace_zero()


PROBLEMS = {
    "build": lambda: build_problem(keep=8),
    "image into text": lambda: build_problem(torch.bfloat16, keep=5, image_into_text=True, pad_left=True, tau=-1.0),
    "merge": lambda: merge_problem(keep_each=torch.tensor([3, 2, 0], dtype=torch.int32), inherit=True),
    "merge, image into text": lambda: merge_problem(keep=2, image_into_text=True, max_anchors=None),
}
problems = pytest.mark.parametrize("make", PROBLEMS.values(), ids=PROBLEMS.keys())


@problems
def test_any_schedule(make, poisoned_empty):
    """One result, however the work is cut up, with the copy and without."""
    problem = on_device(make())
    split = SCHEDULE._replace(slice_blocks=1, slices=3, split=True)
    expected = launch.run(problem, copy=True, schedule=split)
    assert_workspace_zero()
    assert_same(launch.run(problem, copy=True, schedule=split._replace(split=False, lag=0)), expected)
    assert_workspace_zero()
    assert_same((None, launch.run(problem, copy=False, schedule=split)[1]), (None, expected[1]))
    assert torch.equal(backend.match(problem)[0].isinf(), expected[1].score.isinf())


@problems
def test_copy_and_transpose(make):
    """The copy alone makes the same rows, also copies of what is dropped; what is dropped gets no gradient."""
    problem = on_device(make())
    embeds, made = backend.construct(problem)
    if problem.image_into_text:
        assert ((made.places[:, 0] < 0) & (made.places[:, 1] >= 0)).any()
    alone = backend.assemble(problem.image, problem.text, made.source, made.places)
    assert torch.equal(alone.view(torch.uint8), embeds.view(torch.uint8))
    assert_transposed(problem, embeds, made)


def test_missing_features():
    """A placeholder without a feature ranks last, whatever stands behind the salience and the cells."""
    problem = merge_problem(keep=2)
    count = len(problem.image) - 2
    scores = torch.full((count + 2,), 9.0)
    scores[:count] = 1.0
    short = on_device(problem._replace(image=problem.image[:count], salience=scores[:count]))
    expected, got = reference.plan(short), backend.plan(short)
    assert_same((None, got._replace(score=expected.score, relevance=expected.relevance)), (None, expected))
