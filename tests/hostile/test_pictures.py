"""However an image is stored, every family is asked about the same picture; however odd its shape is, its anchors lie
in it."""

from __future__ import annotations

import importlib.util

import checkpoints
import numpy as np
import pytest
from PIL import ExifTags, Image
from strategies import LONGER

from attanchor_vlm import AttAnchorConfig, answer, attach, with_tokens_of
from attanchor_vlm.inference.explain import describe, explain
from attanchor_vlm.inference.picture import anchor_picture

QUESTION = "Is there a cat in the picture?"
GREY = np.random.default_rng(0).integers(0, 256, (36, 52), dtype=np.uint8)
TURNED = Image.Exif()
TURNED[ExifTags.Base.Orientation] = 6

# The same grey picture, and how it is saved.
STORED = {
    "grey.png": (Image.fromarray(GREY), {}),
    "grey with alpha.png": (Image.merge("LA", [Image.fromarray(GREY), Image.new("L", (52, 36), 128)]), {}),
    "alpha.webp": (Image.fromarray(np.stack([*[GREY] * 3, GREY | 1], -1)), {"lossless": True, "exact": True}),
    "palette.png": (Image.fromarray(GREY).convert("P"), {}),
    "palette.gif": (Image.fromarray(GREY).convert("P"), {}),
    "16 bits.png": (Image.fromarray(GREY.astype(np.uint16) * 257), {}),
    "floats.tiff": (Image.fromarray(GREY.astype(np.float32) / 255), {}),
    "floats to 255.tiff": (Image.fromarray(GREY.astype(np.float32)), {}),
    "ink.tiff": (Image.fromarray(GREY).convert("RGB").convert("CMYK"), {}),
    "turned.png": (Image.fromarray(np.rot90(GREY)), {"exif": TURNED}),
}
# Width and height; Qwen's processors take none whose sides are as 200 to 1.
SHAPES = {"a pixel.png": (1, 1), "narrow.png": (3, 500), "wide.png": (599, 4), "large.png": (1200, 900)}
FEW = {"16 bits.png", "palette.gif", "turned.png", "a pixel.png", "narrow.png"}  # in the suite
FAMILIES = [
    name for name in checkpoints.WRITERS if importlib.util.find_spec(checkpoints.NEEDS.get(name, "torch")) is not None
]


def tried_of(files):
    return [(file, how) for file, how in files.items() if LONGER > 1 or file in FEW]


@pytest.mark.parametrize("name", FAMILIES if LONGER > 1 else ["qwen2_5_vl"])
def test_odd_images(tried, name, tmp_path, monkeypatch):
    """Odd images of every family: answer, anchors and picture."""
    model, processor = checkpoints.write(tmp_path, name, monkeypatch)
    attach(model, with_tokens_of(AttAnchorConfig(tau=-1, max_anchors=5), processor))
    Image.fromarray(GREY).convert("RGB").save(tmp_path / "plain.png")
    plain = explain(model, processor, tmp_path / "plain.png", QUESTION, 2)
    anchor_picture(tmp_path / "expected.png", [plain], -1, "")
    for file, (image, options) in tried_of(STORED):
        image.save(tmp_path / file, **options)
        shown = explain(model, processor, tmp_path / file, QUESTION, 2)
        assert shown.matches == plain.matches, file
        assert describe(shown) == describe(plain), file
        if LONGER > 1:
            anchor_picture(tmp_path / "drawn.png", [shown], -1, "")
            assert (tmp_path / "drawn.png").read_bytes() == (tmp_path / "expected.png").read_bytes(), file
        tried()
    for file, size in tried_of(SHAPES):
        checkpoints.picture(0).resize(size).save(tmp_path / file)
        shown = explain(model, processor, tmp_path / file, QUESTION, 2)
        assert shown.answer == answer(model, processor, QUESTION, tmp_path / file, max_new_tokens=2).text
        anchors = [one["pixels"] for one in describe(shown)["anchors"] if one["inserted"]]
        assert len(anchors) == 5
        for x0, y0, x1, y1 in filter(None, anchors):  # none for a token of padding alone
            assert 0 <= x0 <= x1 <= size[0], file
            assert 0 <= y0 <= y1 <= size[1], file
        if LONGER > 1 or size == (1, 1):
            anchor_picture(tmp_path / "drawn.png", [shown], -1, "")
            assert np.asarray(Image.open(tmp_path / "drawn.png").convert("L")).std() > 5, file
        tried()
