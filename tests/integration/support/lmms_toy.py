"""The yes-or-no questions of rendered scenes."""

from __future__ import annotations

import json


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
