"""What is written: all of every output, nothing beside it, at any size; and what a launch leaves behind: nothing."""

import fcntl
import tempfile
from pathlib import Path

import pytest
import torch
from gpu_checks import DEVICE, OPS, SMALL, assert_same, bits, calls, copies, dirty_memory, planted, reference

from attanchor_kernels import build_sequence, merge_sequence, plan_sequence
from attanchor_kernels.backends import workspace
from attanchor_kernels.testing.inputs import TAU, merge_form

MANY = 2**31


@pytest.mark.parametrize(
    ("batch", "image", "text", "hidden"),
    [(0, 5, 4, 8), (2, 0, 4, 8), (2, 5, 0, 8), (2, 0, 0, 8)],
    ids=["no samples", "no image", "no text", "nothing"],
)
@pytest.mark.parametrize("options", [{}, {"max_anchors": 3}, {"direction": "image_into_text"}], ids=str)
def test_empty_inputs(backend, batch, image, text, hidden, options):
    rows = [torch.randn(batch, count, hidden, device=DEVICE) for count in (image, text)]
    for row in rows:
        row.requires_grad_()
    result = build_sequence(*rows, TAU, trim=False, backend=backend, **options)
    assert_same(result, reference(*rows, **options))
    gradients = torch.autograd.grad(result.embeds, rows, torch.ones_like(result.embeds), allow_unused=True)
    for row, gradient in zip(rows, gradients, strict=True):
        assert gradient is None or gradient.shape == row.shape
    merge = merge_form(*(row.detach() for row in rows))
    merged = merge_sequence(*merge, TAU, trim=False, backend=backend, **options)
    assert_same(merged, merge_sequence(*merge, TAU, trim=False, backend="reference", **options))


@pytest.mark.parametrize("options", [{}, {"max_anchors": 6}, {"padding_side": "left"}], ids=str)
def test_every_output_is_written(backend, poisoned_empty, options):
    """Twice, over different garbage: what a launch does not write would differ or hold the garbage."""
    image, text = planted(3)
    mask = torch.rand(3, SMALL.image, device=DEVICE) < 0.7
    expected = copies(reference(image, text, img_mask=mask, **options))
    merge = merge_form(image, text, before=3)
    expected_merge = copies(merge_sequence(*merge, TAU, trim=False, backend="reference", **options))
    sizes = [field.numel() * field.element_size() for field in expected + expected_merge]
    for _ in range(2):
        dirty_memory(sizes)
        assert_same(build_sequence(image, text, TAU, img_mask=mask, trim=False, backend=backend, **options), expected)
        dirty_memory(sizes)
        assert_same(merge_sequence(*merge, TAU, trim=False, backend=backend, **options), expected_merge)
        dirty_memory(sizes)
        assert_same(plan_sequence(*merge, TAU, trim=False, backend=backend, **options)[1:], expected_merge[1:])


def test_every_gradient_is_written(backend, poisoned_empty):
    image, text = (row.requires_grad_() for row in planted(3))
    mask = torch.rand(3, SMALL.image, device=DEVICE) < 0.7
    upstream = torch.randn(3, 110, 96, device=DEVICE).to(image.dtype)

    def gradients(name):
        embeds = build_sequence(image, text, TAU, img_mask=mask, trim=False, backend=name).embeds
        dirty_memory([image.numel() * 2, text.numel() * 2])
        return torch.autograd.grad(embeds, [image, text], upstream)

    for one, other in zip(gradients(backend), gradients("reference"), strict=True):
        assert torch.equal(bits(one), bits(other))


def test_nothing_beside_the_views_is_touched(backend):
    """Inputs inside larger tensors of NaN: neither read into the result nor written."""
    image, text = planted(3)

    def framed(rows):
        frame = torch.full((rows.shape[0] + 2, rows.shape[1] + 5, rows.shape[2] + 8), torch.nan, device=DEVICE)
        frame = frame.to(rows.dtype)
        view = frame[1:-1, 2:-3, 3:-5]
        view.copy_(rows)
        return frame, view

    frames, views = zip(framed(image), framed(text), strict=True)
    before = copies(frames)
    assert_same(build_sequence(*views, TAU, trim=False, backend=backend), reference(image, text))
    for frame, copy in zip(frames, before, strict=True):
        assert torch.equal(bits(frame), bits(copy))


def test_a_launch_leaves_nothing_behind(backend):
    """Sixty calls of ever other shapes in a row: each matches, and what is kept ends as it began, all zero."""
    results = [
        (build_sequence(*pair, TAU, max_anchors=most, trim=False, backend=backend), pair, most)
        for step, pair in enumerate(calls(60))
        for most in ([None, 5, 0][step % 3],)
    ]
    for result, pair, most in results:
        assert_same(result, reference(*pair, max_anchors=most))
    torch.cuda.synchronize()
    kept = workspace.held(torch.device("cuda", torch.cuda.current_device()))
    assert kept
    assert not any(words.any() for words in kept)


@pytest.fixture
def memory_to_itself():
    """Tests may run in several processes; of those that take tens of gigabytes, one at a time."""
    with open(Path(tempfile.gettempdir()) / "attanchor-gpu-tests.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
        torch.cuda.empty_cache()


def _enough_memory(needed: int) -> None:
    free, _ = torch.cuda.mem_get_info()
    if free < needed:
        pytest.skip(f"needs {needed >> 30} GiB of free GPU memory, there are {free >> 30}")


@pytest.mark.parametrize(
    ("batch", "image_rows", "hidden"), [(1, 530_000, 4096), (260, 2_020, 4096)], ids=["one sample", "many samples"]
)
def test_more_elements_than_32_bits_count(backend, memory_to_itself, batch, image_rows, hidden):
    """Offsets in elements and in bytes beyond 32 bits: forward, every output row compared, and backward."""
    assert batch * image_rows * hidden > MANY
    _enough_memory(6 * batch * image_rows * hidden * 2)
    image = torch.randn(batch, image_rows, hidden, device=DEVICE, dtype=torch.bfloat16)
    text = torch.randn(batch, 4, hidden, device=DEVICE, dtype=torch.bfloat16)
    host = image_rows - 3
    text[:, 2] = image[:, host]
    image.requires_grad_()
    embeds, _, _, source, is_anchor, hosts, score = OPS.build_sequence(image, text, TAU, max_anchors=1)
    assert torch.equal(hosts, torch.tensor([-1, -1, host, -1], device=DEVICE).expand(batch, -1))
    assert (score[:, 2] > 0.99).all()
    assert is_anchor[:, host + 1].all()
    with torch.no_grad():
        assert torch.equal(embeds[:, : host + 1], image[:, : host + 1])
        assert torch.equal(embeds[:, host + 1], text[:, 2])
        assert torch.equal(embeds[:, host + 2 : image_rows + 1], image[:, host + 1 :])
        assert torch.equal(embeds[:, image_rows + 1 :], text)
    assert torch.equal(source[:, -1], torch.full((batch,), image_rows + 3, device=DEVICE))

    upstream = torch.ones_like(embeds)
    upstream[-1, image_rows] = 3
    (gradient,) = torch.autograd.grad(embeds, [image], upstream)
    assert gradient[-1, -1].eq(3).all()  # the last image row stands one place behind its own
    gradient[-1, -1] = 1
    assert gradient.amin() == 1
    assert gradient.amax() == 1
