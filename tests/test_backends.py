"""Which backend a call gets: what a binary was built for, and what `auto` takes."""

import sys
from types import ModuleType

import pytest
import torch

from attanchor_kernels import backends
from attanchor_kernels.backends import runs_on

USUAL = ["80+PTX", "90a", "100a"]


@pytest.mark.parametrize(
    ("names", "capability", "runs"),
    [
        (USUAL, (8, 0), True),
        (USUAL, (8, 9), True),
        (USUAL, (9, 0), True),
        (USUAL, (12, 0), True),  # by the PTX
        (USUAL, (7, 5), False),
        (["90a"], (9, 0), True),
        (["90a"], (8, 0), False),
        (["90a"], (10, 0), False),
        (["90a+PTX"], (10, 0), False),
        (["86"], (8, 0), False),
        (["86"], (8, 9), True),
        (["86"], (9, 0), False),
        (["100f"], (10, 3), True),
        (["100f+PTX"], (12, 0), False),
        (["80", "120"], (12, 1), True),
        (["none"], (9, 0), False),
    ],
)
def test_what_machine_code_runs_on(names, capability, runs):
    assert runs_on(names, capability) == runs


@pytest.fixture
def binary(monkeypatch):
    """A binary for Hopper alone, on a machine with one GPU of each of two kinds; nothing is launched."""
    module = ModuleType("attanchor_kernels._C")
    module.architectures = "90a_100a"
    monkeypatch.setitem(sys.modules, "attanchor_kernels._C", module)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(9, 0), (8, 6)][index or 0])
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    backends.why_not.cache_clear()
    yield module
    backends.why_not.cache_clear()


def test_auto_takes_the_binary_only_where_it_runs(binary):
    """On the GPU that it was built for; Triton on the other one of the same machine; the reference elsewhere."""
    chosen = [backends.choose("auto", torch.device("cuda", index), torch.bfloat16) for index in (0, 1)]
    assert chosen == ["cuda", "triton"]
    assert backends.choose("auto", torch.device("cuda", 0), torch.float64) == "reference"
    assert backends.choose("auto", torch.device("cpu"), torch.bfloat16) == "reference"


def test_a_binary_for_another_gpu_says_so(binary):
    assert backends.choose("cuda", torch.device("cuda", 0), torch.float16) == "cuda"
    message = r"built for 90a, 100a and this GPU has compute capability 8\.6; build them anew with ATTANCHOR_CUDA_ARCHS"
    with pytest.raises(ValueError, match=message):
        backends.choose("cuda", torch.device("cuda", 1), torch.float16)
