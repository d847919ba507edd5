"""The registration: opcheck, gradcheck twice over, partial gradients, compilation, what the raw operators never do."""

import os
import subprocess
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import gradcheck, gradgradcheck

from attanchor_kernels import build_sequence, merge_sequence, place_sequence, plan_sequence, reference, trimming
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import assert_same_fields
from attanchor_kernels.testing.inputs import merge_form

OPS = torch.ops.attanchor
DIRECTIONS = ["text_into_image", "image_into_text"]


def pair(batch: int = 2, image: int = 7, text: int = 4, hidden: int = 5, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(batch, image, hidden, generator=generator, dtype=dtype, requires_grad=True),
        torch.randn(batch, text, hidden, generator=generator, dtype=dtype, requires_grad=True),
    )


def merge_pair(**sizes):
    text_embeds, image_embeds, roles = merge_form(*(rows.detach() for rows in pair(**sizes)), before=1)
    return text_embeds.requires_grad_(), image_embeds.requires_grad_(), roles


DROPPING = {"keep": 3, "salience": torch.arange(14.0).view(2, 7), "cells": torch.arange(14).view(2, 7).int() % 5}


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(
    "options", [{}, {"max_anchors": 2, "padding_side": "left"}, {"positions": "inherit"}, DROPPING]
)
def test_opcheck_build(direction, options):
    image, text = pair(dtype=torch.float32)
    torch.library.opcheck(OPS.build_sequence.default, (image, text, 0.0), {"direction": direction, **options})


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_opcheck_of_one_sample_and_of_a_tensor_tau(direction):
    image, text = pair(dtype=torch.float32)
    alone = image[0].detach(), text[0].detach(), 0.0
    torch.library.opcheck(OPS.build_sequence.default, alone, {"direction": direction})
    torch.library.opcheck(OPS.build_sequence.tau_tensor, (image, text, torch.tensor(0.0)), {"keep": 9})


@pytest.mark.parametrize("operator", ["merge_sequence", "plan_sequence"])
def test_opcheck_merge(operator):
    text, image, roles = merge_pair(dtype=torch.float32)
    turn = torch.zeros(roles.shape, dtype=torch.int32)
    positions = torch.arange(3 * roles.numel()).view(3, *roles.shape)
    options = {"turn": turn, "max_anchors": 2, "positions": "inherit", "position_ids": positions}
    each = {"keep_each": torch.tensor([1, 2], dtype=torch.int32), "padding_side": "left", "positions": "inherit"}
    for given in (options, each):
        torch.library.opcheck(getattr(OPS, operator).default, (text, image, roles, 0.0), given)
    torch.library.opcheck(getattr(OPS, operator).tau_tensor, (text, image, roles, torch.tensor(0.0)), {"keep": 2})


def test_opcheck_of_the_internal_linear_operators():
    image, text = pair(dtype=torch.float32)
    *_, places = OPS._plan(image, text, 0.0, *[None] * 6, False, False, None, False, *[None] * 5, "reference")
    options = (*[None] * 6, False, False, None, True, *[None] * 5, "reference")
    torch.library.opcheck(OPS._plan_trimmed, (image.detach(), text.detach(), 0.0, *options))
    source = OPS.build_sequence(image, text, 0.0)[3]
    torch.library.opcheck(OPS._assemble, (image, text, source, places, "reference"))
    grad = torch.randn(*source.shape, 5, requires_grad=True)
    for needs in ((True, True), (True, False), (False, True)):
        torch.library.opcheck(OPS._assemble_backward, (grad, places, [2, 7, 5], [2, 4, 5], *needs, "reference"))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("options", [{}, {"trim": False}, {"keep": 3, "padding_side": "left"}], ids=str)
@pytest.mark.parametrize("operator", ["build", "merge"])
def test_gradcheck_first_and_second_order(direction, options, operator):
    """In float64, and again through the backward, which is a linear operator of its own."""
    options = {"direction": direction, **options}
    if operator == "build":
        rows = pair(image=4, text=2, hidden=2)

        def embeds(image, text):
            return build_sequence(image, text, 0.0, **options).embeds
    else:
        *rows, roles = merge_pair(image=4, text=2, hidden=2)

        def embeds(text, image):
            return merge_sequence(text, image, roles, 0.0, **options).embeds

    assert len(embeds(*rows)[0]) > options.get("keep", 4) + 2
    assert gradcheck(embeds, rows)
    assert gradgradcheck(embeds, rows)


def test_a_gradient_of_a_gradient_that_is_not_zero():
    """Second-order terms through embeds: d/dx of |d/dx sum(w * e^2)|^2."""
    image, text = pair()
    embeds = build_sequence(image, text, -2.0).embeds
    weight = torch.randn_like(embeds)
    (first,) = torch.autograd.grad((weight * embeds.square()).sum(), [text], create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), [text])
    source = build_sequence(image, text, -2.0).source - 7
    per_row = torch.zeros(2, 4, 5, dtype=torch.float64)
    for sample in range(2):
        for place, row in enumerate(source[sample].tolist()):
            if row >= 0:
                per_row[sample, row] += weight[sample, place]
    torch.testing.assert_close(second, 8 * per_row.square() * text.detach())


@pytest.mark.parametrize("wanted", [0, 1])
def test_a_gradient_only_where_it_is_asked_for(wanted):
    rows = [row.detach() for row in pair()]
    rows[wanted].requires_grad_()
    result = build_sequence(*rows, 0.0)
    result.embeds.backward(torch.randn_like(result.embeds))
    assert rows[wanted].grad is not None
    assert rows[1 - wanted].grad is None
    assert not any(field.requires_grad for field in result[1:] if field is not None)


def test_no_graph_without_a_gradient():
    image, text = pair()
    with torch.no_grad():
        assert not build_sequence(image, text, 0.0).embeds.requires_grad
    assert not OPS.plan_sequence(*merge_pair(), 0.0)[0].requires_grad


def test_masked_rows_and_placeholder_rows_get_zero_gradient_whatever_they_hold():
    image, text = pair()
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 3] = False
    embeds = build_sequence(image, text, 0.0, img_mask=mask).embeds
    (grad,) = torch.autograd.grad(embeds, [image], torch.randn_like(embeds))
    assert not grad[:, 3].any()
    assert grad[:, 2].any()

    text_embeds, image_embeds, roles = merge_pair()
    with torch.no_grad():
        text_embeds[roles == 2] = torch.nan
    embeds = merge_sequence(text_embeds, image_embeds, roles, 0.0).embeds
    assert embeds.isfinite().all()
    (grad,) = torch.autograd.grad(embeds, [text_embeds], torch.randn_like(embeds))
    assert not grad[roles == 2].any()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_compiles_to_one_graph_forward_and_backward(direction):
    def embed(image, text):
        result = build_sequence(image, text, 0.0, direction=direction, trim=False)
        return result.embeds * 2, result.source

    image, text = pair()
    upstream = torch.randn(2, 7 + 4 + (4 if direction == "text_into_image" else 7), 5, dtype=torch.float64)
    expected, expected_source = embed(image, text)
    got, source = torch.compile(embed, fullgraph=True, backend="aot_eager")(image, text)
    assert torch.equal(got, expected)
    assert torch.equal(source, expected_source)
    for one, other in zip(
        torch.autograd.grad(got, [image, text], upstream),
        torch.autograd.grad(expected, [image, text], upstream),
        strict=True,
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize("form", ["build", "merge", "raw"])
def test_at_most_one_recompile_over_changing_lengths(form):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def run(*arguments):
        if form == "build":
            return build_sequence(*arguments, 0.0, max_anchors=3, trim=False).embeds
        if form == "merge":
            return merge_sequence(*arguments, 0.0, max_anchors=3, trim=False).embeds
        return OPS.build_sequence(*arguments, 0.0, max_anchors=3)[0]

    for image, text in ((7, 4), (9, 5), (12, 6), (30, 11), (8, 13)):
        make = merge_pair if form == "merge" else pair
        embeds = run(*make(image=image, text=text))
        assert embeds.shape == (2, image + text + 3, 5)
        embeds.backward(torch.randn_like(embeds))
    assert graphs.frame_count <= 2


@pytest.mark.parametrize("dynamic", [None, True])
def test_tau_may_change_under_compilation(dynamic):
    torch._dynamo.reset()
    image, text = pair()
    run = torch.compile(
        lambda i, t, tau: build_sequence(i, t, tau, trim=False).is_anchor,
        fullgraph=True,
        backend="eager",
        dynamic=dynamic,
    )
    for tau in (0.1, -0.2, 0.9):
        assert torch.equal(run(image, text, tau), build_sequence(image, text, tau, trim=False).is_anchor)


def test_a_budget_may_change_under_compilation():
    """One graph for all budgets where the compiler takes them for dynamic."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    image, text = pair()

    @torch.compile(fullgraph=True, backend=graphs, dynamic=True)
    def run(count):
        return build_sequence(image, text, -1.0, max_anchors=count, trim=False).is_anchor

    for count in (2, 3, 7):
        assert torch.equal(run(count), build_sequence(image, text, -1.0, max_anchors=count, trim=False).is_anchor)
    assert graphs.frame_count == 1


def test_implementations_are_not_compiled():
    """What a compiled function calls in eager mode, behind a graph break: dynamo would trace all of it."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("eager")
    image, text = pair()
    problem = Problem(image, text, 0.0)

    @torch.compile(backend=graphs)
    @torch._dynamo.decorators.skip
    def run(*arguments):
        embeds, *_ = OPS._construct(*arguments, "reference")
        embeds.sum().backward()

    run(*problem)
    assert graphs.frame_count == 0
    assert image.grad is not None


def test_inductor_runs_it():
    """The default compiler, not only its front end. What an earlier version of the operators left in its cache would be
    called with the earlier arguments."""
    from torch._inductor.utils import fresh_cache

    image, text = (row.detach() for row in pair(dtype=torch.float32))
    with fresh_cache():
        run = torch.compile(lambda i, t: OPS.build_sequence(i, t, 0.0)[0], fullgraph=True)
        assert torch.equal(run(image, text), OPS.build_sequence(image, text, 0.0)[0])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("form", ["build", "merge", "plan"])
def test_trimming_stays_in_the_one_graph(form, side):
    """Whatever the length comes to: a size that the graph does not know, and its gradients."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def insert(*rows, tau):
        operator = {"build": build_sequence, "merge": merge_sequence, "plan": plan_sequence}[form]
        made = operator(*rows, tau, padding_side=side)
        return made.source if form == "plan" else made.embeds * 2

    rows = pair() if form == "build" else merge_pair()
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):  # PyTorch 2.13 does so with fullgraph
        run = torch.compile(insert, fullgraph=True, backend=graphs)
        lengths = set()
        for tau in (-2.0, 0.8, 2.0):
            got, expected = (call(*rows, tau=torch.tensor(tau)) for call in (run, insert))
            assert torch.equal(got, expected)
            lengths.add(expected.shape[1])
            if form != "plan":
                upstream = torch.randn_like(expected)
                grads = (torch.autograd.grad(made, rows[:2], upstream) for made in (got, expected))
                assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert len(lengths) == 3
    assert graphs.frame_count == 1


@pytest.mark.parametrize("wrong", ["a role", "a placeholder too many", "a placeholder too few"])
def test_one_read_says_length_and_what_is_wrong_with_roles(wrong):
    """What a GPU is asked only once the plan is made; a CPU has refused such roles before."""
    text, image, roles = (rows.detach() for rows in merge_pair())
    problem = Problem(image, text, 0.0, roles, pad_left=True)
    assert trimming.trim(problem, reference.plan(problem)).source.shape == (2, 14)
    at = {"a role": (1, 0, 9), "a placeholder too many": (1, 0, 4), "a placeholder too few": (0, 3, 1)}[wrong]
    roles[at[:2]] = at[2]
    message = {"a role": "roles holds 9", "a placeholder too many": "14 rows; it should have 15"}
    with pytest.raises(ValueError, match=message.get(wrong, "14 rows; it should have 13")):
        trimming.trim(problem, reference.plan(problem))


def test_places_under_fullgraph_without_a_length_to_read():
    image, text = (row.detach()[0] for row in pair())
    host, roles = torch.full((4,), -1), torch.ones(4, dtype=torch.uint8)
    with pytest.raises(Exception, match="pass trim=False"):
        torch.compile(place_sequence, fullgraph=True, backend="eager")(text, image[:0], roles, host)


def test_trimming_under_plain_compile_falls_back():
    torch._dynamo.reset()
    image, text = pair()
    got = torch.compile(lambda i, t: build_sequence(i, t, 0.0).embeds, backend="eager")(image, text)
    assert torch.equal(got, build_sequence(image, text, 0.0).embeds)


@pytest.mark.parametrize("trim", [False, True])
def test_export(trim):
    class Module(torch.nn.Module):
        def forward(self, image, text):
            if trim:
                return build_sequence(image, text, 0.0).embeds
            return OPS.build_sequence(image, text, 0.0, max_anchors=2)[0]

    image, text = (row.detach() for row in pair())
    exported = torch.export.export(Module(), (image, text))
    assert torch.equal(exported.module()(image, text), Module()(image, text))


def test_inputs_are_left_alone_and_outputs_do_not_alias_them():
    image, text = (row.detach() for row in pair())
    before = image.clone(), text.clone()
    embeds = build_sequence(image, text, 2.0).embeds
    embeds.zero_()
    assert torch.equal(image, before[0])
    assert torch.equal(text, before[1])


@pytest.mark.parametrize("trim", [False, True], ids=["capacity", "trim"])
@pytest.mark.parametrize("form", ["build", "merge", "unbatched"])
def test_every_output_may_be_changed_in_place_before_the_backward(form, trim):
    """What the backward needs is nobody's output, and none is a view of something that autograd made."""
    if form == "merge":
        text, image, roles = merge_pair()
        rows, result = (text, image), merge_sequence(text, image, roles, -1.0, trim=trim, keep=3)
    else:
        rows = pair() if form == "build" else tuple(row.detach()[0].requires_grad_() for row in pair())
        result = build_sequence(*rows, -1.0, trim=trim, keep=3)
    upstream = torch.randn_like(result.embeds)
    expected = torch.autograd.grad(result.embeds, rows, upstream, retain_graph=True)
    result.embeds.mul_(3)
    for field in result[1:]:
        field.zero_()
    for one, other in zip(torch.autograd.grad(result.embeds, rows, upstream), expected, strict=True):
        torch.testing.assert_close(one, 3 * other)


def test_outputs_of_a_double_backward_may_be_changed_in_place():
    image, text = pair()
    embeds = build_sequence(image, text, -1.0).embeds
    upstream = torch.randn_like(embeds).requires_grad_()
    grads = torch.autograd.grad(embeds, [image, text], upstream, create_graph=True)
    for grad in grads:
        grad.mul_(2)
    (back,) = torch.autograd.grad(sum(grad.sum() for grad in grads), [upstream])
    torch.testing.assert_close(back, torch.full_like(back, 2.0))


@pytest.mark.parametrize("form", ["build", "merge", "raw"])
def test_a_tensor_tau_changes_without_a_new_graph(form):
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    rows = merge_pair() if form == "merge" else pair()
    operators = {"build": build_sequence, "merge": merge_sequence, "raw": OPS.build_sequence}

    def insert(tau):
        options = {} if form == "raw" else {"trim": False}
        return operators[form](*rows, tau, **options)[:7]

    run = torch.compile(insert, fullgraph=True, backend=graphs)
    inserted = []
    for tau in [step / 10 for step in range(-9, 11, 2)] + [float("nan"), float("inf")]:
        got = run(torch.tensor(tau))
        inserted.append(int(got[4].sum()))
        expected = insert(tau) if tau == tau else insert(2.0)  # NaN inserts nothing
        for one, other in zip(got, expected, strict=True):
            assert torch.equal(one, other)
    assert len(set(inserted)) > 3
    assert graphs.frame_count <= 2


def test_a_tensor_tau_takes_no_gradient():
    image, text = pair()
    tau = torch.tensor(0.0, requires_grad=True)
    build_sequence(image, text, tau).embeds.sum().backward()
    assert tau.grad is None


@pytest.mark.parametrize("merge", [False, True], ids=["build", "merge"])
def test_under_autocast_image_rows_take_the_dtype_of_the_text(merge):
    """As transformers' merges cast them: a projector's output in bfloat16, embeddings in float32."""
    text, image, roles = merge_pair(dtype=torch.float32) if merge else (*reversed(pair(dtype=torch.float32)), None)
    narrow = image.detach().bfloat16().requires_grad_()

    def embed(image):
        return merge_sequence(text, image, roles, 0.0) if merge else build_sequence(image, text, 0.0)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = embed(narrow)
    expected = embed(narrow.float())
    assert_same_fields(got, expected)
    got.embeds.sum().backward()
    assert narrow.grad.dtype == torch.bfloat16
    assert narrow.grad.any()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
def test_a_fork_while_another_thread_matches_leaves_a_child_that_works():
    """A lock held through the product, or a setting of the process changed for it, would be the child's for good."""
    code = """
import os, signal, threading, torch
from attanchor_kernels import build_sequence
torch.set_num_threads(1)
torch.set_float32_matmul_precision("high")
image, text, inside, forked = torch.randn(5, 8), torch.randn(3, 8), threading.Event(), threading.Event()
product = torch.bmm
def wait(*arguments):
    inside.set()
    forked.wait(60)
    return product(*arguments)
torch.bmm = wait
thread = threading.Thread(target=build_sequence, args=(image, text, 0.1))
thread.start()
assert inside.wait(60)
torch.bmm = product
child = os.fork()
if child == 0:
    signal.alarm(20)
    build_sequence(image, text, 0.1)
    os._exit(torch.get_float32_matmul_precision() != "high")
forked.set()
thread.join()
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)
