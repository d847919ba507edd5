"""Microbenchmarks of every operator and backend that this machine has, by pytest-benchmark: `make bench`.

They include the launch from Python. Device time, against a copy of the same bytes: `python -m benchmarks roofline`.
"""

import pytest
import torch

from attanchor_kernels.testing.inputs import SHAPES
from benchmarks.baselines import plain_merge
from benchmarks.cases import OPERATIONS, Case, kernel_backends, make_inputs, run, verify

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
BACKENDS = ["reference", *(kernel_backends(DEVICE) if ON_GPU else [])]
CASES = [
    Case(operation, shape, batch, torch.bfloat16 if ON_GPU else torch.float32)
    for shape in (SHAPES if ON_GPU else SHAPES[:1])
    for batch in ((1, 8) if ON_GPU else (1,))
    for operation in OPERATIONS
]


def name(case):
    return f"{case.operation}-{case.shape.name}-B{case.batch}"


def waiting(call):
    """The call and, on a GPU, the wait for its end."""

    def run_and_wait():
        result = call()
        if ON_GPU:
            torch.cuda.synchronize()
        return result

    return run_and_wait


@pytest.mark.parametrize("case", CASES, ids=name)
@pytest.mark.parametrize("backend", BACKENDS)
def test_operator(benchmark, case, backend):
    inputs = make_inputs(case, DEVICE, seed=0)
    verify(case, run(case, inputs, "reference"), run(case, inputs, backend))
    benchmark.group = name(case)
    benchmark(waiting(lambda: run(case, inputs, backend)))


@pytest.mark.parametrize("case", [case for case in CASES if case.operation == "merge"], ids=name)
def test_the_merge_of_transformers(benchmark, case):
    """masked_scatter, which inserts nothing: what `merge_sequence` replaces."""
    inputs = make_inputs(case, DEVICE, seed=0)
    benchmark.group = name(case)
    merged = benchmark(waiting(lambda: plain_merge(inputs)))
    assert torch.equal(merged[inputs.roles == 2], inputs.image)
