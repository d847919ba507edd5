"""The CPU implementation is no toy: at the LLaVA-7B shape, held to its unavoidable work and to a literal loop."""

import pytest
import torch

from benchmarks import cpu_reference
from benchmarks.cases import SHAPE_OF, Case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 4])
def test_against_unavoidable_work_and_a_literal_loop(batch, dtype):
    """Up to three tries, since a busy machine can only make a ratio worse than it is."""
    case = Case("forward", SHAPE_OF["llava-7b"], batch, dtype)
    rows = []
    for _ in range(3):
        rows.append(cpu_reference.compare(case, rounds=20))
        if cpu_reference.met(rows[-1]):
            return
    raise AssertionError(rows)
