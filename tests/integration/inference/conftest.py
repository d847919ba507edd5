"""A sample as `attanchor sample` writes it, and its model with anchors; one for each file."""

from __future__ import annotations

import pytest
from infer_toy import TAU

from attanchor_lab.sample import write_sample
from attanchor_vlm import load


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    folder = tmp_path_factory.mktemp("infer") / "sample"
    write_sample(folder)
    return folder


@pytest.fixture(scope="module")
def loaded(sample):
    return load(str(sample / "model"), tau=TAU)
