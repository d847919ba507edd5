"""Where image tokens lie in the picture: paint a token's box, and only the tokens that lie there may change.

The image encoders look through attention layers whose output is set to zero, so that a token depends on its own patches
alone, and images are resized without smoothing. What changes then is decided by the processors and models of
transformers, not by what `patch_boxes` believes about them.
"""

from __future__ import annotations

import re

import checkpoints
import numpy as np
import pytest
import torch
from builders import features
from PIL import Image, ImageOps

from attanchor_vlm import AttAnchorConfig, attach, encode_chat
from attanchor_vlm.inference.explain import explain
from attanchor_vlm.inference.picture import anchor_picture
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.geometry import Box, image_slots, patch_boxes

SIZES = [(120, 200), (190, 90), (150, 150), (40, 170)]  # (height, width)
NEAREST = 0


def load(name: str, tmp_path, monkeypatch):
    model, processor = checkpoints.write(tmp_path / name, name, monkeypatch)
    processor.image_processor.resample = NEAREST
    with torch.no_grad():
        for parameter_name, parameter in adapter_for(model).vision_tower(model).named_parameters():
            if re.search(r"(out_proj|attn\.proj|projection_layer)\.(weight|bias)$", parameter_name):
                parameter.zero_()
    return model, processor


def noise(size: tuple[int, int], seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Image.fromarray(values)


def encode(processor, images: list[list[Image.Image]], question: str = "What is it?"):
    parts = [[*([{"type": "image"}] * len(own)), {"type": "text", "text": question}] for own in images]
    chats = [[{"role": "user", "content": part}] for part in parts]
    return encode_chat(processor, chats, images, add_generation_prompt=True)


def rows_of(model, batch, row: int) -> torch.Tensor:
    counts = [len(image_slots(model, batch, one)) for one in range(len(batch["input_ids"]))]
    return features(model, batch).split(counts)[row]


def overlap(box: Box, painted: tuple[int, int, int, int], image: int) -> float:
    """The share of the painted region that lies in a box."""
    if box.pixels is None or box.image != image:
        return 0.0
    x0, y0, x1, y1 = box.pixels
    left, top, right, bottom = painted
    across, down = min(x1, right) - max(x0, left), min(y1, bottom) - max(y0, top)
    return max(across, 0.0) * max(down, 0.0) / ((right - left) * (bottom - top))


def check_places(model, processor, images: list[list[Image.Image]], row: int) -> list[Box]:
    """Paint every fifth box of a row's images, inside its edges, and look which features change."""
    batch = encode(processor, images)
    boxes, before = patch_boxes(model, processor, batch, row, images), rows_of(model, batch, row)
    assert len(boxes) == len(before) == len(image_slots(model, batch, row))
    painted_boxes = 0
    for number, box in list(enumerate(boxes))[:: 5 if len(boxes) > 40 else 2]:
        if box.pixels is None:
            continue
        x0, y0, x1, y1 = box.pixels
        margin_x, margin_y = (x1 - x0) / 8, (y1 - y0) / 8
        painted = (round(x0 + margin_x), round(y0 + margin_y), round(x1 - margin_x), round(y1 - margin_y))
        if painted[2] - painted[0] < 3 or painted[3] - painted[1] < 3:
            continue  # a sliver that the edge of the picture leaves of a box
        picture = images[row][box.image].copy()
        picture.paste(ImageOps.invert(picture.crop(painted)), painted)
        changed_images = [list(own) for own in images]
        changed_images[row][box.image] = picture
        changed = (rows_of(model, encode(processor, changed_images), row) - before).abs().amax(-1) > 1e-5
        assert changed[number], box
        for other, is_changed in zip(boxes, changed.tolist(), strict=True):
            share = overlap(other, painted, box.image)
            assert not is_changed or share > 0, (box, other)
            assert is_changed or share < 0.3, (box, other)
        painted_boxes += 1
    assert painted_boxes >= 2
    return boxes


@pytest.mark.parametrize("name", [*checkpoints.WRITERS, "qwen3_5", "glm4v", "paddleocr_vl"])
def test_a_box_is_where_its_token_looks(name, tmp_path, monkeypatch):
    model, processor = load(name, tmp_path, monkeypatch)
    for size in SIZES:
        boxes = check_places(model, processor, [[noise(size)]], 0)
        assert {box.image for box in boxes} == {0}


@pytest.mark.parametrize("name", list(checkpoints.WRITERS))
def test_several_images_in_several_rows(name, tmp_path, monkeypatch):
    model, processor = load(name, tmp_path, monkeypatch)
    images = [[noise(SIZES[0])], [noise(SIZES[1], 1), noise(SIZES[2], 2)]]
    for row in range(2):
        boxes = check_places(model, processor, images, row)
        assert [box.image for box in boxes] == sorted(box.image for box in boxes)
        assert {box.image for box in boxes} == set(range(row + 1))


@pytest.mark.parametrize(
    ("name", "tiles"), [("llava_next", 4), ("llava_onevision", 4), ("internvl", 2), ("idefics3", 4), ("smolvlm", 4)]
)
def test_tiles_are_numbered_and_views_are_not(name, tiles, tmp_path, monkeypatch):
    model, processor = load(name, tmp_path, monkeypatch)
    images = [[noise((120, 150))]]
    boxes = patch_boxes(model, processor, encode(processor, images), 0, images)
    found = {box.tile for box in boxes}
    assert found - {None} == set(range(len(found) - 1))
    assert len(found) - 1 >= tiles
    for tile in found - {None}:
        inside = [box.pixels for box in boxes if box.tile == tile and box.pixels]
        assert inside
    # A view of the whole image covers it; so do the tiles, no pixel twice.
    for view in (True, False):
        area = sum(
            (x1 - x0) * (y1 - y0)
            for x0, y0, x1, y1 in (box.pixels for box in boxes if (box.tile is None) == view and box.pixels)
        )
        # LLaVA-NeXT's models take away whole lines of cells that hold padding, and the edge of the image with them.
        least = 0.9 if name.startswith("llava") and not view else 1
        assert least * (1 - 1e-6) <= area / (120 * 150) <= 1 + 1e-6


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
def test_newline_tokens_have_no_box(name, tmp_path, monkeypatch):
    model, processor = load(name, tmp_path, monkeypatch)
    images = [[noise(SIZES[3])], [noise(SIZES[0]), noise(SIZES[1])]]
    batch = encode(processor, images)
    for row in range(2):
        silent = (rows_of(model, batch, row) == model.base_model.image_newline).all(-1).tolist()
        boxes = patch_boxes(model, processor, batch, row, images)
        assert any(silent)
        for box, is_newline in zip(boxes, silent, strict=True):
            assert box.pixels is None or not is_newline
        if name == "llava_next":  # whose images are not padded but for what the model takes away again
            assert [box.pixels is None for box in boxes] == silent


@pytest.mark.parametrize("name", list(checkpoints.WRITERS))
def test_boxes_of_very_long_images_lie_within_them(name, tmp_path, monkeypatch):
    model, processor = load(name, tmp_path, monkeypatch)
    for height, width in ((12, 300), (300, 12), (5, 424), (709, 7), (3, 3), (1, 1)):
        images = [[Image.new("RGB", (width, height))]]
        boxes = patch_boxes(model, processor, encode(processor, images), 0, images)
        for x0, y0, x1, y1 in (box.pixels for box in boxes if box.pixels is not None):
            assert 0 <= x0 < x1 <= width
            assert 0 <= y0 < y1 <= height


def test_onevision_shrinks_large_images(tmp_path, monkeypatch):
    """Features of more tiles than allowed are interpolated: a token looks at cells around its own box as well."""
    model, processor = load("llava_onevision", tmp_path, monkeypatch)
    model.config.vision_aspect_ratio = processor.vision_aspect_ratio = "anyres_max_2"
    images = [[noise((160, 160))]]
    batch = encode(processor, images)
    boxes, before = patch_boxes(model, processor, batch, 0, images), rows_of(model, batch, 0)
    tiles = [box for box in boxes if box.tile is not None and box.pixels]
    assert len(tiles) == 25
    middle = next(
        number for number, box in enumerate(boxes) if box.tile is not None and (box.row, box.column) == (2, 2)
    )
    painted = tuple(round(value) for value in boxes[middle].pixels)
    picture = images[0][0].copy()
    picture.paste(ImageOps.invert(picture.crop(painted)), painted)
    changed = (rows_of(model, encode(processor, [[picture]]), 0) - before).abs().amax(-1) > 1e-5
    assert changed[middle]
    for box, is_changed in zip(boxes, changed.tolist(), strict=True):
        if is_changed and box.tile is not None:
            assert max(abs(box.row - 2), abs(box.column - 2)) <= 1


@pytest.mark.parametrize("size", [(60, 260), (260, 60)])
def test_gemma3_pans_and_scans(size, tmp_path, monkeypatch):
    model, processor = load("gemma3", tmp_path, monkeypatch)
    processor.image_processor.do_pan_and_scan = True
    processor.image_processor.pan_and_scan_min_crop_size = 16
    processor.image_processor.pan_and_scan_max_num_crops = 4
    processor.image_processor.pan_and_scan_min_ratio_to_activate = 1.2
    monkeypatch.setattr(processor, "images_kwargs", {})
    picture = noise(size)
    boxes = [
        Box(0, tile, row, column, region)
        for grid in adapter_for(model).grids(model, processor, {"pixel_values": torch.zeros(1, 3, 16, 16)}, 0, size)
        for tile, row, column, region in grid.cells()
    ]
    assert {box.tile for box in boxes} == {None, 0, 1, 2, 3}
    crops = processor.image_processor(picture, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        before = torch.cat(list(model.get_image_features(crops).pooler_output))
    for number in range(0, len(boxes), 3):
        x0, y0, x1, y1 = (round(value) for value in boxes[number].pixels)
        changed_picture = picture.copy()
        changed_picture.paste(ImageOps.invert(picture.crop((x0 + 2, y0 + 2, x1 - 2, y1 - 2))), (x0 + 2, y0 + 2))
        crops = processor.image_processor(changed_picture, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            after = torch.cat(list(model.get_image_features(crops).pooler_output))
        changed = (after - before).abs().amax(-1) > 1e-5
        assert changed[number]
        for box, is_changed in zip(boxes, changed.tolist(), strict=True):
            assert not is_changed or overlap(box, (x0 + 2, y0 + 2, x1 - 2, y1 - 2), 0) > 0


def test_gemma3_pans_and_scans_only_where_its_processor_does(tmp_path, monkeypatch):
    """The processor's own default, off, comes before the setting of its image processor."""
    model, processor = load("gemma3", tmp_path, monkeypatch)
    images = [[noise((60, 260))]]
    processor.image_processor.do_pan_and_scan = True
    batch = encode(processor, images)
    assert {box.tile for box in patch_boxes(model, processor, batch, 0, images)} == {None}
    options = {"do_pan_and_scan": True, "pan_and_scan_min_crop_size": 16}
    monkeypatch.setattr(processor, "images_kwargs", {**processor.images_kwargs, **options})
    batch = encode(processor, images)
    assert {box.tile for box in patch_boxes(model, processor, batch, 0, images)} == {None, 0, 1, 2, 3}


@pytest.mark.parametrize("name", list(checkpoints.WRITERS))
def test_explain_says_where_in_which_image_anchors_went(name, tmp_path, monkeypatch):
    """Two images of different shapes: the patch of each match is the image token that the plan has as its host."""
    model, processor = load(name, tmp_path, monkeypatch)
    attach(model, AttAnchorConfig(tau=-1))
    images, question = [noise(SIZES[0]), noise(SIZES[1], 1)], "What is to the left of the red dog?"
    shown = explain(model, processor, images, question, max_new_tokens=1)
    assert (shown.images, shown.question) == (images, question)
    batch = encode(processor, [images], question)
    assert shown.boxes == patch_boxes(model, processor, batch, 0, [images])
    hosts = model.attanchor_plan.host[0]
    slots = image_slots(model, batch, 0)
    assert [slots[match.patch] for match in shown.matches] == hosts[hosts >= 0].tolist()
    assert "".join(match.text for match in shown.matches).replace("␣", "") == question.replace(" ", "")
    if name == "idefics3":  # drawing takes a second, and is tested by itself
        anchor_picture(tmp_path / "anchors.png", [shown], -1, name)
        assert Image.open(tmp_path / "anchors.png").width > 400


def test_other_images_than_the_batchs_are_refused(tmp_path, monkeypatch):
    model, processor = load("idefics3", tmp_path, monkeypatch)
    batch = encode(processor, [[noise((120, 150))]])
    with pytest.raises(ValueError, match=r"row 0 has 20 image tokens, .* videos of this size should take 12"):
        patch_boxes(model, processor, batch, 0, [[(200, 40)]])
