"""Compile csrc/ with the C++ compiler, over the emulated device of this folder, into a module like the real binary."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import importlib.machinery
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import torch

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "emulator"
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-DATTANCHOR_STAMPS"]
FLAGS += [f"-I{HERE}", f"-I{CSRC}"]
TORCH = Path(torch.__file__).parent
BINDING_FLAGS = [
    "-DATTANCHOR_DISPATCH_KEY=CPU",
    "-Daoti_torch_empty_strided=attanchor_emulated_empty",  # outputs.cpp
    "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-DPy_LIMITED_API=0x030a0000",
    "-DATTANCHOR_ARCHS=80_90+PTX",
    f"-I{TORCH / 'include'}",
    f"-I{sysconfig.get_paths()['include']}",
]


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if compiler() is None:
        return "no C++ compiler (g++) on the PATH"
    if not (Path(sysconfig.get_paths()["include"]) / "Python.h").exists():
        return "Python's headers are not installed"
    return None


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def build() -> Path:
    """The module's path; compiled only if a source or the PyTorch version has changed."""
    sources = sorted([*(path for folder in (CSRC, HERE) for path in folder.rglob("*.[ch]*")), Path(__file__)])
    digest = hashlib.sha256(f"{torch.__version__} {sys.version} {FLAGS} {BINDING_FLAGS}".encode())
    for source in sources:
        digest.update(source.name.encode() + source.read_bytes())
    folder = CACHE / digest.hexdigest()[:16]
    module = folder / "_C.abi3.so"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not module.exists():
            _compile(folder, module)
    return module


def _compile(folder: Path, module: Path) -> None:
    units: list[tuple[Path, list[str]]] = [(source, ["-x", "c++"]) for source in sorted(CSRC.rglob("*.cu"))]
    units += [*((source, []) for source in sorted(HERE.glob("*.cpp"))), (CSRC / "bindings.cpp", BINDING_FLAGS)]
    objects = [str(folder / f"{source.name}.o") for source, _ in units]
    commands = [
        [compiler(), *FLAGS, *flags, "-c", str(source), "-o", made]
        for (source, flags), made in zip(units, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:  # the tests' other workers wait for this one
        list(pool.map(_run, commands))
    unfinished = folder / "unfinished.so"
    _run([compiler(), "-shared", *objects, "-o", str(unfinished), f"-L{TORCH / 'lib'}", "-ltorch_cpu"])
    unfinished.rename(module)


def _run(command: list) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr}")


class Emulator:
    """The emulated device and the CUDA backend over it, whose tensors are on the CPU."""

    def __init__(self) -> None:
        path = str(build())
        name = "attanchor_kernels._C"
        # The name is taken for the import of the backend alone (loading it takes it already): elsewhere the binary must
        # look as present or absent as it is.
        before = sys.modules.get(name)
        loader = importlib.machinery.ExtensionFileLoader(name, path)
        spec = importlib.util.spec_from_file_location(name, path, loader=loader)
        assert spec is not None
        module: ModuleType = importlib.util.module_from_spec(spec)
        loader.exec_module(module)
        self.binary = module
        self._library = ctypes.CDLL(path)
        self._library.attanchor_emulate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_uint64]
        self._library.attanchor_emulate_failure.argtypes = [ctypes.c_char_p]
        self._library.attanchor_emulate_launches.argtypes = [ctypes.c_bool]
        self._library.attanchor_emulate_clock.argtypes = [ctypes.c_uint64]
        sys.modules[name] = module
        try:
            self.backend = importlib.import_module("attanchor_kernels.backends.cuda")
            self.launch = importlib.import_module("attanchor_kernels.backends.cuda.launch")
            self.workspace = importlib.import_module("attanchor_kernels.backends.workspace")
        finally:
            if before is None:
                del sys.modules[name]
            else:
                sys.modules[name] = before

    def configure(self, resident: int, seed: int, occupied: int = 0) -> None:
        """From now on so many blocks run at once, less those of other work, in the order that the seed gives."""
        self._library.attanchor_emulate(resident, occupied, seed)

    def fail(self, reason: str) -> None:
        """From now on asking the device how much it runs is an error for this reason; empty: it answers."""
        self._library.attanchor_emulate_failure(reason.encode())

    def clock(self, step: int) -> None:
        """From now on a step of a thread takes so many nanoseconds; 1 at first."""
        self._library.attanchor_emulate_clock(step)

    def launches(self, run: bool) -> None:
        """Whether launches run from now on, or are accepted and forgotten, as where the time of the host is taken."""
        self._library.attanchor_emulate_launches(run)
