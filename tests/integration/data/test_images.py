"""Image files of odd kinds are read right, or refused at once."""

from __future__ import annotations

import io
import os
import signal

import numpy as np
import pytest
from PIL import Image, UnidentifiedImageError

from attanchor_vlm.data.images import open_no_others, unreadable
from attanchor_vlm.data.rows import load_image
from attanchor_vlm.errors import DataError


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.png")
    signal.alarm(20)  # ends the test if it is waited for
    try:
        with pytest.raises(DataError, match=r"a\.png cannot be read: it is not a file"):
            load_image(tmp_path / "a.png")
        assert list(unreadable([tmp_path / "a.png"], progress=False)) == [tmp_path / "a.png"]
    finally:
        signal.alarm(0)


def test_a_program_that_looks_like_a_picture_starts_nothing(tmp_path, monkeypatch):
    """Pillow hands EPS to Ghostscript, whatever the file is called."""
    (tmp_path / "a.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("subprocess.check_call", lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(DataError, match=r"a\.png is not an image that can be read"):
        load_image(tmp_path / "a.png")


def test_after_open_no_others_nothing_else_is_opened(monkeypatch):
    monkeypatch.setattr(Image, "ID", list(Image.ID))
    postscript, picture = io.BytesIO(), io.BytesIO()
    Image.new("RGB", (8, 8)).save(postscript, "EPS")
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    assert Image.open(postscript).format == "EPS"
    open_no_others()
    with pytest.raises(UnidentifiedImageError):
        Image.open(postscript)
    assert Image.open(picture).format == "PNG"


@pytest.mark.parametrize("top", [1.0, 255.0])
def test_a_picture_of_floats_keeps_its_brightness(tmp_path, top):
    ramp = np.linspace(0, top, 64, dtype=np.float32).reshape(8, 8)
    Image.fromarray(ramp).save(tmp_path / "a.tiff")
    read = np.asarray(load_image(tmp_path / "a.tiff"))[..., 0]
    assert np.abs(read - ramp * (255 / top)).max() <= 1
