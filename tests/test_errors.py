"""Every error of the contract: its type, and that the message names the argument, what it was and what it should be."""

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from attanchor_kernels import Role, build_sequence, merge_sequence, plan_sequence
from attanchor_kernels.testing.contract import assert_same_fields

IMAGE, TEXT = torch.randn(2, 5, 8), torch.randn(2, 3, 8)
SLOTS, FEATURES = torch.randn(2, 4, 8), torch.randn(3, 8)
ROLES = torch.tensor([[2, 2, 3, 1], [2, 3, 0, 0]], dtype=torch.uint8)

BUILD_ERRORS = [
    ({"img": [1]}, TypeError, "img is list; it should be a torch.Tensor"),
    ({"img": IMAGE.to_sparse()}, TypeError, "img has layout torch.sparse_coo; it should be a dense tensor"),
    ({"img": IMAGE.int()}, TypeError, "img has dtype torch.int32"),
    ({"txt": TEXT.half()}, TypeError, "img has dtype torch.float32 and txt has torch.float16; they should be the same"),
    ({"img": IMAGE[None]}, ValueError, r"img has shape \(1, 2, 5, 8\); it should be \(B, M, D\) or \(M, D\)"),
    ({"img": IMAGE[:, :, :0], "txt": TEXT[:, :, :0]}, ValueError, "its hidden size D should be at least 1"),
    ({"txt": TEXT[0]}, ValueError, r"txt has shape \(3, 8\); with img \(2, 5, 8\) it should be \(2, N, 8\)"),
    ({"txt": TEXT[:, :, :7]}, ValueError, r"txt has shape \(2, 3, 7\)"),
    ({"txt": TEXT[:1]}, ValueError, r"txt has shape \(1, 3, 8\)"),
    ({"txt": torch.empty(2, 3, 8, device="meta")}, ValueError, "img is on cpu and txt is on meta"),
    ({"tau": "0.1"}, TypeError, "tau is str; it should be a number, or a 0-dim float32 tensor"),
    ({"tau": torch.tensor(0.1).double()}, TypeError, "tau has dtype torch.float64; it should be torch.float32"),
    ({"tau": torch.tensor([0.1])}, ValueError, r"tau has shape \(1,\); it should be \(\)"),
    ({"tau": torch.tensor(0.1, device="meta")}, ValueError, "tau is on meta; it should be on cpu"),
    ({"tau": True}, TypeError, "tau is bool"),
    ({"tau": math.nan}, ValueError, "tau is NaN"),
    ({"tau": 10**400}, ValueError, "tau is an integer that no float holds"),
    ({"img_mask": torch.ones(2, 5)}, TypeError, "img_mask has dtype torch.float32; it should be torch.bool"),
    ({"img_mask": [True]}, TypeError, "img_mask is list"),
    ({"img_mask": torch.ones(2, 5).bool().to_sparse()}, TypeError, "img_mask has layout torch.sparse_coo"),
    ({"img": torch.nn.UninitializedParameter()}, TypeError, "img is UninitializedParameter"),
    ({"txt_mask": torch.nn.UninitializedParameter()}, TypeError, "txt_mask is UninitializedParameter"),
    ({"position_ids": torch.zeros(2, 8).long().to_sparse(), "positions": "inherit"}, TypeError, "position_ids has lay"),
    ({"txt_mask": torch.ones(2, 5).bool()}, ValueError, r"txt_mask has shape \(2, 5\); it should be \(2, 3\)"),
    ({"anchor_mask": torch.ones(3).bool()}, ValueError, r"anchor_mask has shape \(3,\); it should be \(2, 3\)"),
    ({"anchor_mask": torch.ones(2, 3, device="meta").bool()}, ValueError, "anchor_mask is on meta"),
    ({"max_anchors": -1}, ValueError, "max_anchors is -1; it should be 0 or more"),
    ({"max_anchors": np.int64(-1)}, ValueError, "max_anchors is -1; it should be 0 or more"),
    ({"max_anchors": 2**63}, ValueError, "max_anchors is 9223372036854775808; it should be 0 or more and at most"),
    ({"max_anchors": 2.0}, TypeError, "max_anchors is float; it should be an int"),
    ({"max_anchors": True}, TypeError, "max_anchors is bool"),
    ({"max_anchors": np.float32(2)}, TypeError, "max_anchors is float32"),
    ({"max_anchors": np.array(1.5)}, TypeError, "max_anchors is ndarray"),
    ({"max_anchors": torch.tensor(2)}, TypeError, "max_anchors is Tensor"),
    ({"direction": "up"}, ValueError, "direction is 'up'; it should be 'text_into_image' or 'image_into_text'"),
    ({"positions": "flat"}, ValueError, "positions is 'flat'; it should be 'sequential' or 'inherit'"),
    ({"padding_side": "top"}, ValueError, "padding_side is 'top'; it should be 'right' or 'left'"),
    ({"position_ids": torch.zeros(2, 8).long()}, ValueError, "position_ids is given with positions='sequential'"),
    (
        {"position_ids": torch.zeros(2, 8), "positions": "inherit"},
        TypeError,
        "position_ids has dtype torch.float32; it should be torch.int64",
    ),
    (
        {"position_ids": torch.zeros(2, 9).long(), "positions": "inherit"},
        ValueError,
        r"position_ids has shape \(2, 9\); it should be \(2, 8\), or \(P, 2, 8\) with P >= 1",
    ),
    ({"position_ids": torch.zeros(0, 2, 8).long(), "positions": "inherit"}, ValueError, "with P >= 1"),
    ({"keep": -1}, ValueError, "keep is -1; it should be 0 or more"),
    ({"keep": True}, TypeError, "keep is bool; it should be an int"),
    ({"keep": 1 / 3}, TypeError, "keep is float; it should be an int"),
    ({"keep": torch.tensor([1, 1], dtype=torch.int32)}, TypeError, "keep is Tensor; it should be an int"),
    ({"salience": torch.zeros(2, 5)}, ValueError, "salience is given without keep"),
    ({"cells": torch.zeros(2, 5).int()}, ValueError, "cells is given without keep"),
    ({"keep": 1, "salience": torch.zeros(2, 5).half()}, TypeError, "salience has dtype torch.float16; it should be"),
    ({"keep": 1, "salience": torch.zeros(2, 3)}, ValueError, r"salience has shape \(2, 3\); it should be \(2, 5\)"),
    (
        {"keep": 1, "cells": torch.zeros(2, 5).long()},
        TypeError,
        "cells has dtype torch.int64; it should be torch.int32",
    ),
    ({"keep": 1, "cells": torch.full((2, 5), 5).int()}, ValueError, "cells holds 5; a cell should be below 5"),
    ({"trim": 1}, TypeError, "trim is int; it should be a bool"),
    ({"backend": "numpy"}, ValueError, "backend is 'numpy'; it should be one of 'auto', 'reference', 'triton', 'cuda'"),
    (
        {"backend": "cuda"},
        ValueError,
        "backend is 'cuda', which is not available: .*`ATTANCHOR_BUILD_CUDA=1 pip install --no-build-isolation .`",
    ),
    (
        {"img": IMAGE.double(), "txt": TEXT.double(), "backend": "triton"},
        ValueError,
        "backend is 'triton' and the inputs are float64",
    ),
]


@pytest.mark.parametrize(("change", "error", "message"), BUILD_ERRORS)
def test_build_sequence(change, error, message):
    if change.get("backend") == "cuda" and torch.cuda.is_available():
        pytest.skip("the CUDA kernels may be built here")
    with pytest.raises(error, match=message):
        build_sequence(**{"img": IMAGE, "txt": TEXT, "tau": 0.1, **change})


def test_merge_sequence_takes_a_count_for_each_sample():
    with pytest.raises(TypeError, match=r"keep is float; it should be an int, an int32 tensor of shape \(2,\) or None"):
        merge_sequence(TEXT, IMAGE[0, :0], torch.ones(2, 3, dtype=torch.uint8), 0.1, keep=1.5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_images_of_several_sizes_in_a_nested_tensor():
    with pytest.raises(TypeError, match="img has layout nested; it should be a dense tensor"):
        build_sequence(torch.nested.nested_tensor([IMAGE[0], IMAGE[1, :2]]), TEXT, 0.1)


@pytest.mark.parametrize("count", [np.int64(1), np.uint8(1), np.array(1)], ids=repr)
def test_any_integer_is_a_budget(count):
    one = build_sequence(IMAGE, TEXT, -1.0, max_anchors=1)
    assert one.is_anchor.sum() == 2
    assert_same_fields(build_sequence(IMAGE, TEXT, -1.0, max_anchors=count), one)


@pytest.mark.parametrize(
    "tau", [np.float32(0.5), np.float64(0.5), np.float16(0.5), np.int8(0), 0, torch.tensor(0.5)], ids=repr
)
def test_any_real_number_is_a_threshold(tau):
    assert_same_fields(build_sequence(IMAGE, IMAGE, tau), build_sequence(IMAGE, IMAGE, float(tau)))


def test_meta_tensors_have_no_length_to_trim_to():
    image, text = IMAGE.to("meta"), TEXT.to("meta")
    with pytest.raises(ValueError, match="trim is True, and tensors on meta have no values"):
        build_sequence(image, text, 0.1)
    assert build_sequence(image, text, 0.1, trim=False).embeds.shape == (2, 5 + 3 + 3, 8)


MERGE_ERRORS = [
    ({"roles": ROLES.long()}, TypeError, "roles has dtype torch.int64; it should be torch.uint8"),
    ({"roles": ROLES.to_sparse()}, TypeError, "roles has layout torch.sparse_coo; it should be a dense tensor"),
    ({"turn": ROLES.int().to_sparse()}, TypeError, "turn has layout torch.sparse_coo; it should be a dense tensor"),
    ({"roles": None}, TypeError, "roles is NoneType"),
    ({"roles": ROLES[:, :3]}, ValueError, r"roles has shape \(2, 3\); it should be \(2, 4\)"),
    ({"roles": ROLES + 3}, ValueError, "roles holds 6; it should hold 0"),
    ({"image_embeds": FEATURES[:2]}, ValueError, "image_embeds has 2 rows; it should have 3"),
    ({"image_embeds": torch.randn(4, 8)}, ValueError, "image_embeds has 4 rows; it should have 3"),
    ({"image_embeds": FEATURES[None]}, ValueError, r"image_embeds has shape \(1, 3, 8\); it should be \(T, 8\)"),
    ({"text_embeds": SLOTS[None]}, ValueError, r"text_embeds has shape \(1, 2, 4, 8\)"),
    (
        {"text_embeds": SLOTS.bfloat16()},
        TypeError,
        "image_embeds has dtype torch.float32 and text_embeds has torch.bfloat16",
    ),
    ({"turn": torch.zeros(2, 4).long()}, TypeError, "turn has dtype torch.int64; it should be torch.int32"),
    ({"turn": torch.zeros(2, 3).int()}, ValueError, r"turn has shape \(2, 3\)"),
    ({"max_anchors": -3}, ValueError, "max_anchors is -3"),
    ({"keep": torch.tensor([1, 1])}, TypeError, "keep has dtype torch.int64; it should be torch.int32"),
    ({"keep": torch.tensor([1]).int()}, ValueError, r"keep has shape \(1,\); it should be \(2,\)"),
    ({"keep": torch.tensor([1, -2]).int()}, ValueError, "keep holds -2; it should hold 0 or more"),
    ({"keep": 1, "salience": torch.zeros(2, 4)}, ValueError, r"salience has shape \(2, 4\); it should be \(3,\)"),
    ({"keep": 1, "cells": torch.full((3,), 4).int()}, ValueError, "cells holds 4; a cell should be below 4"),
    ({"max_anchors": 2**31}, ValueError, "max_anchors is 2147483648"),
]


@pytest.mark.parametrize("operator", [merge_sequence, plan_sequence])
@pytest.mark.parametrize(("change", "error", "message"), MERGE_ERRORS)
def test_merge_and_plan_sequence(operator, change, error, message):
    with pytest.raises(error, match=message):
        operator(**{"text_embeds": SLOTS, "image_embeds": FEATURES, "roles": ROLES, "tau": 0.1, **change})


def test_roles_have_names():
    assert [role.value for role in Role] == [0, 1, 2, 3, 4]
    roles = torch.tensor([[Role.IMAGE, Role.SILENT_IMAGE, Role.ANCHOR_TEXT, Role.TEXT], [Role.IMAGE, 3, 0, 0]])
    result = merge_sequence(SLOTS, FEATURES, roles.to(torch.uint8), -1.0)
    assert result.host.tolist() == [[-1, -1, 0, -1], [-1, 0, -1, -1]]


def test_forward_mode_is_refused_rather_than_without_a_tangent():
    def embeds(text):
        return build_sequence(IMAGE, text, 0.1).embeds

    with pytest.raises(RuntimeError, match="txt is a dual tensor; embeds can be differentiated in reverse mode alone"):
        torch.func.jvp(embeds, (TEXT,), (torch.ones_like(TEXT),))
    with torch.autograd.forward_ad.dual_level():
        assert embeds(TEXT) is not None
        with pytest.raises(RuntimeError, match="txt is a dual tensor"):
            embeds(torch.autograd.forward_ad.make_dual(TEXT, torch.ones_like(TEXT)))


def test_the_raw_operators_check_too():
    with pytest.raises(ValueError, match="max_anchors is -1"):
        torch.ops.attanchor.build_sequence(IMAGE, TEXT, 0.1, max_anchors=-1)
    with pytest.raises(ValueError, match="image_embeds has 2 rows"):
        torch.ops.attanchor.merge_sequence(SLOTS, FEATURES[:2], ROLES, 0.1)


def test_the_environment_variable_is_read_at_each_call_and_the_argument_beats_it(monkeypatch):
    monkeypatch.setenv("ATTANCHOR_BACKEND", "nonsense")
    with pytest.raises(ValueError, match="ATTANCHOR_BACKEND is 'nonsense'"):
        build_sequence(IMAGE, TEXT, 0.1)
    with pytest.raises(ValueError, match="ATTANCHOR_BACKEND is 'nonsense'"):
        torch.ops.attanchor.build_sequence(IMAGE, TEXT, 0.1)
    monkeypatch.setenv("ATTANCHOR_BACKEND", "cuda")
    with pytest.raises(ValueError, match="ATTANCHOR_BACKEND is 'cuda', which is not available"):
        build_sequence(IMAGE, TEXT, 0.1)
    build_sequence(IMAGE, TEXT, 0.1, backend="reference")
    monkeypatch.setenv("ATTANCHOR_BACKEND", "")
    build_sequence(IMAGE, TEXT, 0.1)


@pytest.mark.parametrize("late", ["", "import triton, os; os.environ['TRITON_INTERPRET'] = '1'\n"])
def test_triton_on_cpu_tensors_says_how(late):
    """Also where TRITON_INTERPRET is set too late, after the import."""
    code = late + (
        "import torch, attanchor_kernels as a\n"
        "try: a.build_sequence(torch.randn(2, 4), torch.randn(2, 4), 0.1, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert "backend is 'triton', which is not available" in run.stdout
    assert "TRITON_INTERPRET=1" in run.stdout
