"""Anchors in the frames of videos, and of images beside them in one prompt: what holds for images holds for frames."""

from __future__ import annotations

import pytest
import torch
import videos
from builders import plain
from PIL import Image
from shared import GREEDY, LOGITS, NEW, both_directions, both_sides, difference, own_logits
from tiny_families import IMAGE, PAD, VIDEO
from torch.nn import functional as F

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.chat.videos import Video
from attanchor_vlm.model.check import findings
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.geometry import image_slots, patch_boxes

MIXED = ["iv", "v", "i", "", "vi"]
TAU = 0.1

every_family = pytest.mark.parametrize("family", videos.FAMILIES, ids=str)
every_route = pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(family, route, id=f"{family}-{route}") for family in videos.FAMILIES for route in family.routes],
)


def attached(family, **settings):
    return attach(family.model(), AttAnchorConfig(**{"tau": TAU, **settings}))


@both_directions
@both_sides
@every_route
def test_nothing_allowed_is_the_untouched_model_but_for_rounding(family, route, side, direction):
    batch = videos.prompts(family, MIXED, side)[0]
    real = batch["attention_mask"].bool()
    with torch.no_grad():
        before = family.model()(**plain(batch)).logits[real]
        model = attached(family, route=route, direction=direction)
        batch["anchor_mask"][:] = False
        after = own_logits(model, model(**batch).logits)
    assert difference(before, after) < 1e-4


@every_family
def test_hosts_are_the_best_matches_over_frames_and_images(family):
    model, batch = attached(family), videos.prompts(family, ["iv", "v"])[0]
    with torch.no_grad():
        model(**batch)
    plan, ids = model.attanchor_plan, batch["input_ids"]
    rows, newline = videos.features(model, batch), getattr(model.base_model, "image_newline", None)
    where = ((ids == IMAGE) | (ids == VIDEO)).nonzero()
    in_frames = 0
    for sample in range(len(ids)):
        own = (where[:, 0] == sample) & ~((rows == newline).all(-1) if newline is not None else torch.tensor(False))
        for slot in batch["anchor_mask"][sample].nonzero()[:, 0].tolist():
            text = model.get_input_embeddings()(ids[sample, slot]).detach()
            cosine = F.cosine_similarity(text[None], rows[own], dim=-1)
            assert abs(float(plan.score[sample, slot]) - float(cosine.max())) < 1e-5
            host = int(plan.host[sample, slot])
            assert host == (int(where[own][cosine.argmax(), 1]) if cosine.max() >= TAU else -1)
            in_frames += host >= 0 and int(ids[sample, host]) == VIDEO
    assert in_frames


@both_directions
@every_route
def test_a_batch_is_its_samples_alone(family, route, direction):
    for side in ("left", "right"):
        batch, alone = videos.prompts(family, MIXED, side)
        model = attached(family, route=route, direction=direction)
        with torch.no_grad():
            logits = model(**batch).logits
            together, plan = [logits[n][plan_of(model, n)] for n in range(len(alone))], model.attanchor_plan
            assert plan.is_anchor.any(-1).sum() >= 3
            for own, sample in zip(together, alone, strict=True):
                assert difference(own, model(**sample).logits[0]) < 1e-4


def plan_of(model, sample):
    return model.attanchor_plan.attention_mask[sample].bool()


@both_directions
@pytest.mark.parametrize("family", [family for family in videos.FAMILIES if len(family.routes) > 1], ids=str)
def test_both_routes_agree(family, direction):
    batch, found = family.with_labels(videos.prompts(family, ["iv", "v"])[0]), []
    for route in family.routes:
        model = attached(family, route=route, direction=direction)
        output = model(**batch)
        output.loss.backward()
        gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        found.append((output.logits[model.attanchor_plan.source >= 0], output.loss, torch.cat(gradients)))
    for one, other in zip(*found, strict=True):
        assert difference(one, other) < 1e-4


@every_route
def test_cached_generation_agrees_with_uncached_forwards(family, route):
    batch = videos.prompts(family, MIXED, "left")[0]
    model = attached(family, route=route)
    output = model.generate(**batch, **GREEDY, **LOGITS)
    tokens = output.sequences[:, batch["input_ids"].shape[1] :]
    with torch.no_grad():
        for step in range(NEW):
            logits = model(**batch).logits[:, -1]
            assert difference(logits, output.logits[step]) < 1e-4
            batch = family.longer(batch, tokens[:, step : step + 1])


@every_family
def test_beams_are_the_same_on_a_sample_alone(family):
    batch, alone = videos.prompts(family, ["iv", "v"], "left")
    model = attached(family)
    options = {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": NEW}
    together = model.generate(**batch, **options)[:, -NEW:]
    assert torch.equal(together, torch.cat([model.generate(**sample, **options)[:, -NEW:] for sample in alone]))


@both_directions
@every_route
def test_the_self_check_finds_nothing_wrong(family, route, direction):
    model = attached(family, route=route, direction=direction)
    for media in (["iv"], ["v", "", "v"]):
        batch = videos.prompts(family, media)[0]
        mask = batch.pop("anchor_mask")
        found = findings(model, adapter_for(model), model.attanchor_config, batch, mask)
        assert found
        assert not [one for one in found if one.found]


@every_family
def test_mistakes_in_a_call_with_videos(family):
    model, batch = attached(family), videos.prompts(family, ["iv"])[0]
    first = batch["input_ids"] == VIDEO
    fewer = {**batch, "input_ids": batch["input_ids"].masked_fill(first & (first.cumsum(-1) == 1), PAD + 10)}
    with pytest.raises(ValueError, match=r"have \d+ video placeholders and the videos \d+ features"):
        model(**fewer)
    with pytest.raises(ValueError, match=r"keep is 0\.5 in a call with videos"):
        attached(family, keep=0.5)(**batch)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_boxes_say_which_frame_of_which_video(name):
    family = next(one for one in videos.FAMILIES if one.name == name)
    model, batch = family.model(), videos.prompts(family, ["v", "iv"])[0]
    film = Video([Image.new("RGB", (60, 40))] * 3)
    for row, media in enumerate(([film], [(90, 60), film])):
        boxes = patch_boxes(model, None, batch, row, [[film], [(90, 60), film]])
        assert len(boxes) == len(image_slots(model, batch, row))
        of_video = [box for box in boxes if box.video is not None]
        # Two steps of two frames, of which the last is there twice; each a grid of two by two.
        assert [(box.image, box.frame) for box in of_video] == [(row, 0)] * 4 + [(row + 1, 2)] * 4
        assert [box.pixels for box in of_video[4:]] == [box.pixels for box in of_video[:4]]
        assert of_video[3].pixels == (30.0, 20.0, 60.0, 40.0)
        assert {box.image for box in boxes if box.video is None} == ({0} if len(media) > 1 else set())
