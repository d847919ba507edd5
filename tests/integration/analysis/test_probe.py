"""The probe: its cosines are those of the matching, its verdict tells a model that matches from one that does not."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import VICUNA, byte_level_tokenizer, llava_processor, metaspace_tokenizer, picture

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, cli, detach, encode_chat
from attanchor_vlm.analysis.probe import DOES_NOT_FOLLOW, FOLLOWS, UNDECIDED, WEAK, measure
from attanchor_vlm.analysis.probe_control import permute_projector
from attanchor_vlm.analysis.probe_scores import (
    CONTENT,
    CONTROLS,
    FUNCTION,
    PARTNERS,
    PUNCTUATION,
    PromptScores,
    choose,
    prompt_scores,
    token_kinds,
)
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import Sample, read_rows, samples
from attanchor_vlm.model import load as loading


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes on disk, the shipped model, and questions about different scenes."""
    folder = tmp_path_factory.mktemp("world")
    scenes.write_dataset(folder, "some", 30, seed=3)
    rows, _ = read_rows(folder / "some.json", folder / "images")
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    return folder, model, processor, choose(list(samples(rows, "each")), 120)


@pytest.fixture(scope="module")
def aligned(world):
    _, model, processor, chosen = world
    return list(prompt_scores(model, processor, chosen, 30))


@pytest.fixture(scope="module")
def permuted(world):
    _, _, _, chosen = world
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    return list(prompt_scores(permute_projector(model, 0), processor, chosen, 30))


# --- Kinds of tokens. ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer, lambda: metaspace_tokenizer(split=False)])
def test_tokens_have_the_kind_of_their_word(make):
    tokenizer = make()
    text = "What is to the left of the red dog? It isn't a small blue cube, says Zoë."
    ids = tokenizer(text, add_special_tokens=False).input_ids
    found = {CONTENT: "", FUNCTION: "", PUNCTUATION: ""}
    kinds = token_kinds(tokenizer, ids, [True] * len(ids))
    for token, kind in zip(ids, kinds, strict=True):
        found[kind] += tokenizer.convert_ids_to_tokens(token)
    assert all(kind in found for kind in kinds)
    for word in ("left", "red", "dog", "small", "blue", "cube", "says"):
        assert word in found[CONTENT]
        assert word not in found[FUNCTION] + found[PUNCTUATION]
    assert not any(character.isalnum() for character in found[PUNCTUATION].replace("Ġ", ""))
    if make is not metaspace_tokenizer and make is not byte_level_tokenizer:
        return  # tokens that reach over spaces belong to several words
    assert "hat" in found[FUNCTION].replace("W", "")
    assert "red" not in found[FUNCTION]


@pytest.mark.parametrize("make", [byte_level_tokenizer, metaspace_tokenizer])
def test_content_tokens_are_those_that_encode_chat_means(make):
    processor = llava_processor(make(), VICUNA)
    text = "Is the sky grey, or don't you know?"
    if make is metaspace_tokenizer:  # which has no token for an apostrophe
        text = text.replace("don't", "do not")
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    every, content = (
        encode_chat(processor, [chat], [[picture()]], add_generation_prompt=True, content_words=only)
        for only in (False, True)
    )
    kinds = token_kinds(processor.tokenizer, every["input_ids"][0].tolist(), every["anchor_mask"][0].tolist())
    assert [kind == CONTENT for kind in kinds] == content["anchor_mask"][0].tolist()
    assert [kind is not None for kind in kinds] == every["anchor_mask"][0].tolist()
    assert {CONTENT, FUNCTION, PUNCTUATION} <= set(kinds)


def test_function_words_may_be_anothers():
    tokenizer = byte_level_tokenizer()
    ids = tokenizer("red dog", add_special_tokens=False).input_ids
    assert set(token_kinds(tokenizer, ids, [True] * len(ids), {"red", "dog"})) == {FUNCTION}


# --- Scores. ---------------------------------------------------------------------------------------------------------


def test_scores_and_hosts_are_those_of_the_matching(world, aligned):
    """Best cosine and host of every token as the attached model finds them, with everything inserted."""
    _, model, processor, chosen = world
    attach(model, AttAnchorConfig(tau=-1))
    try:
        batch = Collator(processor, "each")(chosen[:6])
        with torch.no_grad():
            model(**batch)
        plan = model.attanchor_plan
    finally:
        detach(model)
    image = processor.image_token_id
    in_order = {prompt.images: prompt for prompt in aligned}
    for row, sample in enumerate(chosen[:6]):
        slots = (batch["input_ids"][row] == image).nonzero()[:, 0]
        taking = batch["anchor_mask"][row]
        prompt = next(
            p
            for p in aligned
            if p.images == sample.images and p.ids.tolist() == batch["input_ids"][row][taking].tolist()
        )
        assert prompt.best == pytest.approx(plan.score[row][taking].numpy(), abs=1e-5)
        assert slots[prompt.host].tolist() == plan.host[row][taking].tolist()
        assert prompt.patches == len(slots)
    assert len(in_order) == 30


def test_every_image_is_as_often_anothers_as_its_own(world):
    """Each prompt is scored with the images of the PARTNERS before it, in turn, and never with its own."""
    _, model, processor, chosen = world
    few = chosen[:7]
    prompts = {p.images: p for p in prompt_scores(model, processor, few, 3)}
    assert len(prompts) == 7
    batch = Collator(processor, "each")(few)
    with torch.no_grad():
        features = model.get_image_features(batch["pixel_values"]).pooler_output
        for index, sample in enumerate(few):
            text = model.get_input_embeddings()(batch["input_ids"][index][batch["anchor_mask"][index]])
            expected = [
                torch.cosine_similarity(text[:, None], features[(index - back) % 7][None], dim=-1).amax(1).numpy()
                for back in range(1, PARTNERS + 1)
            ]
            found = prompts[sample.images].elsewhere
            assert found.shape == (PARTNERS, len(text))
            assert np.sort(found, 0) == pytest.approx(np.sort(np.stack(expected), 0), abs=1e-5)


def test_prompts_about_the_same_image_are_no_partners(world):
    _, model, processor, chosen = world
    first = [sample for sample in chosen if sample.images == chosen[0].images][:3]
    prompts = list(prompt_scores(model, processor, [*first, chosen[1]], 2))
    assert sorted(len(p.elsewhere) for p in prompts) == [0, 0, 1, 1]
    with pytest.raises(ValueError, match="about 1 image; the probe compares"):
        list(prompt_scores(model, processor, first))


def test_as_many_images_as_there_are_come_first():
    made = [Sample(n, (("user", "q"), ("assistant", "a")), (name,)) for n, name in enumerate("aaaabbc")]
    chosen = choose([*made, Sample(9, (), ())], 5, seed=1)
    assert sorted(s.images[0] for s in chosen[:3]) == ["a", "b", "c"]
    assert sorted(s.images[0] for s in chosen) == ["a", "a", "b", "b", "c"]
    assert choose(made, 5, seed=1) == chosen[:5]
    assert len(choose(made, 99)) == 7


def test_controls_are_the_scores_of_models_with_permuted_features(world):
    """What is computed by permuting the text is what a permuted projector gives."""
    _, model, processor, chosen = world
    prompts = list(prompt_scores(model, processor, chosen[:3], seed=5))
    order = torch.Generator().manual_seed(5 + 2**31)
    permutation = torch.randperm(64, generator=order)  # the first control's
    other, _ = loading.load_pretrained(str(small_llava.SHIPPED))
    last = other.model.multi_modal_projector.linear_2
    with torch.no_grad():  # text permuted by p is image permuted by its inverse
        inverse = permutation.argsort()
        last.weight.copy_(last.weight[inverse].clone())
        last.bias.copy_(last.bias[inverse].clone())
    for one, expected in zip(prompts, prompt_scores(other, processor, chosen[:3], seed=5), strict=True):
        content = one.kinds == CONTENT
        assert one.control.shape == (CONTROLS, content.sum())
        assert one.control[0] == pytest.approx(expected.best[content], abs=1e-5)
        assert one.control_elsewhere[0] == pytest.approx(expected.elsewhere[:, content], abs=1e-5)


# --- Figures and verdicts. -------------------------------------------------------------------------------------------


def prompt(name: str, best, elsewhere, kinds=(CONTENT, CONTENT, FUNCTION, PUNCTUATION), **changed) -> PromptScores:
    best, kinds = np.array(best, dtype=np.float32), np.array(kinds, dtype=object)
    content = int((kinds == CONTENT).sum())
    values = {
        "images": (name,),
        "ids": np.arange(len(best)),
        "kinds": kinds,
        "best": best,
        "host": np.zeros(len(best), dtype=int),
        "mean": np.zeros(len(best), dtype=np.float32),
        "elsewhere": np.array(elsewhere, dtype=np.float32),
        "control": np.full((3, content), 0.05, dtype=np.float32),
        "control_elsewhere": np.full((3, len(elsewhere), content), 0.05, dtype=np.float32),
        "hosts": np.array([0, 1, 2, 3]),
        "patches": 6,
    }
    return PromptScores(**{**values, **changed})


def good(number: int, **changed) -> PromptScores:
    """Content words fall from 0.5 to 0.3 and 0.4."""
    jitter = 0.01 * (number % 3)
    return prompt(
        f"image {number}",
        [0.5 + jitter, 0.5, 0.2, 0.1],
        [[0.3, 0.3, 0.2, 0.1], [0.4, 0.4, 0.2, 0.1]],
        **changed,
    )


def test_figures_by_hand():
    probe = measure([good(n) for n in range(30)], taus=(0.45, 0.15))
    assert (probe.samples, probe.images) == (30, 30)
    content = probe.kinds[CONTENT]
    assert (content.tokens, content.mean, content.margin) == pytest.approx((60, 0.505, 0.505))
    assert content.quantiles[2] == pytest.approx(0.5)
    assert [(s.tau, s.all, s.content, s.function, s.punctuation) for s in probe.shares] == [
        (0.15, 0.75, 1.0, 1.0, 0.0),
        (0.45, 0.5, 1.0, 0.0, 0.0),
    ]
    shuffled = probe.shuffled
    assert (shuffled.own, shuffled.other, shuffled.drop) == pytest.approx((0.505, 0.35, 0.155), abs=1e-6)
    assert 0.153 <= shuffled.low < shuffled.drop < shuffled.high <= 0.157
    assert shuffled.effect == pytest.approx(0.155 / (0.1 / 2**0.5), rel=1e-4)
    assert (shuffled.wins, shuffled.function_drop, *shuffled.control) == pytest.approx((1, 0, 0, 0), abs=1e-6)
    assert (probe.hosts.words, probe.hosts.distinct, probe.hosts.top_share) == (4, 4, 0.25)
    assert probe.hosts.effective == pytest.approx(4)
    assert (probe.content, probe.content_at_tau) == (0.5, 1.0)
    assert probe.verdict == FOLLOWS
    assert all(reason.passed for reason in probe.reasons)


@pytest.mark.parametrize(
    ("change", "verdict", "failed"),
    [
        (lambda p: {"hosts": np.array([5, 5, 5, 1])}, WEAK, {"no hub"}),
        (lambda p: {"best": p.best / 8, "elsewhere": p.elsewhere / 8, "control": p.control / 8}, WEAK, {"high enough"}),
        (lambda p: {"best": p.best + np.array([0, 0, 0, 0.6], np.float32)}, WEAK, {"content first"}),
        (lambda p: {"control": p.control + 0.5}, UNDECIDED, {"follows the image", "above chance"}),
        (
            lambda p: {"control": p.control + 0.5, "control_elsewhere": p.control_elsewhere + 0.5},
            WEAK,
            {"above chance"},
        ),
        (lambda p: {"elsewhere": np.stack([p.best, p.best])}, DOES_NOT_FOLLOW, {"follows the image", "effect"}),
    ],
)
def test_each_reason_can_fail_by_itself(change, verdict, failed):
    prompts = [dataclasses.replace(p, **change(p)) for p in map(good, range(30))]
    probe = measure(prompts)
    names = {reason.name for reason in probe.reasons if not reason.passed}
    assert (probe.verdict, names) == (verdict, failed)


def test_a_large_difference_that_chance_may_have_made_is_no_verdict():
    """Half of the images fall by 0.3 and half rise by nearly as much: neither follows nor does not."""
    prompts = [
        prompt(f"image {n}", [best, best, 0.2, 0.1], [[0.3, 0.3, 0.2, 0.1], [0.35, 0.35, 0.2, 0.1]])
        for n, best in enumerate([0.66, 0.04] * 20)
    ]
    probe = measure(prompts)
    assert probe.shuffled.low < 0 < probe.shuffled.drop
    assert probe.shuffled.effect > 0.1
    assert probe.verdict == UNDECIDED


def test_few_images_are_no_verdict():
    probe = measure([good(n) for n in range(29)])
    assert probe.verdict == UNDECIDED
    assert [reason.text for reason in probe.reasons if not reason.passed] == [
        "29 different images; at least 30 are wanted"
    ]


def test_without_content_words_there_is_nothing_to_say():
    with pytest.raises(ValueError, match="no question has a content word"):
        measure([good(0, kinds=np.array([FUNCTION] * 4, dtype=object), control=np.zeros((3, 0)))])


def test_the_verdicts_of_an_aligned_model_and_of_one_that_is_not_differ(aligned, permuted):
    """The small LLaVA as shipped, and with its projector's output features permuted: all else is the same."""
    yes, no = measure(aligned), measure(permuted)
    assert (yes.verdict, no.verdict) == (FOLLOWS, DOES_NOT_FOLLOW)
    assert all(reason.passed for reason in yes.reasons)
    assert {"follows the image", "effect"} <= {reason.name for reason in no.reasons if not reason.passed}
    assert yes.shuffled.drop > 10 * abs(no.shuffled.drop)
    assert no.shuffled.low < 0 < no.shuffled.high
    assert yes.shuffled.effect > 0.25
    assert yes.kinds[CONTENT].mean > 2 * no.kinds[CONTENT].mean
    # With words that no image answers to, nothing falls.
    assert abs(yes.shuffled.function_drop) < 0.1 * yes.shuffled.drop


# --- The command. ----------------------------------------------------------------------------------------------------


def arguments(folder, *more, model=small_llava.SHIPPED):
    data = ["--data", str(folder / "some.json"), "--images", str(folder / "images")]
    return ["probe", "--model", str(model), *data, *more]


def test_the_command_prints_plots_and_writes_the_control(world, tmp_path, capsys):
    folder, *_ = world
    plot, control = tmp_path / "probe.png", tmp_path / "control"
    options = ["--samples", "60", "--batch-size", "30", "--tau", "0.5", "--tau", "0.6"]
    assert cli.main(arguments(folder, *options, "--plot", str(plot), "--save-control", str(control))) == 0
    said = capsys.readouterr().out
    assert f"verdict: {FOLLOWS}" in said
    assert said.count("\n  + ") == 7
    assert "60 samples, 30 different images" in said
    assert [line.split()[0] for line in said.splitlines() if line.startswith("0.")] == ["0.5", "0.6"]
    assert Image.open(plot).size[0] > 1000

    assert cli.main(arguments(folder, "--samples", "60", "--batch-size", "30", "--json", model=control)) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"] == DOES_NOT_FOLLOW
    assert said["model"] == str(control)
    assert len(said["shares"]) > 10
    assert {reason["name"] for reason in said["reasons"]} >= {"follows the image", "high enough", "no hub"}


def test_mistakes_are_said_before_any_work(world, tmp_path, capsys):
    folder, *_ = world
    (tmp_path / "there").mkdir()
    (tmp_path / "p.png").mkdir()
    for more, message, code in (
        (("--plot", "p.jpg"), "p.jpg should end in .png, .pdf or .svg", 2),
        (("--plot", str(tmp_path / "p.png")), "p.png is a folder; give the name of a picture", 2),
        (("--plot", f"{__file__}/p.png"), "p.png cannot be written: ", 1),
        (("--save-control", str(tmp_path / "there")), "there exists; take another folder", 2),
        (("--adapter", str(tmp_path)), "holds no adapter_config.json", 1),
        (("--samples", "1"), "--samples", 2),
    ):
        assert cli.main(arguments(folder, *more)) == code
        assert message in capsys.readouterr().err
    rows = json.loads((folder / "some.json").read_text())
    (tmp_path / "one.json").write_text(json.dumps([row for row in rows if row["image"] == rows[0]["image"]]))
    changed = [str(tmp_path / "one.json") if a.endswith("some.json") else a for a in arguments(folder)]
    assert cli.main(changed) == 1
    assert "about fewer than two images" in capsys.readouterr().err
