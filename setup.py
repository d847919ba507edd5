"""Metadata lives in pyproject.toml. This file builds the CUDA extension where it can.

The extension is built when PyTorch is a CUDA build and its nvcc is there, with or without a GPU in the machine:

    ATTANCHOR_BUILD_CUDA    1: build it, and fail if that is impossible; 0: leave it out; unset: where possible
    ATTANCHOR_CUDA_ARCHS    what to compile for, such as "90" or "80;90;100+PTX"; unset: all that this nvcc knows of
                            80 (Ampere, Ada), 90+PTX (Hopper; anything newer through the driver), 100 (Blackwell)
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

LEAST_TORCH = (2, 10)  # the first with the parts of the stable ABI that csrc/bindings.cpp uses
ARCHS = (("80", (11, 0)), ("90+PTX", (11, 8)), ("100", (12, 8)))  # and the first CUDA that knows them


class Unable(Exception):
    """Why the extension cannot be built here."""


def hidden_toolkit() -> str | None:
    """The CUDA toolkit, where PyTorch would not find it: nvcc on the PATH is a script or a link that leads there."""
    nvcc = shutil.which("nvcc")
    named = "CUDA_HOME" in os.environ or "CUDA_PATH" in os.environ
    if nvcc is None or named or Path(nvcc).parents[1].joinpath("include", "cuda_runtime.h").exists():
        return None
    said = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull], capture_output=True, text=True).stderr
    found = re.search(r"^#\$ TOP=(.+)$", said, re.MULTILINE)
    return str(Path(found.group(1)).resolve()) if found and Path(found.group(1), "bin", "nvcc").exists() else None


def toolchain() -> tuple[int, int]:
    """Version of the nvcc that PyTorch will call."""
    if home := hidden_toolkit():
        os.environ["CUDA_HOME"] = home
    try:
        import torch
        from torch.utils.cpp_extension import CUDA_HOME
    except ImportError as error:
        raise Unable(
            f"PyTorch cannot be imported by the build ({error}); install it and add --no-build-isolation"
        ) from None
    version = tuple(map(int, re.findall(r"\d+", torch.__version__)[:2]))
    if version < LEAST_TORCH:
        raise Unable(f"PyTorch is {torch.__version__}; at least {'.'.join(map(str, LEAST_TORCH))} is needed")
    if torch.version.cuda is None:
        raise Unable(f"PyTorch {torch.__version__} is not a CUDA build")
    nvcc = Path(CUDA_HOME or "", "bin", "nvcc")
    if CUDA_HOME is None or not nvcc.exists():
        raise Unable("there is no nvcc: set CUDA_HOME to a CUDA toolkit")
    found = re.search(
        r"release (\d+)\.(\d+)", subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    )
    if found is None:
        raise Unable(f"{nvcc} --version does not say its version")
    if found.group(1) != torch.version.cuda.split(".")[0]:
        raise Unable(f"nvcc is of CUDA {found.group(1)}.{found.group(2)}, PyTorch of CUDA {torch.version.cuda}")
    return int(found.group(1)), int(found.group(2))


def architectures(cuda: tuple[int, int]) -> list[str]:
    """Names such as "90" or "80+PTX"."""
    given = os.environ.get("ATTANCHOR_CUDA_ARCHS")
    if not given:
        return [name for name, since in ARCHS if cuda >= since]
    names = [name for name in re.split(r"[;, ]+", given) if name]
    for name in names:
        if not re.fullmatch(r"\d+[af]?(\+PTX)?", name):
            raise SystemExit(f'ATTANCHOR_CUDA_ARCHS holds {name!r}; it should be like "90" or "80;90;100+PTX"')
    return names


def code_flags(names: list[str]) -> list[str]:
    """What nvcc is told: machine code for each, and where asked for what a driver can compile for later GPUs."""
    flags = []
    for name in names:
        number = name.removesuffix("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if name.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def extension() -> dict:
    """Arguments for `setup` that build the extension, or none; says which and why."""
    wish = os.environ.get("ATTANCHOR_BUILD_CUDA", "")
    if wish not in ("", "0", "1"):
        raise SystemExit(f"ATTANCHOR_BUILD_CUDA is {wish!r}; it should be 0, 1 or unset")
    if wish == "0":
        say("the CUDA extension is left out: ATTANCHOR_BUILD_CUDA=0")
        return {}
    try:
        cuda = toolchain()
    except Unable as reason:
        if wish == "1":
            raise SystemExit(f"attanchor-kernels: ATTANCHOR_BUILD_CUDA=1, but {reason}") from None
        say(f"the CUDA extension is left out: {reason}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    archs = architectures(cuda)
    say(f"the CUDA extension is built with CUDA {cuda[0]}.{cuda[1]} for {', '.join(archs)}")
    module = CUDAExtension(
        "attanchor_kernels._C",
        sorted(map(str, [*Path("csrc").rglob("*.cu"), Path("csrc/bindings.cpp")])),
        include_dirs=[str(Path("csrc").resolve())],
        depends=sorted(map(str, [*Path("csrc").glob("*.cuh"), *Path("csrc").glob("*.h")])),
        define_macros=[("TORCH_TARGET_VERSION", f"0x{LEAST_TORCH[0]:02x}{LEAST_TORCH[1]:02x}000000000000")],
        extra_compile_args={
            "cxx": ["-O3", "-g0", "-std=c++17", f"-DATTANCHOR_ARCHS={'_'.join(archs)}"],
            "nvcc": ["-O3", "-std=c++17", "--threads=4", *code_flags(archs)],
        },
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def say(what: str) -> None:
    print(f"attanchor-kernels: {what}", file=sys.stderr)


setup(
    license="Apache-2.0",
    license_files=["LICENSE"],
    **extension(),
)
