"""Without a GPU, Triton's kernels run in its interpreter: it must be chosen before anything imports triton."""

import gc
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # workers share the cores; set before torch is imported

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

from attanchor_kernels.testing.interpreter import hasten  # noqa: E402

# No test may fail for a slow machine: no deadline, and drawing examples may take its time. The fixture that poisons
# memory is the same for all examples of a test.
PATIENT = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True, suppress_health_check=PATIENT)
settings.load_profile("repository")

HERE = Path(__file__).parent
sys.path.append(str(HERE / "emulator"))
GPU_ALONE = (HERE / "gpu", HERE / "integration" / "model" / "families" / "test_flash_attention.py")
# Files that take longest are begun first, or the last of them is left to one worker while the others are idle.
LONGEST = (
    *("test_cuda_emulated", "test_triton_compile", "test_cuda_build", "test_cuda_keep", "test_parity"),
    *("test_triton_kernels", "test_docs", "test_processors", "test_experiments", "test_calibration"),
    *("test_alignment_training", "test_resume", "test_train", "test_ops", "test_lab_runs", "test_triton_limits"),
    *("test_check", "test_metrics", "test_table_families", "test_streaming", "test_demo", "test_family_keep"),
    *("test_lmms_benchmarks", "test_triton_keep", "test_families", "test_gpu_runner", "test_benchmarks"),
)


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files of many tests


def pytest_addoption(parser):
    parser.addoption("--newest", action="store_true", help="expect the failures that upstream.txt lists")


def pytest_runtest_setup():
    if "triton" in sys.modules:
        hasten()


def pytest_report_header():
    return None if HAS_GPU else "tests/gpu, test_flash_attention.py: not collected, since there is no GPU"


def pytest_ignore_collect(collection_path, config):
    """Without a GPU, tests that need one are collected only where they are asked for, and then skipped."""
    asked = any("gpu" in argument or "flash" in argument for argument in config.args)
    return True if collection_path in GPU_ALONE and not (HAS_GPU or asked) else None


def upstream() -> dict[str, str]:
    """Tests that newest releases of other packages break, and why: lines of "file.py::test: reason"."""
    lines = [line for line in (HERE / "upstream.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(": ", 1) for line in lines)


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: LONGEST.index(item.path.stem) if item.path.stem in LONGEST else len(LONGEST))
    broken = upstream() if config.getoption("--newest") else {}
    for item in items:
        if "tests/gpu/" in str(item.path) and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))
        name = item.nodeid.rsplit("/", 1)[-1]
        reason = broken.get(name) or broken.get(name.split("[")[0])
        if reason:
            item.add_marker(pytest.mark.xfail(reason=reason))


def pytest_collection_finish():
    gc.freeze()  # modules and tests stay to the end: the garbage collector need not go through them again and again


def pytest_sessionfinish():
    gc.unfreeze()  # or bindings report at exit what was never freed


def pytest_terminal_summary(terminalreporter):
    """What the compilers said of every kernel, which a test that passes would keep to itself."""
    reports = [report for outcome in ("passed", "failed") for report in terminalreporter.stats.get(outcome, [])]
    usages = [value for report in reports for name, value in report.user_properties if name == "usage"]
    if usages:
        terminalreporter.section("registers and spills of the kernels")
    for kernel, target, registers, spilled in usages:
        terminalreporter.write_line(f"{kernel:<40}{target:<8}{registers:>4} registers{spilled:>6} bytes spilled")


@pytest.fixture
def poisoned_empty(monkeypatch):
    """Fill whatever `torch.empty` and its kin hand out with garbage, so that an unwritten output shows."""

    def poison(make):
        def poisoned(*arguments, **options):
            tensor = make(*arguments, **options)
            if tensor.dtype.is_floating_point:
                return tensor.fill_(float("nan"))
            return tensor.fill_(True) if tensor.dtype == torch.bool else tensor.fill_(77)

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_strided", poison(torch.empty_strided))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    for name in ("_empty_strided_cpu", "_empty_strided_cuda"):
        monkeypatch.setattr(torch._C._dynamo.guards, name, poison(getattr(torch._C._dynamo.guards, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
