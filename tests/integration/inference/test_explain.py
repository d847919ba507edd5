"""The picture of a question's anchors: boxes at their pixels, labels that can be read, and nothing of a formula."""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from PIL import Image

from attanchor_vlm import cli, detach
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.inference import explain as evaluate
from attanchor_vlm.inference import picture as plots
from attanchor_vlm.inference.explain import Anchored, Match, describe
from attanchor_vlm.inference.picture import anchor_picture
from attanchor_vlm.model.geometry import Box
from attanchor_vlm.model.load import load

TAU = 0.5


def grid(image, tile, rows, columns, x0, y0, x1, y1):
    w, h = (x1 - x0) / columns, (y1 - y0) / rows
    return [
        Box(image, tile, y, x, (x0 + x * w, y0 + y * h, x0 + (x + 1) * w, y0 + (y + 1) * h))
        for y in range(rows)
        for x in range(columns)
    ]


@pytest.fixture
def tiled():
    """A tall image as a view of the whole (4 tokens), two tiles (8), and a newline token; and one that is cropped."""
    images = [Image.new("RGB", (80, 160), "#808080"), Image.new("RGB", (300, 100), "#404040")]
    boxes = [
        *grid(0, None, 2, 2, 0, 0, 80, 160),
        *grid(0, 0, 2, 2, 0, 0, 80, 80),
        *grid(0, 1, 2, 2, 0, 80, 80, 160),
        Box(0, None, 2, 0, None),
        *grid(1, None, 2, 2, 100, 0, 200, 100),
    ]
    matches = [
        Match("a", 0.1, None),
        Match("red", 0.6, 6),
        Match("dog", 0.7, 6),
        Match("costs", 0.55, 1),
        Match("$5", 0.8, 16),
        Match("␣", float("-inf"), None),
    ]
    return Anchored(images, boxes, "a red dog costs $5 or $6", matches, "yes $1 $2", truth="no")


@pytest.fixture
def figure(monkeypatch):
    """The figure that is about to be saved, drawn."""
    kept = []
    monkeypatch.setattr(plots, "save", lambda figure, path: kept.append(figure))

    def draw(*arguments):
        anchor_picture(*arguments)
        kept[-1].canvas.draw()
        return kept[-1]

    yield draw
    for one in kept:
        plt.close(one)


def rectangles(axes, colour=None):
    """(x0, y0, x1, y1) of the coloured outlines."""
    found = []
    for patch in axes.patches:
        is_outline = isinstance(patch, Rectangle) and not patch.get_fill()
        if not is_outline:
            continue
        own = to_hex(patch.get_edgecolor())
        if own == colour or (colour is None and own in plots.PALETTE):
            x, y = patch.get_xy()
            found.append((x, y, x + patch.get_width(), y + patch.get_height()))
    return found


def test_boxes_stand_at_their_pixels(tiled, figure):
    drawn = figure("p.png", [tiled], TAU, "title")
    first, second, scores = drawn.axes
    assert sorted(rectangles(first)) == sorted(tiled.boxes[patch].pixels for patch in (1, 6))
    assert rectangles(second) == [tiled.boxes[16].pixels]
    assert set(rectangles(first, "#ffffff")) >= set(rectangles(first))
    # In a view of the whole image, dashed; in a tile, drawn through.
    dashed = [patch for patch in first.patches if patch.get_linestyle() not in ("-", "solid", ":", "dotted")]
    assert [patch.get_xy() for patch in dashed] == [tiled.boxes[1].pixels[:2]]
    assert [text.get_text() for text in first.texts] == [
        "costs 0.55  · whole view",
        "red 0.60, dog 0.70  · tile 1",
        "image 1",
    ]
    assert [text.get_text() for text in second.texts] == [r"\$5 0.80", "image 2"]
    # A word's bar has the colour of its patch.
    bars = [to_hex(bar.get_facecolor()) for bar in scores.patches]
    assert bars[1] == bars[2]
    assert len({*bars[1:5]}) == 3
    assert rectangles(second, bars[4]) == [tiled.boxes[16].pixels]
    widths = [bar.get_width() for bar in scores.patches]
    assert widths == pytest.approx([0.1, 0.6, 0.7, 0.55, 0.8, 0])


def test_the_title_is_no_formula_and_says_what_is_wrong(tiled, figure):
    drawn = figure("p.png", [tiled], TAU, "costs_$1_$2.png")
    texts = [text.get_text().replace(r"\$", "$").replace("\n", " ") for text in drawn.texts]
    assert texts == ["costs_$1_$2.png", "“a red dog costs $5 or $6”  →  yes $1 $2  (wrong; it is no)"]


def test_what_the_model_does_not_see_is_dimmed(tiled, figure):
    _, second, _ = figure("p.png", [tiled], TAU, "title").axes
    dim = [patch for patch in second.patches if patch.get_alpha() and patch.get_fill()]
    spans = sorted((patch.get_x(), patch.get_x() + patch.get_width()) for patch in dim)
    assert spans == [(0, 100), (200, 300)]
    first = figure("p.png", [tiled], TAU, "title").axes[0]
    assert not [patch for patch in first.patches if patch.get_alpha() and patch.get_fill()]


@pytest.mark.parametrize("size", [(640, 480), (1600, 200), (100, 900)], ids=["photo", "wide", "tall"])
@pytest.mark.parametrize("count", [17, 60])
def test_labels_can_be_read_whatever_the_image_is(size, count, figure):
    image = Image.new("RGB", size)
    boxes = grid(0, None, 10, 10, 0, 0, *size)
    # Most of them in one row, where labels have to move apart.
    matches = [Match(f"word{i}", 0.9, 30 + i if i < 10 else (7 * i) % 100) for i in range(count)]
    example = Anchored([image], boxes, "Many?", matches, "yes")
    drawn = figure("p.png", [example, example], TAU, "title")
    whole = drawn.get_window_extent()
    for axes in (drawn.axes[0], drawn.axes[2]):
        labels = [text for text in axes.texts if text.get_bbox_patch() is not None]
        more = [text.get_text() for text in axes.texts if text.get_bbox_patch() is None]
        patches = len({match.patch for match in matches})
        assert len(labels) == min(patches, 36)
        assert more == ([f"and {patches - 36} patches more"] if patches > 36 else [])
        extents = sorted((text.get_bbox_patch().get_window_extent() for text in labels), key=lambda one: one.y0)
        assert all(b.y0 >= a.y1 for a, b in itertools.pairwise(extents))
        bars = drawn.axes[1].get_tightbbox()
        for one in extents:
            assert whole.x0 < one.x0 < one.x1 < bars.x0
            assert whole.y0 < one.y0 < one.y1 < whole.y1
        shape = axes.transData.transform([(0, 0), size])
        width, height = np.abs(shape[1] - shape[0])
        assert width / height == pytest.approx(size[0] / size[1], rel=1e-6)  # not distorted
        assert max(width, height) > 3 * drawn.dpi


def test_a_long_prompt_shows_its_best_words(figure):
    boxes = grid(0, None, 4, 4, 0, 0, 64, 64)
    matches = [Match(f"w{i}", i / 200, 3 if i in (5, 150) else None) for i in range(160)]
    drawn = figure("p.png", [Anchored([Image.new("RGB", (64, 64))], boxes, "Long?", matches)], TAU, "t")
    words = [label.get_text() for label in drawn.axes[1].get_yticklabels()]
    assert words == ["w5", *(f"w{i}" for i in range(117, 160))]
    assert drawn.axes[1].get_xlabel() == "best cosine with a patch (116 low ones not shown)"


def test_dropped_patches_are_dimmed_and_counted(tiled, figure):
    """Of an image with tiles, those of the tiles: the view of the whole image shows the same places once more."""
    fewer = dataclasses.replace(tiled, dropped=frozenset((0, 5, 7, 14)))
    first, second, _ = figure("p.png", [fewer], TAU, "title").axes
    for axes, patches in ((first, (5, 7)), (second, (14,))):
        dim = next(one for one in axes.collections if one.get_alpha() == plots._VEIL)
        found = {tuple(path.get_extents().bounds) for path in dim.get_paths()}
        boxes = [
            tiled.boxes[patch].pixels for patch in patches if tiled.boxes[patch].tile is not None or axes is second
        ]
        assert found == {(x0, y0, x1 - x0, y1 - y0) for x0, y0, x1, y1 in boxes}
    said = describe(fewer)
    assert (said["image_tokens"], said["kept"]) == (len(tiled.boxes), len(tiled.boxes) - 4)


def test_explain_says_which_patches_stayed(sample):
    image = sample / "images" / "test-00000.png"
    for settings in ({"tau": 0.3, "keep": 0.25}, {"tau": 1.0, "keep": 4}):
        model, processor = load(str(sample / "model"), **settings)
        shown = evaluate.explain(model, processor, image, "Where is the red triangle?")
        expected = settings["keep"] if settings["keep"] == 4 else len(shown.boxes) // 4
        assert len(shown.boxes) - len(shown.dropped) == expected
        hosts = {match.patch for match in shown.matches if match.patch is not None}
        assert bool(hosts) == (settings["tau"] < 1)
        assert not hosts & shown.dropped


@pytest.mark.parametrize(
    ("prompt", "shown"),
    [
        ("<image>\n<image>\nAlike?", "Alike?"),
        ("Alike?", "Alike?"),
        ("<image> and <image>: alike?", "[image 1] and [image 2]: alike?"),
        ("Is it here? <image>", "Is it here? [image 1]"),
    ],
)
def test_images_that_stand_inside_of_a_question_are_numbered(sample, loaded, prompt, shown):
    images = [sample / "images" / "test-00000.png"] * max(prompt.count("<image>"), 1)
    assert evaluate.explain(*loaded, images, prompt, 1).question == shown


def test_no_anchors_is_said(tiled, figure):
    nothing = dataclasses.replace(tiled, matches=[Match("a", 0.1, None)])
    drawn = figure("p.png", [nothing], TAU, "title")
    assert "no token reaches tau" in [text.get_text() for text in drawn.axes[0].texts]
    figure("p.png", [dataclasses.replace(tiled, matches=[])], TAU, "title")


def test_the_description_is_json(tiled):
    said = json.loads(json.dumps(describe(tiled), allow_nan=False))
    assert (said["answer"], said["inserted"], said["candidates"]) == ("yes $1 $2", 4, 6)
    assert said["anchors"][0] == {"text": "a", "score": 0.1, "inserted": False}
    assert said["anchors"][5]["score"] is None
    assert said["anchors"][1] == {
        "text": "red",
        "score": 0.6,
        "inserted": True,
        "where": "image 1, tile 1, row 2, column 1",
        "image": 0,
        "tile": 0,
        "row": 1,
        "column": 0,
        "pixels": [0, 40, 40, 80],
    }
    assert said["anchors"][3]["where"] == "image 1, whole view, row 1, column 2"
    assert said["anchors"][4]["where"] == "image 2, row 2, column 2"


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_a_question_is_explained_by_the_command_line(sample, tmp_path, capsys, suffix):
    image, picture = sample / "images" / "test-00000.png", tmp_path / f"anchors.{suffix}"
    arguments = ["generate", "--model", sample / "model", "--tau", 0.53, "--image", image, "--explain", picture]
    assert cli.main([str(word) for word in arguments] + ["--prompt", "Where is the red triangle?"]) == 0
    answer, *lines, last = capsys.readouterr().out.splitlines()
    model, processor = load(str(sample / "model"), tau=0.53)
    expected = infer.answer(model, processor, "Where is the red triangle?", [image])
    assert answer == expected.text
    assert last == f"picture: {picture}"
    assert [line.split()[0] for line in lines] == ["Where", "is", "the", "red", "triangle", "?"]
    assert sum("row 8, column 8" in line for line in lines) == expected.inserted == 2  # the triangle's cell
    assert sum("not inserted" in line for line in lines) == 4
    assert picture.stat().st_size > 5000
    if suffix == "png":
        width, height = Image.open(picture).size
        assert width > 800 < 2.5 * height


def test_the_bars_and_tau_tell_apart_what_rounding_would_not(figure, sample):
    model, processor = load(str(sample / "model"), tau=0.53)
    image = infer.open_image(sample / "images" / "test-00000.png")
    shown = evaluate.explain(model, processor, image, "Where is the red triangle?")
    texts = [text.get_text() for text in figure("p.png", [shown], 0.534, "t").axes[1].texts]
    assert {"0.536", "0.662", "tau 0.534"} <= set(texts)


def test_a_score_a_hair_below_zero_is_no_minus_zero(tiled, figure):
    tiled.matches[0] = Match("a", -0.001, None)
    texts = [text.get_text() for text in figure("p.png", [tiled], TAU, "t").axes[2].texts]
    assert texts[0] == "0.00"


def test_images_may_be_paths_of_any_kind_of_picture(sample, tmp_path):
    model, processor = load(str(sample / "model"), tau=0.53)
    picture = sample / "images" / "test-00000.png"
    Image.open(picture).convert("RGBA").save(tmp_path / "rgba.png")
    expected = describe(evaluate.explain(model, processor, infer.open_image(picture), "Where is the red triangle?"))
    for given in (picture, str(picture), [picture], Image.open(tmp_path / "rgba.png")):
        assert describe(evaluate.explain(model, processor, given, "Where is the red triangle?")) == expected
    with pytest.raises(ValueError, match="the prompt has 2 <image> placeholders for 1 image"):
        evaluate.explain(model, processor, picture, "<image> <image> Where?")
    with pytest.raises(ValueError, match="the model is not attached, so it has no anchors"):
        evaluate.explain(detach(model), processor, picture, "Where?")


def test_a_picture_is_whole_or_not_there(tiled, tmp_path, monkeypatch):
    def full(self, path, **options):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(plt.Figure, "savefig", full)
    with pytest.raises(OSError, match="No space"):
        anchor_picture(tmp_path / "p.png", [tiled], TAU, "title")
    assert not list(tmp_path.iterdir())
    assert not plt.get_fignums()


def test_a_prompt_in_another_script_is_drawn_without_complaint(tiled, tmp_path, recwarn):
    chinese = dataclasses.replace(tiled, question="红色的环在哪里？", matches=[Match("红", 0.8, 6)])
    anchor_picture(tmp_path / "p.png", [chinese], TAU, "环.png")
    assert not list(recwarn)
    assert Image.open(tmp_path / "p.png").size[0] > 500
