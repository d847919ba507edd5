"""In fresh processes: the package needs neither Triton nor a binary nor a GPU, and imports none of them."""

import os
import subprocess
import sys

import pytest
import torch

from attanchor_kernels import doctor

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ImportError(f"{{name}} is blocked by the test")
sys.meta_path.insert(0, Block())
"""


def run(code: str, blocked: tuple[str, ...]) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    code = BLOCK.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import attanchor_kernels
print([m for m in ('triton', 'transformers', 'peft') if m in sys.modules])
import torch
a, b = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 2, 8)
out = attanchor_kernels.build_sequence(a, b, -1.0)
out.embeds.backward(torch.randn_like(out.embeds))
raw = torch.ops.attanchor.build_sequence(a, b, -1.0)
print(tuple(out.embeds.shape), tuple(raw[0].shape), a.grad is not None)
try: attanchor_kernels.build_sequence(a, b, 0.1, backend='triton')
except ValueError as error: print(error)
"""


DOCTOR = "import runpy; runpy.run_module('attanchor_kernels.doctor', run_name='__main__')"


@pytest.mark.parametrize("blocked", [(), ("triton", "transformers", "peft", "attanchor_kernels._C")])
def test_what_is_optional_is_neither_needed_nor_loaded(blocked):
    """By the operators, and by the doctor that says what is there."""
    output = run(USE + DOCTOR, blocked)
    loaded, made, *explained = output.splitlines()
    assert loaded == "[]"
    assert made == "(1, 8, 8) (1, 8, 8) True"
    if blocked:
        assert "Triton cannot be imported (triton is blocked by the test); install it with" in explained[0]
    assert "self-test passed" in output
    assert "CUDA kernels for" in output
    assert "auto takes  reference" in output
    assert ("triton is blocked" in "".join(explained[1:])) == bool(blocked)


@pytest.mark.parametrize(
    ("wish", "why"), [("cuda", "cuda', which is not available: the CUDA"), ("fastest", "fastest'; it should be one of")]
)
def test_doctor_says_when_the_environment_asks_for_what_is_not_there(monkeypatch, wish, why):
    monkeypatch.setenv("ATTANCHOR_BACKEND", wish)
    assert doctor.automatic(torch.device("cpu")).startswith(f"nothing: ATTANCHOR_BACKEND is '{why}")
