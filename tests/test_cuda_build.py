"""Every CUDA file compiled to machine code without a GPU, and what its kernels take: registers, spills, shared memory.

`python tests/test_cuda_build.py` prints the table of what is compiled here.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parent.parent
CSRC = ROOT / "csrc"
CACHE = ROOT / "build" / "cuda"
TARGETS = ("80", "90", "100")


def targets(source: Path) -> tuple[str, ...]:
    """What a file is compiled for here: sm_90, where the kernels are tuned, and one file for the others too.

    float16 differs from bfloat16 in one instruction: of each pair of files one is compiled, and each type somewhere.
    """
    if source.stem == "construct_bfloat":
        return TARGETS
    return () if source.stem in ("construct_half", "construct_drop_half", "construct_held_bfloat") else TARGETS[1:2]


SOURCES = [path for path in sorted(CSRC.rglob("*.cu")) if targets(path)]


class Usage(NamedTuple):
    kernel: str
    target: str
    registers: int
    spill_bytes: int


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None) or shutil.which("nvcc")


needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="left out: there is no nvcc on the PATH or in CUDA_HOME")


def compiled(source: Path) -> tuple[str, str]:
    """What ptxas says of a file for all its targets, and its PTX of 9.0, kept until sources or the compiler change."""
    compiler = nvcc()
    assert compiler is not None
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    digest = hashlib.sha256(f"{version} {targets(source)}".encode())
    for path in [source, *sorted(CSRC.glob("*.cuh")), *sorted(CSRC.glob("*.h"))]:
        digest.update(path.read_bytes())
    kept = CACHE / f"{source.name}.{digest.hexdigest()[:16]}.json"
    if not kept.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        flags = ["-std=c++17", "-O3", "-Werror=all-warnings", "-Xptxas=-v", f"-I{CSRC}"]
        flags += [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets(source)]
        with tempfile.TemporaryDirectory(dir=CACHE) as folder:
            command = [compiler, *flags, "--keep", "--keep-dir", folder, "-c", source, "-o", f"{folder}/made.o"]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            assemblies = [path.read_text() for path in Path(folder).glob("*.ptx")]
            (ptx,) = [assembly for assembly in assemblies if ".target sm_90" in assembly]
            unfinished = Path(folder, "unfinished")
            unfinished.write_text(json.dumps([done.stderr, ptx]))
            unfinished.rename(kept)
    report, ptx = json.loads(kept.read_text())
    return report, ptx


def usage(source: Path) -> list[Usage]:
    """Registers and spilled bytes of every kernel of a file and target, the functions that it calls counted in."""
    kernels: list[Usage] = []
    for line in compiled(source)[0].splitlines():
        if found := re.search(r"Compiling entry function '(\S+)' for 'sm_(\w+)'", line):
            kernels.append(Usage(readable(found.group(1)), found.group(2), 0, 0))
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = kernels[-1].spill_bytes + int(found.group(1)) + int(found.group(2))
            kernels[-1] = kernels[-1]._replace(spill_bytes=spilled)
        elif found := re.search(r"Used (\d+) registers", line):
            kernels[-1] = kernels[-1]._replace(registers=int(found.group(1)))
    return kernels


def readable(mangled: str) -> str:
    """A kernel's name and template arguments, such as "construct_kernel BFloat 64 8"."""
    name = re.search(r"\d((?:construct|construct_held|assemble|backward)_kernel)", mangled)
    assert name is not None, mangled
    element = re.search(r"kernelI(?:NS_4arch\d(\w+?)E|(f))", mangled)
    kind = [(element.group(1) or "float")] if element else []
    drops = ["drops"] if "Lb1E" in mangled else []
    return " ".join([name.group(1), *kind, *re.findall(r"Li(\d+)E", mangled), *drops])


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_without_spills_where_it_is_tuned(source, record_property):
    """Every file compiles without a warning; the forward keeps its registers on sm_90, and fits twice on an SM."""
    kernels = usage(source)
    for kernel in kernels:
        usages = (f"CUDA, {kernel.kernel}", f"sm_{kernel.target}", kernel.registers, kernel.spill_bytes)
        record_property("usage", usages)
        if kernel.target == "90":
            assert kernel.spill_bytes == 0, f"{kernel.kernel} spills {kernel.spill_bytes} bytes"
        if kernel.kernel.startswith("construct"):
            assert kernel.registers <= 128, f"{kernel.kernel} does not fit twice: {kernel.registers} registers"
    assert source.stem == "construct" or {kernel.target for kernel in kernels} == set(targets(source))


# Of a PTX instruction, what it means for the barriers between blocks; the first that fits.
EVENTS = {
    "maximum": r"(atom|red)\.\S*max\.u64",
    "ask": r"atom\.(?!shared)\S*add\.u32",
    "count": r"red\.(?!shared)\S*add\.u32",
    "fence": r"fence\.acq_rel\.gpu",
    "pass": r"fence\.acq_rel\.cluster",
    "poll": r"ld\.acquire\.gpu\.global\.u32",
    "barrier": r"(bar|barrier)\S*\.sync|barrier\.cluster\.wait",
    "key": r"ld\.(global\.cg|relaxed\.gpu\.global)\.u64",
}


def barrier_faults(ptx: str) -> list[str]:
    """What the kernels of a PTX file lack of the barriers between blocks, in the order of its lines.

    Whoever says that something is done stands behind a barrier of the block and a fence for the whole GPU; who asks
    whether it was the last, before another. What the last finds out is published by one more. A wait polls by loads
    that acquire and meets at a barrier before a key is read, which passes by the first-level cache. What a cluster's
    blocks show each other is fenced by one thread behind a barrier of its block.
    """
    faults = []
    for kernel, order in events(ptx, EVENTS):
        held, drops, alone = "held" in kernel, "drops" in kernel, kernel.split()[3] == "1"
        wanted = {
            r"maximum barrier (?:(?:barrier|pass|ask) )*fence (?:count|ask)": 1,  # maxima, then that they are out
            r"barrier fence (?=count)": 1 if drops else 2,
            r"barrier fence (?=ask fence barrier)": 3 if held else 2,
            r"fence ask fence barrier (?:barrier )?fence count": 1,
            r"poll (?:poll )*barrier (?:(?:barrier|ask) )*key": 1,
            r"barrier (?=pass barrier)": 0 if alone else 3,  # the first ticket, the sums, a further block of texts
            r"pass": 0 if alone else 3,
        }
        counts = {pattern: len(re.findall(pattern, order)) for pattern in wanted}
        if counts != wanted:
            faults.append(f"{kernel}: {counts}, expected {wanted}")
    return faults


def events(ptx: str, patterns: dict[str, str]) -> list[tuple[str, str]]:
    """The kernels of a PTX file, and what of `patterns` each has, in the order of its lines."""
    kernels = []
    for entry in re.split(r"^(?:\.visible )?\.(?=entry|func)", ptx, flags=re.MULTILINE)[1:]:
        if not entry.startswith("entry"):
            continue
        lines = (re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in entry.splitlines())
        found = (next((name for name, pattern in patterns.items() if re.match(pattern, line)), "") for line in lines)
        kernels.append((readable(entry.split("(")[0]), " ".join(filter(None, found))))
    return kernels


def ptx_of(name: str) -> str:
    return compiled(CSRC / "instantiations" / f"{name}.cu")[1]


@needs_nvcc
@pytest.mark.parametrize("name", ["construct_bfloat", "construct_held_half", "construct_drop_bfloat"])
def test_the_barrier_is_in_the_code(name):
    """Fences where something is said to be done, acquiring loads where it is awaited; and the check sees them go."""
    ptx = ptx_of(name)
    assert barrier_faults(ptx) == []
    for planted in ("fence.acq_rel.gpu", "fence.acq_rel.cluster", "ld.acquire.gpu", "ld.relaxed.gpu.global.u64"):
        assert barrier_faults(ptx.replace(planted, "nothing")), planted


# The same for bulk copies, which do not see shared memory as other instructions do.
ASYNCHRONOUS = {
    "barrier": r"bar\.sync|barrier\.cluster\.wait",
    "started": r"mbarrier\.init",
    "shown": r"fence\.mbarrier_init\.release\.cluster",
    "ordered": r"fence\.proxy\.async\.shared::cta",
    "expected": r"mbarrier\.arrive\.expect_tx",
    "load": r"cp\.async\.bulk\.shared::cluster\.global",
    "awaited": r"mbarrier\.try_wait\.parity",
    "store": r"cp\.async\.bulk\.global\.shared::cta",
    "drained": r"cp\.async\.bulk\.wait_group\.read 0",
}


def asynchronous_faults(ptx: str) -> list[str]:
    """What the kernels of a PTX file lack of the order that asynchronous work needs."""
    wanted = [
        r"started (?:started )*shown barrier",
        r"drained ordered barrier expected load",  # behind whatever stored and used the rows that were held
        r"load.* drained$",
        r"awaited barrier",
        r"store store",
    ]
    return [
        f"{kernel} lacks {pattern}: {order}"
        for kernel, order in events(ptx, ASYNCHRONOUS)
        for pattern in wanted
        if len(re.findall(pattern, order)) != 1
    ]


@needs_nvcc
def test_asynchronous_work_is_ordered_in_the_code():
    """Bulk copies come behind fences, barriers and waits; and the check would see them go."""
    ptx = ptx_of("construct_held_half")
    assert asynchronous_faults(ptx) == []
    for step in ("fence.mbarrier_init", "fence.proxy.async", "mbarrier.try_wait", "cp.async.bulk.wait_group.read"):
        assert asynchronous_faults(ptx.replace(step, "nothing")), step


@needs_nvcc
def test_every_wait_ends_in_a_build_with_stamps(tmp_path):
    """Whoever waits for other blocks, or for rows on their way, looks at the clock and can end the launch."""
    made, source = tmp_path / "stamps.ptx", CSRC / "instantiations" / "construct_held_float.cu"
    flags = ["-std=c++17", "-Werror=all-warnings", f"-I{CSRC}", "-DATTANCHOR_STAMPS", "-arch=compute_90", "-ptx"]
    subprocess.run([nvcc(), *flags, source, "-o", made], check=True)
    steps = {"look": r"mbarrier\.try_wait|ld\.acquire\.gpu", "clock": r"mov.*%globaltimer", "fail": "__assertfail,"}
    ((_, order),) = events(made.read_text(), steps)
    assert len(re.findall("clock look clock fail look", order)) == 2


def test_bindings_compile_on_the_stable_abi(tmp_path):
    """The registration needs neither CUDA's headers nor anything of PyTorch outside its stable ABI of 2.10."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if compiler is None:
        pytest.skip("left out: there is no C++ compiler")
    includes = [Path(torch.__file__).parent / "include", sysconfig.get_paths()["include"]]
    flags = ["-std=c++17", "-fPIC", "-Wall", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-DPy_LIMITED_API=0x030a0000"]
    made = tmp_path / "bindings.o"
    command = [compiler, *flags, *(f"-I{path}" for path in includes), "-c", str(CSRC / "bindings.cpp"), "-o", str(made)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if shutil.which("nm") is None:
        return
    symbols = subprocess.run(["nm", "-uC", made], capture_output=True, text=True, check=True).stdout
    assert "aoti_torch_create_device_guard" in symbols
    assert not re.findall(r" (at|c10|torch)::\S+", symbols), symbols


@pytest.mark.parametrize(
    ("wish", "says"),
    [
        ("0", "the CUDA extension is left out: ATTANCHOR_BUILD_CUDA=0"),
        ("1", "ATTANCHOR_BUILD_CUDA=1, but PyTorch"),
        ("maybe", "ATTANCHOR_BUILD_CUDA is 'maybe'; it should be 0, 1 or unset"),
        ("", "the CUDA extension is left out: PyTorch"),
    ],
)
def test_build_says_what_it_does(wish, says):
    """Left out by wish or by need, it says why; forced and impossible, it fails."""
    if torch.version.cuda is not None and wish != "0":
        pytest.skip("PyTorch is a CUDA build: here the extension can be built")
    environment = {**os.environ, "ATTANCHOR_BUILD_CUDA": wish}
    command = [sys.executable, "setup.py", "--version"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert says in done.stderr
    assert (done.returncode == 0) == (wish in ("", "0"))


@pytest.mark.parametrize("shape", ["toolkit", "script", "link", "script that says nothing"])
def test_the_toolkit_behind_a_wrapper_is_found(tmp_path, monkeypatch, shape):
    """PyTorch takes the folder above nvcc's for the toolkit; where that holds no headers, nvcc itself is asked."""
    toolkit = tmp_path / "cuda"
    for path in ("bin/nvcc", "include/cuda_runtime.h"):
        (toolkit / path).parent.mkdir(parents=True)
        (toolkit / path).write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    (toolkit / "bin/nvcc").chmod(0o755)
    wrapper = tmp_path / "local/bin/nvcc"
    wrapper.parent.mkdir(parents=True)
    if shape == "link":
        wrapper.symlink_to(toolkit / "bin/nvcc")
    else:
        wrapper.write_text("#!/bin/sh\n" + f'exec {toolkit}/bin/nvcc "$@"\n' * (shape == "script"))
        wrapper.chmod(0o755)
    monkeypatch.setenv("ATTANCHOR_BUILD_CUDA", "0")
    monkeypatch.setenv("PATH", str(toolkit / "bin" if shape == "toolkit" else wrapper.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.chdir(ROOT)
    hidden_toolkit = runpy.run_path("setup.py")["hidden_toolkit"]
    assert hidden_toolkit() == (str(toolkit) if shape in ("script", "link") else None)
    monkeypatch.setenv("CUDA_HOME", "/elsewhere")
    assert hidden_toolkit() is None


def main() -> None:
    for source in SOURCES:
        for kernel in usage(source):
            print(f"| {kernel.kernel} | sm_{kernel.target} | {kernel.registers} | {kernel.spill_bytes} |")


if __name__ == "__main__":
    main()
