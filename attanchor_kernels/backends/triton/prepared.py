"""Kernels with what all their launches of one shape share, so that a call pays for a dictionary's answer alone."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch
from triton.compiler import CompiledKernel

MOST = 1024


class Launch:
    """A kernel, its grid, and its arguments from the first number on.

    Triton's own way to a launch finds out at each call how every argument specialises the kernel, and whether a global
    has changed. Here it is taken once; what it compiled is then launched as it is. So whatever Triton would compile a
    kernel apart for must be in the key that a launch is kept by; what triton.knobs say counts when a shape first comes.
    """

    def __init__(self, kernel: Any, programs: int, options: dict[str, Any], **numbers: Any) -> None:
        self.kernel, self.grid, self.options = kernel, (programs, 1, 1), options
        self.numbers = tuple(numbers[name] for name in kernel.arg_names if name in numbers)
        self.compiled: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> None:
        """Launch it on the current stream of the current device, with the arguments before the numbers."""
        if self.compiled is not None:
            self.compiled(*arguments, *self.numbers)
            return
        found = self.kernel[self.grid](*arguments, *self.numbers, **self.options)
        if isinstance(found, CompiledKernel):  # nothing is in the interpreter
            self.compiled = found[self.grid]


_prepared: dict[Hashable, Any] = {}


def prepared(key: Hashable, make: Callable[..., Any], *arguments: Any) -> Any:
    """What `make` made of the arguments when the key first came."""
    found = _prepared.get(key)
    if found is None:
        if len(_prepared) >= MOST:
            _prepared.clear()
        found = _prepared[key] = make(*arguments)
    return found


def compilation(num_warps: int, num_stages: int = 1, registers: int | None = None) -> dict[str, Any]:
    """Compiler options; ROCm knows no limit of registers."""
    limit = {} if registers is None or torch.version.hip else {"maxnreg": registers}
    return {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": True, **limit}
