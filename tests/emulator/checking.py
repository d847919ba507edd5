"""What the tests over the emulated device share: the device itself, random schedules for it, and one check for all."""

from __future__ import annotations

from collections.abc import Sequence

import emulated
import torch
from hypothesis import strategies as st
from torch import Tensor

from attanchor_kernels import AnchoredSequence, reference
from attanchor_kernels.backends.common import rows_contiguous
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import assert_keeps_contract
from attanchor_kernels.trimming import shift_places

emulator = emulated.Emulator()
launch = emulator.launch
NEEDS = ((True, True), (True, False), (False, True))  # a gradient of the images, of the texts


@st.composite
def schedules(draw, problem: Problem):
    """A compiled variant, tile sizes, and a device that runs few blocks at once in a random order."""
    tuning = draw(st.sampled_from(launch.variants(problem.text.dtype, problem.drops)))
    if not is_aligned(problem):  # tiles are held by 16-byte copies alone
        tuning = tuning._replace(hold=0)
    tuning = tuning._replace(tile_rows=draw(st.sampled_from([1, 3, 8, 32])), lag=draw(st.integers(1, 3)))
    return tuning, tuning.cluster * draw(st.sampled_from([1, 2, 5])), draw(st.integers(0, 2**32))


def is_aligned(problem: Problem) -> bool:
    """Whether all rows begin and end at multiples of 16 bytes, as the launcher sees them."""
    numbers = [problem.hidden * problem.text.element_size()]
    for rows in (rows_contiguous(problem.image), rows_contiguous(problem.text)):
        strides = zip(rows.stride()[:-1], rows.shape[:-1], strict=True)
        numbers += [rows.data_ptr(), *(stride * rows.element_size() for stride, count in strides if count > 1)]
    return all(number % 16 == 0 for number in numbers)


def run(problem: Problem, schedule, *, plan: bool = True, occupied: int = 0) -> tuple[AnchoredSequence, Tensor]:
    """Construct, and plan, over the emulated device: they must agree, and change nothing beside their outputs."""
    tuning, resident, seed = schedule
    emulator.configure(resident, seed, occupied)
    embeds, made = launch.run(problem, copy=True, tuning=tuning)
    check_rims(embeds, *made)
    if plan:
        planned = launch.run(problem, copy=False, tuning=tuning._replace(hold=0))[1]
        for one, other in zip(made, planned, strict=True):
            assert torch.equal(one, other)
    assert not any(words.any() for words in emulator.workspace.held(torch.device("cpu")))
    return AnchoredSequence(embeds, *made[:-1]), made.places


def check(problem: Problem, schedule) -> AnchoredSequence:
    result, places = run(problem, schedule)
    assert_keeps_contract(result, problem, trimmed=False)
    check_rows(problem, result, places)
    return result


def check_rims(*outputs: Tensor) -> None:
    """What lies around an output, in the larger buffer that the emulator puts it in, is as it was."""
    for output in outputs:
        whole = torch.empty(0, dtype=torch.uint8).set_(output.untyped_storage())
        start = output.storage_offset() * output.element_size()
        rims = torch.cat([whole[:start], whole[start + output.numel() * output.element_size() :]])
        assert len(rims) == 256 * output.element_size()
        assert (rims == 0xCB).all()


def check_rows(problem: Problem, result: AnchoredSequence, places: Tensor) -> None:
    """The copy alone and its transpose, at capacity and trimmed, do what the reference does, bit for bit."""
    image, text, source, embeds = problem.image, problem.text, result.source, result.embeds
    longest = int(result.attention_mask.sum(-1).max()) if source.numel() else 0
    cut = problem.capacity - longest if problem.pad_left else 0
    trimmed = source[:, cut : cut + longest], shift_places(places, cut), embeds[:, cut : cut + longest]
    for needs, (source_, places_, embeds_) in ((NEEDS[:1], (source, places, embeds)), (NEEDS, trimmed)):
        assert same_bits(emulator.backend.assemble(image, text, source_, places_), embeds_)
        check_transpose(problem, source_, places_, needs)


def check_transpose(problem: Problem, source: Tensor, places: Tensor, needs: Sequence[tuple[bool, bool]]) -> None:
    image, text = problem.image, problem.text
    generator = torch.Generator().manual_seed(1)
    upstream = torch.randn((*source.shape, problem.hidden), generator=generator).to(text.dtype)
    if problem.batch % 2:  # an upstream gradient need not be contiguous
        upstream = upstream.repeat_interleave(2, dim=1)[:, ::2]
    for need_image, need_text in needs:
        arguments = upstream, places, tuple(image.shape), tuple(text.shape), need_image, need_text
        got, expected = emulator.backend.assemble_backward(*arguments), reference.assemble_backward(*arguments)
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)


def same_bits(one: Tensor, other: Tensor) -> bool:
    nan = one.isnan() & other.isnan()
    return torch.equal(one.masked_fill(nan, 0), other.masked_fill(nan, 0)) and one.shape == other.shape
