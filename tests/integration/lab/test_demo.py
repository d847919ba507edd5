"""The demo's pieces: scenes whose answers are true, weights that align, a report that says what was measured."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
import torch
from lab_toy import objects, truth
from PIL import Image

from attanchor_lab import demo
from attanchor_lab.accuracy import Accuracy
from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_lab.small_llava import pretrain as stage1
from attanchor_vlm.constants import IGNORE_INDEX
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model import load as loading


@pytest.fixture(scope="module")
def shipped():
    return loading.load_pretrained(str(small_llava.SHIPPED))


def test_answers_are_true_of_the_scenes():
    generator = scenes.generator_for(5)
    drawn = scenes.draw_scenes(60, generator)
    counts = drawn.there.sum(1)
    assert counts.min() == 5
    assert counts.max() == 9
    seen = dict.fromkeys(scenes.KINDS, 0)
    adversarial = denied = 0
    for question in scenes.ask(drawn, generator):
        there = objects(drawn, question.scene)
        expected, (colour, shape) = truth(question.kind, re.findall(r"\w+", question.text), there, scenes.WORLD)
        assert question.answer == expected
        seen[question.kind] += 1
        if question.answer == "no":
            denied += 1
            adversarial += colour in {c for c, _ in there} and shape in {s for _, s in there}
    assert min(seen.values()) > 50
    assert 0.5 < adversarial / denied <= 1


def test_the_same_seed_writes_the_same_data(tmp_path):
    one, other = (scenes.write_dataset(tmp_path / name, "train", 3, seed=7) for name in ("a", "b"))
    assert one.read_bytes() == other.read_bytes()
    for path in sorted((tmp_path / "a" / "images").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / "images" / path.name).read_bytes()
    rows = json.loads(one.read_text())
    assert {row["kind"] for row in rows} == set(scenes.KINDS)
    assert rows[0]["conversations"][0]["value"].startswith("<image>\n")


def test_the_shipped_weights_align_words_and_patches(shipped):
    model, processor = shipped
    measured = stage1.alignment(model, processor, count=120, seed=987)
    assert measured["hit"] > 0.9
    assert measured["chance"] < 0.05
    assert 2e5 < sum(p.numel() for p in model.parameters()) < 1e6
    assert sum(path.stat().st_size for path in small_llava.SHIPPED.iterdir()) < 8e6


def test_the_shipped_tokenizer_has_every_word_as_one_token(shipped):
    _, processor = shipped
    for word in (*scenes.COLOURS, *scenes.SHAPES, scenes.EMPTY, "yes", "no", "top", "bottom", "left", "right"):
        assert small_llava.word_id(processor, word) != processor.tokenizer.unk_token_id
    with pytest.raises(ValueError, match="'hippopotamus' is"):
        small_llava.word_id(processor, "hippopotamus")


def test_packed_questions_lose_what_separate_ones_lose(shipped):
    """Stage 1 packs the questions of an image behind one copy of it: the block mask must keep them apart."""
    model, processor = shipped
    generator = scenes.generator_for(3)
    drawn = scenes.draw_scenes(2, generator)
    pixels = stage1.pixel_values(processor, scenes.render(drawn, generator))
    questions = scenes.ask(drawn, generator)
    packer = stage1._Packer(processor)

    @torch.no_grad()
    def answers(asked, count, features):
        ids, labels, positions, mask = packer.pack(asked, count)
        rows = model.get_input_embeddings()(ids).masked_scatter((ids == packer.image)[..., None], features)
        hidden = model.model.language_model(inputs_embeds=rows, attention_mask=mask, position_ids=positions)
        learned = labels[:, 1:] != IGNORE_INDEX
        return model.lm_head(hidden.last_hidden_state[:, :-1][learned])

    features = torch.stack(list(model.get_image_features(pixels).pooler_output)).detach()
    together = answers(questions, 2, features)
    apart = [
        answers([scenes.Question(q.kind, q.text, q.answer, 0)], 1, features[q.scene : q.scene + 1]) for q in questions
    ]
    torch.testing.assert_close(together, torch.cat(apart), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    output = tmp_path_factory.mktemp("demo") / "out"
    size = demo.Size(train_images=20, val_images=4, test_images=8, steps=4, batch_size=8)
    said: list[str] = []
    results = demo.run(output, size=size, say=said.append, progress=False)
    return output, size, results, said


def test_the_demo_leaves_its_table_and_pictures(finished):
    output, _, results, said = finished
    assert json.loads((output / "results.json").read_text()) == results
    for name in ("loss.png", "scenes.png", "photographs.png"):
        picture = np.asarray(Image.open(output / name).convert("RGB"))
        assert picture.shape[0] > 300
        assert picture.std() > 10
    text = "\n".join(said)
    for name in (demo.PLAIN, demo.TEXT_INTO_IMAGE, demo.IMAGE_INTO_TEXT, "validation loss", *scenes.KINDS, "inserted"):
        assert name in text
    for line in results["verdict"]:
        assert line in said
    assert [arm["name"] for arm in results["arms"]] == [demo.PLAIN, demo.TEXT_INTO_IMAGE, demo.IMAGE_INTO_TEXT]
    plain, text_into_image, image_into_text = results["arms"]
    assert plain["inserted_share"] == {"training": 0, "test": 0}
    assert plain["difference_to_plain"]["mean"] == 0
    for arm in (text_into_image, image_into_text):
        assert 0.02 < arm["inserted_share"]["test"] < 0.5


def test_the_demo_trains_by_the_command_that_it_prints(finished, tmp_path):
    from attanchor_vlm import cli

    _output, size, results, said = finished
    printed = next(line for line in said if "attanchor train" in line and "text_into_image" in line)
    arguments = printed.partition("attanchor ")[2].split()
    arguments[arguments.index("--output") + 1] = str(tmp_path / "again")
    assert cli.main(arguments) == 0
    again = json.loads((tmp_path / "again" / "run.json").read_text())["result"]
    assert again["steps"] == size.steps
    assert again["val_loss"] == pytest.approx(results["arms"][1]["val_loss"], rel=1e-5)


def test_words_of_the_photographs_go_to_patches(finished):
    _, _, results, _ = finished
    assert len(results["photographs"]) == len(demo.PHOTOGRAPHS)
    inserted = [
        token["text"] for one in results["photographs"] for token in one["tokens"] if token["patch"] is not None
    ]
    assert set(inserted) & {*scenes.COLOURS, *scenes.SHAPES}


def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "results.json").write_text("{}")
    demo.clear(tmp_path, {"data", "runs", "results.json", "loss.png"})
    assert not list(tmp_path.iterdir())
    (tmp_path / "thesis.tex").write_text("years of work")
    (tmp_path / "loss.png").write_text("old")
    with pytest.raises(SetupError, match=r"holds thesis.tex, which is no part of a demo"):
        demo.clear(tmp_path, {"data", "runs", "results.json", "loss.png"})
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_missing_is_said_before_an_earlier_demo_is_removed(tmp_path, monkeypatch):
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(SetupError, match="nowhere is not a folder"):
        demo.run(tmp_path, model="/nowhere", progress=False)
    monkeypatch.setitem(sys.modules, "skimage", None)
    with pytest.raises(SetupError, match="scikit-image"):
        demo.run(tmp_path, progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    with pytest.raises(ValueError, match="is not a folder"):
        stage1.make(tmp_path / "results.json" / "weights")


def of_marks(right):
    kinds = tuple(np.repeat(scenes.KINDS, 100).tolist())
    return Accuracy(kinds, tuple(np.asarray(right).tolist()), 0.1, 1.0)


@pytest.mark.parametrize(
    ("lost", "gained", "says"),
    [
        (30, 0, ("-10.0 points", "worse")),
        (0, 30, ("+10.0 points", "better")),
        (3, 2, ("-0.3 points", "no difference shown")),
    ],
)
def test_the_verdict_follows_the_numbers(lost, gained, says):
    plain = np.zeros(300, dtype=bool)
    plain[:100] = plain[200:250] = True
    anchored = plain.copy()
    anchored[200 : 200 + lost] = False  # of the place questions
    anchored[300 - gained :] = True
    arms = []
    for name, right in ((demo.PLAIN, plain), (demo.TEXT_INTO_IMAGE, anchored)):
        difference, error = of_marks(right).minus(of_marks(plain))
        arms.append({"name": name, "difference_to_plain": {"mean": difference, "standard_error": error}})
    line, caution = demo.verdict(arms)
    assert line.startswith(f"{demo.TEXT_INTO_IMAGE} − {demo.PLAIN}: {says[0]}, 95 % ")
    assert line.endswith(f": {says[1]}")
    assert "One seed" in caution


def test_paired_differences_have_the_textbook_error():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 300)) < [[0.7], [0.5]]
    difference, error = of_marks(a).minus(of_marks(b))
    pairs = (a.astype(float) - b).reshape(3, 100)
    assert difference == pytest.approx(pairs.mean())
    assert error == pytest.approx(np.sqrt((pairs.var(1) / 100).sum()) / 3)


def test_a_photograph_that_is_not_there_says_so():
    with pytest.raises(SetupError, match="does not ship the photograph 'mona_lisa'"):
        demo.photograph("mona_lisa")
