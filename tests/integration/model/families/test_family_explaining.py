"""`attanchor generate --explain` on checkpoints of every kind of grid: tiles, several images, none of them a square.

Which boxes the tokens of every family have is tested in test_geometry.py.
"""

from __future__ import annotations

import json

import checkpoints
import numpy as np
import pytest
from checkpoints import picture
from PIL import Image

from attanchor_vlm import cli

QUESTION = "What is to the left of the red dog?"
TILED = {"llava_next", "idefics3"}


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "idefics3"])
def test_anchors_are_drawn_where_their_patches_lie(name, tmp_path, monkeypatch, capsys):
    checkpoints.write(tmp_path / "model", name, monkeypatch)
    sizes = []
    for index in range(2):
        image = picture(index).resize((90 + 40 * index, 60))
        image.save(tmp_path / f"{index}.png")
        sizes.append(image.size)
    arguments = ["generate", "--model", tmp_path / "model", "--tau", -1, "--prompt", QUESTION, "--json"]
    arguments += ["--image", tmp_path / "0.png", "--image", tmp_path / "1.png", "--max-new-tokens", 3]
    arguments += ["--explain", tmp_path / "anchors.png"]
    assert cli.main([str(argument) for argument in arguments]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["picture"] == str(tmp_path / "anchors.png")
    assert said["inserted"] == said["candidates"] == len(said["anchors"]) > 8
    assert "".join(one["text"] for one in said["anchors"]) == QUESTION.replace(" ", "")
    for one in said["anchors"]:
        width, height = sizes[one["image"]]
        x0, y0, x1, y1 = one["pixels"]
        assert 0 <= x0 < x1 <= width
        assert 0 <= y0 < y1 <= height
        assert one["where"].startswith(f"image {one['image'] + 1}, ")
        assert (one["tile"] is not None) <= (name in TILED)
        assert ("tile" in one["where"]) == (one["tile"] is not None)
    drawn = np.asarray(Image.open(tmp_path / "anchors.png").convert("RGB"))
    assert drawn.shape[0] > 500
    assert drawn.std() > 10
