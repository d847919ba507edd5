"""The demonstration on photographs with stand-ins for stamps and pretrained parts: what it leaves and what it says."""

from __future__ import annotations

import json

import pytest
import small_vlm_toy
import torch
from stamps_toy import CONCEPTS, write_stamps

from attanchor_lab import demo_photographs as demo
from attanchor_lab.small_vlm import parts
from attanchor_vlm.errors import SetupError

pytest.importorskip("skimage")


def test_the_demonstration_leaves_its_figures_and_a_picture(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "check_installed", lambda: None)
    monkeypatch.setattr(parts, "read", lambda side: small_vlm_toy.parts())
    names = " ".join(name for names in CONCEPTS.values() for name in names if name != "fox")
    monkeypatch.setattr(parts, "class_names", lambda: [f"{names} {word}" for word in ("cup", "owl", "jug")])
    monkeypatch.setattr(parts, "read_tower", lambda side: (small_vlm_toy.tower(), (torch.zeros(3, 8), torch.zeros(3))))
    size = demo.Size(
        scenes=8, test_scenes=4, concepts=None, reading_steps=1, question_steps=1, names=2, questions=1,
        held_out=0.34,
    )  # fmt: skip
    said: list[str] = []
    stamps = write_stamps(tmp_path / "stamps")
    results = demo.run(tmp_path / "out", size, say=said.append, progress=False, folder=stamps)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (tmp_path / "out" / "anchors.png").stat().st_size > 10_000
    plain, anchors, shorter = (results["arms"][name] for name in (demo.PLAIN, demo.ANCHORS, demo.SHORTER))
    assert anchors["tokens"] > plain["tokens"] > shorter["tokens"]
    assert plain["inserted_share"] == 0 < anchors["inserted_share"]
    assert set(plain["accuracy"]) >= {"existence", "count", "what", "mean"}
    assert results["held_out"]
    world = json.loads((tmp_path / "out" / "data" / "world.json").read_text())["concepts"]
    assert "fox" not in world["seen"] + world["held_out"]  # the image encoder's classes do not name it
    assert all(0 <= value <= 1 for sight in results["sight"].values() for value in sight.values())
    lines = [line for line in said if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(results["arms"])


def test_what_is_missing_is_said_before_an_earlier_demo_is_removed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(SetupError, match=r"apt-get install tuxpaint-stamps-default"):
        demo.run(tmp_path / "out", folder=tmp_path / "none")
    assert (tmp_path / "out" / "results.json").exists()
