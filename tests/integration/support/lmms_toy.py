"""A small model with rendered scenes, and their yes-or-no questions."""

from __future__ import annotations

import json
import shutil

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava


def make_world(folder):
    """The folder with the shipped model and 4 scenes of two questions to test on."""
    shutil.copytree(small_llava.SHIPPED, folder / "model")
    scenes.write_dataset(folder, "test", 4, seed=1, each=2)
    return folder


def existence(world):
    """Yes-or-no questions of the scenes: (question, answer, image file)."""
    rows = [row for row in json.loads((world / "test.json").read_text()) if row["kind"] == "existence"]
    return [
        (
            row["conversations"][0]["value"].removeprefix("<image>\n"),
            row["conversations"][1]["value"],
            world / "images" / row["image"],
        )
        for row in rows
    ]
