"""`python -m attanchor_kernels.doctor`: versions, backends, why one is missing, and a self-test. For bug reports."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import sys

import torch

import attanchor_kernels
from attanchor_kernels import AnchoredSequence, backends, build_sequence, checks
from attanchor_kernels.testing.contract import assert_keeps_contract

PACKAGES = ("torch", "triton", "transformers", "peft", "accelerate", "numpy")
VARIABLES = (backends.ENVIRONMENT_VARIABLE, "TRITON_INTERPRET", "CUDA_HOME")


def versions() -> dict[str, str]:
    """Name and version of everything a bug report needs; "not installed" where it is not."""
    found = {"attanchor_kernels": attanchor_kernels.__version__, "python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cuda (of torch)"] = torch.version.cuda or "none: a CPU build"
    try:
        found["CUDA kernels for"] = importlib.import_module("attanchor_kernels._C").architectures.replace("_", ", ")
    except ImportError:
        found["CUDA kernels for"] = "not built"
    found["system"] = f"{platform.system()} {platform.machine()}"
    return found


def devices() -> list[torch.device]:
    """The CPU and every accelerator that torch sees."""
    return [torch.device("cpu"), *(torch.device("cuda", index) for index in range(torch.cuda.device_count()))]


def self_test(backend: str, device: torch.device) -> str:
    """Hold one small forward and backward of a backend to the float64 oracle: "passed", or what went wrong."""
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randn(2, rows, 48, generator=generator) for rows in (33, 7))
    text[:, 2] += 2 * image[:, 30]
    img, txt = (rows.clone().to(device).requires_grad_() for rows in (image, text))
    try:
        result = build_sequence(img, txt, 0.5, backend=backend)
        assert result.embeds is not None
        (gradient,) = torch.autograd.grad(result.embeds, [txt], torch.ones_like(result.embeds))
        on_cpu = AnchoredSequence(*(field.detach().cpu() for field in result if field is not None))
        problem = checks.build_call(image, text, 0.5, None, None, None, None, *_DEFAULTS).problem
        assert_keeps_contract(on_cpu._replace(position_ids=on_cpu.position_ids.unsqueeze(0)), problem, trimmed=True)
        counts = torch.stack([(on_cpu.source == 33 + n).sum(1) for n in range(7)], dim=1)
        assert torch.equal(gradient[..., 0].cpu(), counts.float()), "the gradient is wrong"
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"
    return "passed"


_DEFAULTS = ("text_into_image", "sequential", None, "right")


def automatic(device: torch.device) -> str:
    """What a call that names no backend gets, which ATTANCHOR_BACKEND may forbid."""
    try:
        return f"{backends.choose('auto', device, torch.bfloat16)} for bfloat16"
    except ValueError as error:
        return f"nothing: {error}"


def main() -> int:
    """Print the report. Returns 1 if an available backend fails its self-test."""
    for name, version in versions().items():
        print(f"{name:<20}{version}")
    for variable in VARIABLES:
        print(f"{variable:<20}{os.environ.get(variable, 'not set')}")
    failed = False
    for device in devices():
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu"
        print(f"\n{device} ({kind})")
        for backend in backends.NAMES[1:]:
            reason = backends.why_not(backend, device.type, device.index)
            outcome = f"not available: {reason}" if reason else f"available, self-test {self_test(backend, device)}"
            failed |= "FAILED" in outcome
            print(f"  {backend:<12}{outcome}")
        print(f"  auto takes  {automatic(device)}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
