"""In fresh processes: the package needs neither Triton nor a binary nor a GPU, and imports none of them."""

import os
import subprocess
import sys

import pytest

BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r} or name in {blocked!r}:
            raise ImportError(f"{{name}} is blocked by the test")
sys.meta_path.insert(0, Block())
"""


def run(code: str, blocked: tuple[str, ...] = (), **variables: str) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | variables
    code = BLOCK.format(blocked=blocked) + code
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr
    return done.stdout


USE = """
import torch, attanchor_kernels
a, b = torch.randn(1, 4, 8, requires_grad=True), torch.randn(1, 2, 8)
out = attanchor_kernels.build_sequence(a, b, -1.0)
out.embeds.backward(torch.randn_like(out.embeds))
raw = torch.ops.attanchor.build_sequence(a, b, -1.0)
print(tuple(out.embeds.shape), tuple(raw[0].shape), a.grad is not None)
"""


@pytest.mark.parametrize("blocked", [(), ("triton",), ("attanchor_kernels._C",), ("triton", "transformers", "peft")])
def test_works_without_what_is_optional(blocked):
    assert run(USE, blocked) == "(1, 8, 8) (1, 8, 8) True\n"


def test_import_does_not_load_triton_or_transformers():
    code = "import attanchor_kernels, sys; print([m for m in ('triton', 'transformers', 'peft') if m in sys.modules])"
    assert run(code) == "[]\n"


def test_a_missing_triton_is_explained():
    code = (
        "import torch, attanchor_kernels as a\n"
        "try: a.build_sequence(torch.randn(2, 4), torch.randn(2, 4), 0.1, backend='triton')\n"
        "except ValueError as error: print(error)"
    )
    assert "Triton cannot be imported (triton is blocked by the test); install it with" in run(code, ("triton",))


DOCTOR = "import runpy; runpy.run_module('attanchor_kernels.doctor', run_name='__main__')"


@pytest.mark.parametrize("blocked", [(), ("triton",)])
def test_doctor_runs_anywhere(blocked):
    output = run(DOCTOR, blocked)
    assert "self-test" in output
    assert "CUDA kernels for" in output
    assert "reference" in output
    assert ("triton is blocked" in output) == bool(blocked)


@pytest.mark.parametrize(
    ("wish", "why"), [("cuda", "cuda', which is not available: the CUDA"), ("fastest", "fastest'; it should be one of")]
)
def test_doctor_says_when_the_environment_asks_for_what_is_not_there(wish, why):
    assert f"auto takes  nothing: ATTANCHOR_BACKEND is '{why}" in run(DOCTOR, ATTANCHOR_BACKEND=wish)
