"""Hand-made examples in which every value can be read off: the method, its edges, and what users would get wrong."""

import math

import pytest
import torch

from attanchor_kernels import Role, build_sequence, merge_sequence, ops, plan_sequence
from attanchor_kernels.testing.contract import assert_same_fields

# Three orthogonal patches; words that look like patch 2, patch 0, nothing, patch 2.
PATCHES = torch.eye(4)[:3]
WORDS = torch.tensor([[0.0, 0, 1, 0], [1, 0, 0, 0.1], [0, 0, 0, 1], [0, 0, 2, 0.5]])


def test_text_into_image_follows_algorithm_1():
    """Copies stand behind their patch in text order; the whole text follows."""
    out = build_sequence(PATCHES, WORDS, 0.5)
    # slots: patches 0 1 2, words 3 4 5 6
    assert out.source.tolist() == [0, 4, 1, 2, 3, 6, 3, 4, 5, 6]
    assert out.is_anchor.tolist() == [False, True, False, False, True, True, False, False, False, False]
    assert out.host.tolist() == [2, 0, -1, 2]
    assert out.position_ids.tolist() == list(range(10))
    assert out.attention_mask.tolist() == [1] * 10
    expected = torch.tensor([1.0, 1 / math.sqrt(1.01), 0.0, 2 / math.sqrt(4.25)])
    torch.testing.assert_close(out.score, expected)
    assert torch.equal(out.embeds, torch.cat([PATCHES, WORDS])[out.source])


def test_image_into_text_follows_algorithm_2():
    """The image first, then the text with a copy of each patch behind its best word."""
    out = build_sequence(PATCHES, WORDS, 0.5, direction="image_into_text")
    # patch 0 -> word 1 (cos .995), patch 1 -> nothing, patch 2 -> word 0 (cos 1, word 3 has .97)
    assert out.source.tolist() == [0, 1, 2, 3, 2, 4, 0, 5, 6]
    assert out.host.tolist() == [1, -1, 0]


@pytest.mark.parametrize("tau", [1.0, 1.5, math.inf, torch.tensor(1.0), torch.tensor(math.nan)], ids=str)
def test_tau_of_one_or_more_is_the_identity(tau):
    """Even where a word equals a patch; the scores are still reported."""
    out = build_sequence(PATCHES, WORDS, tau)
    assert torch.equal(out.embeds, torch.cat([PATCHES, WORDS]))
    assert out.host.tolist() == [-1] * 4
    assert out.score[0] == 1


@pytest.mark.parametrize("tau", [-math.inf, -2.0])
def test_a_low_tau_inserts_everything_that_has_a_candidate(tau):
    out = build_sequence(PATCHES, WORDS, tau)
    assert out.is_anchor.sum() == 4
    nothing = build_sequence(PATCHES, WORDS, tau, img_mask=torch.zeros(3, dtype=torch.bool))
    assert nothing.is_anchor.sum() == 0
    assert nothing.score.tolist() == [-math.inf] * 4


# Sizes at which a matrix product on the CPU was seen to round equal rows differently.
TILED = [(700, 37, 333), (1153, 3, 1000), (577, 1, 4096), (33, 5, 999), (2881, 7, 2048)]


@pytest.mark.parametrize(("image_count", "text_count", "hidden"), TILED)
def test_equal_cosines_go_to_the_lowest_index(image_count, text_count, hidden):
    """Bit-identical patches behind their negative: words go to patch 1, or to patch 0 if the cosine is negative."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(hidden, generator=generator)
    image = row.repeat(image_count, 1)
    image[0] = -row
    words = torch.randn(text_count, hidden, generator=generator)
    words[0] = row
    out = build_sequence(image, words, -2.0)
    assert torch.equal(out.host, (words.double() @ row.double() > 0).long())


@pytest.mark.parametrize(("image_count", "text_count", "hidden"), TILED)
def test_bit_identical_movers_score_identically_and_the_budget_keeps_the_earlier(image_count, text_count, hidden):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(image_count, hidden, generator=generator)
    word = torch.randn(hidden, generator=generator)
    out = build_sequence(image, word.repeat(text_count, 1), -2.0, max_anchors=4)
    assert out.score.unique().numel() == 1
    assert (out.host >= 0).nonzero().flatten().tolist() == list(range(min(4, text_count)))


@pytest.mark.parametrize("seed", range(8))
def test_equal_rows_score_identically_in_any_layout(seed):
    """Over a transposed layout, sums ran in another order in the last few rows than in the others."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.randn(40, 1000, generator=generator)
    words = torch.randn(1000, generator=generator).repeat(37, 1).mT.contiguous().mT
    out = build_sequence(image, words, -1.0, max_anchors=3)
    assert out.score.unique().numel() == 1
    assert (out.host >= 0).nonzero().flatten().tolist() == [0, 1, 2]


@pytest.mark.parametrize(("texts", "hidden"), [(1, 40_000), (5, 999), (50, 2048)])
def test_a_sample_scores_the_same_bits_alone_and_in_a_batch(texts, hidden):
    """Also where the others of its batch have more image tokens or more words."""
    generator = torch.Generator().manual_seed(2)
    text = torch.randn(3, texts + 40, hidden, generator=generator)
    features = torch.randn(3 * 30, hidden, generator=generator)
    roles = torch.full((3, texts + 40), Role.ANCHOR_TEXT, dtype=torch.uint8)
    roles[0, :20], roles[1, 5:35], roles[2, :40] = Role.IMAGE, Role.IMAGE, Role.IMAGE
    roles[2, 41:] = Role.TEXT
    together = merge_sequence(text, features, roles, 0.0, keep=9, trim=False)
    for sample, rows in enumerate((slice(0, 20), slice(20, 50), slice(50, 90))):
        alone = merge_sequence(text[sample], features[rows], roles[sample], 0.0, keep=9, trim=False)
        for field in ("host", "score", "relevance", "source"):
            assert torch.equal(getattr(alone, field), getattr(together, field)[sample]), field


def test_zero_rows_score_exactly_zero_and_take_the_first_host():
    image = torch.randn(5, 8)
    out = build_sequence(image, torch.zeros(2, 8), 0.0)
    assert out.score.tolist() == [0.0, 0.0]
    assert out.host.tolist() == [0, 0]


def test_the_budget_keeps_the_best():
    out = build_sequence(PATCHES, WORDS, 0.5, max_anchors=2)
    assert out.host.tolist() == [2, 0, -1, -1]
    assert build_sequence(PATCHES, WORDS, 0.5, max_anchors=0).is_anchor.sum() == 0
    assert build_sequence(PATCHES, WORDS, 0.5, max_anchors=99, trim=False).source.shape == (7 + 99,)


def test_a_budget_beyond_what_there_is_to_insert_takes_no_memory(monkeypatch):
    """The largest that is allowed: a plan at its capacity would take tens of gigabytes."""
    rows, plan = [], ops.plan_trimmed
    monkeypatch.setattr(
        ops, "plan_trimmed", lambda problem, backend: rows.append(problem.capacity) or plan(problem, backend)
    )
    for direction, most in (("text_into_image", 3 + 4 + 4), ("image_into_text", 3 + 4 + 3)):
        expected = build_sequence(PATCHES, WORDS, 0.5, direction=direction)
        out = build_sequence(PATCHES, WORDS, 0.5, max_anchors=2**30, direction=direction)
        assert torch.equal(out.source, expected.source)
        assert rows[-1] == most


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20])
def test_non_finite_rows_neither_host_nor_move_but_are_copied(bad):
    """1e20 is finite, its square is not in float32."""
    image, words = PATCHES.clone(), WORDS.clone()
    image[2, 1] = bad
    words[1, 0] = bad
    out = build_sequence(image, words, 0.5)
    assert out.host.tolist() == [-1, -1, -1, -1]
    assert out.score[1] == -math.inf
    assert torch.equal(out.embeds.nan_to_num(7), torch.cat([image, words]).nan_to_num(7))


def test_float64_is_compared_in_float64():
    """Two cosines that float32 could not tell apart."""
    image = torch.tensor([[1.0, 2e-6], [1.0, 1e-6]], dtype=torch.float64)
    assert build_sequence(image, torch.tensor([[1.0, 0.0]], dtype=torch.float64), 0.5).host.tolist() == [1]


def test_inherited_positions():
    """Originals keep their place, an anchor takes its host's, on every axis."""
    out = build_sequence(PATCHES, WORDS, 0.5, positions="inherit")
    assert out.position_ids.tolist() == [0, 1 - 1, 1, 2, 2, 2, 3, 4, 5, 6]
    plain = torch.stack([torch.arange(7), 10 + torch.arange(7), 100 * torch.arange(7)])
    out = build_sequence(PATCHES, WORDS, 0.5, positions="inherit", position_ids=plain)
    assert out.position_ids.shape == (3, 10)
    assert out.position_ids[2].tolist() == [0, 0, 100, 200, 200, 200, 300, 400, 500, 600]


def test_masks_drop_rows_and_left_padding_keeps_order():
    image, words = PATCHES.repeat(2, 1, 1), WORDS.repeat(2, 1, 1)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    matched = torch.tensor([[True] * 4, [False, True, True, True]])
    out = build_sequence(image, words, 0.5, img_mask=mask, anchor_mask=matched, padding_side="left")
    assert out.source.tolist() == [
        [0, 4, 1, 2, 3, 6, 3, 4, 5, 6],
        [-1, -1, 0, 4, 2, 6, 3, 4, 5, 6],
    ]
    assert out.attention_mask[1].tolist() == [0, 0] + [1] * 8
    assert out.position_ids[1].tolist() == [0, 0, *range(8)]
    assert out.score[1, 0] == -math.inf
    assert not out.embeds[1, :2].any()


def test_merge_puts_features_into_placeholders_and_anchors_behind_them():
    """text, image, text, image: the features go in row-major order, newline rows never host, roles say who moves."""
    roles = torch.tensor([1, 2, 4, 3, 2, 3, 0], dtype=torch.uint8)
    text = torch.randn(7, 4)
    features = torch.eye(4)[:3]
    text[3], text[5] = features[1] * 3 + features[2], features[0]  # like the newline row, then the second image
    out = merge_sequence(text, features, roles, 0.1)
    assert out.source.tolist() == [0, 1, 5, 2, 3, 4, 3, 5]
    assert out.host.tolist() == [-1, -1, -1, 4, -1, 1, -1]
    rows = torch.stack([text[0], features[0], text[5], features[1], text[3], features[2], text[3], text[5]])
    assert torch.equal(out.embeds, rows)


def test_turns_keep_later_questions_out_of_earlier_images():
    roles = torch.tensor([2, 3, 2, 3], dtype=torch.uint8)
    text = torch.ones(4, 2)
    features = torch.ones(2, 2)
    turn = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    assert merge_sequence(text, features, roles, 0.5).host.tolist() == [-1, 0, -1, 0]
    assert merge_sequence(text, features, roles, 0.5, turn=turn).host.tolist() == [-1, 0, -1, 2]


def test_plan_is_merge_without_the_copy():
    roles = torch.tensor([[1, 2, 2, 3, 3], [2, 3, 3, 0, 0]], dtype=torch.uint8)
    text, features = torch.randn(2, 5, 6), torch.randn(3, 6)
    merged, planned = (f(text, features, roles, -1.0) for f in (merge_sequence, plan_sequence))
    assert planned.embeds is None
    assert_same_fields(planned, merged._replace(embeds=None))


def test_raw_operators_give_the_same_rows_at_capacity():
    image, words = torch.randn(2, 9, 16), torch.randn(2, 5, 16)
    trimmed = build_sequence(image, words, 0.1)
    raw = torch.ops.attanchor.build_sequence(image, words, 0.1)
    assert raw[0].shape == (2, 9 + 5 + 5, 16)
    length = trimmed.source.shape[1]
    for one, other in zip(trimmed[:5], raw[:5], strict=True):
        assert torch.equal(one, other[:, :length])
    assert torch.equal(trimmed.host, raw[5])
    assert torch.equal(trimmed.score, raw[6])
    assert raw[7].shape == (2, 0)
    assert trimmed.relevance is None
    assert all(field.is_contiguous() for field in trimmed if field is not None)


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_and_autocast_change_nothing(precision):
    """Words between two patches whose cosines differ by 1e-4, which a product in bfloat16 could not tell apart."""
    base = torch.randn(1, 512, generator=torch.Generator().manual_seed(0))
    image = base + 0.01 * torch.eye(300, 512) * torch.arange(1, 301).unsqueeze(1)
    words = image[::7] + 0.02 * torch.randn(43, 512, generator=torch.Generator().manual_seed(1))
    best = torch.nn.functional.cosine_similarity(words.double()[:, None], image.double(), dim=-1).topk(2).values
    words = words[best[:, 0] - best[:, 1] > 5e-5]
    assert len(words) > 20
    expected = build_sequence(image, words, 0.1)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = build_sequence(image, words, 0.1)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    assert_same_fields(got, expected)


def test_an_inherited_matmul_precision_goes_on_being_inherited():
    """What was set for all backends when the operator ran is no setting of the matrix product's own."""
    everything, product = torch.backends, torch.backends.mkldnn.matmul
    before = everything.fp32_precision, product.fp32_precision
    try:
        product.fp32_precision, everything.fp32_precision = "none", "tf32"
        build_sequence(PATCHES, WORDS, 0.5)
        assert product.fp32_precision == "tf32"
        everything.fp32_precision = "ieee"
        assert product.fp32_precision == "ieee"
    finally:
        everything.fp32_precision, product.fp32_precision = before
