"""Every backend against the float64 oracle, on random problems of every kind."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNEL_DTYPES, build_arguments, examples, merge_arguments

from attanchor_kernels import AnchoredSequence, build_sequence, checks, merge_sequence, plan_sequence
from attanchor_kernels.testing.contract import assert_keeps_contract, assert_same_fields
from attanchor_kernels.testing.oracle import algorithm_1, algorithm_2, embed

DTYPES = [*KERNEL_DTYPES, torch.float64]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the Triton kernels run on the GPU here: tests/gpu")
BACKENDS = ["reference", pytest.param("triton", marks=interpreted)]


def with_axis(result: AnchoredSequence) -> AnchoredSequence:
    flat = result.position_ids.dim() == 2
    return result._replace(position_ids=result.position_ids.unsqueeze(0)) if flat else result


def check_build(arguments: dict, trim: bool, backend: str) -> None:
    problem = checks.build_call(**arguments).problem
    result = build_sequence(**arguments, trim=trim, backend=backend)
    assert_keeps_contract(with_axis(result), problem, trimmed=trim)


def check_merge(arguments: dict, trim: bool, backend: str) -> None:
    problem = checks.merge_call(**arguments).problem
    result = merge_sequence(**arguments, trim=trim, backend=backend)
    assert_keeps_contract(with_axis(result), problem, trimmed=trim)
    planned = plan_sequence(**arguments, trim=trim, backend=backend)
    assert_same_fields(planned._replace(embeds=result.embeds), result)


@examples(300)
@given(build_arguments(DTYPES, drops=True, tau_tensors=True), st.booleans())
def test_reference_build(arguments, trim):
    """The reference keeps the contract of build_sequence."""
    check_build(arguments, trim, "reference")


@examples(300)
@given(merge_arguments(DTYPES, drops=True, tau_tensors=True), st.booleans())
def test_reference_merge(arguments, trim):
    """The reference keeps the contract of merge_sequence and plan_sequence."""
    check_merge(arguments, trim, "reference")


@interpreted
@examples(50)
@given(build_arguments(KERNEL_DTYPES, drops=True, tau_tensors=True), st.booleans())
def test_triton_build(arguments, trim):
    """The Triton kernels keep the contract of build_sequence, half of the time dropping tokens."""
    check_build(arguments, trim, "triton")


@interpreted
@examples(50)
@given(merge_arguments(KERNEL_DTYPES, drops=True, tau_tensors=True), st.booleans())
def test_triton_merge(arguments, trim):
    """The same of merge_sequence and plan_sequence."""
    check_merge(arguments, trim, "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("direction", "algorithm"), [("text_into_image", algorithm_1), ("image_into_text", algorithm_2)]
)
@pytest.mark.parametrize("tau", [-1.0, 0.2, 1.0])
def test_the_papers_algorithms(backend, direction, algorithm, tau):
    """What Algorithms 1 and 2 make of a sample, read literally: every row, and which of them are copies."""
    generator = torch.Generator().manual_seed(6)
    for _ in range(8):
        counts = torch.randint(1, 12, (2,), generator=generator).tolist()
        image, text = (torch.randn(count, 6, generator=generator) for count in counts)
        sequence = algorithm(image, text, tau)
        result = build_sequence(image, text, tau, direction=direction, backend=backend)
        assert torch.equal(result.embeds, embed(sequence, image, text, direction == "image_into_text"))
        assert result.is_anchor.tolist() == [kind == "anchor" for kind, _ in sequence]


def _gradient_problem(dtype: torch.dtype, merge: bool):
    generator = torch.Generator().manual_seed(3)
    image = torch.randn(2, 21, 19, generator=generator)
    text = torch.randn(2, 9, 19, generator=generator)
    text[:, 3], text[:, 5] = image[:, 7], image[:, 7]
    if not merge:
        mask = torch.rand(2, 21, generator=generator) < 0.8
        return build_sequence, [image.to(dtype), text.to(dtype)], {"tau": 0.1, "img_mask": mask}
    roles = torch.full((2, 30), 3, dtype=torch.uint8)
    roles[:, 2:23], roles[:, 0], roles[1, 25:] = 2, 1, 0
    text_embeds = torch.cat([image[:, :21] * 0, text], 1)
    return merge_sequence, [text_embeds.to(dtype), image.reshape(-1, 19).to(dtype)], {"roles": roles, "tau": 0.1}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES)
@pytest.mark.parametrize("merge", [False, True], ids=["build", "merge"])
@pytest.mark.parametrize(("direction", "trim"), [("text_into_image", False), ("image_into_text", True)])
def test_gradients_are_the_sums_over_copies(backend, dtype, merge, direction, trim):
    """Against float32 index arithmetic on the result's own map, with a random upstream gradient, rounded once."""
    operator, rows, options = _gradient_problem(dtype, merge)
    rows = [row.requires_grad_() for row in rows]
    result = operator(*rows, **options, direction=direction, trim=trim, backend=backend)
    assert result.is_anchor.any()
    upstream = torch.randn(result.embeds.shape, generator=torch.Generator().manual_seed(4)).to(dtype)
    got = torch.autograd.grad(result.embeds, rows, upstream)

    slots = 30
    expected = torch.zeros(2, slots + 1, 19)
    index = torch.where(result.source < 0, slots, result.source)
    expected.scatter_add_(1, index.unsqueeze(-1).expand_as(upstream), upstream.float())
    expected = expected[:, :slots]
    if merge:
        is_image = options["roles"] == 2
        wanted = [expected.masked_fill(is_image.unsqueeze(-1), 0), expected[is_image]]
    else:
        wanted = list(expected.split([21, 9], dim=1))
    for one, other in zip(got, wanted, strict=True):
        assert torch.equal(one, other.to(dtype))


def test_bitwise_repeatable():
    """Ten runs of the reference, one result; the kernels have tests of their own for it."""
    arguments = {"img": torch.randn(2, 70, 33), "txt": torch.randn(2, 20, 33), "tau": 0.05, "max_anchors": 6}
    first = build_sequence(**arguments, backend="reference")
    for _ in range(9):
        assert_same_fields(build_sequence(**arguments, backend="reference"), first)
