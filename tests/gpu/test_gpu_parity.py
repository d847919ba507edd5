"""Kernels on a GPU: the contract on random problems, the reference at the models' sizes, full precision of float32."""

import pytest
import torch
from gpu_checks import DEVICE, OPS, assert_same, check_contract, moved, planted, problem_of, reference
from hypothesis import given, seed, settings
from limits import LIMITS
from strategies import KERNEL_DTYPES, build_arguments, merge_arguments

from attanchor_kernels import AnchoredSequence, backends, build_sequence, merge_sequence, plan_sequence
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import BAND, assert_keeps_contract
from attanchor_kernels.testing.inputs import SHAPES, TAU, matched_pair, merge_form

# Triton compiles anew for nearly every random problem, seconds each; the interpreter runs many more of them elsewhere.
EXAMPLES = {"triton": 5, "cuda": 60}
PARTS = range(3)  # as tests of their own, so that they compile side by side


def random_problems(backend: str, part: int):
    """Hypothesis settings: other problems in every part, the same ones in every run."""

    def decorate(check):
        count = settings(max_examples=EXAMPLES[backend], deadline=None, derandomize=False, database=None)
        return seed(part)(count(check))

    return decorate


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_build_keeps_the_contract(backend, dtype, part):
    """Every option on random problems, against the float64 oracle."""

    @random_problems(backend, part)
    @given(arguments=build_arguments([dtype]))
    def check(arguments):
        for trim in (False, True):
            result = build_sequence(**moved(arguments), trim=trim, backend=backend)
            check_contract(result, problem_of(arguments), trim)

    check()


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_merge_and_plan_keep_the_contract(backend, dtype, part):
    @random_problems(backend, part)
    @given(arguments=merge_arguments([dtype]))
    def check(arguments):
        on_device = moved(arguments)
        for trim in (False, True):
            result = merge_sequence(**on_device, trim=trim, backend=backend)
            check_contract(result, problem_of(arguments), trim)
            planned = plan_sequence(**on_device, trim=trim, backend=backend)
            for field, merged in zip(planned[1:], result[1:], strict=True):
                assert torch.equal(field, merged)

    check()


@pytest.mark.parametrize("make", LIMITS.values(), ids=LIMITS.keys())
def test_limits_of_tiles_and_scans(backend, make):
    """Just below, at and above the sizes at which a kernel changes its way, against the float64 oracle."""
    problem = make()
    embeds, made = backends.load(backend).construct(Problem(**moved(problem._asdict())))
    assert made.is_anchor.any()
    result = AnchoredSequence(*(field.cpu() for field in (embeds, *made[:-1])))
    assert_keeps_contract(result, problem, trimmed=False)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("direction", ["text_into_image", "image_into_text"])
def test_match_alone(shape, direction):
    """Triton's match without plan and copy: the plan's scores, the hosts of what is inserted."""
    triton = pytest.importorskip("attanchor_kernels.backends.triton")
    image, text = planted(3, shape)
    problem = Problem(image, text, TAU, image_into_text=direction == "image_into_text")
    made = triton.plan(problem)
    score, host = triton.match(problem)
    assert (made.host >= 0).any()
    assert torch.equal(score, made.score)
    assert torch.equal(made.host, torch.where(made.host >= 0, host, -1))
    assert ((host >= 0) == score.isfinite()).all()


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("batch", [1, 3, 8, 33])
def test_real_shapes_against_the_reference(backend, shape, dtype, batch):
    """Every field, with planted matches that no rounding changes; the budgeted and the full capacity."""
    if shape.image > 1000 and batch > 8:
        batch = 9  # as ragged, and no reference in float32 that fills a GPU of 24 GB
    image, text = matched_pair(batch, shape, dtype=dtype, device=DEVICE, seed=batch)
    axes = torch.arange(3 * batch * (shape.image + shape.text), device=DEVICE).view(3, batch, -1)
    inherit = {"positions": "inherit", "position_ids": axes} if "qwen" in shape.name else {}
    for options in ({"max_anchors": 8}, {}, {"direction": "image_into_text", "padding_side": "left"}):
        options = {**options, **inherit}
        result = build_sequence(image, text, TAU, trim=False, backend=backend, **options)
        assert result.is_anchor.any()
        assert_same(result, reference(image, text, **options))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_real_shapes_keep_the_contract_where_every_score_is_close(backend, shape):
    """tau = -1 and a budget: hosts and movers are chosen among near ties of random cosines."""
    if shape.image > 1000:
        shape = shape._replace(image=1500)  # the oracle takes one Python step for every pair
    image, text = matched_pair(1, shape, dtype=torch.bfloat16, seed=7, share=0)
    result = build_sequence(image.to(DEVICE), text.to(DEVICE), -1.0, max_anchors=8, trim=True, backend=backend)
    arguments = {"img": image, "txt": text, "tau": -1.0, "max_anchors": 8, "img_mask": None, "txt_mask": None}
    defaults = {"anchor_mask": None, "direction": "text_into_image", "positions": "sequential"}
    problem = problem_of({**arguments, **defaults, "position_ids": None, "padding_side": "right"})
    check_contract(result, problem, True)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
@pytest.mark.parametrize("batch", [1, 8])
def test_real_prompts_against_the_reference(backend, shape, batch):
    """`merge_sequence` with text in front of the image."""
    arguments = merge_form(*matched_pair(batch, shape, dtype=torch.bfloat16, device=DEVICE, seed=3), before=5)
    result = merge_sequence(*arguments, TAU, max_anchors=8, trim=False, backend=backend)
    expected = merge_sequence(*arguments, TAU, max_anchors=8, trim=False, backend="reference")
    assert result.is_anchor.any()
    assert_same(result, expected)


@pytest.mark.parametrize("precision", ["highest", "high", "medium"])
@pytest.mark.parametrize("autocast", [None, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["reference", None], ids=["reference", "kernel"])
def test_float32_is_never_rounded(backend, precision, autocast, name):
    """Rows whose entries TF32 and bfloat16 all round the same way: the cosine 1 would become 0.999 or less."""
    value = 1 + 2**-11 - 2**-14
    signs = torch.randn(40, 128, generator=torch.Generator().manual_seed(0)).sign()
    image = torch.stack([value * signs] * 2).to(DEVICE)
    text = image[:, 5:15].clone()
    found = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cuda", dtype=autocast or torch.float16, enabled=autocast is not None):
            result = build_sequence(image, text, 1 - 2 * BAND, trim=False, backend=name or backend)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(found)
    assert (result.score - 1).abs().max() <= BAND
    assert torch.equal(result.host, torch.arange(5, 15, device=DEVICE).expand(2, -1))


def test_prompts_that_do_not_add_up_cost_no_sync_and_no_crash(backend):
    """Raw operator: placeholders beyond T are NaN rows, surplus features are ignored, unknown roles are padding."""
    text_embeds, image_embeds, roles = merge_form(*planted(2), before=2)
    short = OPS.merge_sequence(text_embeds, image_embeds[:-3], roles, TAU)
    assert short[0][1][short[3][1] == 2 + 69].isnan().all()
    assert short[0].isnan().any(-1).sum() == 3
    surplus = OPS.merge_sequence(text_embeds, torch.cat([image_embeds, image_embeds[:4]]), roles, TAU)
    assert_same(surplus, OPS.merge_sequence(text_embeds, image_embeds, roles, TAU))
    unknown, padding = roles.clone(), roles.clone()
    unknown[:, -1], padding[:, -1] = 9, 0
    strange = OPS.merge_sequence(text_embeds, image_embeds, unknown, TAU)
    assert_same(strange, OPS.merge_sequence(text_embeds, image_embeds, padding, TAU))


def test_prompts_that_do_not_add_up_are_errors_where_the_device_is_read_anyway(backend):
    text_embeds, image_embeds, roles = merge_form(*planted(2), before=2)
    with pytest.raises(ValueError, match="image_embeds"):
        merge_sequence(text_embeds, image_embeds[:-3], roles, TAU, backend=backend)
    roles[0, 0] = 9
    with pytest.raises(ValueError, match="roles"):
        merge_sequence(text_embeds, image_embeds, roles, TAU, backend=backend)
