"""Alignment: the loss by hand, labels from captions and from CLIP, its place in training, and what a probe says."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VICUNA, byte_level_tokenizer, llava_processor, metaspace_tokenizer, tiny_llava
from transformers import CLIPConfig, CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from attanchor_vlm import AttAnchorConfig, attach, cli, loading, presets, scenes, small_llava, train
from attanchor_vlm.alignment import (
    KEY,
    AlignedCollator,
    Aligner,
    CaptionLabels,
    ClipLabels,
    Votes,
    aligner_for,
    clip,
    clip_votes,
    image_alignment,
    label_tokens,
    patch_alignment,
    read_captions,
    read_word_list,
    two_way_contrast,
)
from attanchor_vlm.collate import Collator
from attanchor_vlm.data import DataError, Sample, read_rows, samples
from attanchor_vlm.loading import SetupError
from attanchor_vlm.mixin import base_of
from attanchor_vlm.probe import DOES_NOT_FOLLOW, FOLLOWS, permute_projector, save

# --- The loss. -------------------------------------------------------------------------------------------------------


def test_the_contrast_by_hand():
    """Row 0 shows words 0 and 1, row 1 word 1, row 2 has no label; word 2 is right nowhere."""
    logits = torch.tensor([[2.0, 1.0, 0.5], [0.0, 1.5, -1.0], [9.0, 9.0, 9.0]])
    right = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.0, 0.0]])

    def against(one: float, *others: float) -> float:
        return -np.log(np.exp(one) / (np.exp(one) + sum(map(np.exp, others))))

    rows = [(against(2, 0.5) + against(1, 0.5)) / 2, against(1.5, 0, -1)]
    columns = [against(2, 0), 0.0]  # word 1 has no labelled row that is wrong for it
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert float(two_way_contrast(logits, right)) == pytest.approx(expected, rel=1e-5)


def test_the_weights_of_a_row_count_within_it():
    logits = torch.tensor([[2.0, 1.0, 0.0], [0.0, 0.0, 3.0]])
    once, twice = (torch.tensor([[0.9, 0.3, 0.0], [0.0, 0.0, scale]]) for scale in (1.0, 0.2))
    assert two_way_contrast(logits, once) == pytest.approx(float(two_way_contrast(logits, twice)))
    other = torch.tensor([[0.3, 0.9, 0.0], [0.0, 0.0, 1.0]])
    assert abs(float(two_way_contrast(logits, once) - two_way_contrast(logits, other))) > 0.01


def test_without_a_label_the_loss_is_zero_with_finite_gradients():
    patches = torch.randn(3, 8, requires_grad=True)
    loss = patch_alignment(patches, torch.randn(4, 8), torch.zeros(3, 4))
    loss.backward()
    assert float(loss.detach()) == 0
    assert patches.grad.abs().max() == 0
    assert float(patch_alignment(torch.randn(2, 8), torch.randn(0, 8), torch.zeros(2, 0))) == 0


def test_one_image_token_is_enough_for_a_word_and_one_elsewhere_is_too_many():
    generator = torch.Generator().manual_seed(0)
    words = torch.eye(16)[:2]
    background = torch.eye(16)[4:]

    def image(*shown: int) -> torch.Tensor:
        noise = background[torch.randint(12, (20,), generator=generator)]
        return torch.cat([words[list(shown)] + 0.1 * torch.randn(len(shown), 16, generator=generator), noise])

    right = torch.eye(2)
    good = image_alignment([image(0), image(1)], words, right)
    swapped = image_alignment([image(1), image(0)], words, right)
    both = image_alignment([image(0, 1), image(0, 1)], words, right)
    nothing = image_alignment([image(), image()], words, right)
    assert good < 0.01
    assert swapped > 5
    assert both == pytest.approx(float(np.log(2)), abs=0.2)
    assert nothing == pytest.approx(float(np.log(2)), abs=0.1)


@pytest.mark.parametrize("by_image", [True, False])
def test_gradients_reach_image_tokens_and_no_words(by_image):
    torch.manual_seed(0)
    patches, words = torch.randn(6, 8, requires_grad=True), torch.randn(3, 8, requires_grad=True)
    right = torch.eye(3)
    if by_image:
        loss = image_alignment(list(patches.split(2)), words, right)
    else:
        loss = patch_alignment(patches, words, right.repeat(2, 1))
    loss.backward()
    assert (patches.grad.abs().sum(1) > 0).all()
    assert words.grad is None
    # Cosines do not change with length, so the gradient has no part along it.
    assert (patches.grad * patches).sum(1).abs().max() < 1e-6


# --- Labels from text. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_labels_are_the_tokens_that_a_word_has_inside_a_sentence(make):
    tokenizer = make()
    inside = tokenizer("It is a red dog", add_special_tokens=False).input_ids
    content, other = label_tokens(tokenizer, "red dog. It is")
    assert content <= set(inside)
    assert set(tokenizer.convert_ids_to_tokens(sorted(content))) & {"Ġred", "▁red"}
    assert not content & other
    assert label_tokens(tokenizer, "") == (set(), set())


def sample(name: str | None, question: str, answer: str, row: int = 0) -> Sample:
    return Sample(row, (("user", question), ("assistant", answer)), (name,) if name else ())


def test_samples_of_one_image_share_their_labels():
    processor = small_llava.build_processor()
    word = {w: small_llava.word_id(processor, w) for w in ("red", "ring", "blue", "the")}
    made = CaptionLabels(processor.tokenizer)(
        [
            sample("a", "<image>\nWhat colour is the ring?", "red"),
            sample("a", "<image>\nIs the ring there?", "ring"),
            sample("b", "<image>\nWhat colour is it?", "the blue ring"),
            sample(None, "Is it red?", "red"),
        ],
        {},
    )
    words, right = made["words"].tolist(), made["right"]
    assert len(set(words)) == len(words) == right.shape[1]
    column = {name: right[:, words.index(token)].tolist() for name, token in word.items()}
    assert column["red"] == [1, 1, 0, 0]
    assert column["ring"] == [1, 1, 1, 0]
    assert column["blue"] == [0, 0, 1, 0]
    assert column["the"] == [0, 0, 0, 0]  # comes along, and is wrong for all


def test_captions_come_from_a_file(tmp_path):
    def written(name: str, value) -> dict:
        text = "\n".join(map(json.dumps, value)) if name.endswith("l") else json.dumps(value)
        (tmp_path / name).write_text(text)
        return {str(path): text for path, text in read_captions(tmp_path / name, tmp_path / "in").items()}

    a, b = str(tmp_path / "in" / "a.png"), str(tmp_path / "in" / "b.png")
    assert written("1.json", {"a.png": "a red ring", "b.png": ["dog", "grass"]}) == {a: "a red ring", b: "dog grass"}
    rows = [{"image": "a.png", "caption": "one"}, {"image": "a.png", "caption": "two"}]
    assert written("2.jsonl", rows) == written("2.json", rows) == {a: "one two"}
    coco = {
        "images": [{"id": 7, "file_name": "b.png"}],
        "annotations": [{"image_id": 7, "caption": "x"}, {"image_id": 7, "caption": "y"}],
    }
    assert written("3.json", coco) == {b: "x y"}
    for value, message in (
        ({"a.png": 3}, r"'a.png' has 3; a caption should be text"),
        ([{"image": "a.png"}], r"should be an object of image names"),
        ({}, "hold no caption"),
        ({"annotations": [{"image_id": 1, "caption": "x"}], "images": []}, "or COCO captions"),
    ):
        with pytest.raises(DataError, match=message):
            written("bad.json", value)
    (tmp_path / "broken.json").write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        read_captions(tmp_path / "broken.json", tmp_path)
    with pytest.raises(DataError, match="cannot be read: No such file"):
        read_captions(tmp_path / "gone.json", tmp_path)


def test_an_image_without_a_caption_is_not_labelled():
    processor = small_llava.build_processor()
    labels = CaptionLabels(processor.tokenizer, {"a": "red ring"})
    made = labels([sample("a", "<image>\nWhat?", "no"), sample("b", "<image>\nWhat?", "blue")], {})
    assert made["right"].sum(1).tolist() == [2, 0]
    assert labels.labelled([("a",), ("b",), ()]) == 1


# --- Labels from CLIP. -----------------------------------------------------------------------------------------------

WORDS = ["red", "dog", "sky", "small cube", "grey"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A tiny random CLIP with its processor: 4 x 4 patches."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    tokenizer = byte_level_tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id},
        vision_config={**sizes, "image_size": 16, "patch_size": 4},
        projection_dim=24,
        logit_scale_init_value=2.0,
    )
    model = CLIPModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.3)
    model.save_pretrained(folder)
    side = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=side), tokenizer).save_pretrained(folder)
    return folder


def pictures(folder, sizes=((20, 30), (40, 25))):
    generator = np.random.default_rng(0)
    paths = []
    for number, (height, width) in enumerate(sizes):
        paths.append(folder / f"{number}.png")
        Image.fromarray(generator.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    return paths


def test_clip_is_asked_once_and_for_the_whole_image(clip_folder, tmp_path, monkeypatch):
    paths = pictures(tmp_path)
    votes = clip_votes(clip_folder, WORDS, paths, tmp_path / "run", progress=False)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    with torch.no_grad():
        for path in paths:
            squeezed = Image.open(path).convert("RGB").resize((16, 16), Image.Resampling.BICUBIC)
            inputs = processor(
                text=[f"a photo of a {word}" for word in WORDS], images=squeezed, return_tensors="pt", padding=True
            )
            output = model(**inputs)
            hidden = model.vision_model(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
            layer = model.vision_model.encoder.layers[-1]
            values = layer.self_attn.out_proj(layer.self_attn.v_proj(layer.layer_norm1(hidden)))[0, 1:]
            patches = model.visual_projection(model.vision_model.post_layernorm(values))
            cosines = torch.cosine_similarity(patches[:, None], output.text_embeds[None], dim=-1)
            expected = (cosines * model.logit_scale.exp()).softmax(-1)
        kept = votes.of(path)
        assert kept.shape == (16, 5, 2)
        for patch in range(16):
            assert sorted(kept[patch, :, 0]) == [0, 1, 2, 3, 4]
            order = kept[patch, :, 0].astype(int)
            assert kept[patch, :, 1] == pytest.approx(expected[patch][order].numpy(), abs=2e-4)
            assert list(kept[patch, :, 1]) == sorted(kept[patch, :, 1], reverse=True)
    assert votes.of(tmp_path / "other.png") is None

    with monkeypatch.context() as patch:
        patch.setattr(clip, "_load", lambda path: pytest.fail("the images were labelled already"))
        again = clip_votes(clip_folder, WORDS, paths, tmp_path / "run", progress=False)
        assert np.array_equal(again.table, votes.table)
    changed = clip_votes(clip_folder, WORDS[:3], paths, tmp_path / "run", progress=False)
    assert changed.table.shape == (2, 16, 3, 2)


def test_only_a_clip_can_say_what_patches_show(tmp_path):
    with pytest.raises(SetupError, match="is not a folder"):
        clip_votes(tmp_path / "gone", WORDS, pictures(tmp_path), tmp_path, progress=False)
    tiny_llava().save_pretrained(tmp_path / "llava")
    llava_processor(byte_level_tokenizer(), VICUNA).save_pretrained(tmp_path / "llava")
    with pytest.raises(SetupError, match="it should be a CLIP-class model"):
        clip_votes(tmp_path / "llava", WORDS, pictures(tmp_path), tmp_path, progress=False)
    assert not (tmp_path / "align-labels.npy").exists()
    (tmp_path / "words.txt").write_text("# what there is\nred\n\nsmall cube  # two words\nred\n")
    assert read_word_list(tmp_path / "words.txt") == ["red", "small cube"]
    (tmp_path / "one.txt").write_text("red\n")
    with pytest.raises(SetupError, match="holds 1 words"):
        read_word_list(tmp_path / "one.txt")


def test_words_come_to_image_tokens_by_area():
    """A grid of 2 x 2 in an image of 8 x 4 pixels, and regions that lie across it."""
    kept = np.zeros((4, 2, 2), np.float32)
    kept[:, :, 0] = [[0, 1], [1, 0], [2, 0], [0, 2]]
    kept[:, :, 1] = [[0.7, 0.3], [1.0, 0.0], [0.6, 0.4], [0.5, 0.5]]
    regions = np.array([[0, 0, 4, 2], [2, 0, 6, 2], [0, 0, 8, 4], [3.0, 1.0, 5.0, 3.0]], dtype=float)
    found = clip._words_under(kept, regions, (8, 4))
    whole = {1: 0.325, 0: 0.4, 2: 0.275}
    for expected, words in zip(({0: 0.7, 1: 0.3}, {0: 0.35, 1: 0.65}, whole, whole), found, strict=True):
        assert words == pytest.approx(expected)


def test_clip_labels_are_tokens_at_the_tokens_of_the_image(tmp_path):
    """Upper half of the image "red", lower half "small cube", seen through a model that crops its middle."""
    (path,) = pictures(tmp_path, ((32, 16),))
    table = np.zeros((1, 16, 5, 2), np.uint16)
    table[0, :8, 0], table[0, 8:, 0] = (0, 65535), (3, 65535)
    model, processor = tiny_llava(), llava_processor(byte_level_tokenizer(), VICUNA)
    labels = ClipLabels(processor, model, Votes(WORDS, [path], table))
    asked = [
        Sample(0, (("user", "<image>\nWhat is the dog?"), ("assistant", "red")), (path,)),
        Sample(1, (("user", "What is red?"), ("assistant", "no")), ()),
    ]
    batch = Collator(processor, "each")(asked)
    model.config.image_token_id = processor.image_token_id
    made = labels(asked, batch)
    words, right = made["words"].tolist(), made["right"]
    red, cube = (sorted(label_tokens(processor.tokenizer, word)[0]) for word in ("red", "small cube"))
    assert right.shape == (16, len(words))
    for token in red:
        if token not in cube:
            assert right[:, words.index(token)].tolist() == [1] * 8 + [0] * 8
    for token in cube:
        if token not in red:
            assert right[:, words.index(token)].tolist() == [0] * 8 + [1] * 8
    assert len(cube) > 1  # every piece of a word is a label
    assert right.sum(0)[len(set(red) | set(cube)) :].abs().max() == 0


# --- In training. ----------------------------------------------------------------------------------------------------


def write_captions(folder, name: str, count: int, seed: int) -> None:
    """What `scenes.write_dataset` has drawn, in words."""
    drawn = scenes.draw_scenes(count, np.random.default_rng(seed))
    texts = {}
    for number, (colour, shape) in enumerate(zip(drawn.colour, drawn.shape, strict=True)):
        objects = [f"a {scenes.COLOURS[c]} {scenes.SHAPES[s]}" for c, s in zip(colour, shape, strict=True) if s >= 0]
        texts[f"{name}-{number:05d}.png"] = ", ".join(objects)
    (folder / "captions.json").write_text(json.dumps(texts))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes with captions, and the shipped model with its projector's output permuted: one without alignment."""
    folder = tmp_path_factory.mktemp("world")
    scenes.write_dataset(folder, "train", 60, seed=0)
    write_captions(folder, "train", 60, seed=0)
    scenes.write_dataset(folder, "val", 2, seed=2)
    model, processor = loading.load(str(small_llava.SHIPPED))
    save(permute_projector(model), processor, folder / "unaligned")
    return folder


def settings(world, output, **more):
    names = {field.name for field in dataclasses.fields(presets.Preset)}
    method = {name: more.pop(name) for name in list(more) if name in names}
    defaults = {
        "model": str(world / "unaligned"),
        "data": world / "train.json",
        "images": world / "images",
        "val_fraction": 0,
        "max_steps": 2,
    }
    method = {"tau": 0.2, "batch_size": 4, "lr": 1e-2, **method}
    return presets.TrainSettings(output=output, preset=presets.preset("small-llava", **method), **{**defaults, **more})


def run(*args, **kwargs):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return train.run(settings(*args, **kwargs), say=lambda line: None, progress=False)
    finally:
        torch.set_num_threads(threads)


def logged(result, key):
    return [line[key] for line in result.log if key in line]


def test_a_short_alignment_moves_the_probe_from_one_verdict_to_the_other(tmp_path, monkeypatch, capsys):
    """As docs/align.md has it, block by block: before, and after 40 steps with captions, on scenes of their own."""
    page = (Path(__file__).parents[2] / "docs" / "align.md").read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--output", "sample"]) == 0
    probes = []
    for kind, block in re.findall(r"```(python|sh)\n(.*?)```", page, re.DOTALL):
        if kind == "python":
            exec(compile(block, "docs/align.md", "exec"), {})
            continue
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words or any("PATH" in word for word in words):
                continue  # for a real checkpoint
            assert words[0] == "attanchor"
            capsys.readouterr()
            json_too = ["--json"] if words[1] == "probe" and "--save-control" not in words else []
            assert cli.main([*words[1:], *json_too]) == 0
            if json_too:
                probes.append(json.loads(capsys.readouterr().out))
    before, after = probes
    assert (before["verdict"], after["verdict"]) == (DOES_NOT_FOLLOW, FOLLOWS)
    assert after["shuffled"]["low"] > before["shuffled"]["drop"]
    assert after["shuffled"]["effect"] > 2 * before["shuffled"]["effect"] + 0.1
    assert after["kinds"]["content"]["mean"] > 1.5 * before["kinds"]["content"]["mean"]
    assert after["content_at_tau"] > before["content_at_tau"]
    losses = [
        line["align_loss"]
        for line in map(json.loads, (tmp_path / "runs/aligned/log.jsonl").read_text().splitlines())
        if "align_loss" in line
    ]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    # The page's table says what comes out.
    for probe, column in ((before, 1), (after, 2)):
        table = {row.split("|")[1].strip(): row.split("|") for row in page.splitlines() if row.startswith("| ")}
        assert table["verdict"][column + 1].strip() == probe["verdict"]
        assert float(table["falls with another's image"][column + 1]) == pytest.approx(
            probe["shuffled"]["drop"], abs=0.02
        )


@pytest.mark.parametrize("tau", [0.2, 1.0])
def test_weight_zero_is_a_run_without(world, tmp_path, tau):
    same = {"val_data": world / "val.json", "eval_steps": 2, "eval_batch_size": 64, "tau": tau}
    plain = run(world, tmp_path / "plain", **same)
    zero = run(world, tmp_path / "zero", align_weight=0.0, align_labels=str(world / "captions.json"), **same)
    timing = ("train_runtime", "eval_runtime", "per_second", "total_flos")
    kept = [
        [{k: v for k, v in line.items() if not any(t in k for t in timing)} for line in result.log]
        for result in (plain, zero)
    ]
    assert kept[0] == kept[1]
    assert "align_loss" not in kept[0][0]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_first_step_adds_the_alignment_to_the_loss_of_the_answers_and_to_no_validation(
    world, tmp_path, accumulation
):
    """With accumulation, the mean over the step's batches; and the weight scales it, gradient and all."""
    same = {
        "val_data": world / "val.json",
        "max_steps": 1,
        "eval_steps": 1,
        "eval_batch_size": 64,
        "lr": 1e-9,
        "accumulation": accumulation,
    }
    plain = run(world, tmp_path / "plain", **same)
    seen = []
    original = AlignedCollator.__call__

    def remember(self, batch):
        seen.append(batch)
        return original(self, batch)

    captions = {"align_labels": str(world / "captions.json")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(AlignedCollator, "__call__", remember)
        one = run(world, tmp_path / "one", align_weight=1.0, **captions, **same)
    (answers,), (loss,), (align,) = logged(plain, "loss"), logged(one, "loss"), logged(one, "align_loss")
    assert align > 0.5
    assert loss == pytest.approx(answers + align, rel=1e-5)
    assert logged(one, "eval_loss") == pytest.approx(logged(plain, "eval_loss"), rel=1e-6)
    assert all("align_loss" not in line for line in one.log if "eval_loss" in line)
    if accumulation == 1:
        three = run(world, tmp_path / "three", align_weight=3.0, **captions, **same)
        assert logged(three, "align_loss") == pytest.approx([3 * align], rel=1e-5)
    # Counted anew, batch by batch, on the model as it was.
    model, processor = loading.load(str(world / "unaligned"))
    labels = CaptionLabels(processor.tokenizer, read_captions(world / "captions.json", world / "images"))
    values = []
    with torch.no_grad():
        for batch in seen[:accumulation]:
            made = labels(batch, {})
            pixels = Collator(processor, "each")(batch)["pixel_values"]
            features = list(model.get_image_features(pixels).pooler_output)
            words = model.get_input_embeddings()(made["words"])
            values.append(float(image_alignment(features, words, made["right"])))
    assert align == pytest.approx(sum(values) / accumulation, rel=1e-4)


def test_only_the_projector_gets_a_gradient_from_the_alignment(world):
    model, processor = loading.load(str(world / "unaligned"))
    attach(model, AttAnchorConfig(tau=0.2))
    model = loading.add_lora(model, presets.PRESETS["small-llava"]).train()
    rows, _ = read_rows(world / "train.json", world / "images")
    aligner = Aligner(CaptionLabels(processor.tokenizer, read_captions(world / "captions.json", world / "images")), 1.0)
    batch = AlignedCollator(Collator(processor, "each"), aligner.labels)(list(samples(rows[:8], "each")))
    inputs = {name: value for name, value in batch.items() if name != KEY}
    with aligner.watching(model):
        aligner_loss = aligner(model, batch, model(**inputs))
    aligner_loss.backward()
    reached = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached
    assert all("multi_modal_projector" in name for name in reached)
    assert "get_image_features" not in vars(base_of(model).base_model)
    with pytest.raises(RuntimeError, match="past get_image_features"):
        aligner(model, batch, model(**inputs))


def test_a_batch_without_images_has_no_alignment():
    processor = small_llava.build_processor()
    aligner = Aligner(CaptionLabels(processor.tokenizer), 1.0)
    torch.manual_seed(0)
    model = attach(small_llava.build_model(processor), AttAnchorConfig(tau=0.2)).train()
    batch = AlignedCollator(Collator(processor, "each"), aligner.labels)([sample(None, "Is it red?", "yes")])
    inputs = {name: value for name, value in batch.items() if name != KEY}
    with aligner.watching(model):
        assert float(aligner(model, batch, model(**inputs))) == 0


def test_clip_labels_train_a_model(world, clip_folder, tmp_path):
    (tmp_path / "words.txt").write_text("red\nblue\nring\nsquare\ndog\n")
    result = run(
        world,
        tmp_path / "run",
        align_weight=0.5,
        align_clip=clip_folder,
        align_words=tmp_path / "words.txt",
        batch_size=3,
    )
    assert all(loss > 0 for loss in logged(result, "align_loss"))
    assert len(logged(result, "align_loss")) == 2
    index = json.loads((tmp_path / "run" / "align-labels.json").read_text())
    assert index["words"] == ["red", "blue", "ring", "square", "dog"]
    assert len(index["images"]) == 60


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"align_labels": "c.json"}, "align_labels is c.json, but there is no align_weight"),
        ({"align_clip": "clip"}, "align_clip is clip, but there is no align_weight"),
        ({"align_weight": -1.0}, "align_weight is -1.0; it should be a number of at least 0"),
        ({"align_weight": float("nan")}, "align_weight is nan"),
        ({"align_weight": 1.0, "align_temperature": 0.0}, "align_temperature is 0.0; it should be greater than 0"),
        ({"align_weight": 1.0, "align_clip": "clip"}, "align_clip and align_words belong together"),
        (
            {"align_weight": 1.0, "align_clip": "clip", "align_words": "w", "align_labels": "c.json"},
            "labels come from the one or the other",
        ),
        ({"align_weight": 1.0, "batch_size": 1}, "batch_size is 1 with align_labels"),
        ({"align_weight": 1.0, "align_labels": "c.json", "images": None}, "images are inside the rows"),
    ],
)
def test_settings_that_make_no_sense_are_refused(world, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        settings(world, tmp_path, **change)


def test_what_cannot_be_aligned_is_refused_before_training(world, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"other.png": "a dog"}))
    with pytest.raises(DataError, match=r"other.json has no caption for any image of .*train.json"):
        run(world, tmp_path / "run", align_weight=1.0, align_labels=str(tmp_path / "other.json"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    model, processor = loading.load(str(world / "unaligned"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name)
    with pytest.raises(SetupError, match="nothing of LlavaForConditionalGeneration's projector is trained"):
        aligner_for(settings(world, tmp_path / "x", align_weight=1.0), model, processor, ())


def test_the_command_takes_the_options(world, tmp_path, capsys):
    arguments = ["train", "--model", world / "unaligned", "--data", world / "train.json", "--images", world / "images"]
    arguments += ["--output", tmp_path / "run", "--preset", "small-llava", "--tau", "0.5", "--max-steps", "1"]
    arguments += ["--batch-size", "4", "--val-fraction", "0", "--align-weight", "0.5"]
    assert cli.main([str(a) for a in [*arguments, "--align-labels", world / "captions.json"]]) == 0
    stored = json.loads((tmp_path / "run" / "run.json").read_text())["settings"]
    assert (stored["align_weight"], stored["align_labels"]) == (0.5, str(world / "captions.json"))
    assert any("align_loss" in line for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines())
    capsys.readouterr()
    assert cli.main([str(a) for a in [*arguments[:-2], "--align-clip", "clip"]]) == 1
    assert "there is no align_weight" in capsys.readouterr().err


def test_two_processes_are_one_that_accumulates(world, tmp_path):
    """Under torchrun each process sees its own batch: losses and the norm of the gradient are those of one process that
    goes through both batches before its step."""
    options = {"--model": world / "unaligned", "--data": world / "train.json", "--images": world / "images"}
    options |= {"--preset": "small-llava", "--tau": 0.2, "--max-steps": 2, "--batch-size": 4, "--val-fraction": 0}
    options |= {"--align-weight": 2.0, "--align-labels": world / "captions.json"}
    words = ["train", *(str(word) for pair in options.items() for word in pair)]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    together = [*launcher, "-m", "attanchor_vlm.cli", *words, "--output", str(tmp_path / "two")]
    done = subprocess.run(
        together, capture_output=True, text=True, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert cli.main([*words, "--output", str(tmp_path / "one"), "--accumulation", "2"]) == 0
    two, one = (
        [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("two", "one")
    )
    steps = [line for line in one if "loss" in line]
    assert len(steps) == 2
    for expected, line in zip(steps, two, strict=False):
        for name in ("loss", "align_loss", "grad_norm", "inserted_share"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3), name
        assert line["align_loss"] > 0.5
