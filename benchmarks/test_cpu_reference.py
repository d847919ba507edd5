"""The CPU implementation is no toy: at the LLaVA-7B shape, held to its unavoidable work and to a literal loop."""

import pytest

from attanchor_kernels import build_sequence
from attanchor_kernels.testing.inputs import TAU, matched_pair
from benchmarks import cpu_reference


@pytest.mark.parametrize("batch", cpu_reference.BATCHES)
def test_against_unavoidable_work_and_a_literal_loop(batch):
    """Up to three tries, since a busy machine can only make a ratio worse than it is."""
    for _ in range(3):
        found = cpu_reference.compare(batch, rounds=30, loop_rounds=1)
        if found.of_unavoidable <= cpu_reference.MOST_OF_UNAVOIDABLE and found.of_loop >= cpu_reference.LEAST_OF_LOOP:
            return
    assert found.of_unavoidable <= cpu_reference.MOST_OF_UNAVOIDABLE
    assert found.of_loop >= cpu_reference.LEAST_OF_LOOP


@pytest.mark.parametrize("batch", cpu_reference.BATCHES)
@pytest.mark.parametrize("work", ["reference", "unavoidable"])
def test_time(benchmark, batch, work):
    """The figures that pytest-benchmark prints."""
    image, text = matched_pair(batch, cpu_reference.SHAPE_LLAVA, seed=batch)
    benchmark.group = f"llava-7b, B={batch}, float32"
    if work == "reference":
        result = benchmark(build_sequence, image, text, TAU)
        assert result.is_anchor.sum() == batch * 5
    else:
        benchmark(cpu_reference.unavoidable_work, image, text, text[:, :5])
