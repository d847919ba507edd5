"""The scripts in integration/examples run as their first lines say."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import load_settings

EXAMPLES = Path(__file__).parents[2] / "integration" / "examples"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    scenes.write_dataset(folder, "train", 4, seed=0)
    return folder


def script(name, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_ask(data):
    image = sorted((data / "images").iterdir())[0]
    said = script("ask.py", small_llava.SHIPPED, image, "Where is the red ring?", "0.1")
    assert re.search(r"^[1-6] of 6 tokens were inserted$", said, re.MULTILINE)


def test_train_own_loop(data, tmp_path, monkeypatch, capsys):
    """In this process: that a script runs in one of its own, with what is installed, is shown above."""
    arguments = [small_llava.SHIPPED, data / "train.json", data / "images", tmp_path / "out", 3]
    monkeypatch.setattr(sys, "argv", list(map(str, ["train_own_loop.py", *arguments])))
    runpy.run_path(str(EXAMPLES / "train_own_loop.py"))
    said = capsys.readouterr().out
    assert len(re.findall(r"^step \d: loss \d+\.\d{4}, inserted \d+\.\d%$", said, re.MULTILINE)) == 3
    assert load_settings(tmp_path / "out").tau == 0.12
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_every_example_is_tested():
    tested = set(re.findall(r'(?:script\(|EXAMPLES / )"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert tested == {path.name for path in EXAMPLES.glob("*.py")}
