"""Every compiled way of the CUDA construct kernel, whatever the shape would choose, against the reference."""

import re

import pytest
import torch
from gpu_checks import DEVICE, assert_same, bits, planted
from strategies import KERNEL_DTYPES

from attanchor_kernels import AnchoredSequence, backends, reference
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.inputs import TAU, Shape, merge_form

if reason := backends.why_not("cuda", "cuda"):
    pytest.skip(f"the CUDA backend is not there: {reason}", allow_module_level=True)

from attanchor_kernels.backends.cuda import launch

# A model's, and one that fills no tile, no block of texts and no chunk of columns.
SHAPES = (Shape("llava-7b", 576, 50, 4096), Shape("ragged", 150, 66, 560))
WAYS = [(dtype, tuning) for dtype in KERNEL_DTYPES for tuning in launch.variants(dtype)]
DROPPING_WAYS = [(dtype, tuning) for dtype in KERNEL_DTYPES for tuning in launch.variants(dtype, drops=True)]


def lacks(tuning: launch.Tuning) -> str | None:
    """What the variant needs and this GPU or the binary lacks, or None."""
    from attanchor_kernels import _C

    capability, built = torch.cuda.get_device_capability(), _C.architectures.split("_")
    clusters = capability >= (9, 0) and any(int(re.match(r"\d+", arch).group()) >= 90 for arch in built)
    return "clusters need compute capability 9.0 and a build for it" if tuning.cluster > 1 and not clusters else None


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize(("dtype", "tuning"), WAYS, ids=str)
def test_variant(dtype, tuning, shape):
    """Every field, several samples to a cluster, and the same bits again."""
    if reason := lacks(tuning):
        pytest.skip(reason)
    image, text = planted(5, shape, dtype=dtype, seed=1)  # whose budget cuts no near tie
    problems = [Problem(image, text, TAU, max_anchors=8, image_into_text=into_text) for into_text in (False, True)]
    text_embeds, image_embeds, roles = merge_form(image, text, before=3)
    # Features of the last placeholders are missing, so that NaN rows and rows of zeros stand among the held ones.
    problems.append(Problem(image_embeds[:-20], text_embeds, TAU, roles=roles, max_anchors=8, pad_left=True))
    for problem in problems:
        check(problem, tuning)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize(("dtype", "tuning"), DROPPING_WAYS, ids=str)
def test_variant_that_drops(dtype, tuning, shape):
    """A third of the image tokens stays, by hosts, cells and given numbers: no rounding changes who does."""
    if reason := lacks(tuning):
        pytest.skip(reason)
    image, text = planted(5, shape, dtype=dtype, seed=1)
    salience = torch.randn(5, shape.image, generator=torch.Generator(DEVICE).manual_seed(2), device=DEVICE)
    cells = torch.arange(shape.image, dtype=torch.int32, device=DEVICE).div(4, rounding_mode="floor").expand(5, -1)
    for into_text in (False, True):
        problem = Problem(image, text, TAU, max_anchors=8, image_into_text=into_text, keep=shape.image // 3)
        check(problem._replace(salience=salience, cells=cells), tuning)
        check(problem._replace(salience=salience, pad_left=True), tuning)


def check(problem: Problem, tuning: launch.Tuning) -> None:
    """What was asked for runs, makes what the reference makes, and the same bits again."""
    got = made(problem, tuning)
    assert got.is_anchor.any()
    assert_same(got, AnchoredSequence(*flat(reference.construct(problem))))
    for one, other in zip(made(problem, tuning), got, strict=True):
        assert torch.equal(bits(one), bits(other))
    way = launch.launched(problem, tuning=tuning)
    assert way[:3] == (tuning.tile_images, tuning.cluster, tuning.hold == 1)


def test_many_samples_in_one_launch():
    """More tiles than clusters, so that every cluster holds, gives up and waits, with bulk copies and without."""
    if reason := lacks(launch.Tuning(cluster=8)):
        pytest.skip(reason)
    image, text = planted(300, Shape("small tiles", 200, 20, 1024))
    problem = Problem(image, text, TAU)
    expected = AnchoredSequence(*flat(reference.construct(problem)))
    for bulk in (0, 1):
        assert_same(made(problem, launch.Tuning(32, 8, hold=1, bulk=bulk)), expected)


@pytest.mark.parametrize("clusters", [1, 2, 3, 11])
@pytest.mark.parametrize(
    "way", [{"cluster": 1, "lag": 1}, {"cluster": 8, "hold": 0, "lag": 3}, {"cluster": 8, "hold": 1}]
)
def test_a_small_grid_is_enough(clusters, way):
    """As on a small slice of a GPU: fewer blocks than a sample has tiles, down to one block or one cluster."""
    tuning = launch.Tuning(**way, blocks=clusters * way["cluster"])
    if reason := lacks(tuning):
        pytest.skip(reason)
    image, text = planted(9, Shape("many tiles", 300, 20, 1024))
    problem = Problem(image, text, TAU)
    assert_same(made(problem, tuning), AnchoredSequence(*flat(reference.construct(problem))))


def made(problem: Problem, tuning: launch.Tuning) -> AnchoredSequence:
    dirty = [torch.full((2**20,), float("nan"), device=DEVICE) for _ in range(4)]
    torch.cuda.synchronize()
    del dirty  # what the allocator hands out next holds NaN
    return AnchoredSequence(*flat(launch.run(problem, copy=True, tuning=tuning)))


def flat(constructed):
    embeds, plan = constructed
    return embeds, *plan[:-1]
