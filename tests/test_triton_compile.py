"""Every Triton kernel to machine code for every target, on a machine without a GPU; registers and spills.

Run as a script it prints a line per kernel: `python tests/test_triton_compile.py [sm_80 sm_90 sm_100 gfx942]`. In a
process where TRITON_INTERPRET is set `triton.jit` makes no compilable functions, so the tests run this script in a
process of its own.
"""

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BACKENDS = ROOT / "attanchor_kernels" / "backends"
TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
MULTIPROCESSORS = 132
# name -> (dtype, B, D, options of the problem); M = 576, N = 50. Few rows are copied in smaller tiles than many.
CONSTRUCT = {
    "build": ("bf16", 32, 4096, {}),
    "build, few rows": ("bf16", 1, 4096, {}),
    "build, plan alone": ("fp16", 32, 4096, {"copy": False}),
    "build, masks, image into text": ("fp16", 8, 2048, {"masks": True, "image_into_text": True}),
    "build, D = 4098": ("bf16", 32, 4098, {"budgeted": False}),
    "build, D = 512, debug": ("bf16", 64, 512, {"debug": True}),
    "build, float32": ("fp32", 8, 4096, {"masks": True, "inherit": True}),
    "merge": ("bf16", 32, 4096, {"merges": True, "turn": True, "inherit": True}),
    "merge, few rows, left": ("bf16", 1, 4096, {"merges": True, "pad_left": True}),
    "build, few rows, keep": ("bf16", 1, 4096, {"keep": True, "cells": True, "salience": True}),
    "merge, keep each": ("bf16", 32, 4096, {"merges": True, "turn": True, "keep_each": True, "cells": True}),
    "merge, float32, keep": ("fp32", 1, 4098, {"merges": True, "image_into_text": True, "keep": True}),
    "match": ("bf16", 32, 4096, {"match": True}),
}
COPIES = {"assemble": "bf16", "assemble, float32": "fp32", "transpose": "bf16", "transpose, float32": "fp32"}
# Targets other than sm_90 differ in the backend alone; a selection of the cases keeps this file short.
EVERYWHERE = ["build, float32", "merge, keep each", "transpose"]


def cases(target: str) -> list[str]:
    return [*CONSTRUCT, *COPIES] if target == "sm_90" else EVERYWHERE


# --- In the process without TRITON_INTERPRET. ------------------------------------------------------------------------


def _source(kernel, pointers: dict, config):
    """`kernel` with aligned pointers (None where there is none), one constexpr and int32 for everything else."""
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for position, name in enumerate(kernel.arg_names):
        value = pointers.get(name, "constexpr" if name == "config" else "i32")
        if name == "config":
            constants[(position,)] = config
        elif value is None:
            constants[(position,)] = None
            value = "constexpr"
        elif name in pointers and isinstance(value, tuple):
            for field, pointer in enumerate(value):
                if pointer is None:
                    constants[(position, field)] = None
                else:
                    attributes[(position, field)] = [["tt.divisibility", 16]]
            value = type(value)(*(pointer or "constexpr" for pointer in value))
        elif value.startswith("*"):
            attributes[(position,)] = [["tt.divisibility", 16]]
        signature[name] = value
    return ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)


def _construct(target: str, dtype: str, batch: int, hidden: int, problem: dict):
    """Source and compiler options of a construct launch, configured as the launcher would on a GPU of 132 units."""
    import torch

    from attanchor_kernels.backends.triton import kernels, launch, schedule
    from attanchor_kernels.backends.triton.types import Config, Inputs, Outputs, State

    schedule.multiprocessors = lambda device: MULTIPROCESSORS
    get = problem.get
    itemsize = 4 if dtype == "fp32" else 2
    aligned = 16 // itemsize if hidden * itemsize % 16 == 0 else 4 // itemsize
    drops = get("keep", False) or get("keep_each", False)
    chosen = schedule.construct(torch.device("cpu"), itemsize, batch, 576, 626, hidden, aligned)
    row, mask = f"*{dtype}", "*u1" if get("masks") else None
    outputs = Outputs(
        embeds=row if get("copy", True) else None,
        **dict.fromkeys(("position_ids", "attention_mask", "source", "host"), "*i64"),
        is_anchor="*u1",
        score="*fp32",
        relevance="*fp32" if drops else None,
        places="*i32",
    )
    if get("match"):
        outputs = Outputs(*[None] * len(outputs))._replace(host=outputs.host, score=outputs.score)
    pointers = {
        "image": row,
        "text": row,
        "inputs": Inputs(
            roles="*u8" if get("merges") else None,
            turn="*i32" if get("turn") else None,
            image_mask=mask,
            text_mask=mask,
            anchor_mask=mask,
            position_ids="*i64" if get("inherit") else None,
            tau=None,
            keep_each="*i32" if get("keep_each") else None,
            salience="*fp32" if get("salience") else None,
            cells="*i32" if get("cells") else None,
        ),
        "outputs": outputs,
        "state": State(
            keys="*u64",
            cuts="*u64",
            counters="*i32",
            relevance="*u32" if drops and not get("image_into_text") else None,
            scratch="*fp32" if chosen.split else None,
            ranks="*u64" if drops else None,
            survivors="*i32" if drops else None,
        ),
        "keep": "i32" if get("keep") else None,
        **dict.fromkeys(("slices", "slice_blocks", "ring"), "i32" if chosen.split else None),
        "tau": "fp32",
    }
    config = Config(
        hidden=hidden,
        alignment=aligned,
        merges=get("merges", False),
        image_into_text=get("image_into_text", False),
        budgeted=get("budgeted", not get("match")),
        drops=drops,
        inherit=get("inherit", False),
        pad_left=get("pad_left", False),
        interpreted=False,
        amd="gfx9" if target == "gfx942" else "",
        **{name: value for name, value in chosen._asdict().items() if name in Config._fields}
        | ({"slices": 0, "slice_blocks": 0} if chosen.split else {}),
    )
    compilation = launch.compilation(chosen.num_warps, chosen.num_stages, chosen.registers)
    compilation["debug"] = get("debug", False)
    return _source(kernels.construct_kernel, pointers, config), compilation


def _copy(name: str, dtype: str):
    from attanchor_kernels.backends.triton import kernels, launch, schedule
    from attanchor_kernels.backends.triton.types import CopyConfig

    itemsize = 4 if dtype == "fp32" else 2
    tiles = (schedule.copying if name.startswith("assemble") else schedule.adding)(itemsize, 4096)
    names = ["image", "text", "embeds"] if name.startswith("assemble") else ["grad", "image_grad", "text_grad"]
    pointers = {**dict.fromkeys(names, f"*{dtype}"), "source": "*i64", "places": "*i32"}
    kernel = kernels.assemble_kernel if name.startswith("assemble") else kernels.transpose_kernel
    pointers = {key: value for key, value in pointers.items() if key in kernel.arg_names}
    config = CopyConfig(4096, 16 // itemsize, True, False, tiles.block_rows, tiles.block_columns)
    return _source(kernel, pointers, config), launch.compilation(tiles.num_warps)


# Of an instruction, what it means for the barrier; the first that fits. Others mean nothing.
PTX_EVENTS = {
    "maximum": r"(atom|red)\.\S*\bmax\b",
    "ticket": r"atom\.\S*relaxed\S*\badd\b",
    "arrival": r"atom\.(?=\S*acq_rel)(?=\S*\bgpu\b)\S*\badd\b",
    "release": r"(atom|red)\.(?=\S*release)(?=\S*\bgpu\b)\S*\badd\b",
    "poll": r"ld\.volatile\.global",
    "acquire": r"(ld|atom)\.(?=\S*acquire)(?=\S*\bgpu\b)",
    "barrier": r"(bar|barrier)\S*\.sync",
    "access": r"(ld|st|cp\.async)\S*\.global|atom|red\.",
}
AMD_EVENTS = {
    "release": r"buffer_wbl2 sc1",
    "acquire": r"buffer_inv sc1",
    "drained": r"s_waitcnt vmcnt\(0\)",
    "arrival": r"global_atomic_add ",
    "barrier": r"s_barrier",
    "access": r"(global|buffer|flat)_(load|store|atomic)",
}


def _events(assembly: str, known: dict[str, str]) -> list[str]:
    lines = (re.sub(r"^@!?%p\d+\s+", "", line.strip()) for line in assembly.splitlines())
    found = (next((name for name, pattern in known.items() if re.match(pattern, line)), None) for line in lines)
    return [event for event in found if event is not None]


def barrier_faults(assembly: str, target: str, arrivals: int, waits: int, releases: int) -> list[str]:
    """What machine code lacks of the barrier in the order of its lines.

    An arrival is an acquire-release add for the whole GPU behind a barrier of the program (AMD: before which every
    wavefront has drained). A wait polls, acquires for the whole GPU, and meets at a barrier before anything is read.
    The cut of a sample and the base of a later one are released.
    """
    amd = target == "gfx942"
    events = _events(assembly, AMD_EVENTS if amd else PTX_EVENTS)
    order, faults = " ".join(events), []
    arrival = (
        r"drained (?:barrier )+(?:drained )?release drained arrival drained acquire" if amd else r"barrier arrival"
    )
    # (AMD: the meeting may stand at the head of the loop, above.)
    waiting = r"barrier access drained acquire" if amd else r"poll (?:barrier )?acquire barrier"
    for name, pattern, least in (("arrivals", arrival, arrivals), ("waits", waiting, waits)):
        if (count := len(re.findall(pattern, order))) != least:
            faults.append(f"{count} {name} of {least}")
    if not amd and (count := events.count("release")) != releases:
        faults.append(f"{count} releases of {releases}")
    return faults


# Changes that weaken the barrier; the last is one to a wait.
PLANTED = {
    "ptx": [("acq_rel", "relaxed"), ("acq_rel", "release"), (".gpu.", ".cta."), ("acquire", "relaxed")],
    "ptx, releases": [(".release.", ".relaxed.")],
    "amdgcn": [
        ("buffer_wbl2", "s_nop"),
        ("ASMSTART\n\ts_waitcnt", "ASMSTART\n\ts_nop"),
        ("sc0\n\ts_waitcnt", "sc0\n\ts_nop"),
        ("buffer_inv", "s_nop"),
    ],
}


def _barrier(assembly: str, target: str, source) -> dict:
    """Faults of a construct kernel's barrier, and whether each of some planted ones would be found."""
    from attanchor_kernels.backends.triton.types import Config

    (config,) = [value for value in source.constants.values() if isinstance(value, Config)]
    split = config.split
    plans = source.signature["outputs"].source != "constexpr"
    merges = source.signature["inputs"].roles != "constexpr"
    drops = source.signature["outputs"].relevance != "constexpr"
    wanted = {"arrivals": 1 + plans + 2 * split + drops, "waits": int(plans) + split + merges}
    wanted["releases"] = merges + (plans and config.budgeted and not drops)
    changes = PLANTED["amdgcn" if target == "gfx942" else "ptx"][: 3 + plans]
    changes += PLANTED["ptx, releases"] if wanted["releases"] and target != "gfx942" else []
    planted = [bool(barrier_faults(assembly.replace(*change), target, **wanted)) for change in changes]
    return {"barrier": barrier_faults(assembly, target, **wanted), "planted": planted}


def _compile(work: tuple[str, str]) -> dict:
    """Compile one case for one target: the size of its machine code and, from NVIDIA, its resources."""
    import triton
    from triton.backends.compiler import GPUTarget

    target, case = work
    source, options = _construct(target, *CONSTRUCT[case]) if case in CONSTRUCT else _copy(case, COPIES[case])
    if target == "gfx942":
        options.pop("maxnreg", None)
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    row = {"target": target, "case": case, "shared": compiled.metadata.shared}
    if case in CONSTRUCT:
        row |= _barrier(compiled.asm["amdgcn" if target == "gfx942" else "ptx"], target, source)
    if target == "gfx942":
        assembly = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly)[1])
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", assembly)[1])
        return {**row, "bytes": len(compiled.asm["hsaco"]), "registers": registers, "spills": spills}
    # Loads and stores of one 16-bit element, as rows are copied when the compiler has lost sight of their alignment.
    row["narrow"] = len(re.findall(r"\b(?:ld|st)\.global(?!\S*\.v\d)\S*\.b16\b", compiled.asm["ptx"]))
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, code = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    # The tensor cores' instructions stand in the loop over columns, from its first line to its last.
    loop = code[(code.find("MMA.") if "MMA." in code else len(code)) : code.rfind("MMA.")]
    row["asserts"] = "__assertfail" in compiled.asm["ptx"]
    row["spills in the loop"] = len(re.findall(r"\b(?:STL|LDL)", loop))
    # Nothing in these kernels lives in local memory but what was spilled: the stack is the spill.
    return {**row, "bytes": len(compiled.asm["cubin"]), "registers": registers, "spills": stack}


def _main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", default=list(TARGETS))
    parser.add_argument("--cases", help="only these, with semicolons between")
    options = parser.parse_args(arguments)
    chosen = options.cases.split(";") if options.cases else None
    work = [(target, case) for target in options.targets for case in chosen or cases(target)]
    with ProcessPoolExecutor(max_workers=min(2, os.cpu_count() or 1)) as pool:
        for row in pool.map(_compile, work):
            print(json.dumps(row), flush=True)


def _launchers() -> None:
    """Run the launchers with a driver that compiles and does not launch; print how often each kernel was compiled.

    This binds and specialises the arguments as on a GPU, which neither the interpreter nor `triton.compile` does.
    """
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver

    from attanchor_kernels.backends.triton import kernels, launch
    from attanchor_kernels.problem import Problem

    class Driver:
        def get_current_target(self):
            return GPUTarget(*TARGETS["sm_90"])

        def get_current_device(self):
            return 0

        def get_current_stream(self, device):
            return 0

    class Compiled:
        def __init__(self, kernel):
            self.kernel, self.made, self.arg_names = kernel, set(), kernel.arg_names

        def __getitem__(self, grid):
            assert grid[0] > 0
            assert grid[1:] == (1, 1)
            return lambda *arguments, **named: self.made.add(self.kernel.warmup(*arguments, grid=grid, **named).hash)

    driver.set_active(Driver())
    launched = {}
    for name in ("construct_kernel", "assemble_kernel", "transpose_kernel"):
        launched[name] = Compiled(getattr(kernels, name))
        setattr(launch, name, launched[name])
    for batch, images, texts in [(2, 16, 17), (2, 33, 20), (1, 64, 32), (3, 65, 25)]:
        image, text = torch.zeros(batch, images, 64).half(), torch.zeros(batch, texts, 64).half()
        launch.match(Problem(image, text, 0.5))
        mask = torch.ones(batch, images + 1).bool()[:, batch % 2 :][:, :images]  # some begin at an odd address
        embeds, plan = launch.construct(Problem(image, text, 0.5, image_mask=mask, max_anchors=3))
        launch.assemble(image, text, plan.source, plan.places)
        launch.assemble_backward(embeds, plan.places, image.shape, text.shape, True, True)
    print(json.dumps({name: len(kernel.made) for name, kernel in launched.items()}))


# --- In pytest. ------------------------------------------------------------------------------------------------------


def _run(cache: Path, *arguments: str) -> list[dict]:
    """This file as a script, with an empty cache and without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory) -> dict[tuple[str, str], dict]:
    """All cases, compiled once for the same sources, compiler and interpreter."""
    sources = [Path(__file__), BACKENDS / "common.py", *sorted((BACKENDS / "triton").glob("*.py"))]
    versions = f"{version('triton')} {version('torch')} {sys.version}".encode()
    digest = hashlib.sha256(versions + b"".join(source.read_bytes() for source in sources))
    stored = ROOT / "build" / "triton" / f"{digest.hexdigest()[:16]}.json"
    if stored.exists():
        rows = json.loads(stored.read_text())
    else:
        rows = _run(tmp_path_factory.mktemp("triton"))
        stored.parent.mkdir(parents=True, exist_ok=True)
        unfinished = stored.with_suffix(f".{os.getpid()}")
        unfinished.write_text(json.dumps(rows))
        unfinished.rename(stored)
    return {(row["target"], row["case"]): row for row in rows}


@pytest.mark.parametrize("target", TARGETS)
def test_every_kernel_compiles(compiled, target, record_property):
    """Machine code for every kernel and configuration."""
    for case in cases(target):
        row = compiled[target, case]
        record_property("usage", (f"Triton, {case}", target, row["registers"], row["spills"]))
        assert row["bytes"] > 1000, case


def test_forward_spills_nothing_on_sm_90(compiled):
    """No register of a forward kernel goes to memory, and the fast path leaves room for two programs."""
    for case in [*CONSTRUCT, "assemble", "assemble, float32"]:
        row = compiled["sm_90", case]
        assert row["asserts"] == ("debug" in case), row
        assert row["spills"] == row["spills in the loop"] == 0, row
    for case in (
        "build",
        "build, few rows",
        "build, few rows, keep",
        "merge",
        "merge, few rows, left",
        "merge, keep each",
    ):
        row = compiled["sm_90", case]
        assert row["registers"] <= 128, row
        assert 2 * row["shared"] <= 227 * 1024, row


def test_the_barrier_is_in_the_machine_code(compiled):
    """Arrivals release and acquire, waits acquire, for the whole GPU: what a compiler could weaken unseen."""
    for (target, case), row in compiled.items():
        if case not in CONSTRUCT:
            continue
        assert row["barrier"] == [], (target, case, row["barrier"])
        assert all(row["planted"]), (target, case, row["planted"])


def test_rows_of_16_bytes_are_moved_16_bytes_at_a_time(compiled):
    """At D = 4096 no element of a row is loaded or stored by itself."""
    for case in ("build", "build, few rows", "merge", "assemble", "transpose"):
        assert compiled["sm_90", case]["narrow"] == 0, compiled["sm_90", case]


def test_launchers_bind_and_compile_once_over_lengths(tmp_path):
    """The launchers' calls fit the kernels, and new B, M and N compile nothing anew."""
    assert _run(tmp_path, "launchers") == [{"construct_kernel": 2, "assemble_kernel": 1, "transpose_kernel": 1}]


if __name__ == "__main__":
    # Where the kernels are, whatever is installed.
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:] == ["launchers"]:
        _launchers()
    else:
        _main(sys.argv[1:])
