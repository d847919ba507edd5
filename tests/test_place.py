"""`place_sequence`: copies at places that the caller chose."""

import pytest
import torch
from hypothesis import given
from strategies import KERNEL_DTYPES, examples, merge_arguments
from torch.autograd import gradcheck

from attanchor_kernels import merge_sequence, place_sequence
from attanchor_kernels.testing.contract import assert_same_fields

# text, image, image, newline, text, text
ROLES = torch.tensor([1, 2, 2, 4, 3, 3], dtype=torch.uint8)
TEXT, IMAGE = torch.arange(24.0).view(6, 4), 100 + torch.arange(12.0).view(3, 4)
HOST = torch.tensor([-1, -1, -1, -1, 2, 1])


@examples(100)
@given(merge_arguments(KERNEL_DTYPES))
def test_at_the_hosts_that_matching_finds_it_is_merge_sequence(arguments):
    expected = merge_sequence(**arguments)
    taken = ("text_embeds", "image_embeds", "roles", "positions", "position_ids", "padding_side")
    got = place_sequence(**{name: arguments[name] for name in taken}, host=expected.host)
    assert got.score.eq(-torch.inf).all()
    assert_same_fields(got, expected._replace(score=got.score))


def test_copies_stand_behind_their_hosts_in_their_own_order():
    out = place_sequence(TEXT, IMAGE, ROLES, HOST.masked_fill(HOST == 1, 2))
    assert out.source.tolist() == [0, 1, 2, 4, 5, 3, 4, 5]
    rows = torch.cat([TEXT[:1], IMAGE[:2], TEXT[4:], IMAGE[2:], TEXT[4:]])
    assert torch.equal(out.embeds, rows)


def test_or_ahead_of_them():
    out = place_sequence(TEXT, IMAGE, ROLES, torch.tensor([-1, -1, -1, -1, 1, 1]), ahead=True, positions="inherit")
    assert out.source.tolist() == [0, 4, 5, 1, 2, 3, 4, 5]
    assert out.is_anchor.tolist() == [False, True, True, *[False] * 5]
    assert out.position_ids.tolist() == [0, 1, 1, 1, 2, 3, 4, 5]


def test_any_slot_may_be_copied_behind_any_also_itself():
    out = place_sequence(TEXT, IMAGE, ROLES, torch.tensor([0, 5, -1, 0, -1, -1]), copy=False)
    assert out.embeds is None
    assert out.source.tolist() == [0, 0, 3, 1, 2, 3, 4, 5, 1]


def test_at_capacity_on_the_left():
    roles = torch.stack([ROLES, torch.tensor([2, 3, 0, 0, 0, 0], dtype=torch.uint8)])
    host = torch.stack([HOST, torch.tensor([-1, 0, -1, -1, -1, -1])])
    out = place_sequence(
        TEXT.expand(2, -1, -1), torch.cat([IMAGE, IMAGE[:1]]), roles, host, padding_side="left", trim=False
    )
    assert out.source.tolist() == [[-1] * 4 + [0, 1, 5, 2, 4, 3, 4, 5], [-1] * 9 + [0, 1, 1]]
    assert not out.embeds[1, :9].any()


def test_gradients():
    text, image = TEXT.double().requires_grad_(), IMAGE.double().requires_grad_()
    assert gradcheck(lambda t, i: place_sequence(t, i, ROLES, HOST, ahead=True).embeds, (text, image))


def test_it_compiles():
    run = torch.compile(
        lambda host: place_sequence(TEXT, IMAGE, ROLES, host, trim=False), fullgraph=True, backend="aot_eager"
    )
    assert_same_fields(run(HOST), place_sequence(TEXT, IMAGE, ROLES, HOST, trim=False))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"host": HOST.int()}, TypeError, "host has dtype torch.int32; it should be torch.int64"),
        ({"host": None}, TypeError, "host is NoneType; it should be a torch.Tensor"),
        ({"host": HOST[:5]}, ValueError, r"host has shape \(5,\); it should be \(6,\)"),
        ({"host": HOST - 1}, ValueError, "host holds -2 to 1; it should hold -1 or slots below 6"),
        ({"host": HOST * 3}, ValueError, "host holds -3 to 6"),
        (
            {"roles": ROLES * torch.tensor([1, 1, 1, 1, 0, 1], dtype=torch.uint8)},
            ValueError,
            "both slots should be real",
        ),
        (
            {"host": HOST.clamp_min(0), "roles": torch.tensor([0, 2, 2, 4, 3, 3]).byte()},
            ValueError,
            "both slots should",
        ),
        ({"ahead": 1}, TypeError, "ahead is int; it should be a bool"),
        ({"copy": None}, TypeError, "copy is NoneType; it should be a bool"),
        ({"image_embeds": IMAGE[:2]}, ValueError, "image_embeds has 2 rows; it should have 3"),
    ],
)
def test_errors(change, error, message):
    with pytest.raises(error, match=message):
        place_sequence(**{"text_embeds": TEXT, "image_embeds": IMAGE, "roles": ROLES, "host": HOST, **change})
