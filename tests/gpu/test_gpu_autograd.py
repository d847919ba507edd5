"""Gradients against index arithmetic, repeatability bit for bit, and compilation, on a GPU."""

import pytest
import torch
from gpu_checks import DEVICE, OPS, SMALL, assert_same, bits, copies, planted, reference
from strategies import KERNEL_DTYPES

from attanchor_kernels import build_sequence, merge_sequence
from attanchor_kernels.testing.inputs import SHAPES, TAU, merge_form

DIRECTIONS = ["text_into_image", "image_into_text"]


def sums_over_copies(source, upstream, slots):
    """The gradient of every slot by index arithmetic in float32: (B, slots, D)."""
    total = torch.zeros(len(source), slots + 1, upstream.shape[-1], device=source.device)
    index = torch.where(source < 0, slots, source).unsqueeze(-1).expand_as(upstream)
    return total.scatter_add_(1, index, upstream.float())[:, :slots]


@pytest.mark.parametrize("shape", [SMALL, *SHAPES], ids=lambda shape: shape.name)
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_of_build(backend, shape, dtype, direction):
    image, text = (row.requires_grad_() for row in planted(2, shape, dtype))
    result = build_sequence(image, text, TAU, direction=direction, max_anchors=8, trim=False, backend=backend)
    upstream = torch.randn(result.embeds.shape, device=DEVICE).to(dtype)
    got = torch.autograd.grad(result.embeds, [image, text], upstream)
    expected = sums_over_copies(result.source, upstream, shape.image + shape.text)
    for one, other in zip(got, expected.split([shape.image, shape.text], dim=1), strict=True):
        assert torch.equal(one, other.to(dtype))


@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("trim", [False, True], ids=["capacity", "trim"])
def test_gradients_of_merge(backend, dtype, direction, trim):
    text, image, roles = merge_form(*planted(3, SMALL, dtype), before=4)
    roles[1, -5:] = 0
    text.requires_grad_()
    image.requires_grad_()
    result = merge_sequence(text, image, roles, TAU, direction=direction, trim=trim, backend=backend)
    upstream = torch.randn(result.embeds.shape, device=DEVICE).to(dtype)
    got = torch.autograd.grad(result.embeds, [text, image], upstream)
    expected = sums_over_copies(result.source, upstream, roles.shape[1])
    is_image = roles == 2
    assert torch.equal(got[0], expected.masked_fill(is_image.unsqueeze(-1), 0).to(dtype))
    assert torch.equal(got[1], expected[is_image].to(dtype))


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_only_where_it_is_asked_for(backend, wanted):
    rows = list(planted(2))
    rows[wanted].requires_grad_()
    result = build_sequence(*rows, TAU, trim=False, backend=backend)
    result.embeds.backward(torch.randn_like(result.embeds))
    assert rows[wanted].grad is not None
    assert rows[1 - wanted].grad is None


@pytest.mark.parametrize("strides", ["expanded", "transposed"])
def test_an_upstream_gradient_of_any_strides(backend, strides):
    """What `sum` and a transposed product hand back."""
    image, text = (row.requires_grad_() for row in planted(2))
    embeds = build_sequence(image, text, TAU, trim=False, backend=backend).embeds
    upstream = torch.randn(embeds.shape, device=DEVICE).to(embeds.dtype)
    upstream = upstream[:, :1, :1].expand_as(embeds) if strides == "expanded" else upstream.mT.contiguous().mT
    got = torch.autograd.grad(embeds, [image, text], upstream, retain_graph=True)
    expected = torch.autograd.grad(embeds, [image, text], upstream.contiguous())
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("shape", [SHAPES[1], SHAPES[3]], ids=lambda shape: shape.name)
def test_fifty_runs_one_result(backend, shape):
    """Forward and backward, bit for bit, scores too, where every decision is among near ties."""
    generator = torch.Generator().manual_seed(5)
    image, text = (
        torch.randn(4, rows, shape.hidden, generator=generator).to(DEVICE, torch.bfloat16).requires_grad_()
        for rows in (shape.image, shape.text)
    )
    upstream = torch.randn(4, shape.image + shape.text + 8, shape.hidden, device=DEVICE).to(torch.bfloat16)

    def run():
        fields = OPS.build_sequence(image, text, -1.0, max_anchors=8)
        return copies([*fields, *torch.autograd.grad(fields[0], [image, text], upstream)])

    first = run()
    for _ in range(49):
        for one, other in zip(run(), first, strict=True):
            assert torch.equal(bits(one), bits(other))


def test_twins_take_the_lowest_index_wherever_they_fall_into_tiles(backend):
    """Bit-identical image rows, far apart: the first hosts, and all texts that are equal score equally."""
    image, text = planted(2, SHAPES[0])
    image[:, [5, 40, 199, 333, 575]] = image[:, :1]
    text[:, [3, 17, 49]] = image[:, :1]
    result = build_sequence(image, text, TAU, trim=False, backend=backend)
    assert (result.host[:, [3, 17, 49]] == 0).all()
    assert (result.score[:, [3, 17, 49]] == result.score[:, 3:4]).all()
    kept = build_sequence(image, text, 0.99, max_anchors=2, trim=False, backend=backend)
    assert (kept.host[:, [3, 17]] == 0).all()
    assert (kept.host[:, 49] == -1).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_to_one_graph_forward_and_backward(backend, direction):
    """With the default compiler."""
    torch._dynamo.reset()
    image, text = (row.requires_grad_() for row in planted(2))

    def embed(image, text):
        fields = OPS.build_sequence(image, text, TAU, direction=direction, max_anchors=8)
        return fields[0] * 2, fields[3]

    upstream = torch.randn(2, 98, 96, device=DEVICE).to(image.dtype)
    expected, expected_source = embed(image, text)
    got, source = torch.compile(embed, fullgraph=True)(image, text)
    assert torch.equal(got, expected)
    assert torch.equal(source, expected_source)
    for one, other in zip(
        torch.autograd.grad(got, [image, text], upstream),
        torch.autograd.grad(expected, [image, text], upstream),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_compiled_into_cuda_graphs(warm):
    """`reduce-overhead` captures what it compiles."""
    torch._dynamo.reset()
    run = torch.compile(lambda i, t: OPS.build_sequence(i, t, TAU, max_anchors=8)[0] * 1, mode="reduce-overhead")
    for seed in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        pair = planted(2, seed=seed)
        assert torch.equal(run(*pair), reference(*pair, max_anchors=8).embeds)


def test_second_order(backend):
    """The backward is a linear operator of its own: d/dx of |d/dx sum(w * e^2)|^2."""
    image, text = (row.float().requires_grad_() for row in planted(2))
    results = []
    for name in (backend, "reference"):
        embeds = build_sequence(image, text, TAU, trim=False, backend=name).embeds
        weight = torch.linspace(-1, 1, embeds.numel(), device=DEVICE).view_as(embeds)
        first = torch.autograd.grad((weight * embeds.square()).sum(), [text, image], create_graph=True)
        results.append(torch.autograd.grad(sum(one.square().sum() for one in first), [text, image]))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_one_row_matches_across_batch_sizes(backend):
    """A sample's result does not depend on what else is in the batch."""
    image, text = planted(33, SHAPES[0])
    together = build_sequence(image, text, -1.0, max_anchors=8, trim=False, backend=backend)
    for at in (0, 32):
        alone = build_sequence(image[at], text[at], -1.0, max_anchors=8, trim=False, backend=backend)
        assert_same(alone, [field[at] for field in together])
