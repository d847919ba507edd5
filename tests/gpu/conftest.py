"""Every test here runs once for each kernel backend that this machine has."""

import os

import pytest
import torch
from gpu_checks import DEVICE, graph_safe_warm_up

from attanchor_kernels import backends

# At least Triton: a GPU on which no kernel backend is available is a failure, not an empty test run.
AVAILABLE = [name for name in ("triton", "cuda") if backends.why_not(name, "cuda") is None] or ["triton"]


def pytest_runtest_logreport(report):
    """A failure is printed at once: a later test that hangs must not take its reason along."""
    if report.failed and "PYTEST_XDIST_WORKER" not in os.environ:
        print(f"\n{report.nodeid} failed:\n{report.longreprtext}", flush=True)


@pytest.fixture(params=AVAILABLE)
def backend(request, monkeypatch) -> str:
    """A kernel backend, which the raw operators take as well."""
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, request.param)
    return request.param


@pytest.fixture
def warm(backend):
    """The backend with its memory for captured launches allocated."""
    graph_safe_warm_up()
    return backend


@pytest.fixture(autouse=True)
def quiet_device():
    """An error of an earlier launch shows in the test that made it."""
    yield
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
