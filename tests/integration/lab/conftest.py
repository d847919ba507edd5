from __future__ import annotations

import pytest
from training_toy import write_world


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The folder with a small model, 8 scenes to train on and 2 to test on."""
    return write_world(tmp_path_factory, "shipped", train=(8, 0), test=(2, 1))
