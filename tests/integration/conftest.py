"""Tiny models are fastest on one thread, by far so where other work shares the cores."""

from __future__ import annotations

import pytest
import torch


def pytest_configure(config):
    config.addinivalue_line("markers", "nightly: long, and run only where `-m nightly` asks for it")


def pytest_collection_modifyitems(config, items):
    if "nightly" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("nightly") is None]


@pytest.fixture(scope="module", autouse=True)  # of the module, so that its own fixtures run on one thread too
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
