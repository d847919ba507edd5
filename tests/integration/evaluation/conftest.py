"""The shipped model with a few scenes to test on, and lmms-eval without the network."""

from __future__ import annotations

import pytest
from training_toy import write_world


@pytest.fixture
def lmms_eval(tmp_path, monkeypatch):
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    return pytest.importorskip("lmms_eval.evaluator")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory, "shipped", test=(4, 1))
