"""CUDA graphs, streams, devices, and no waiting for the device: what a server does with the operators."""

import pytest
import torch
from gpu_checks import (
    DEVICE,
    OPS,
    SMALL,
    assert_same,
    bits,
    capture,
    copies,
    dirty_memory,
    planted,
    reference,
)

from attanchor_kernels import build_sequence, merge_sequence
from attanchor_kernels.backends import workspace
from attanchor_kernels.testing.inputs import SHAPES, TAU, Shape, merge_form

TALL = Shape("tall", 2880, 50, 4096)  # more tiles in a sample than a GPU has multiprocessors


def expected_of(pair, **options):
    return tuple(reference(*pair, **options))


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("options", [{}, {"max_anchors": 3}], ids=["full", "budget"])
def test_a_graph_replayed_with_changed_inputs(warm, batch, options):
    """The raw operator, replayed in turn with eager calls on the same stream."""
    image, text = planted(batch)
    graph, outputs = capture(lambda: OPS.build_sequence(image, text, TAU, **options))
    for seed in range(1, 12):
        fresh = planted(batch, seed=seed)
        image.copy_(fresh[0])
        text.copy_(fresh[1])
        for output in outputs:  # whatever a replay does not write shows
            output.fill_(True if output.dtype == torch.bool else 77)
        graph.replay()
        assert_same(outputs, expected_of(fresh, **options))
        assert_same(OPS.build_sequence(*fresh, TAU, **options), expected_of(fresh, **options))


def test_merge_and_plan_in_one_graph(warm):
    """Several calls in one graph, each with its own state."""
    arguments = merge_form(*planted(3), before=4)

    def run():
        return (*OPS.merge_sequence(*arguments, TAU, max_anchors=4), *OPS.plan_sequence(*arguments, TAU, max_anchors=4))

    eager = copies(run())
    graph, outputs = capture(run)
    for _ in range(5):
        graph.replay()
        for one, other in zip(outputs, eager, strict=True):
            assert torch.equal(bits(one), bits(other))


def test_backward_in_a_graph(warm):
    image, text = (row.requires_grad_() for row in planted(3))
    upstream = torch.randn(3, 70 + 20 + 20, 96, device=DEVICE).to(image.dtype)

    def run():
        return torch.autograd.grad(OPS.build_sequence(image, text, TAU)[0], [image, text], upstream)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        eager = copies(run())
    torch.cuda.current_stream().wait_stream(stream)
    graph, outputs = capture(run)
    upstream.mul_(2)
    graph.replay()
    for one, other in zip(outputs, eager, strict=True):
        assert torch.equal(one, 2 * other)


def test_two_graphs_of_one_stream_replayed_at_once(warm):
    """They were captured on the same stream, and must still share nothing when two streams replay them."""
    shared = torch.cuda.Stream()
    pairs = [planted(8, SHAPES[0], seed=seed) for seed in (1, 2)]
    expected = [expected_of(pair, max_anchors=8) for pair in pairs]
    graphs = [capture(lambda p=pair: OPS.build_sequence(*p, TAU, max_anchors=8), stream=shared) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    for _ in range(50):
        for (graph, _), stream in zip(graphs, streams, strict=True):
            with torch.cuda.stream(stream):
                graph.replay()
        torch.cuda.synchronize()
        for (_, outputs), fields in zip(graphs, expected, strict=True):
            assert_same(outputs, fields)


def test_many_graphs_without_a_shortage(warm):
    """More captured launches than any fixed amount of memory was made for."""
    pair = planted(2, SMALL)
    expected = expected_of(pair)
    kept = []
    least = 2 * SMALL.text  # words of a launch: one for every mover
    for _ in range(workspace.ARENA_WORDS // (100 * least) + 1):
        graph, outputs = capture(lambda: [OPS.build_sequence(*pair, TAU) for _ in range(100)])
        graph.replay()
        assert_same(outputs[0], expected)
        assert_same(outputs[-1], expected)
        kept.append(graph)
    torch.cuda.synchronize()


@pytest.mark.parametrize("shape", [SMALL, SHAPES[1], TALL], ids=lambda shape: shape.name)
def test_two_streams_at_once(backend, shape):
    """Launches on two streams overlap and neither waits for work of the other that cannot start."""
    pairs = [planted(batch, shape, seed=batch) for batch in (2, 3)]
    expected = [expected_of(pair, max_anchors=8) for pair in pairs]
    streams = [torch.cuda.Stream() for _ in pairs]
    torch.cuda.synchronize()
    results = []
    for _ in range(20):
        for pair, stream in zip(pairs, streams, strict=True):
            with torch.cuda.stream(stream):
                results.append(OPS.build_sequence(*pair, TAU, max_anchors=8))
    torch.cuda.synchronize()
    for index, result in enumerate(results):
        assert_same(result, expected[index % 2])


@pytest.mark.parametrize("shape", [SHAPES[0], TALL], ids=lambda shape: shape.name)
@pytest.mark.parametrize("batch", [1, 4])
def test_while_other_kernels_hold_the_multiprocessors(backend, shape, batch):
    """Matrix products keep every multiprocessor busy, so that programs of one launch start at different times."""
    pair = planted(batch, shape)
    expected = expected_of(pair, max_anchors=8)
    side = torch.cuda.Stream()
    square = torch.randn(4096, 4096, device=DEVICE, dtype=torch.bfloat16)
    torch.cuda.synchronize()
    results = []
    for _ in range(10):
        with torch.cuda.stream(side):
            for _ in range(4):
                torch.mm(square, square)
        results += [OPS.build_sequence(*pair, TAU, max_anchors=8) for _ in range(4)]
    torch.cuda.synchronize()
    for result in results:
        assert_same(result, expected)


@pytest.mark.parametrize("ring", [1, 2, 7])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("shape", [SMALL, SHAPES[0]], ids=lambda shape: shape.name)
def test_waits_of_triton_end(monkeypatch, ring, lag, shape):
    """Hardly any room for partial sums, and copies right behind their matches: nearly every program has to wait."""
    from attanchor_kernels.backends.triton import schedule

    usual = schedule.construct

    def small(*arguments, **options):
        return usual(*arguments, **options)._replace(ring=ring, lag=lag)

    monkeypatch.setattr(schedule, "construct", small)
    pair = planted(4, shape)
    merge = merge_form(*pair, before=3)
    for _ in range(3):
        result = build_sequence(*pair, TAU, max_anchors=8, trim=False, backend="triton")
        assert_same(result, reference(*pair, max_anchors=8))
        merged = merge_sequence(*merge, TAU, trim=False, backend="triton")
        assert_same(merged, merge_sequence(*merge, TAU, trim=False, backend="reference"))


@pytest.mark.parametrize("batch", [1, 8])
def test_the_raw_operators_never_wait_for_the_device(warm, batch):
    """PyTorch raises at any synchronising call while this mode is on."""
    image, text = (row.requires_grad_() for row in planted(batch))
    merge = merge_form(image.detach(), text.detach(), before=3)
    upstream = torch.randn(batch, 94, 96, device=DEVICE).to(image.dtype)
    OPS.build_sequence(image, text, TAU, max_anchors=4)
    OPS.merge_sequence(*merge, TAU)
    torch.cuda.set_sync_debug_mode("error")
    try:
        embeds = OPS.build_sequence(image, text, TAU, max_anchors=4)[0]
        torch.autograd.grad(embeds, [image, text], upstream)
        OPS.merge_sequence(*merge, TAU)
        OPS.plan_sequence(*merge, TAU, max_anchors=2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_trimming_waits_once(warm):
    """One read of the length, and it raises under that mode."""
    pair = planted(2)
    build_sequence(*pair, TAU, backend=warm)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            build_sequence(*pair, TAU, backend=warm)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_trimming_under_capture_says_what_to_do(warm):
    pair = planted(2)
    with pytest.raises(ValueError, match="trim=False"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        build_sequence(*pair, TAU, backend=warm)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second GPU")
def test_a_second_device(backend):
    """Inputs on a device that is not the current one."""
    other = torch.device("cuda", 1)
    pair = planted(3, device=other)
    assert torch.cuda.current_device() == 0
    result = OPS.build_sequence(*pair, TAU)
    assert all(field.device == other for field in result)
    assert_same(result, expected_of(pair))


def test_memory_that_was_freed_is_not_read(warm):
    """The caller drops its inputs right after the call, and other work takes their memory at once."""
    expected = expected_of(planted(8, SHAPES[0]))
    for _ in range(10):
        image, text = planted(8, SHAPES[0])
        result = OPS.build_sequence(image, text, TAU)
        sizes = [image.numel() * 2, text.numel() * 2]
        del image, text
        dirty_memory(sizes)
        assert_same(result, expected)
