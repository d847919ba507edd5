"""Anchors in the frames of videos, and of images beside them in one prompt: what holds for images holds for frames."""

from __future__ import annotations

import pytest
import torch
import videos
from PIL import Image
from shared import (
    NEW,
    both_directions,
    both_sides_and_directions,
    check_cached_generation,
    check_nothing_allowed,
    check_routes_agree,
    check_samples_alone,
)
from tiny import difference
from tiny_families import IMAGE, PAD, START, VIDEO
from torch.nn import functional as F

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.chat.videos import Video
from attanchor_vlm.model import check
from attanchor_vlm.model.check import findings
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.geometry import image_slots, patch_boxes
from attanchor_vlm.model.recording import record

MIXED = ["iv", "v", "i", "", "vi"]
TAU = 0.1

every_family = pytest.mark.parametrize("family", videos.FAMILIES, ids=str)
every_route = pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(family, route, id=f"{family}-{route}") for family in videos.FAMILIES for route in family.routes],
)


def attached(family, **settings):
    return attach(family.model(), AttAnchorConfig(**{"tau": TAU, **settings}))


@both_sides_and_directions
@every_route
def test_nothing_allowed_is_the_untouched_model_but_for_rounding(family, route, side, direction):
    check_nothing_allowed(family, route, side, direction, MIXED)


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


@both_sides_and_directions
@every_route
def test_a_batch_is_its_samples_alone(family, route, side, direction):
    # Of Qwen3.5, whose chunks of linear attention lie otherwise in other lengths, more rounding shows.
    check_samples_alone(family, route, side, direction, MIXED, bound=1e-4, tau=TAU)


@both_directions
@pytest.mark.parametrize("family", [family for family in videos.FAMILIES if len(family.routes) > 1], ids=str)
def test_both_routes_agree(family, direction):
    check_routes_agree(family, "right", direction, ["iv", "v"], tau=TAU)


@every_route
def test_cached_generation_agrees_with_uncached_forwards(family, route):
    check_cached_generation(family, route, "text_into_image", MIXED, tau=TAU)


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


@pytest.mark.parametrize(("media", "seen"), [(["i", "v"], 2), (["i", "iv"], 1)])
def test_the_self_check_looks_at_every_kind(media, seen, monkeypatch):
    model, batch, ran = attached(videos.FAMILIES[0]), videos.prompts(videos.FAMILIES[0], media)[0], []
    monkeypatch.setattr(check, "record", lambda *args: ran.append(args[2]) or record(*args))
    assert check.findings(model, adapter_for(model), model.attanchor_config, batch, batch.pop("anchor_mask"))
    assert [len(one["input_ids"]) for one in ran[:1]] == [seen]
    assert adapter_for(model).kinds(ran[0]) == ["image", "video"]
    assert (adapter_for(model).video_placeholders(model, ran[0]["input_ids"])).any()


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


@both_directions
@every_route
def test_a_cap_for_each_frame_keeps_its_best(family, route, direction):
    model = attached(family, route=route, direction=direction, tau=-1)
    batch, ids = videos.prompts(family, ["iv", "v"])[0], videos.prompts(family, ["iv", "v"])[0]["input_ids"]
    with torch.no_grad():
        model(**batch)
        whole = model.attanchor_plan
        frame = frames_of(batch)
        at = frame.gather(1, whole.host.clamp(min=0)) if direction == "text_into_image" else frame
        for most, in_all in ((0, None), (1, None), (2, 3), (50, None)):
            attach(model, AttAnchorConfig(-1, direction, route=route, max_anchors=in_all, max_anchors_per_frame=most))
            logits = model(**batch).logits
            plan = model.attanchor_plan
            for sample in range(len(ids)):
                inserted = (whole.host[sample] >= 0).nonzero()[:, 0].tolist()
                ranked, counts, best = sorted(inserted, key=lambda s: -float(whole.score[sample, s])), {}, []
                for slot in ranked:  # the best of its frame, and of the sample
                    key = int(at[sample, slot])
                    counts[key] = counts.get(key, 0) + 1
                    best += [slot] if counts[key] <= most and len(best) < (in_all or 99) else []
                found = (plan.host[sample] >= 0).nonzero()[:, 0].tolist()
                assert found == sorted(best)
                assert plan.host[sample, found].tolist() == whole.host[sample, found].tolist()
    attach(model, AttAnchorConfig(-1, direction, route=route))
    with torch.no_grad():
        assert difference(model(**batch).logits, logits) < 1e-5  # a cap that nothing reaches changes nothing


def frames_of(batch):
    """(B, S), a number for the frame or image of each image token that takes part."""
    found = torch.full(batch["input_ids"].shape, -1)
    number = 0
    for sample, row in enumerate(batch["input_ids"].tolist()):
        slots = [slot for slot, token in enumerate(row) if token in (IMAGE, VIDEO)]
        films = [slot for slot in slots if row[slot] == VIDEO]
        for group in ([slot for slot in slots if row[slot] == IMAGE], films[:4], films[4:8]):
            found[sample, group] = number
            number += 1
        assert len(films) in (8, 9)  # and OneVision's newline
    return found


def test_a_cap_needs_to_know_the_frames():
    family = videos.FAMILIES[0]
    model, batch = attached(family, max_anchors_per_frame=1), videos.prompts(family, ["v"])[0]
    with torch.no_grad():
        batch["mm_encoder_outputs"] = {
            "video": model.get_video_features(
                batch.pop("pixel_values_videos"), batch["video_grid_thw"], return_dict=True
            )
        }
        grid = batch.pop("video_grid_thw")
        attach(model, AttAnchorConfig(TAU, positions="sequential", max_anchors_per_frame=1))
        with pytest.raises(ValueError, match="which video tokens are of one frame is not known for qwen2_vl"):
            model(**batch)
        model(**batch, video_grid_thw=grid)
    assert int(model.attanchor_stats.inserted) <= 2
    with pytest.raises(ValueError, match="placement is 'random' with max_anchors_per_frame 1"):
        AttAnchorConfig(0.5, placement="random", max_anchors_per_frame=1)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "qwen3_vl"])
def test_without_a_mask_the_times_of_frames_take_no_part(name):
    family = next(one for one in videos.FAMILIES if one.name == name)
    model, batch = attached(family, tau=-1), videos.prompts(family, ["vv", "i"], "left")[0]
    words = batch.pop("anchor_mask")
    with torch.no_grad():
        model(**batch)
    ids, took_part = batch["input_ids"], torch.isfinite(model.attanchor_plan.score)
    assert (took_part | ~words)[1].all()
    first, *_, last = (ids[0] == VIDEO).nonzero()[:, 0].tolist()
    inside = took_part[0, first:last]
    beside = 2  # the last two words behind a video, which the mask leaves out
    if name == "qwen3_vl":
        starts = (ids[0, :-1] == START) & (ids[0, 1:] == VIDEO)
        times = starts.nonzero() - torch.tensor([[1, 2]])  # two tokens in front of every frame
        assert times.numel() == 8
        assert not took_part[0, times].any()
        beside = 1  # one of them might be of a time that is longer
    assert inside.sum() == words[0, first:last].sum() + beside
    assert (took_part[0, last:] | ~words[0, last:]).all()
