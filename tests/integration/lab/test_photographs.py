"""The photograph world: its rows are the library's, what is held out never trains, and every answer is true."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stamps_toy import COLOURED, CONCEPTS, write_stamps

from attanchor_lab.photographs import stamps
from attanchor_lab.photographs.config import PhotographConfig
from attanchor_lab.photographs.dataset import SPLITS, read_photographs, write_photographs
from attanchor_lab.photographs.grounding import grounding
from attanchor_lab.photographs.questions import NEGATIVES
from attanchor_lab.photographs.scenes import PLACES
from attanchor_lab.photographs.wordings import KINDS
from attanchor_lab.scenes import dataset
from attanchor_lab.small_llava.model import SHIPPED
from attanchor_vlm.data.rows import read_rows
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.load import load

pytest.importorskip("skimage")
SIDE = 96


def config(folder: Path, **changes) -> PhotographConfig:
    settings = {"scenes": 40, "test_scenes": 24, "held_out": 0.34, "pixels": SIDE, "seed": 3} | changes
    return PhotographConfig(output=folder / "out", stamps=folder / "stamps", **settings)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photographs")
    write_stamps(folder / "stamps")
    write_photographs(config(folder), lambda line: None)
    return folder / "out"


def rows(folder: Path, pattern: str = "*-*.json") -> list[dict]:
    return [row for path in sorted(folder.glob(pattern)) for row in read_photographs(path)]


def said(row: dict) -> tuple[str, str]:
    return row["conversations"][0]["value"].removeprefix("<image>\n"), row["conversations"][1]["value"]


def test_a_file_for_every_kind_and_split_and_the_library_reads_each(written: Path) -> None:
    wanted = {f"test-{kind}-{split}.json" for kind in KINDS for split in SPLITS}
    wanted |= {"train-questions.json", "world.json"}
    assert {path.name for path in written.glob("*.json")} == wanted
    for path in written.glob("t*-*.json"):
        good, bad = read_rows(path, written / "images")
        assert good
        assert not bad


def test_the_seed_makes_the_rows_and_the_pictures(written: Path, tmp_path: Path) -> None:
    write_stamps(tmp_path / "stamps")
    write_photographs(config(tmp_path), lambda line: None)
    again = {path.relative_to(tmp_path / "out"): path.read_bytes() for path in (tmp_path / "out").rglob("*.*")}
    assert again == {path.relative_to(written): path.read_bytes() for path in written.rglob("*.*")}


def test_only_the_kinds_that_are_wanted_are_asked(tmp_path: Path) -> None:
    write_stamps(tmp_path / "stamps")
    paths = write_photographs(config(tmp_path, kinds=("place", "what"), scenes=6, test_scenes=6), lambda line: None)
    tests = {f"test-{kind}-{split}.json" for kind in ("place", "what") for split in SPLITS}
    assert {path.name for path in paths} == {"train-questions.json"} | tests
    assert {row["kind"] for row in rows(tmp_path / "out")} == {"place", "what"}


def test_held_out_concepts_and_wordings_are_in_no_training_row(written: Path) -> None:
    world = json.loads((written / "world.json").read_text())
    held_out, train = set(world["concepts"]["held_out"]), rows(written, "train-*.json")
    assert not held_out & {thing["name"] for row in train for thing in row["things"]}
    assert not held_out & {name for row in train for name in row["asked"]}
    assert {thing["name"] for row in rows(written, "*-concepts.json") for thing in row["things"]} <= held_out
    for kind in KINDS:
        known, new = ([pattern(text) for text in world["wordings"][side][kind]] for side in ("seen", "held_out"))
        for row in (row for row in train if row["kind"] == kind):
            assert any(one.fullmatch(said(row)[0]) for one in known)
            assert not any(one.fullmatch(said(row)[0]) for one in new)
        for row in rows(written, f"test-{kind}-wordings.json"):
            assert any(one.fullmatch(said(row)[0]) for one in new)


def pattern(wording: str) -> re.Pattern[str]:
    return re.compile(re.sub(r"\\{\w+\\}", ".+", re.escape(wording)))


def test_every_answer_is_true_of_the_things_in_the_row(written: Path) -> None:
    numbers = ("one", "two", "three", "four")
    for row in rows(written, "t*-*.json"):
        names = Counter(thing["name"] for thing in row["things"])
        at = {thing["place"]: thing["name"] for thing in row["things"]}
        (text, answer), asked = said(row), row["asked"]
        if row["kind"] == "existence":
            assert answer == ("yes" if asked[0] in names else "no")
            assert (row["negative"] in NEGATIVES) == (answer == "no")
        elif row["kind"] == "colour":
            assert answer == COLOURED[asked[0]]
        elif row["kind"] == "place":
            assert at[answer] == asked[0]
            assert names[asked[0]] == 1
        elif row["kind"] == "left":
            first, second = (next(place for place in at if at[place] == name) for name in asked)
            assert answer == ("yes" if first.endswith("left") else "no")
            assert first.split()[1] != second.split()[1]
        elif row["kind"] == "count":
            assert answer == numbers[names[asked[0]] - 1]
        else:
            assert at[place_in(text)] == answer.split()[1]


def place_in(text: str) -> str:
    return next(place for place in PLACES if place in text)


def test_boxes_lie_in_their_corner_and_around_what_is_seen(written: Path) -> None:
    for row in rows(written, "train-questions.json"):
        for thing in row["things"]:
            left, top, right, bottom = thing["box"]
            assert 0 <= left < right <= SIDE
            assert 0 <= top < bottom <= SIDE
            corner = PLACES[2 * (top + bottom > SIDE) + (left + right > SIDE)]
            assert thing["visible"] >= 0.6
            assert corner == thing["place"] or thing["visible"] < 1


def test_adversarial_negatives_are_what_stands_with_what_is_there(written: Path) -> None:
    theme = {name: group for group, names in CONCEPTS.items() for name in names}
    near = Counter()
    for row in rows(written, "train-questions.json"):
        if row["negative"] in ("random", "adversarial"):
            near[row["negative"], theme[row["asked"][0]] in {theme[one["name"]] for one in row["things"]}] += 1
    shares = {kind: near[kind, True] / (near[kind, True] + near[kind, False]) for kind in ("random", "adversarial")}
    assert shares["adversarial"] > shares["random"]


@pytest.mark.parametrize(
    ("stem", "caption", "name"),
    [
        ("tiger_sumatran", "A Sumatran tiger.", ("tiger", None)),
        ("hen", "A brown hen.", ("chicken", "brown")),
        ("greenflag", "A green flag.", ("flag", "green")),
        ("blue-and-yellowflag", "A blue and yellow flag.", ("flag", None)),
        ("gnu-stand", "A blue gnu.", ("gnu", None)),
        ("peacock", "A peacock (a male peafowl).", ("peacock", None)),
        ("Mince_Pie", "A mince pie is a traditional Christmas food in the UK.", ("pie", None)),
        ("sea_lion", "A sea lion.", None),
        ("scissors_small_open", "A pair of open scissors.", None),
        ("fire", "Fire! Fire! Fire!", None),
    ],
)
def test_a_caption_is_reduced_to_its_noun(stem: str, caption: str, name: tuple[str, str | None] | None) -> None:
    assert stamps.name_of(stem, caption) == name


def test_drawings_and_signs_are_left_out(tmp_path: Path) -> None:
    for folder in ("animals/cats/cartoon", "symbols", "animals/cats"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        Image.new("RGBA", (4, 4), "red").save(tmp_path / folder / "lion.png")
        (tmp_path / folder / "lion.txt").write_text("A lion.")
    assert [stamp.path.parent for stamp in stamps.find_stamps(tmp_path)] == [tmp_path / "animals/cats"]


def test_blur_and_noise_change_the_picture_and_not_the_rows(written: Path, tmp_path: Path) -> None:
    write_stamps(tmp_path / "stamps")
    write_photographs(config(tmp_path, blur=4.0, noise=0.0), lambda line: None)
    sharp, blurred = (
        np.asarray(Image.open(folder / "images/train-00000.jpg").convert("L"), float)
        for folder in (written, tmp_path / "out")
    )
    assert np.abs(np.diff(blurred)).mean() < 0.5 * np.abs(np.diff(sharp)).mean()


def test_mistakes_are_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(SetupError, match=r"apt-get install tuxpaint-stamps-default"):
        write_photographs(config(tmp_path))
    write_stamps(tmp_path / "stamps")
    with pytest.raises(SetupError, match=r"too few for scenes of 4 things"):
        write_photographs(config(tmp_path, held_out=0.1))
    with pytest.raises(ValueError, match=r"least is 4; it should be at most most, 3"):
        write_photographs(config(tmp_path, least=4, most=3))
    with pytest.raises(ValueError, match=r"kinds is size; it should be some of existence, colour"):
        write_photographs(config(tmp_path, kinds=("size",)))
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"exists; take another folder"):
        write_photographs(config(tmp_path))


def test_grounding_is_scored_by_the_boxes(tmp_path: Path) -> None:
    """The shipped small LLaVA, which was aligned, finds the one patch of a shape; boxes elsewhere are no hits."""
    generator = dataset.generator_for(5)
    scenes = dataset.draw_scenes(12, generator, 3, 5)
    asked, away = [], []
    for number, pixels in enumerate(dataset.render(scenes, generator)):
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        shapes = scenes.shape[number][scenes.there[number]].tolist()
        shape = next((one for one in shapes if shapes.count(one) == 1), shapes[0])
        boxes = []
        for at in scenes.where[number][scenes.there[number]][torch.tensor(shapes) == shape].tolist():
            row, column = divmod(at, dataset.GRID)
            boxes.append([side * dataset.CELL for side in (column, row, column + 1, row + 1)])
        name = dataset.SHAPES[shape]
        talk = [{"from": "human", "value": f"<image>\nWhere is the {name}?"}, {"from": "gpt", "value": "top left"}]
        line = {"image": f"{number}.png", "asked": [name], "conversations": talk}
        asked.append(line | {"things": [{"name": name, "box": box} for box in boxes]})
        away.append(line | {"things": [{"name": name, "box": [200, 200, 210, 210]}]})
    model, processor = load(str(SHIPPED), tau=0.6)
    found = grounding(model, processor, asked, tmp_path)
    assert found["words"] == 12
    assert found["hit"] > 0.75
    assert found["chance"] < 0.05
    assert grounding(model, processor, away, tmp_path)["hit"] == 0
    assert model.attanchor_config.tau == 0.6
    with pytest.raises(ValueError, match="no question names a thing that is there"):
        grounding(model, processor, [away[0] | {"things": []}], tmp_path)
