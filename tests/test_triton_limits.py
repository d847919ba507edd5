"""The Triton kernels just below and above the sizes at which they change their way, against the float64 oracle."""

import pytest
import torch
from limits import LIMITS, build, merge
from test_triton_kernels import DEVICE, assert_transposed, assert_workspace_zero

from attanchor_kernels import AnchoredSequence
from attanchor_kernels.backends import triton as backend
from attanchor_kernels.backends.triton import launch, schedule
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import assert_keeps_contract

# Lengths that only these kernels have: keys in blocks of 2048, roles of earlier samples in blocks of 2048.
OWN = {
    "2049 movers": lambda: build(3, 2049, 2),
    "2052 earlier slots": lambda: merge(513, batch=5, pad_left=True),
}
CASES = {**LIMITS, **OWN}


def on_device(problem: Problem) -> Problem:
    return problem._replace(**{k: v.to(DEVICE) for k, v in problem._asdict().items() if isinstance(v, torch.Tensor)})


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_limit(make, poisoned_empty):
    """The contract, the copy alone, the match alone, the transpose, and the workspace as it was."""
    problem = make()
    given = on_device(problem)
    # Few large tiles to assemble, or the interpreter takes minutes.
    rows = 32 if problem.slots * problem.batch < 1500 else 512
    images = len(given.image) if given.merges else given.image.shape[1]
    chosen = schedule.construct(DEVICE, given.text.element_size(), given.batch, images, given.slots, given.hidden, 1)
    embeds, made = launch.run(given, copy=True, schedule=chosen._replace(block_rows=rows))
    result = AnchoredSequence(embeds, *made[:-1])
    assert made.is_anchor.any()
    assert_keeps_contract(AnchoredSequence(*(field.cpu() for field in result)), problem, trimmed=False)
    assert torch.equal(backend.assemble(given.image, given.text, made.source, made.places), embeds)
    assert torch.equal(backend.match(given)[0], made.score)
    assert_transposed(given, embeds, made)
    assert_workspace_zero()
