from __future__ import annotations

import shutil

import pytest

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder with a small model, 8 scenes to train on and 2 to test on."""
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(small_llava.SHIPPED, folder / "model")
    scenes.write_dataset(folder, "train", 8, seed=0)
    scenes.write_dataset(folder, "test", 2, seed=1)
    return folder
