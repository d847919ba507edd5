"""Alignment in training: its place, what it moves, and what a probe says of it."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path

import forked
import pytest
import torch
import training_toy
from alignment_toy import sample
from training_toy import lines

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, cli
from attanchor_vlm.analysis.probe import DOES_NOT_FOLLOW, FOLLOWS
from attanchor_vlm.analysis.probe_control import permute_projector
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import read_rows, samples
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.training.alignment import (
    KEY,
    AlignedCollator,
    Aligner,
    CaptionLabels,
    aligner_for,
    image_alignment,
    read_captions,
)
from attanchor_vlm.training.lora import add_lora


def write_captions(folder, name: str, count: int, seed: int) -> None:
    """What `scenes.write_dataset` has drawn, in words."""
    drawn = scenes.draw_scenes(count, scenes.generator_for(seed))
    colours, shapes = (drawn.on_patches(kind).tolist() for kind in (drawn.colour, drawn.shape))
    texts = {}
    for number, (colour, shape) in enumerate(zip(colours, shapes, strict=True)):
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
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    loading.save_pretrained(permute_projector(model), processor, folder / "model")
    return folder


OPTIONS = {"val_data": None, "val_fraction": 0, "max_steps": 2, "eval_steps": 2, "tau": 0.2, "lr": 1e-2}
settings = functools.partial(training_toy.settings, **OPTIONS)
run = functools.partial(training_toy.run, **OPTIONS)


def logged(result, key):
    return [line[key] for line in result.log if key in line]


def test_a_short_alignment_moves_the_probe_from_one_verdict_to_the_other(tmp_path, monkeypatch, capsys):
    """As docs/align.md has it, block by block: before, and after 40 steps with captions, on scenes of their own."""
    page = (Path(__file__).parents[3] / "docs" / "align.md").read_text(encoding="utf-8")
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
    losses = [line["align_loss"] for line in lines(tmp_path / "runs" / "aligned") if "align_loss" in line]
    assert len(losses) == 40
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    # The page's table says what comes out.
    for probe, column in ((before, 1), (after, 2)):
        table = {row.split("|")[1].strip(): row.split("|") for row in page.splitlines() if row.startswith("| ")}
        assert table["verdict"][column + 1].strip() == probe["verdict"]
        assert float(table["falls with another's image"][column + 1]) == pytest.approx(
            probe["shuffled"]["drop"], abs=0.02
        )


def test_weight_zero_is_a_run_without(world, tmp_path):
    same = {"val_data": world / "val.json", "eval_steps": 2, "eval_batch_size": 64}
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
    same = {"val_data": world / "val.json", "eval_steps": 1, "eval_batch_size": 64}
    same |= {"max_steps": 1, "lr": 1e-9, "accumulation": accumulation}
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
    model, processor = loading.load_pretrained(str(world / "model"))
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
    model, processor = loading.load_pretrained(str(world / "model"))
    attach(model, AttAnchorConfig(tau=0.2))
    model = add_lora(model, rank=16, alpha=32, dropout=0.0).train()
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
    model = attach(small_llava.build_model(), AttAnchorConfig(tau=0.2)).train()
    batch = AlignedCollator(Collator(processor, "each"), aligner.labels)([sample(None, "Is it red?", "yes")])
    inputs = {name: value for name, value in batch.items() if name != KEY}
    with aligner.watching(model):
        assert float(aligner(model, batch, model(**inputs))) == 0


def test_clip_labels_train_a_model(world, clip_folder, tmp_path):
    (tmp_path / "words.txt").write_text("red\nblue\nring\nsquare\ndog\n")
    clip = {"align_clip": clip_folder, "align_words": tmp_path / "words.txt"}
    result = run(world, tmp_path / "run", align_weight=0.5, **clip, batch_size=3)
    assert all(loss > 0 for loss in logged(result, "align_loss"))
    assert len(logged(result, "align_loss")) == 2
    index = json.loads((tmp_path / "run" / "align-labels.json").read_text())
    assert index["words"] == ["red", "blue", "ring", "square", "dog"]
    assert len(index["images"]) == 60


def test_what_cannot_be_aligned_is_refused_before_training(world, tmp_path):
    (tmp_path / "other.json").write_text(json.dumps({"other.png": "a dog"}))
    with pytest.raises(DataError, match=r"other.json has no caption for any image of .*train.json"):
        run(world, tmp_path / "run", align_weight=1.0, align_labels=str(tmp_path / "other.json"))
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    model, processor = loading.load_pretrained(str(world / "model"))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("language_model" in name)
    with pytest.raises(SetupError, match="nothing of LlavaForConditionalGeneration's projector is trained"):
        aligner_for(settings(world, tmp_path / "x", align_weight=1.0), model, processor, ())


def command(words):
    assert cli.main(words) == 0


def test_two_processes_are_one_that_accumulates(world, tmp_path):
    """Under torchrun each process sees its own batch: losses and the norm of the gradient are those of one process that
    goes through both batches before its step."""
    options = {"--model": world / "model", "--data": world / "train.json", "--images": world / "images"}
    options |= {"--preset": "small-llava", "--tau": 0.2, "--max-steps": 2, "--batch-size": 4, "--val-fraction": 0}
    options |= {"--align-weight": 2.0, "--align-labels": world / "captions.json"}
    words = ["train", *(str(word) for pair in options.items() for word in pair)]
    assert forked.together(command, [*words, "--output", str(tmp_path / "two")]) == [0, 0]
    assert cli.main([*words, "--output", str(tmp_path / "one"), "--accumulation", "2"]) == 0
    two, one = lines(tmp_path / "two"), lines(tmp_path / "one")
    steps = [line for line in one if "loss" in line]
    assert len(steps) == 2
    for expected, line in zip(steps, two, strict=False):
        for name in ("loss", "align_loss", "grad_norm", "inserted_share"):
            assert line[name] == pytest.approx(expected[name], rel=1e-3), name
        assert line["align_loss"] > 0.5
