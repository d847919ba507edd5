"""Which implementations exist here, why one is missing, and which one a call gets.

A backend is a module with four functions over a `Problem`:

    construct(problem) -> (embeds (B, C, D), Plan)     match, plan and copy in one pass
    plan(problem) -> Plan                              the same without the copy
    assemble(image, text, source, places) -> embeds    the copy alone
    assemble_backward(grad, places, image_shape, text_shape, need_image, need_text) -> (grad_image, grad_text)

The last two are linear and each other's transpose. `source` and `places` as in `Plan`, possibly trimmed to L <= C rows.
"""

from __future__ import annotations

import functools
import importlib
import os
import re
from types import ModuleType

import torch

NAMES = ("auto", "reference", "triton", "cuda")
ENVIRONMENT_VARIABLE = "ATTANCHOR_BACKEND"
OLDEST_TRITON = (3, 5)


@functools.cache
def why_not(name: str, device_type: str, index: int | None = None) -> str | None:
    """Why a backend cannot run on a device type ("cpu", "cuda", …), or None if it can.

    `index` is that of the device, by default the current one: GPUs of one machine may differ.
    """
    if name == "reference":
        return None
    if name == "triton":
        return _why_not_triton(device_type)
    return _why_not_cuda(device_type, index)


def _why_not_triton(device_type: str) -> str | None:
    try:
        import triton
        import triton.language
    except ImportError as error:
        return f"Triton cannot be imported ({error}); install it with `pip install triton`"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < OLDEST_TRITON:
        oldest = ".".join(map(str, OLDEST_TRITON))
        return f"Triton {triton.__version__} is too old; install {oldest} or later with `pip install -U triton`"
    if device_type == "cuda":
        return None
    # Triton decides at its import whether functions are interpreted.
    interpreted = type(triton.language.max).__name__ == "InterpretedFunction" and triton.knobs.runtime.interpret
    if device_type == "cpu" and interpreted:
        return None
    return (
        f"Triton kernels run on CUDA and ROCm tensors, these are on {device_type!r}; "
        "to run them on the CPU in Triton's interpreter set TRITON_INTERPRET=1 before the first import of triton"
    )


def _why_not_cuda(device_type: str, index: int | None) -> str | None:
    try:
        binary = importlib.import_module("attanchor_kernels._C")
    except ImportError as error:
        return (
            f"the CUDA extension attanchor_kernels._C cannot be imported ({error}); "
            "build it with nvcc and a PyTorch for CUDA: `ATTANCHOR_BUILD_CUDA=1 pip install --no-build-isolation .`"
        )
    if device_type != "cuda":
        return f"the CUDA kernels run on CUDA tensors, these are on {device_type!r}"
    built = binary.architectures.split("_")
    capability = torch.cuda.get_device_capability(index)
    if not runs_on(built, capability):
        return (
            f"the CUDA kernels were built for {', '.join(built)} and this GPU has compute capability "
            f"{capability[0]}.{capability[1]}; build them anew with ATTANCHOR_CUDA_ARCHS unset, or naming it"
        )
    return None


def runs_on(names: list[str], capability: tuple[int, int]) -> bool:
    """Whether code built for `names`, such as "80+PTX" or "90a", runs on a GPU of this compute capability.

    Machine code runs within its major version, from its minor version on; PTX on everything later too, compiled by the
    driver. Code for "a" runs on just that capability, for "f" within the major version only, PTX or not.
    """
    return any(_runs_on(name, capability) for name in names)


def _runs_on(name: str, capability: tuple[int, int]) -> bool:
    found = re.fullmatch(r"(\d+)(\d)([af]?)(\+PTX)?", name)
    if found is None:
        return False
    major, minor, kind, ptx = int(found[1]), int(found[2]), found[3], found[4]
    if kind == "a":
        return capability == (major, minor)
    if ptx and not kind:
        return capability >= (major, minor)
    return capability[0] == major and capability[1] >= minor


def requested(argument: str) -> str:
    """The backend asked for: the argument, else ATTANCHOR_BACKEND (read at each call), else "auto".

    Raises:
        ValueError: neither names a backend.
    """
    if argument not in NAMES:
        raise ValueError(f"backend is {argument!r}; it should be one of {', '.join(map(repr, NAMES))}")
    if argument != "auto":
        return argument
    name = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"
    if name not in NAMES:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} is {name!r}; it should be one of {', '.join(map(repr, NAMES))}, or unset"
        )
    return name


def choose(argument: str, device: torch.device, dtype: torch.dtype) -> str:
    """The name of the backend that a call gets.

    `auto` takes the reference on a CPU and for float64, otherwise CUDA where it is built for the GPU, else Triton, else
    the reference. That CUDA comes first rests on no measurement yet: docs/kernels.md says what the rule is to become.

    Raises:
        ValueError: the backend asked for is unknown, cannot run here, or does not do this dtype.
    """
    name = requested(argument)
    wish = ENVIRONMENT_VARIABLE if argument == "auto" else "backend"
    if name == "auto":
        if device.type == "cpu" or dtype == torch.float64:
            return "reference"
        return next(n for n in ("cuda", "triton", "reference") if why_not(n, device.type, device.index) is None)
    if name != "reference" and dtype == torch.float64:
        raise ValueError(
            f"{wish} is {name!r} and the inputs are float64; the kernels do not do float64: use 'reference'"
        )
    reason = why_not(name, device.type, device.index)
    if reason is not None:
        raise ValueError(f"{wish} is {name!r}, which is not available: {reason}")
    return name


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a backend that `choose` returned; imported at its first use."""
    if name == "reference":
        return importlib.import_module("attanchor_kernels.reference")
    return importlib.import_module(f"attanchor_kernels.backends.{name}")
