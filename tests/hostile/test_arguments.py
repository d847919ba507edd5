"""Whatever an operator is given, it works, or says in a TypeError or ValueError which argument is wrong. Values are
held against an oracle in test_parity.py; here gradients are, of the same odd tensors."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import build_arguments, examples, merge_arguments

from attanchor_kernels import build_sequence, merge_sequence, plan_sequence
from attanchor_kernels.problem import Role


def _changed(tensor: torch.Tensor, how: str) -> object:
    """A tensor as it should not be, or as it may be in spite of its looks."""
    changes = {
        "double": tensor.double,
        "integers": tensor.int,
        "bytes": tensor.byte,
        "booleans": tensor.bool,
        "complex": lambda: torch.complex(tensor.float(), tensor.float()),
        "sparse": tensor.to_sparse,
        "meta": lambda: tensor.to("meta"),
        "an axis more": lambda: tensor[None],
        "an axis less": lambda: tensor[0] if len(tensor) else tensor.flatten(),
        "shorter": lambda: tensor[..., :-1],
        "expanded": lambda: tensor[..., :1].expand(tensor.shape) if tensor.shape[-1] else tensor,
        "nested": lambda: torch.nested.nested_tensor(list(tensor)) if tensor.dim() > 1 else tensor,
        "parameter": lambda: torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point()),
        "uninitialised": torch.nn.UninitializedParameter,
        "inference": lambda: _in_inference_mode(tensor),
        "numpy": lambda: tensor.float().numpy(),
        "list": tensor.tolist,
    }
    return changes[how]()


CHANGES = "double integers bytes booleans complex sparse meta shorter expanded nested parameter uninitialised"
CHANGES = [*CHANGES.split(), "inference", "numpy", "list", "an axis more", "an axis less"]
# An object whose own methods raise is left out: what it raises passes through.
ODD = [None, True, -1, 0, 3, 2**31, 2**63, -(2**70), 10**400, 0.5, math.nan, -math.inf]
ODD += ["", "right", b"\0", [], {}, object]
ODD += [np.float32(0.3), np.int8(-3), np.array([1.0, 2.0]), 1j, torch.tensor(0.5), torch.zeros(0)]
ODD += [torch.tensor(2, dtype=torch.int32), torch.tensor([1, 2, 3], dtype=torch.int32), torch.tensor(math.nan)]


def _in_inference_mode(tensor):
    with torch.inference_mode():
        return tensor.clone()


def _attack(data, operator, arguments: dict) -> None:
    arguments = {name: value for name, value in arguments.items() if value is not None}
    for name in data.draw(st.lists(st.sampled_from(sorted(arguments)), min_size=1, max_size=2, unique=True)):
        if isinstance(arguments[name], torch.Tensor) and data.draw(st.booleans()):
            arguments[name] = _changed(arguments[name], data.draw(st.sampled_from(CHANGES)))
        else:
            arguments[name] = data.draw(st.sampled_from(ODD))
    try:
        operator(**arguments, backend="reference")
    except (TypeError, ValueError) as error:
        if not any(name in str(error) for name in arguments):
            raise AssertionError("no argument is named") from error


@pytest.mark.filterwarnings("ignore")
@given(data=st.data())
@examples(60)
def test_build(tried, data):
    """Operators, hostile arguments of build_sequence."""
    tried()
    _attack(data, build_sequence, {**data.draw(build_arguments([torch.float32], 6, True)), "trim": True})


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operator", [merge_sequence, plan_sequence])
@given(data=st.data())
@examples(40)
def test_merge(tried, operator, data):
    """Operators, hostile arguments of merge_sequence and plan_sequence."""
    tried()
    arguments = data.draw(merge_arguments([torch.float32], 6, True))
    _attack(data, operator, arguments if operator is plan_sequence else {**arguments, "trim": True})


@pytest.mark.parametrize("operator", [build_sequence, merge_sequence])
@given(data=st.data())
@examples(15)
def test_gradients(tried, operator, data):
    """Operators, gradients of odd tensors against loops over the copies."""
    tried()
    strategy = build_arguments if operator is build_sequence else merge_arguments
    arguments = data.draw(strategy([torch.float32], 8, drops=True))
    names = ["img", "txt"] if operator is build_sequence else ["text_embeds", "image_embeds"]
    leaves = [arguments[name].detach().requires_grad_() for name in names]
    arguments |= dict(zip(names, leaves, strict=True))
    made = operator(**arguments, trim=data.draw(st.booleans()), backend="reference")
    upstream = torch.randn(made.embeds.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad(made.embeds, leaves, upstream)
    slots = arguments["text_embeds"].shape[1] if operator is merge_sequence else sum(leaf.shape[1] for leaf in leaves)
    wanted = torch.zeros(len(upstream), slots, upstream.shape[-1])
    for sample, sources in enumerate(made.source.tolist()):
        for slot, source in enumerate(sources):
            if source >= 0:
                wanted[sample, source] += upstream[sample, slot]
    if operator is build_sequence:
        expected = wanted.split([leaf.shape[1] for leaf in leaves], 1)
    else:
        is_image = (arguments["roles"] == Role.IMAGE) | (arguments["roles"] == Role.SILENT_IMAGE)
        expected = (wanted.masked_fill(is_image[..., None], 0), wanted[is_image])
    torch.testing.assert_close(got, tuple(expected))
