"""The demonstration on photographs with stand-ins for stamps and pretrained parts: what it leaves and what it says."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import small_vlm_toy
import torch
from PIL import Image
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
        scenes=8, test_scenes=4, concepts=None, held_out=0.34, reading_steps=3, question_steps=1, questions=1,
    )  # fmt: skip
    said: list[str] = []
    stamps = write_stamps(tmp_path / "stamps")
    results = demo.run(tmp_path / "out", size, say=said.append, progress=False, folder=stamps)
    assert json.loads((tmp_path / "out" / "results.json").read_text()) == results
    assert (tmp_path / "out" / "anchors.png").stat().st_size > 10_000
    plain, anchors, shorter = (results["arms"][name] for name in (demo.PLAIN, demo.ANCHORS, demo.SHORTER))
    assert anchors["tokens"] > plain["tokens"] > shorter["tokens"]
    assert plain["inserted_share"] == 0 < anchors["inserted_share"]
    assert set(plain["accuracy"]) >= {"existence", "place", "what", "mean"}
    assert results["held_out"]
    world = json.loads((tmp_path / "out" / "data" / "world.json").read_text())["concepts"]
    assert "fox" not in world["seen"] + world["held_out"]  # the image encoder's classes do not name it
    assert list(results["named"]) == ["before", "after 4 scenes", "after 8 scenes", "after 12 scenes", "held out"]
    assert all(0 <= value <= 1 for share in results["named"].values() for value in share.values())
    lines = [line for line in said if line.startswith("|")]
    assert [line.split("|")[1].strip() for line in lines[2:]] == list(results["arms"])


def test_things_are_named_where_they_are_and_captions_of_another_scene_are_counted_apart(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    rows = []
    for number, names in enumerate((("owl", "lion"), ("owl", "fox"))):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{number}.jpg")
        things = [{"name": name, "place": place} for name, place in zip(names, ("top left", "top right"), strict=True)]
        rows += 2 * [{"image": f"{number}.jpg", "things": things}]  # two questions about it
    (tmp_path / "test-what-seen.json").write_text(json.dumps(rows))
    said = ["top left: an owl\ntop right: a fox", "top left: a fox\ntop right: an owl"]

    def answers(model, processor, asked, *more, progress):
        wanted = tuple(sample.messages[-1][1] for sample in asked)
        assert wanted == ("top left: an owl\ntop right: a lion", "top left: an owl\ntop right: a fox")
        return SimpleNamespace(predictions=said, references=wanted)

    monkeypatch.setattr(demo, "generate_answers", answers)
    lines: list[str] = []
    captions = demo._captions(tmp_path, "test-what-seen")
    found = demo._named(None, None, captions, tmp_path / "images", "now", lines.append)
    assert found == {"named": 1 / 4, "unseen": 2 / 4}
    assert lines == ["   now: 25% named (50% of another scene's). 0.jpg: top left: an owl, top right: a fox"]


def test_what_is_missing_is_said_before_an_earlier_demo_is_removed(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.json").write_text("{}")
    with pytest.raises(SetupError, match=r"apt-get install tuxpaint-stamps-default"):
        demo.run(tmp_path / "out", folder=tmp_path / "none")
    assert (tmp_path / "out" / "results.json").exists()
