"""Counts what the attacks tried, and with `--audit FILE` stores a row for each kind, as `make audit` does."""

from __future__ import annotations

import collections
import os
from pathlib import Path

import pytest
import torch

from attanchor_vlm.provenance import environment
from attanchor_vlm.records import append_row

TRIES = pytest.StashKey[collections.Counter]()
FAILURES = pytest.StashKey[collections.Counter]()


def pytest_addoption(parser):
    parser.addoption("--audit", type=Path, help="append what was tried, and what failed, to this file of rows")


def pytest_configure(config):
    config.stash[TRIES], config.stash[FAILURES] = collections.Counter(), collections.Counter()


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tried(request):
    """A function that counts one try of this test's kind, the first line of its docstring."""
    kind = request.function.__doc__.splitlines()[0].rstrip(".")

    def count(number: int = 1) -> None:
        request.config.stash[TRIES][kind] += number

    return count


@pytest.fixture
def resident():
    """A function that says how many bytes of memory this process has."""
    return lambda: int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.failed and item.function.__doc__:
        item.config.stash[FAILURES][item.function.__doc__.splitlines()[0].rstrip(".")] += 1


def pytest_sessionfinish(session):
    file = session.config.getoption("--audit", None)
    if file is None:
        return
    for kind, tries in session.config.stash[TRIES].items():
        row = {"run": "audit", "kind": kind, "tried": tries, "failed": session.config.stash[FAILURES][kind]}
        append_row(file, row | environment("cpu", file.parent.name))
