"""Tiny models are fastest on one thread, by far so where other work shares the cores."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
import typer

from attanchor_lab import sample
from attanchor_vlm.training.config import PRESETS


def pytest_configure(config):
    config.addinivalue_line("markers", "nightly: long, and run only where `-m nightly` asks for it")


def pytest_collection_modifyitems(config, items):
    if "nightly" not in config.option.markexpr:
        items[:] = [item for item in items if item.get_closest_marker("nightly") is None]


@pytest.fixture(scope="session", autouse=True)
def same_every_time():
    """The command line is put together once, and transformers writes no config out for a log that is off."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        patch.setattr(transformers.PreTrainedConfig, "__repr__", object.__repr__)
        yield


@pytest.fixture(scope="module", autouse=True)  # of the module, so that its own fixtures run on one thread too
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def hub_out_of_reach(monkeypatch):
    """Though nobody says HF_HUB_OFFLINE, no connection comes about: no route."""

    def refuse(*args, **kwargs):
        raise OSError("no route")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("socket.create_connection", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)


@pytest.fixture(scope="module")
def short_examples():
    """What `attanchor sample` writes is of fewer scenes, and its model is trained in smaller batches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample, "TRAIN_SCENES", 8)
        patch.setattr(sample, "TEST_SCENES", 2)
        patch.setitem(PRESETS["small-llava"], "batch_size", 4)
        yield
