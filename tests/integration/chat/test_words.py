"""Content words: function words and punctuation are left out of the anchors, from the text and from ids alone."""

from __future__ import annotations

import json

import pytest
import torch
from chats import KINDS, processor_of, user
from tiny import byte_level_tokenizer, metaspace_tokenizer, picture, tiny_llava
from training_toy import write_world

from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, cli, encode_chat, load_settings, with_tokens_of
from attanchor_vlm.analysis.calibrate import threshold_for_share
from attanchor_vlm.chat.words import FUNCTION_WORDS, content_spans, function_token_ids, read_words, words_to_leave_out
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import Sample
from attanchor_vlm.inference.explain import explain
from attanchor_vlm.model.candidates import mask_from_ids

QUESTION = "What is to the left of the red dog?"


def contents(text: str, *words: str) -> list[str]:
    return [text[start:end] for start, end in content_spans(text, *([frozenset(words)] if words else []))]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (QUESTION, ["left", "red", "dog"]),
        ("IS THE DOG red, or blue?!", ["DOG", "red", "blue"]),
        ("Isn't the dog's T-shirt blue, and can't you see 2 cats?", ["dog", "T", "shirt", "blue", "see", "2", "cats"]),
        ("I’ll say they’ve won’t-do attitudes", ["say", "attitudes"]),
        ("  \n…?! ", []),
        ("", []),
        ("3.5 % of __init__", ["3", "5", "__init__"]),
        ("Où est le chien ?", ["Où", "est", "le", "chien"]),
        ("狗在哪里？", ["狗在哪里"]),
        ("the", []),
        ("theatre offal within2", ["theatre", "offal", "within2"]),
        ("I cannot see it, it ain't red", ["see", "red"]),
    ],
)
def test_content_words_of_a_text(text, expected):
    assert contents(text) == expected


def test_the_list_holds_words_as_they_are_compared_and_no_content():
    assert contents(" ".join(FUNCTION_WORDS)) == []
    said = "two hundred red black colour dog left right"
    assert contents(said) == said.split()


@pytest.mark.parametrize(
    ("text", "words", "expected"),
    [
        ("Où est le chien ?", ["où", "est", "le"], ["chien"]),
        ("the dog", ["dog"], ["the"]),
        # Of scripts whose letters carry marks, and accents as characters of their own.
        ("कमरे में लाल कुत्ता", ["में"], ["कमरे", "लाल", "कुत्ता"]),
        ("cafe\u0301 la\u0300", ["la\u0300"], ["cafe\u0301"]),
        ("می\u200cشود گربه", ["می\u200cشود"], ["گربه"]),
    ],
)
def test_words_of_ones_own(text, words, expected):
    assert contents(text, *words) == expected


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_holds_the_tokens_of_content_words(kind):
    processor = processor_of(kind)
    chat, other = [user("<image>", QUESTION)], [user("<image>", "Is there a cat?", "And the sky.")]
    images = [[picture()], [picture()]]
    plain = encode_chat(processor, [chat, other], images)
    found = encode_chat(processor, [chat, other], images, content_words=True)
    assert torch.equal(plain["input_ids"], found["input_ids"])
    assert not (found["anchor_mask"] & ~plain["anchor_mask"]).any()
    for row, words in enumerate((["left", "red", "dog"], ["cat", "sky"])):
        ids = found["input_ids"][row][found["anchor_mask"][row]]
        said = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        if "unsplit" in kind:  # a token may reach over a space, and then brings a part of the next word
            assert all(word in said.replace(" ", "") for word in words)
        else:  # the tiny metaspace tokenizer has learned "dog?" as one token
            assert said.replace(" ", "").rstrip("?." * ("metaspace" in kind)) == "".join(words)
    assert found["anchor_mask"].sum() < plain["anchor_mask"].sum()


@pytest.mark.parametrize("kind", KINDS)
def test_a_list_of_words_leaves_out_those(kind):
    processor = processor_of(kind)
    chat = [user("<image>", QUESTION)]
    found = encode_chat(processor, chat, [picture()], content_words=["What", "is", "to", "the", "left", "of", "red"])
    said = processor.tokenizer.decode(found["input_ids"][0][found["anchor_mask"][0]])
    assert "dog" in said
    assert said.replace(" ", "").rstrip("?") == "dog" or "unsplit" in kind


def test_what_is_no_list_of_words_is_refused():
    chat = [user("<image>", QUESTION)]
    for words, error, message in (
        ("the", TypeError, "content_words is str; it should be True, False, or the function words"),
        ([1], TypeError, "content_words holds 1; it should hold words"),
        (["the dog"], ValueError, "content_words holds 'the dog'; it should hold single words"),
    ):
        with pytest.raises(error, match=message):
            encode_chat(processor_of("bytes-chatml"), chat, [picture()], content_words=words)
        with pytest.raises(error, match=message):
            AttAnchorConfig(tau=0.1, content_words=words)
    assert words_to_leave_out(False) is None
    assert words_to_leave_out(True) is FUNCTION_WORDS
    assert words_to_leave_out(["ที่", "में"]) == {"ที่", "में"}


@pytest.mark.parametrize("words", [True, ("der", "die", "das")])
def test_settings_keep_the_words(words):
    config = with_tokens_of(AttAnchorConfig(tau=0.1, content_words=words), byte_level_tokenizer())
    assert AttAnchorConfig.from_dict(config.to_dict()) == config
    assert config.content_words == (words if words is True else ("das", "der", "die"))
    assert config.function_token_ids
    assert with_tokens_of(AttAnchorConfig(tau=0.1), byte_level_tokenizer()).function_token_ids == ()


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_tokens_of_function_words(make):
    tokenizer = make()
    ids = set(function_token_ids(tokenizer, FUNCTION_WORDS))
    tokens = tokenizer.convert_ids_to_tokens(
        tokenizer(f"x {QUESTION} It is a cat.", add_special_tokens=False).input_ids
    )
    left_out = {token.strip("Ġ▁") for token in tokens if tokenizer.convert_tokens_to_ids(token) in ids}
    assert {"the", "is", "of", "to", "."} <= left_out
    assert not {"red", "dog", "left", "cat"} & left_out
    assert not ids & set(tokenizer.all_special_ids)
    # Without a space or a capital in front, "at" is the end of another word.
    cat = tokenizer("hat", add_special_tokens=False).input_ids
    assert not set(cat[1:]) & ids


@pytest.mark.parametrize("kind", ["bytes-chatml", "metaspace-vicuna"])
def test_from_ids_alone_the_same_words_are_left_out(kind):
    processor = processor_of(kind)
    config = with_tokens_of(AttAnchorConfig(tau=0.1, content_words=True), processor)
    batch = encode_chat(processor, [user("<image>", QUESTION)], [picture()], add_generation_prompt=True)
    words = encode_chat(
        processor, [user("<image>", QUESTION)], [picture()], add_generation_prompt=True, content_words=True
    )
    ids, real = batch["input_ids"], batch["attention_mask"].bool()
    image = ids == processor.image_token_id
    model = tiny_llava()
    mask = mask_from_ids(model, config, ids, real, image)
    assert mask[words["anchor_mask"]].all()  # no content word is missed
    extra = processor.tokenizer.convert_ids_to_tokens(ids[mask & ~words["anchor_mask"] & batch["anchor_mask"]])
    assert not {"the", "is", "of", "?"} & {token.strip("Ġ▁") for token in extra}
    without = mask_from_ids(model, with_tokens_of(AttAnchorConfig(tau=0.1), processor), ids, real, image)
    assert int(without.sum()) > int(mask.sum())


def test_from_ids_alone_the_tokens_must_be_known():
    model = attach(tiny_llava(), AttAnchorConfig(tau=-1, content_words=True))
    batch = {"input_ids": torch.tensor([[1] + [3] * 16 + [9, 10]]), "pixel_values": torch.zeros(1, 3, 16, 16)}
    with pytest.raises(ValueError, match=r"function_token_ids is empty: attach with with_tokens_of\(config, processor"):
        model(**batch)
    mask = torch.tensor([[False] * 17 + [True, False]])
    model(**batch, anchor_mask=mask)
    assert torch.equal(model.attanchor_plan.host >= 0, mask)


# --- Through training, calibration and looking. ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory, "random", train=(4, 0))


def command(world, name: str, *more) -> int:
    options = ["--model", world / "model", "--data", world / "train.json", "--images", world / "images", *more]
    return cli.main([name, *map(str, options)])


def test_training_keeps_the_setting_beside_the_adapter(world, tmp_path, monkeypatch):
    masks = []
    original = Collator.__call__

    def record(self, samples):
        batch = original(self, samples)
        masks.append((self, batch["input_ids"], batch["anchor_mask"]))
        return batch

    monkeypatch.setattr(Collator, "__call__", record)
    options = ["--preset", "small-llava", "--tau", "-1", "--max-steps", "1", "--batch-size", "2", "--val-fraction", "0"]
    assert command(world, "train", "--output", tmp_path / "run", *options, "--content-words") == 0
    settings = load_settings(tmp_path / "run")
    assert settings.content_words is True
    assert settings.function_token_ids
    assert masks
    collate, ids, mask = masks[0]
    said = collate.processor.tokenizer.decode(ids[mask]).lower().split()
    assert said
    assert not FUNCTION_WORDS & set(said)

    model = small_llava.build_model().eval()
    attach(model, settings)
    shown = explain(model, collate.processor, picture(), "where is the red ring ?")
    assert [match.text for match in shown.matches] == ["red", "ring"]


def test_words_of_ones_own_by_the_command_line(world, tmp_path, capsys):
    file = tmp_path / "words.txt"
    file.write_text("The IS  # an article and a verb\n\n# nothing\nwhere\n")
    assert read_words(file) == ("is", "the", "where")
    options = ["--preset", "small-llava", "--tau", "-1", "--max-steps", "1", "--batch-size", "2", "--val-fraction", "0"]
    assert command(world, "train", "--output", tmp_path / "run", *options, "--function-words", file) == 0
    assert load_settings(tmp_path / "run").content_words == ("is", "the", "where")
    capsys.readouterr()
    for more, code, message in (
        (["--function-words", file, "--content-words"], 2, "give one of --content-words and --function-words"),
        (["--function-words", tmp_path / "gone"], 1, "function words"),
    ):
        assert command(world, "train", "--output", tmp_path / "other", *options, *more) == code
        assert message in capsys.readouterr().err
    (tmp_path / "bad").write_text("don't\n")
    with pytest.raises(ValueError, match=r"content_words holds \"don't\""):
        read_words(tmp_path / "bad")
    (tmp_path / "empty").write_text("# none\n")
    with pytest.raises(ValueError, match="holds no word; write one a line"):
        read_words(tmp_path / "empty")


def test_asking_with_content_words_alone(world, capsys):
    image = next((world / "images").iterdir())
    asked = ["generate", "--model", world / "model", "--tau", -1, "--image", image]
    asked += ["--prompt", "where is the red ring ?"]
    counts = []
    for more in (["--content-words"], []):
        assert cli.main([*map(str, asked), "--max-new-tokens", "1", "--json", *more]) == 0
        counts.append(json.loads(capsys.readouterr().out)["candidates"])
    assert counts[1] > counts[0] == 2  # red, ring


def test_calibration_counts_the_tokens_that_take_part(world):
    processor = small_llava.build_processor()
    torch.manual_seed(0)
    model = small_llava.build_model()
    image = next((world / "images").iterdir())
    sample = Sample(0, (("user", "<image>\nwhere is the red ring ?"), ("assistant", "left")), (image,))
    num_candidates = []
    for words in (False, True):
        config = AttAnchorConfig(tau=1.0, content_words=words)
        num_candidates.append(len(threshold_for_share(model, processor, [sample], 0.5, config)[1]))
    assert num_candidates[0] > num_candidates[1] == 2  # red, ring
