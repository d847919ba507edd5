"""Dropping image tokens: hand-made examples of every rule of who stays, and what `keep` must leave alone."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import KERNEL_DTYPES, build_arguments, examples, merge_arguments
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

from attanchor_kernels import build_sequence, checks, merge_sequence, plan_sequence, reference
from attanchor_kernels.testing.contract import assert_same_fields

# Six patches and two words: word 0 is closest to patch 4, then 2; word 1 only to patch 1. In row-major order the
# patches' best cosines are 0, 0.6, 0.8, 0, 1, 0.
PATCHES = torch.tensor([[0, 0, 1.0], [0, 0.6, 0.8], [0.8, 0, 0.6], [0, 0, 1], [1, 0, 0], [0, 0, 1]])
WORDS = torch.tensor([[1.0, 0, 0], [0, 1, 0]])
RELEVANCE = [0.0, 0.6, 0.8, 0.0, 1.0, 0.0]
IDENTITY = 1.0  # a tau that inserts nothing


def stay(keep, tau=IDENTITY, words=WORDS, **options) -> list[int]:
    """Which patches stay."""
    out = build_sequence(PATCHES, words, tau, keep=keep, **options)
    return [
        slot for slot, copy in zip(out.source.tolist(), out.is_anchor.tolist(), strict=True) if slot < 6 and not copy
    ]


@pytest.mark.parametrize(
    ("keep", "expected"),
    [
        (0, []),
        (1, [4]),
        (2, [2, 4]),
        (3, [1, 2, 4]),
        (4, [0, 1, 2, 4]),
        (5, [0, 1, 2, 3, 4]),
        (6, [*range(6)]),
        (9, [*range(6)]),
    ],
)
def test_the_most_relevant_stay_and_of_equal_ones_the_lower_index(keep, expected):
    assert stay(keep) == expected


def test_relevance_is_reported_for_the_dropped_too():
    out = build_sequence(PATCHES, WORDS, IDENTITY, keep=1)
    torch.testing.assert_close(out.relevance, torch.tensor(RELEVANCE))
    turned = build_sequence(PATCHES, WORDS, IDENTITY, keep=1, direction="image_into_text")
    assert torch.equal(turned.relevance, turned.score)
    torch.testing.assert_close(turned.relevance, torch.tensor(RELEVANCE))
    none = build_sequence(PATCHES, WORDS, IDENTITY, keep=1, anchor_mask=torch.zeros(2, dtype=torch.bool))
    assert none.relevance.tolist() == [-math.inf] * 6


def test_hosts_stay_first_whatever_their_rank():
    """Word 1 is inserted behind patch 1, which is only the third by relevance and the last by salience."""
    words = WORDS.clone()
    words[0] *= -1  # matches nothing above tau
    salience = torch.tensor([6.0, -1, 5, 4, 3, 2])
    out = build_sequence(PATCHES, words, 0.5, keep=2, salience=salience)
    assert out.source.tolist() == [0, 1, 7, 6, 7]
    assert out.host.tolist() == [-1, 1]


def test_there_are_never_more_anchors_than_survivors():
    """Text into image: the budget is the lesser of the two. The best stays."""
    out = build_sequence(PATCHES, WORDS, 0.5, keep=1, max_anchors=2)
    assert out.source.tolist() == [4, 6, 6, 7]
    assert build_sequence(PATCHES, WORDS, 0.5, keep=0).source.tolist() == [6, 7]


def test_anchors_are_chosen_among_all_image_tokens_before_anything_is_dropped():
    """Image into text: a copy stays in the text though its original is dropped."""
    out = build_sequence(PATCHES, WORDS, 0.5, keep=1, direction="image_into_text")
    assert out.source.tolist() == [4, 6, 2, 4, 7, 1]
    assert out.host.tolist() == [-1, 1, 0, -1, 0, -1]


def test_salience_ranks_instead_of_relevance_and_nan_is_last():
    salience = torch.tensor([1.0, math.nan, math.inf, 1.0, -math.inf, 2.0])
    assert [stay(keep, salience=salience) for keep in range(1, 7)] == [
        [2],
        [2, 5],
        [0, 2, 5],
        [0, 2, 3, 5],
        [0, 1, 2, 3, 5],  # NaN ranks with -inf, and has the lower index
        [0, 1, 2, 3, 4, 5],
    ]


def test_every_cell_gives_its_best_before_any_gives_a_second():
    """Cells {0, 1, 2}, {3}, {4}, and 5 in none: bests 2 (0.8), 3 (0), 4 (1); then 1 (0.6), 0, 5."""
    cells = torch.tensor([3, 3, 3, 0, 5, -1], dtype=torch.int32)
    assert [stay(keep, cells=cells) for keep in range(1, 6)] == [
        [4],
        [2, 4],
        [2, 3, 4],
        [1, 2, 3, 4],
        [0, 1, 2, 3, 4],
    ]


def test_a_cell_in_which_a_host_stays_waits():
    """Word 1's host, patch 1, holds cell 3: patch 3 of cell 0 comes before patch 2 of cell 3."""
    cells = torch.tensor([3, 3, 3, 0, 0, 0], dtype=torch.int32)
    words = torch.cat([-WORDS[:1], WORDS[1:]])
    assert stay(2, tau=0.5, words=words, cells=cells, salience=torch.tensor([9.0, 0, 8, 1, 1, 0])) == [1, 3]


def test_masked_patches_are_no_candidates():
    mask = torch.tensor([True, True, True, True, False, True])
    assert stay(2, img_mask=mask) == [1, 2]
    assert stay(5, img_mask=mask) == [0, 1, 2, 3, 5]


def test_a_row_that_is_not_finite_ranks_last_but_can_stay():
    patches = PATCHES.clone()
    patches[2, 0] = math.nan
    out = build_sequence(patches, WORDS, IDENTITY, keep=5)
    assert out.source.tolist() == [0, 1, 3, 4, 5, 6, 7]
    assert out.relevance[2] == -math.inf
    assert len(build_sequence(patches, WORDS, IDENTITY, keep=6).source) == 8


@pytest.mark.parametrize("positions", ["sequential", "inherit"])
def test_inherited_positions_are_those_of_the_plain_concatenation(positions):
    out = build_sequence(PATCHES, WORDS, 0.5, keep=2, max_anchors=1, positions=positions)
    assert out.source.tolist() == [2, 4, 6, 6, 7]
    assert out.position_ids.tolist() == ([2, 4, 4, 6, 7] if positions == "inherit" else [0, 1, 2, 3, 4])


def test_positions_on_three_axes_and_the_left_side():
    image, words = torch.stack([PATCHES, PATCHES]), torch.stack([WORDS, WORDS])
    mask = torch.tensor([[True] * 6, [True, False, False, False, False, False]])
    ids = torch.arange(8) * torch.tensor([1, 10, 100]).view(3, 1, 1) + torch.zeros(3, 2, 1, dtype=torch.int64)
    options = {"positions": "inherit", "position_ids": ids, "padding_side": "left"}
    out = build_sequence(image, words, IDENTITY, keep=3, img_mask=mask, **options)
    assert out.source.tolist() == [[1, 2, 4, 6, 7], [-1, -1, 0, 6, 7]]
    assert out.position_ids[2].tolist() == [[100, 200, 400, 600, 700], [0, 0, 0, 600, 700]]


def test_capacity():
    def rows(**options) -> int:
        return build_sequence(PATCHES, WORDS, 0.5, trim=False, **options).source.shape[0]

    assert rows(keep=1) == 1 + 2 + 1
    assert rows(keep=4) == 4 + 2 + 2
    assert rows(keep=99) == 6 + 2 + 2
    assert rows(keep=1, max_anchors=5) == 1 + 2 + 5
    assert rows(keep=1, direction="image_into_text") == 1 + 2 + 6


# --- Prompts. --------------------------------------------------------------------------------------------------------

# A picture of 2 x 2 patches with newlines, text, a newline right behind a newline's block start, a second picture.
ROLES = torch.tensor([1, 2, 2, 4, 2, 2, 4, 3, 4, 2, 4, 4, 3], dtype=torch.uint8)
SALIENCE = torch.tensor([5.0, 1, 99, 2, 3, 99, 99, 4, 99, 99])  # by feature row; newlines have one that nobody reads


def kept(keep, **options) -> list[int]:
    text, features = torch.ones(13, 4), torch.ones(10, 4)
    return merge_sequence(text, features, ROLES, IDENTITY, keep=keep, salience=SALIENCE, **options).source.tolist()


def test_a_newline_stays_with_the_patches_of_its_row():
    """By salience: slots 1, 9, 5, 4, 2. Slots 8 and 11 are newlines with no patch of their own: they always stay."""
    assert kept(5) == list(range(13))
    assert kept(4) == [0, 1, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
    assert kept(2) == [0, 1, 3, 7, 8, 9, 10, 11, 12]
    assert kept(1) == [0, 1, 3, 7, 8, 11, 12]
    assert kept(0) == [0, 7, 8, 11, 12]


def test_padding_between_patches_and_a_newline_ends_their_block():
    roles = torch.tensor([2, 0, 4, 3], dtype=torch.uint8)
    out = merge_sequence(torch.ones(4, 2), torch.ones(2, 2), roles, IDENTITY, keep=0)
    assert out.source.tolist() == [2, 3]


def test_cells_and_salience_go_by_feature_row_and_samples_apart():
    """Both samples hold cell 1, and each keeps its best of it."""
    roles = torch.tensor([[2, 2, 3, 2], [3, 2, 4, 2]], dtype=torch.uint8)
    text, features = torch.ones(2, 4, 4), torch.ones(6, 4)
    salience = torch.tensor([1.0, 9, 8, 1, 99, 2])
    cells = torch.tensor([1, 0, 0, 1, 1, 1], dtype=torch.int32)
    out = merge_sequence(text, features, roles, IDENTITY, keep=2, salience=salience, cells=cells)
    assert out.source.tolist() == [[0, 1, 2, -1], [0, 1, 2, 3]]  # nothing is dropped in the second
    out = merge_sequence(text, features, roles, IDENTITY, keep=1, salience=salience, cells=cells)
    assert out.source.tolist() == [[1, 2], [0, 3]]


def test_a_count_for_each_sample():
    roles = torch.tensor([[2, 2, 3], [2, 2, 3], [2, 2, 3]], dtype=torch.uint8)
    text, features = torch.ones(3, 3, 4), torch.ones(6, 4)
    out = merge_sequence(text, features, roles, 0.5, keep=torch.tensor([0, 1, 7], dtype=torch.int32))
    assert out.source.tolist() == [[2, -1, -1, -1], [0, 2, 2, -1], [0, 2, 1, 2]]
    plain = merge_sequence(text, features, roles, 0.5, keep=torch.tensor([0, 1, 7], dtype=torch.int32), max_anchors=0)
    assert plain.source.tolist() == [[2, -1, -1], [0, 2, -1], [0, 1, 2]]
    alone = merge_sequence(text[1], features[2:4], roles[1], 0.5, keep=torch.tensor(1, dtype=torch.int32))
    assert alone.source.tolist() == [0, 2, 2]


def test_turns_bound_the_text_that_relevance_sees():
    """A question may rank images of its own turn and later ones; the first image is ranked by the first question."""
    roles = torch.tensor([2, 3, 2, 3], dtype=torch.uint8)
    features = torch.eye(2)
    text = torch.tensor([[0, 0], [1.0, 0], [0, 0], [0.6, 0.8]])
    turn = torch.tensor([0, 0, 1, 1], dtype=torch.int32)
    options = {"text_embeds": text, "image_embeds": features, "roles": roles, "tau": IDENTITY, "keep": 1}
    torch.testing.assert_close(merge_sequence(**options).relevance[[0, 2]], torch.tensor([1.0, 0.8]))
    out = merge_sequence(**options, turn=turn)
    torch.testing.assert_close(out.relevance[[0, 2]], torch.tensor([1.0, 0.8]))
    swapped = merge_sequence(**{**options, "image_embeds": features.flip(0)}, turn=turn)
    torch.testing.assert_close(swapped.relevance, torch.tensor([0.0, -math.inf, 1.0, -math.inf]))


# --- What keep leaves alone. -----------------------------------------------------------------------------------------


def _unchanged(operator, arguments: dict, everything) -> None:
    plain = dict(arguments)
    if arguments["direction"] == "text_into_image" and everything is not None:
        budget = arguments["max_anchors"]
        plain["max_anchors"] = everything if budget is None else min(budget, everything)
    got = operator(**arguments, keep=everything)
    assert got.relevance is not None
    assert_same_fields(got._replace(relevance=None), operator(**plain))


@examples(100)
@given(build_arguments(KERNEL_DTYPES))
def test_as_many_as_there_are_changes_nothing(arguments):
    _unchanged(build_sequence, arguments, arguments["img"].shape[1])


@examples(100)
@given(merge_arguments(KERNEL_DTYPES), st.sampled_from([merge_sequence, plan_sequence]))
def test_as_many_as_there_are_changes_nothing_in_a_prompt(arguments, operator):
    _unchanged(operator, arguments, int((arguments["roles"] == 2).sum()) + 3)


# --- Gradients, and the registration. --------------------------------------------------------------------------------

OPS = torch.ops.attanchor


def _inputs(dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(2, 7, 5, generator=generator, dtype=dtype)
    text = torch.randn(2, 4, 5, generator=generator, dtype=dtype)
    return image, text


def _prompt(dtype=torch.float64):
    image, text = _inputs(dtype)
    roles = torch.tensor([[1, 2, 2, 4, 2, 2, 3, 3, 3], [2, 4, 2, 2, 3, 3, 3, 0, 0]], dtype=torch.uint8)
    return torch.cat([text, text, text[:, :1]], 1), image.flatten(0, 1)[:9].clone(), roles


def test_a_dropped_row_gets_no_gradient_and_what_ranks_it_none_either():
    text, image, roles = _prompt()
    image.requires_grad_()
    salience = torch.arange(9.0, requires_grad=True)
    out = merge_sequence(text, image, roles, 0.2, keep=2, salience=salience)
    out.embeds.backward(torch.ones_like(out.embeds))
    stays = torch.zeros(2, 9, dtype=torch.bool)
    for sample, row in enumerate(out.source):
        stays[sample, row[row >= 0]] = True
    assert torch.equal(image.grad.any(-1), stays[(roles == 2) | (roles == 4)])
    assert not stays[(roles == 2) | (roles == 4)].all()
    assert salience.grad is None


def test_raw_operators_give_the_same_rows_at_capacity():
    image, text = _inputs()
    raw = OPS.build_sequence(image, text, 0.1, keep=3)
    assert raw[0].shape == (2, 3 + 4 + 3, 5)
    for one, other in zip(raw, build_sequence(image, text, 0.1, keep=3, trim=False), strict=True):
        assert torch.equal(one, other)
    text, image, roles = _prompt()
    keep = torch.tensor([1, 2], dtype=torch.int32)
    raw = OPS.plan_sequence(text, image, roles, 0.1, keep_each=keep)
    for one, other in zip(raw, plan_sequence(text, image, roles, 0.1, keep=keep, trim=False)[1:], strict=True):
        assert torch.equal(one, other)
    with pytest.raises(ValueError, match="keep and keep_each are both given"):
        OPS.merge_sequence(text, image, roles, 0.1, keep=1, keep_each=keep)


def test_one_graph_for_all_counts():
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs, dynamic=True)
    def run(image, text, count):
        out = build_sequence(image, text, 0.0, keep=count, trim=False)
        return out.embeds, out.source, out.relevance

    image, text = _inputs()
    image.requires_grad_()
    for count in (2, 3, 5):
        got = run(image, text, count)
        expected = build_sequence(image, text, 0.0, keep=count, trim=False)
        for one, other in zip(got, (expected.embeds, expected.source, expected.relevance), strict=True):
            assert torch.equal(one, other)
        got[0].sum().backward()
    assert graphs.frame_count == 1


def test_prompts_compile_with_a_count_for_each_sample():
    text, image, roles = _prompt()
    run = torch.compile(
        lambda keep: merge_sequence(text, image, roles, 0.0, keep=keep, trim=False), fullgraph=True, backend="aot_eager"
    )
    for counts in ([1, 2], [0, 9]):
        keep = torch.tensor(counts, dtype=torch.int32)
        assert_same_fields(run(keep), merge_sequence(text, image, roles, 0.0, keep=keep, trim=False))


class _NoBoolReductions(TorchDispatchMode):
    """Refuses what PyTorch has on the CPU and not on CUDA: `scatter_reduce` of bools."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function.overloadpacket is not torch.ops.aten.scatter_reduce or args[0].dtype != torch.bool
        return function(*args, **(kwargs or {}))


def test_hosts_are_marked_by_what_cuda_has_too():
    problem = checks.build_call(PATCHES, WORDS, 0.5, keep=2, cells=torch.arange(6, dtype=torch.int32)).problem
    with _NoBoolReductions():  # sees nothing of what an operator does inside
        plan = reference.plan(problem)
    assert plan.source.tolist() == [[1, 7, 4, 6, 6, 7]]
