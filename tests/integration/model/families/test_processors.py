"""From a chat and real images to an answer, by checkpoints on disk in the files that the Hub's have.

The machine has no torchvision: the processors of families that need it for videos are loaded without their videos.
"""

from __future__ import annotations

import json

import checkpoints
import pytest
import torch
import transformers
from builders import features
from checkpoints import picture
from tiny import plain
from transformers.utils import is_torchvision_available

from attanchor_lab.scenes import dataset as scenes
from attanchor_vlm import AttAnchorConfig, attach, cli, encode_chat, load_settings, with_tokens_of
from attanchor_vlm.data.batches import Collator, message
from attanchor_vlm.data.lengths import RowLengths, check_texts
from attanchor_vlm.data.rows import Row, samples
from attanchor_vlm.errors import SetupError
from attanchor_vlm.inference import ask as infer
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.load import load_pretrained
from attanchor_vlm.model.processors import load_processor

QUESTIONS = ["What is to the left of the red dog?", "Is there a cat in the picture?"]
VIDEO = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "llava_onevision", "smolvlm"]

every_processor = pytest.mark.parametrize("name", list(checkpoints.WRITERS))
further_ones_too = pytest.mark.parametrize("name", list(checkpoints.WRITERS | checkpoints.FURTHER))
without_torchvision = pytest.mark.skipif(is_torchvision_available(), reason="torchvision is installed")


@further_ones_too
def test_a_chat_is_answered_with_anchors_on_the_users_text(name, tmp_path, monkeypatch):
    model, processor = checkpoints.write(tmp_path, name, monkeypatch)
    parts = [[{"type": "image"}] * (row + 1) + [{"type": "text", "text": text}] for row, text in enumerate(QUESTIONS)]
    chats = [[{"role": "user", "content": part}] for part in parts]
    images = [[picture(0)], [picture(1), picture(2)]]
    batch, adapter = encode_chat(processor, chats, images, add_generation_prompt=True), adapter_for(model)
    rows = adapter.feature_rows(adapter.encode_images(model, batch))
    assert int(adapter.placeholders(model, batch["input_ids"]).sum()) == len(rows)

    attach(model, with_tokens_of(AttAnchorConfig(tau=-1), processor))
    output = model.generate(**batch, max_new_tokens=1, do_sample=False)
    plan = model.attanchor_plan
    for row, text in enumerate(QUESTIONS):
        asked = batch["input_ids"][row][batch["anchor_mask"][row]]
        assert processor.tokenizer.decode(asked) == text
        copied = plan.source[row][plan.is_anchor[row]].sort().values
        assert torch.equal(copied, batch["anchor_mask"][row].nonzero()[:, 0])
    with torch.no_grad():
        assert torch.equal(model(**batch).logits[:, -1].argmax(-1), output[:, -1])
        # From ids alone, what else is text behind the image takes part as well, but not what asks for the answer.
        model(**plain(batch))
    taken = torch.isfinite(model.attanchor_plan.score)
    assert taken[batch["anchor_mask"]].all()
    for row, text in enumerate(QUESTIONS):
        assert processor.tokenizer.decode(batch["input_ids"][row][taken[row]]).rstrip().endswith(text)


@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_old_files_that_do_not_say_how_many_tokens_an_image_takes(name, tmp_path, monkeypatch):
    """Those of early 2024 have no processor_config.json: the model's config says what they leave out."""
    _, expected = checkpoints.write(tmp_path, name, monkeypatch)
    own = json.loads((tmp_path / "processor_config.json").read_text())
    images = json.loads((tmp_path / "preprocessor_config.json").read_text())
    (tmp_path / "processor_config.json").unlink()
    old = {**images, "processor_class": own.pop("processor_class")}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(old))
    model, processor = load_pretrained(str(tmp_path))
    assert {setting: getattr(processor, setting) for setting in own} == own
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTIONS[0]}]}]
    batch, same = (encode_chat(one, chat, [picture(0)]) for one in (processor, expected))
    assert torch.equal(batch["input_ids"], same["input_ids"])
    assert int((batch["input_ids"] == model.config.image_token_id).sum()) == len(features(model, batch))


def test_a_chat_template_that_a_constructor_loses_is_given_back(tmp_path, monkeypatch):
    """Phi-4's takes none, and transformers hands it none."""
    _, processor = checkpoints.write(tmp_path, "llava", monkeypatch)
    template, processor.chat_template = processor.chat_template, None
    monkeypatch.setattr("attanchor_vlm.model.processors.AutoProcessor.from_pretrained", lambda *_, **__: processor)
    assert load_processor(str(tmp_path)).chat_template == template


@every_processor
def test_a_batch_is_its_questions_alone(name, tmp_path, monkeypatch):
    """One image, several of other shapes, and none, of questions of other lengths."""
    model, processor = checkpoints.write(tmp_path, name, monkeypatch)
    prompts = [QUESTIONS[0], "Is it in the first <image> or in the second <image> picture?"]
    images = [[picture(0)], [picture(1).resize((90, 50)), picture(2).resize((40, 100))]]
    if name != "paligemma":  # whose processor takes no question without an image
        prompts, images = [*prompts, "Why?"], [*images, []]
    attach(model, AttAnchorConfig(tau=-1, max_anchors=4))
    together = infer.answers(model, processor, prompts, images, max_new_tokens=4)
    assert together == [
        infer.answer(model, processor, prompt, own, max_new_tokens=4)
        for prompt, own in zip(prompts, images, strict=True)
    ]
    assert [answer.inserted for answer in together] == [4, 4, 0][: len(prompts)]


def test_an_image_that_the_processor_refuses_is_one_error(tmp_path, monkeypatch, capsys):
    checkpoints.write(tmp_path / "model", "qwen2_5_vl", monkeypatch)
    picture(0).resize((402, 1)).save(tmp_path / "narrow.png")
    arguments = ["--model", tmp_path / "model", "--tau", 0, "--prompt", "What?", "--image", tmp_path / "narrow.png"]
    assert cli.main(["generate", *map(str, arguments)]) == 1
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: Qwen2_5_VLProcessor does not take these images or texts: absolute aspect ratio")


@further_ones_too
def test_rows_are_as_long_as_their_batches(name, tmp_path, monkeypatch):
    """To the token: a row fits a context of its batch's length, and none that is shorter."""
    _, processor = checkpoints.write(tmp_path, name, monkeypatch)
    sizes = [(60, 40), (40, 100), (300, 90)]
    files = [tmp_path / f"{width}.png" for width, _ in sizes]
    for file, size in zip(files, sizes, strict=True):
        picture(0).resize(size).save(file)
    asked = (("user", "<image>\nWhat is it?"), ("assistant", " yes"))
    several = (("user", "<image>Is <image> this <image>?"), ("assistant", "no"))
    rows = [Row(1, asked, (files[0],)), Row(2, asked, (files[2],)), Row(3, several, tuple(files))]
    if name != "paligemma":  # which takes one question, with an image
        more = (*several, ("user", " And that \n? "), ("assistant", "a dog "))
        rows += [Row(4, more, tuple(files)), Row(5, (("user", "Why?"), ("assistant", "So.")), ())]
    collate, lengths = Collator(processor, "each"), RowLengths(processor)
    for row in rows:
        length = collate(list(samples([row], "each"))[-1:])["input_ids"].shape[1]
        assert check_texts(tmp_path, [row], lengths, length)[1] == []
        (bad,) = check_texts(tmp_path, [row], lengths, length - 1)[1]
        assert bad.reason.startswith(f"{length} tokens with its images, more than")


@pytest.mark.parametrize(
    ("name", "token"),
    [
        ("qwen2_5_vl", "<|video_pad|>"),
        ("gemma3", "<image_soft_token>"),
    ],
)
def test_rows_that_this_processor_cannot_take_are_found_before_a_run(name, token, tmp_path, monkeypatch):
    """A placeholder of any kind in a text and, of Qwen, an image that is far too narrow."""
    _, processor = checkpoints.write(tmp_path, name, monkeypatch)
    picture(0).save(tmp_path / "a.png")
    picture(0).resize((402, 1)).save(tmp_path / "narrow.png")
    rows = [
        Row(1, (("user", "<image>\nWhat?"), ("assistant", "yes")), (tmp_path / "a.png",)),
        Row(2, (("user", f"<image>\nWhat is {token} here?"), ("assistant", "yes")), (tmp_path / "a.png",)),
        Row(3, (("user", "<image>\nWhat?"), ("assistant", "yes")), (tmp_path / "narrow.png",)),
    ]
    good, bad = check_texts(tmp_path / "rows.json", rows, RowLengths(processor), None)
    reasons = {2: f"its text holds {token}, which is a placeholder of this model"}
    if name == "qwen2_5_vl":
        reasons[3] = "an image of 402 x 1 pixels is not taken: absolute aspect ratio"
    assert {one.number for one in good} == {1, 2, 3} - set(reasons)
    assert [one.number for one in bad] == list(reasons)
    for one in bad:
        assert one.reason.startswith(reasons[one.number])
    for row in good:  # and the others it takes
        encode_chat(processor, [[message(role, text) for role, text in row.messages]], [[picture(0)]])


@further_ones_too
def test_a_checkpoint_on_disk_is_trained_asked_and_measured_by_the_command_line(name, monkeypatch, tmp_path, capsys):
    """The last two with the adapter that came out: the model's path is all that the command line is told of it."""
    checkpoints.write(tmp_path / "model", name, monkeypatch)
    scenes.write_dataset(tmp_path, "train", 4, seed=0)
    rows = ["--data", tmp_path / "train.json", "--images", tmp_path / "images"]

    def says(command, *words):
        capsys.readouterr()
        assert cli.main([command, "--model", *map(str, [tmp_path / "model", *words])]) == 0
        return capsys.readouterr().out

    options = ["--output", tmp_path / "run", "--preset", "small-llava", "--tau", 0.0, "--max-steps", 2]
    says("train", *rows, *options, "--batch-size", 2, "--val-fraction", 0)
    assert load_settings(tmp_path / "run").tau == 0
    assert json.loads((tmp_path / "model" / "config.json").read_text())["model_type"] == name
    image, trained = next((tmp_path / "images").iterdir()), ["--adapter", tmp_path / "run", "--json"]
    asked = ["--prompt", "Where is the red ring?", "--image", image, "--max-new-tokens", 2]
    said = json.loads(says("generate", *asked, *trained))
    assert said["tau"] == 0
    assert said["candidates"] >= 6
    measured = json.loads(
        says("eval", *rows, "--metrics", "loss,rougeL", "--max-new-tokens", 2, "--limit", 3, *trained)
    )
    assert measured["samples"] == 3
    assert set(measured["values"]) == {"loss", "rougeL"}
    assert 0 < measured["figures"]["inserted_share"] < 1

    # The processor beside the adapter is whole enough to be loaded again.
    processor = load_processor(str(tmp_path / "model"))
    (tmp_path / "run" / "config.json").write_bytes((tmp_path / "model" / "config.json").read_bytes())
    again = load_processor(str(tmp_path / "run"))
    assert type(again).__name__ == type(processor).__name__
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()


@pytest.mark.parametrize("question", ["  What is it?\n", "What is it?"])
@pytest.mark.parametrize("name", ["gemma3", "qwen2_5_vl"])
def test_space_around_a_text_may_be_taken_away_by_the_template(name, question, tmp_path, monkeypatch):
    """Gemma's template trims texts, Qwen's does not; the mask holds the user's text either way."""
    _, processor = checkpoints.write(tmp_path, name, monkeypatch)
    chat = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": " A cube. "}]},
    ]
    batch = encode_chat(processor, chat, [picture(0)])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    said = processor.tokenizer.decode(batch["input_ids"][0][batch["anchor_mask"][0]])
    learned = processor.tokenizer.decode(batch["input_ids"][0][batch["labels"][0] != -100])
    said, learned = said.replace(" ", ""), learned.replace(" ", "")  # a token that is a space alone lies in no word
    if name == "gemma3":
        assert text.endswith("What is it?<end_of_turn>\n<start_of_turn>model\nA cube.<end_of_turn>\n")
        assert (said, learned) == ("Whatisit?", "Acube.<end_of_turn>")
    else:
        assert text.endswith(f"{question}<|im_end|>\n<|im_start|>assistant\n A cube. <|im_end|>\n")
        assert (said.strip(), learned) == ("Whatisit?", "Acube.<|im_end|>")


@without_torchvision
@pytest.mark.parametrize("name", VIDEO)
def test_without_torchvision_only_the_videos_are_missing(name, tmp_path, monkeypatch):
    _, processor = checkpoints.write(tmp_path, name, monkeypatch)
    with pytest.raises((ImportError, ValueError), match=r"(?i)torchvision"):
        transformers.AutoProcessor.from_pretrained(tmp_path)
    own = json.loads((tmp_path / "config.json").read_text())["model_type"]
    assert type(processor).__name__.replace("_", "").lower() == own.replace("_", "") + "processor"
    with pytest.raises(ValueError, match=r"videos are given, but .*Processor was loaded without torchvision"):
        processor(text="x", videos=[[picture(0)] * 2])
    processor.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "processor_config.json").read_text())
    assert saved["processor_class"] == type(processor).__name__
    # For a machine with torchvision: what was there for videos, which in these files is what there is for images.
    assert saved["video_processor"]["image_mean"] == [0.5] * 3


@without_torchvision
def test_a_processor_that_needs_torchvision_for_more_says_so(tmp_path, monkeypatch):
    checkpoints.write(tmp_path, "llava", monkeypatch)

    def refuse(*args, **kwargs):
        raise ImportError("\nFancyImageProcessor requires the Torchvision library but it was not found")

    monkeypatch.setattr("attanchor_vlm.model.processors.AutoProcessor.from_pretrained", refuse)
    with pytest.raises(SetupError, match="FancyImageProcessor requires the Torchvision library"):
        load_pretrained(str(tmp_path))
