from __future__ import annotations

import pytest
from alignment_toy import make_clip


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return make_clip(tmp_path_factory.mktemp("clip"))
