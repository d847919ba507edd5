"""Without a GPU, Triton's kernels run in its interpreter: it must be chosen before anything imports triton."""

import os

import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

# No test may fail for a slow machine: no deadline, and drawing examples may take its time. The fixture that poisons
# memory is the same for all examples of a test.
PATIENT = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture]
settings.register_profile("repository", deadline=None, derandomize=True, print_blob=True, suppress_health_check=PATIENT)
settings.load_profile("repository")


def pytest_collection_modifyitems(items):
    for item in items:
        if "tests/gpu/" in str(item.path) and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


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
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))
    monkeypatch.setattr(torch.Tensor, "new_empty", poison(torch.Tensor.new_empty))
