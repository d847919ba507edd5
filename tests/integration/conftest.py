"""Tiny models are fastest on one thread, by far so where other work shares the cores."""

from __future__ import annotations

import pytest
import torch

from attanchor_lab import sample
from attanchor_vlm.training.config import PRESETS


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


@pytest.fixture(scope="module")
def short_examples():
    """What `attanchor sample` writes is of fewer scenes, and its model is trained in smaller batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "TRAIN_SCENES", 20)
        patch.setattr(sample, "TEST_SCENES", 5)
        patch.setitem(PRESETS["small-llava"], "batch_size", 4)
        yield
