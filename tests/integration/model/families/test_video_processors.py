"""Videos through the families' own processors, from frames to boxes. These need torchvision; all else is tested without
it, in `test_family_video.py`, on tensors in the shapes that they make."""

from __future__ import annotations

import json

import checkpoints
import numpy as np
import pytest
import torch
from checkpoints import IMAGENET, SQUARE
from PIL import Image
from tiny_families import QWEN_PATCH, SIDE
from torch import nn

from attanchor_vlm import AttAnchorConfig, attach, cli, encode_chat
from attanchor_vlm.chat.videos import Video
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.lengths import RowLengths, check_texts
from attanchor_vlm.data.rows import Row, samples
from attanchor_vlm.data.videos import VideoFiles
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.geometry import image_slots, patch_boxes
from attanchor_vlm.model.media import encode

pytest.importorskip("torchvision", reason="transformers' video processors need it")

PROCESSORS = {
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
    "smolvlm": "SmolVLMVideoProcessor",
}
FOLDED = {"internvl", "smolvlm"}  # frames are images of the prompt
TEXTS = ["Look at", "What is the red dog?"]


@pytest.fixture(params=PROCESSORS)
def loaded(request, tmp_path, monkeypatch):
    name = request.param
    video = "{% elif p['type'] == 'video' %}<video>\n{% else %}{{ p['text'] }}"
    monkeypatch.setattr(checkpoints, "CHATML", checkpoints.CHATML.replace("{% else %}{{ p['text'] }}", video))
    monkeypatch.setattr(checkpoints, "INTERNVL", checkpoints.CHATML.replace("<image>", "<IMG_CONTEXT>"))
    smol = "{% elif line['type'] == 'video' %}{{ '<video>' }}{% elif line['type'] == 'image' %}"
    smol = checkpoints.SMOLVLM.replace("{% elif line['type'] == 'image' %}", smol)
    monkeypatch.setattr(checkpoints, "SMOLVLM", smol)
    own = {"video_processor_type": PROCESSORS[name], "size": SQUARE, **IMAGENET}
    if "qwen" in name:
        own |= {"patch_size": QWEN_PATCH, "temporal_patch_size": 2, "merge_size": 2}
        own["size"] = {"shortest_edge": 256, "longest_edge": 6144}
    if name == "smolvlm":
        own |= {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}, "fps": 1}
        own |= {"num_frames": 64, "video_sampling": {"video_size": {"longest_edge": SIDE}, "max_frames": 64, "fps": 1}}
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "video_preprocessor_config.json").write_text(json.dumps(own), encoding="utf-8")
    return name, *checkpoints.write(tmp_path / "model", name, monkeypatch)


def noise(count: int, seed: int = 0) -> list[Image.Image]:
    pixels = np.random.default_rng(seed).integers(0, 255, (count, 40, 60, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in pixels]


def asked(processor, media, **options):
    kinds = [{"type": "video" if isinstance(one, Video) else "image"} for one in media]
    words = [{"type": "text", "text": text} for text in TEXTS]
    images, videos = ([one for one in media if isinstance(one, Video) == wanted] for wanted in (False, True))
    chat = [{"role": "user", "content": [words[0], *kinds, words[1]]}]
    return encode_chat(processor, [chat], [images], videos=[videos], **{"add_generation_prompt": True, **options})


def test_the_times_of_frames_are_no_candidates(loaded):
    _, model, processor = loaded
    batch = asked(processor, [Video(noise(4))])
    chosen = batch["input_ids"][0][batch["anchor_mask"][0]]
    assert processor.tokenizer.decode(chosen) == "".join(TEXTS)
    attach(model, AttAnchorConfig(tau=-1))
    model.generate(**batch, max_new_tokens=2, do_sample=False)
    hosts = model.attanchor_plan.host[batch["anchor_mask"]].tolist()
    assert set(hosts) <= set(image_slots(model, batch, 0))


def test_rows_with_videos_are_as_long_as_their_batches(loaded, tmp_path):
    _, _, processor = loaded
    files = tuple(tmp_path / f"{number}.png" for number in range(4))
    for file, frame in zip(files, noise(4), strict=True):
        frame.save(file)
    collate, lengths = Collator(processor, "each"), RowLengths(processor)
    turns = (("user", "<video>\nWhat is it?"), ("assistant", "yes"))
    for count, fps in ((4, 2.0), (2, 2.0), (4, 0.05)):
        row = Row(1, turns, (), (VideoFiles(files[:count], fps),))
        length = collate(list(samples([row], "each")))["input_ids"].shape[1]
        assert check_texts(tmp_path, [row], lengths, length)[1] == []
        (bad,) = check_texts(tmp_path, [row], lengths, length - 1)[1]
        assert bad.reason.startswith(f"{length} tokens with its images, more than")


def test_a_box_is_where_its_token_looks(loaded):
    """Painting a token's box, in the frames of its step, changes its features most; and nothing of other steps."""
    name, model, processor = loaded
    with torch.no_grad():  # without attention a feature depends on its own patches
        for tower in [adapter_for(model).vision_tower(model)]:
            for key, parameter in tower.named_parameters():
                if key.endswith(("out_proj.weight", "out_proj.bias", "attn.proj.weight", "attn.proj.bias")):
                    nn.init.zeros_(parameter)
    frames = noise(4)
    media = [Video(frames)] if name in FOLDED else [noise(1, 1)[0], Video(frames)]

    def features(frames):
        batch = asked(processor, [*media[:-1], Video(frames)])
        with torch.no_grad():
            return batch, encode(model, adapter_for(model), batch).rows

    batch, before = features(frames)
    boxes = patch_boxes(model, processor, batch, 0, [media])
    assert len(boxes) == len(before) == len(image_slots(model, batch, 0))
    steps = sorted({box.frame for box in boxes if box.frame is not None})
    assert steps == ([0, 2] if "qwen" in name else [0, 1, 2, 3])
    for number, box in list(enumerate(boxes))[::3]:
        if box.video is None or box.pixels is None:
            continue
        x0, y0, x1, y1 = (round(value) for value in box.pixels)
        painted = [frame.copy() for frame in frames]
        for frame in range(box.frame, box.frame + (2 if "qwen" in name else 1)):
            painted[frame].paste((255, 0, 0), (x0 + 2, y0 + 2, x1 - 2, y1 - 2))
        changed = (features(painted)[1] - before).norm(dim=-1)
        assert int(changed.argmax()) == number
        others = [n for n, other in enumerate(boxes) if other.frame != box.frame]
        assert float(changed[others].max()) < 1e-5


def test_explain_shows_frames(loaded, tmp_path, capsys):
    (tmp_path / "clip").mkdir()
    for number, frame in enumerate(noise(4)):
        frame.save(tmp_path / "clip" / f"{number}.png")
    command = ["generate", "--model", tmp_path / "model", "--tau", -1, "--prompt", TEXTS[1], "--json"]
    command += ["--video", tmp_path / "clip", "--explain", tmp_path / "anchors.png", "--max-new-tokens", 2]
    assert cli.main([str(part) for part in command]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["inserted"] == said["candidates"] > 5
    for one in said["anchors"]:
        assert one["video"] == 0
        assert one["where"].startswith(f"video 1, frame {one['frame'] + 1}, ")
    assert Image.open(tmp_path / "anchors.png").height > 300
