"""The reader finds every kind of bad row before anything is trained, and batches hold what rows say."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm.data import batches as collate
from attanchor_vlm.data import rows as data
from attanchor_vlm.data.lengths import Growth, RowLengths, check_texts
from attanchor_vlm.data.videos import VideoFiles
from attanchor_vlm.errors import DataError


def row(image="a.png", question="<image>\nWhat is it?", answer="a cat", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": "1", "image": image, "conversations": turns, **more}


@pytest.fixture
def folder(tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg", "c.png"):
        Image.fromarray(pixels).save(images / name)
    return tmp_path


def write(folder, rows, name="data.json"):
    path = folder / name
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def turns(*pairs):
    return [{"from": speaker, "value": value} for speaker, value in pairs]


BAD_ROWS = {
    "missing image": (row(image="gone.png"), "gone.png does not exist"),
    "image without placeholder": (row(question="What is it?"), "0 <image> placeholders for 1 image"),
    "placeholder without image": (row(image=None), "1 <image> placeholder for 0 images"),
    "two placeholders": (row(question="<image><image>?"), "2 <image> placeholders for 1 image"),
    "placeholder in an answer": (row(question="What?", answer="<image> it"), "an answer, holds <image>"),
    "image is no name": (row(image=7), '"image" is 7'),
    "the image itself": (row(image="iVBORw0KGgo" * 500), "…'; it should be the name of a file (File name too long)"),
    "not an object": ("text", "the row is a str"),
    "no turns": ({"image": "a.png"}, '"conversations" is missing'),
    "empty turns": (row(conversations=[]), '"conversations" is missing or empty'),
    "turn without value": (
        row(conversations=[{"from": "human"}]),
        'turn 1 should be an object with "from" and "value"',
    ),
    "half a character": (row(question="<image>\nWhat \ud83d?"), r"turn 1 holds half a character, '\ud83d', at 13"),
    "unknown speaker": (row(conversations=turns(("bot", "hi"))), "turn 1 is \"from\" 'bot'"),
    "role is no text": (
        {"messages": [{"role": ["user"], "content": "a"}]},
        "turn 1 has \"role\" ['user']; it should be",
    ),
    "answer first": (row(conversations=turns(("gpt", "hi"))), "turn 1 is by the assistant"),
    "two questions": (row(conversations=turns(("human", "<image>a"), ("human", "b"))), "turn 2 is by the user"),
    "no answer": (row(conversations=turns(("human", "<image>a"))), "a question without an answer"),
    "empty answer": (row(answer=" "), "turn 2, an answer, is empty"),
    "image before a question": (row(conversations=turns(("system", "<image>"))), "turn 1, the system's, holds <image>"),
    "system alone": (row(image=None, conversations=turns(("system", "Be brief."))), "a question without an answer"),
    "system late": (
        row(conversations=turns(("human", "<image>a"), ("system", "Be brief."), ("gpt", "b"))),
        "turn 2 is by the system",
    ),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_named(folder, name):
    bad, reason = BAD_ROWS[name]
    path = write(folder, [row(), bad, row()])
    with pytest.raises(DataError) as caught:
        data.read_rows(path, folder / "images")
    first = str(caught.value).splitlines()[0]
    assert first.startswith(f"{path}, row 2: ")
    assert reason in first
    assert "1 of 3 rows are bad" in str(caught.value)
    assert "--skip-bad" in str(caught.value)
    assert [one.number for one in caught.value.bad] == [2]


@pytest.mark.parametrize("damage", ["not an image", "truncated png", "truncated jpg", "empty"])
def test_an_image_that_cannot_be_decoded_is_named(folder, damage, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)  # lmms-eval allows them where it was imported
    name = "b.jpg" if damage.endswith("jpg") else "c.png"
    file = folder / "images" / name
    whole = file.read_bytes()
    file.write_bytes({"not an image": b"hello", "empty": b""}.get(damage, whole[: len(whole) // 2]))
    path = write(folder, [row(), row(image=name)])
    with pytest.raises(DataError, match=rf"row 2: image .*{name}"):
        data.read_rows(path, folder / "images")
    for source in (file, file.read_bytes()):
        with pytest.raises(DataError, match=r"^image .* (cannot be read|is not an image that can be read)"):
            data.load_image(source)


def test_sixteen_bits_a_pixel_are_scaled_and_not_cut_off(folder):
    values = np.arange(0, 65536, 64, dtype=np.uint16).reshape(32, 32)
    Image.fromarray(values).save(folder / "images" / "deep.png")
    shown = np.asarray(data.load_image(folder / "images" / "deep.png"))
    assert shown.shape == (32, 32, 3)
    assert (shown == (values >> 8)[..., None]).all()
    assert (np.asarray(data.load_image(Image.fromarray(values))) == shown).all()


def test_photographs_stand_upright(folder):
    """As every program shows them: cameras note how they were held."""
    photo, exif = Image.new("RGB", (40, 20), "red"), Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "images" / "held.jpg", exif=exif)
    assert data.load_image(folder / "images" / "held.jpg").size == (20, 40)
    whole = (folder / "images" / "held.jpg").read_bytes()
    assert data.load_image(whole).size == (20, 40)
    damaged = whole.replace(b"Exif\x00\x00MM\x00*", b"Exif\x00\x00MM\x00!")
    assert damaged != whole
    assert data.load_image(damaged).size == (40, 20)  # the image itself is not


def test_skip_bad_keeps_the_good_and_lists_the_bad(folder):
    (folder / "images" / "c.png").write_bytes(b"")
    rows = [row(), row(image="c.png"), row(image="b.jpg"), row(answer="")]
    good, bad = data.read_rows(write(folder, rows), folder / "images", skip_bad=True)
    assert [one.number for one in good] == [1, 3]
    assert [one.number for one in bad] == [2, 4]
    with pytest.raises(DataError, match=r"no usable row.*row 1"):
        data.read_rows(write(folder, [row(image="gone.png")]), folder / "images", skip_bad=True)


def test_many_bad_rows_are_counted_not_all_printed(folder):
    with pytest.raises(DataError) as caught:
        data.read_rows(write(folder, [row(image="gone.png")] * 25), folder / "images")
    assert len(caught.value.bad) == 25
    assert len(str(caught.value).splitlines()) == 12
    assert "and 15 more" in str(caught.value)


@pytest.mark.parametrize(
    ("text", "name", "reason"),
    [
        ('[{"a": 1},\n {"b" 2}]', "data.json", "line 2, column 7: not valid JSON"),
        ('{"a": 1}', "data.json", "holds a JSON dict"),
        ('{"image": null}\n{nonsense\n', "data.jsonl", "line 2, column 2: not valid JSON"),
        ('{"a": 1}\n{"b": 2}\n', "data.json", "line 2, column 1: not valid JSON .*a row a line should be named .jsonl"),
        ('[{"a": 1}]', "data.jsonl", "data.jsonl holds a JSON list; a file of that name should hold a row a line"),
        ("[]", "data.json", "data.json has no usable row"),
        ("", "data.json", "line 1, column 1: not valid JSON"),
        ("", "data.jsonl", "data.jsonl has no usable row"),
    ],
)
def test_a_file_that_is_no_list_of_rows_is_refused(folder, text, name, reason):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=reason):
        data.read_rows(path, folder / "images")


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_a_mark_in_front_of_the_text_is_no_part_of_it(folder, name):
    text = json.dumps([row()] if name.endswith("json") else row())
    (folder / name).write_text(f"\ufeff{text}\r\n", encoding="utf-8")
    assert len(data.read_rows(folder / name, folder / "images")[0]) == 1


def test_rows_that_name_images_need_their_folder(folder):
    with pytest.raises(DataError, match=r"data\.json names images or videos, and no folder of them is given; give --"):
        data.read_rows(write(folder, [row()] * 3), None)
    text_only = {"conversations": turns(("human", "Hello"), ("gpt", "Hi"))}
    assert len(data.read_rows(write(folder, [text_only]), None)[0]) == 1


def test_a_line_of_json_lines_ends_at_its_newline_alone(folder):
    path = folder / "data.jsonl"
    path.write_text(json.dumps(row(answer="one\u2028two\x85"), ensure_ascii=False) + "\r\n", encoding="utf-8")
    rows, _ = data.read_rows(path, folder / "images")
    assert rows[0].messages[1][1] == "one\u2028two\x85"


def test_a_line_that_is_not_json_is_a_bad_row(folder):
    path = folder / "data.jsonl"
    path.write_text("\n".join([json.dumps(row()), "", "{nonsense", json.dumps(row())]), encoding="utf-8")
    good, bad = data.read_rows(path, folder / "images", skip_bad=True)
    assert [one.number for one in good] == [1, 3]
    assert [one.number for one in bad] == [2]
    assert "line 3, column 2: not valid JSON" in bad[0].reason


def test_missing_files_and_folders_are_named(folder):
    with pytest.raises(DataError, match=r"gone\.json cannot be read: No such file"):
        data.read_rows(folder / "gone.json", folder / "images")
    with pytest.raises(DataError, match="pictures is not a folder"):
        data.read_rows(write(folder, [row()]), folder / "pictures")
    (folder / "latin.json").write_bytes(b'["\xe9"]')
    with pytest.raises(DataError, match="not UTF-8"):
        data.read_rows(folder / "latin.json", folder / "images")


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_share_one_of_several_images_are_on_one_side(seed):
    names = [("a", "b"), ("b", "c"), ("d",), ("c",), ("e", "f"), ("f",), (), ("d",)]
    rows = [data.Row(number, (), images) for number, images in enumerate(names, start=1)]
    train, val = data.split_rows(rows, 0.3, seed)
    assert train
    assert val
    assert sorted(one.number for one in train + val) == list(range(1, 9))
    assert not {image for one in train for image in one.images} & {image for one in val for image in one.images}


def test_what_llava_instruct_holds_is_read(folder):
    several = row(
        conversations=turns(("human", "First?\n<image>"), ("gpt", "one"), ("human", "Second?"), ("gpt", "two"))
    )
    two_images = row(image=["a.png", "b.jpg"], question="<image><image>\nAlike?")
    text_only = {"conversations": turns(("human", "Hello"), ("gpt", "Hi"))}
    path = folder / "data.jsonl"
    path.write_text("\n".join(map(json.dumps, (several, two_images, text_only))) + "\n\n", encoding="utf-8")
    rows, bad = data.read_rows(path, folder / "images")
    assert not bad
    assert [len(one.images) for one in rows] == [1, 2, 0]
    assert data.parts(rows[0].messages[0][1]) == [{"type": "text", "text": "First?"}, {"type": "image"}]

    each = list(data.samples(rows[:1], "each"))
    assert [len(sample.messages) for sample in each] == [2, 4]
    assert [sample.messages[-1][1] for sample in each] == ["one", "two"]
    assert [len(sample.messages) for sample in data.samples(rows[:1], "all")] == [4]


def test_a_system_turn_stands_before_every_answer_of_its_row(folder):
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "First?"}]},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "Second?"},
        {"role": "assistant", "content": [{"type": "text", "text": "two"}]},
    ]
    rows, _ = data.read_rows(write(folder, [{"images": ["a.png"], "messages": messages}]), folder / "images")
    each = [sample.messages for sample in data.samples(rows, "each")]
    assert [len(said) for said in each] == [3, 5]
    assert {said[0] for said in each} == {("system", "Be brief.")}
    assert [said[-1] for said in each] == [("assistant", "one"), ("assistant", "two")]
    assert [sample.messages for sample in data.samples(rows, "all")] == each[1:]


def test_the_split_keeps_every_image_on_one_side():
    rows = [data.Row(n, (("user", "q"), ("assistant", "a")), (f"{n // 3}.png",)) for n in range(90)]
    train, validation = data.split_rows(rows, 0.2, seed=3)
    assert {r.images for r in train}.isdisjoint({r.images for r in validation})
    assert len(train) + len(validation) == 90
    assert 18 <= len(validation) <= 20
    assert data.split_rows(rows, 0.2, seed=3) == (train, validation)
    assert data.split_rows(rows, 0.2, seed=4) != (train, validation)
    assert data.split_rows(rows, 0, seed=3) == (rows, [])
    with pytest.raises(DataError, match="leaves no row to train on"):
        data.split_rows(rows[:3], 0.2, seed=0)


@pytest.fixture(scope="module")
def processor():
    return small_llava.build_processor()


def test_batches_learn_the_answer_and_offer_the_question(folder, processor):
    path = write(
        folder, [row(question="<image>\nWhere is the red ring?", answer="top left"), row(image="b.jpg", answer="yes")]
    )
    rows, _ = data.read_rows(path, folder / "images")
    batch = collate.Collator(processor, "each")(list(data.samples(rows, "each")))
    words = processor.tokenizer.convert_ids_to_tokens
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    assert words(ids[batch["anchor_mask"][0]].tolist()) == ["Where", "Ġis", "Ġthe", "Ġred", "Ġring", "?"]
    assert words(labels[labels != -100].tolist()) == ["Ġtop", "Ġleft", "</s>"]
    assert torch.equal(ids[labels != -100], labels[labels != -100])
    assert batch["pixel_values"].shape == (2, 3, small_llava.SIDE, small_llava.SIDE)
    assert not (batch["anchor_mask"] & (batch["labels"] != -100)).any()


def test_every_turn_or_the_last_is_learned(folder, processor):
    several = row(
        conversations=turns(
            ("human", "<image>\nIs there a ring?"), ("gpt", "yes"), ("human", "Where?"), ("gpt", "left")
        )
    )
    rows, _ = data.read_rows(write(folder, [several]), folder / "images")
    learned = {}
    for kind in ("each", "all"):
        batch = collate.Collator(processor, kind)(list(data.samples(rows, kind))[-1:])
        labels = batch["labels"][0]
        learned[kind] = processor.tokenizer.decode(labels[labels != -100], skip_special_tokens=True).split()
    assert learned == {"each": ["left"], "all": ["yes", "left"]}


def test_a_batch_of_text_alone_has_no_anchor_mask(processor):
    sample = data.Sample(1, (("user", "Hello"), ("assistant", "yes")), ())
    batch = collate.Collator(processor, "each")([sample])
    assert "anchor_mask" not in batch
    assert "pixel_values" not in batch


def test_rows_that_the_model_cannot_take_are_found_by_their_text(folder, processor):
    image = next((folder / "images").iterdir())
    rows = [
        data.Row(1, (("user", "<image>\nShort?"), ("assistant", "yes")), (image,)),
        data.Row(2, (("user", "<image>\n" + "word " * 60), ("assistant", "yes")), (image,)),
    ]
    cells = scenes.GRID**2
    lengths = RowLengths(processor)
    good, bad = check_texts("data.json", rows, lengths, cells + 40)
    assert [one.number for one in good] == [1]
    assert bad[0].number == 2
    assert f"more than the model's context, {cells + 40}" in str(bad[0])
    assert check_texts("data.json", rows, lengths, None) == (rows, [])

    def bad_of(context, growth=None):
        return [one.reason for one in check_texts("data.json", rows[:1], lengths, context, growth)[1]]

    # To the token, with what the template writes.
    batch = collate.Collator(processor, "each")(list(data.samples(rows[:1], "each")))
    length, asked = batch["input_ids"].shape[1], int(batch["anchor_mask"].sum())
    assert bad_of(length) == []
    assert bad_of(length - 1) == [f"{length} tokens with its images, more than the model's context, {length - 1}"]
    # The short one is too long as well if every word of its question may be copied, but not if only two may.
    (reason,) = bad_of(length, Growth())
    assert reason == (
        f"{length} tokens with its images and up to {asked} anchors, more than the model's context, {length}; "
        "max_anchors bounds them"
    )
    assert bad_of(length + 2, Growth(2)) == []
    # Pause tokens count too, and what is dropped makes room, also where the plain prompt has none.
    assert len(bad_of(length + 2, Growth(2, pauses=1))) == 1
    assert bad_of(length + 2, Growth(2, pauses=2, keep=cells - 2)) == []
    fewer = Growth(2, keep=cells - 8)
    assert bad_of(length - 6, fewer) == []
    (reason,) = bad_of(length - 7, fewer)
    assert reason.startswith(f"{length} tokens with its images, {length - 6} of which may be left by keep, more than")
    # Not where tokens keep the plain prompt's positions.
    assert len(bad_of(length - 1, dataclasses.replace(fewer, in_place=True))) == 1
    assert bad_of(length, dataclasses.replace(fewer, in_place=True)) == []


def test_frames_of_a_video_count(folder, processor, monkeypatch):
    """By a processor of nothing but frames, of three tokens each."""

    def encoded(processor, chat, images, videos, **options):
        length = 10 + 3 * sum(len(video.frames) for video in videos[0])
        return {"input_ids": torch.zeros(1, length), "anchor_mask": torch.ones(1, 5)}

    monkeypatch.setattr("attanchor_vlm.data.lengths.encode_chat", encoded)
    video = VideoFiles((next((folder / "images").iterdir()),) * 7)
    row = data.Row(1, (("user", "<video>\nShort?"), ("assistant", "yes")), (), (video,))
    lengths = RowLengths(processor)
    assert check_texts("data.json", [row], lengths, 31)[1] == []
    assert len(check_texts("data.json", [row], lengths, 30)[1]) == 1
    assert check_texts("data.json", [row], lengths, 36, Growth())[1] == []
    assert "31 tokens with its images and up to 5 anchors" in str(
        check_texts("data.json", [row], lengths, 35, Growth())[1]
    )


@pytest.mark.parametrize(
    ("copies", "added"),
    [
        ({"keep": 1.0}, 10),  # drops nothing
        ({"keep": 1000}, 10),
        ({"keep": 0.9}, 0),
        ({"keep": 98}, 6),  # of the first image alone
        ({"keep": 98, "budget": 3, "pauses": 2}, 2 + 3 - 4),
        ({"keep": 98, "budget": 3, "pauses": 2, "in_place": True}, 2),
        ({"budget": 0, "keep": 0.5, "pauses": 2}, 2 - 52),
        ({"of_images": True, "keep": 98}, 104 - 4),
    ],
)
def test_what_a_row_grows_by_at_the_most(copies, added):
    """10 tokens of text, images of 102 and 2 tokens."""
    assert Growth(**copies)(10, [102, 2]) == added
    assert Growth(**copies)(10, []) == 0
