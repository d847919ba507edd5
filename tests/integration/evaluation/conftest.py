"""The shipped model with a few scenes to test on, and lmms-eval without the network."""

from __future__ import annotations

import shutil

import pytest

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava


@pytest.fixture
def lmms_eval(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("lmms_eval.evaluator")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(small_llava.SHIPPED, folder / "model")
    scenes.write_dataset(folder, "test", 4, seed=1, each=2)
    return folder
