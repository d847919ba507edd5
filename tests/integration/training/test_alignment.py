"""Alignment: the loss by hand, labels from captions and from CLIP."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from alignment_toy import WORDS, sample
from PIL import Image
from tiny import VICUNA, byte_level_tokenizer, llava_processor, metaspace_tokenizer, tiny_llava
from transformers import CLIPModel, CLIPProcessor

from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import Sample
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.training.alignment import (
    CaptionLabels,
    ClipLabels,
    Votes,
    clip,
    clip_votes,
    image_alignment,
    label_tokens,
    patch_alignment,
    read_captions,
    read_word_list,
    two_way_contrast,
)

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


# --- Labels from CLIP. -----------------------------------------------------------------------------------------------


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
