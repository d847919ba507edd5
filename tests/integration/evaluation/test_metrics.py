"""Metric values against published examples and values worked by hand, never against the code that computes them."""

from __future__ import annotations

import json
import math
import shutil
import sys

import pytest
import torch
from training_toy import arguments
from transformers import BertConfig, BertModel

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, cli
from attanchor_vlm.data.rows import read_rows, samples
from attanchor_vlm.errors import DataError
from attanchor_vlm.evaluation import amber, answers, extras, run, text_metrics
from attanchor_vlm.evaluation.config import EvalConfig
from attanchor_vlm.model.load import load_pretrained

needs_java = pytest.mark.skipif(shutil.which("java") is None, reason="METEOR needs java")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(small_llava.SHIPPED, folder / "model")
    scenes.write_dataset(folder, "test", 3, seed=1, each=1)
    return folder


@pytest.fixture(scope="module")
def test_samples(world):
    return list(samples(read_rows(world / "test.json", world / "images")[0], "each"))


# --- Text. -----------------------------------------------------------------------------------------------------------


def test_bleu_is_the_published_example():
    """sacrebleu's README: three sentences with two references each, BLEU 48.53."""
    pytest.importorskip("sacrebleu")
    said = ["The dog bit the man.", "It wasn't surprising.", "The man had just bitten him."]
    references = [
        ["The dog bit the man.", "The dog had bit the man."],
        ["It was not unexpected.", "No one was surprised."],
        ["The man bit him first.", "The man had bitten the dog."],
    ]
    assert text_metrics.bleu(said, references) == pytest.approx(0.4853, abs=5e-5)


def test_rouge_l_by_hand():
    """Longest common subsequence "the quick brown jumps the", 5 of 8 and 5 of 9 words; the better reference counts."""
    pytest.importorskip("rouge_score")
    said = ["The quick brown dog jumps on the log."]
    fox = "The quick brown fox jumps over the lazy dog"
    by_hand = 2 * (5 / 8) * (5 / 9) / (5 / 8 + 5 / 9)
    assert text_metrics.rouge_l(said, [[fox]]) == pytest.approx(by_hand)
    assert text_metrics.rouge_l(said, [["nothing alike", fox]]) == pytest.approx(by_hand)
    assert text_metrics.rouge_l([*said, "none"], [[fox], ["of these"]]) == pytest.approx(by_hand / 2)


def test_cider_by_hand():
    """Every n-gram stands in one of two references, so all weights are ln 2 and cancel. "red dog" has 2 of 4 words of
    its reference (cosine 2 / sqrt(2 * 4)), 1 of 3 pairs (1 / sqrt 3) and no longer n-gram, and is 2 words shorter."""
    pytest.importorskip("pycocoevalcap")
    references = [["Red dog runs fast."], ["blue cat sits there"]]
    penalty = math.exp(-(2**2) / (2 * 6**2))
    by_hand = 10 * penalty * (2 / math.sqrt(8) + 1 / math.sqrt(3)) / 4
    same = text_metrics.cider(["red dog runs fast", "Blue cat sits there."], references)
    assert same == pytest.approx(10)
    assert text_metrics.cider(["red dog", "blue cat sits there"], references) == pytest.approx((by_hand + 10) / 2)


@needs_java
def test_meteor_by_hand():
    """METEOR 1.5 for English (alpha 0.85, beta 0.2, gamma 0.6): "red dog" against "red dog runs", both words exact in
    one chunk, P 1, R 2/3; its total weighs both pairs by their matches, so one pair alone is asked for."""
    pytest.importorskip("pycocoevalcap")
    precision, recall = 1.0, 2 / 3
    mean = precision * recall / (0.85 * precision + 0.15 * recall)
    by_hand = mean * (1 - 0.6 * (1 / 2) ** 0.2)
    assert text_metrics.meteor(["Red dog."], [["red dog runs"]]) == pytest.approx(by_hand, abs=1e-6)


def test_meteor_without_java_says_so(monkeypatch):
    pytest.importorskip("pycocoevalcap")
    monkeypatch.setattr(extras.shutil, "which", lambda name: None)
    with pytest.raises(extras.MissingExtraError, match="METEOR needs java, and there is none on the path"):
        text_metrics.check(["meteor"])
    with pytest.raises(extras.MissingExtraError, match="METEOR needs java"):
        text_metrics.meteor(["a"], [["a"]])


@pytest.mark.filterwarnings("ignore:Exception ignored in.*Meteor:pytest.PytestUnraisableExceptionWarning")
def test_a_java_that_does_not_run_is_said_before_a_model_is_loaded(monkeypatch, tmp_path):
    pytest.importorskip("pycocoevalcap")
    java = tmp_path / "java"
    java.write_text("#!/bin/sh\nexit 1\n")
    java.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(extras.MissingExtraError, match="java does not run"):
        text_metrics.check(["meteor"])
    monkeypatch.setattr(extras, "_runs", lambda java: True)  # one that ends later, as without memory
    with pytest.raises(extras.MissingExtraError, match="METEOR's java ended early"):
        text_metrics.meteor(["a"], [["a"]])


@needs_java
def test_tokens_are_those_of_stanfords_tokenizer():
    ptb = pytest.importorskip("pycocoevalcap.tokenizer.ptbtokenizer").PTBTokenizer()
    texts = [
        "A man's dog doesn't bark; it's \"happy\", isn't it?",
        "The 2nd car (red) costs $3.50 - cheap!",
        "There are two dogs. One of them runs, the other sleeps. No.",
        "well-known Mr. Smith's place/yard 50%",
        "yes",
    ]
    theirs = ptb.tokenize({number: [{"caption": text}] for number, text in enumerate(texts)})
    assert [text_metrics.tokenize(text) for text in texts] == [theirs[number][0] for number in range(len(texts))]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """A random BERT with its tokenizer on disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "runs", "blue", "cat", "sits"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {name: f"[{name[:-6].upper()}]" for name in ("pad_token", "unk_token", "cls_token", "sep_token")}
    folder = tmp_path_factory.mktemp("encoder")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=32, **special).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    BertModel(BertConfig(vocab_size=len(words), max_position_embeddings=32, **sizes)).save_pretrained(folder)
    return folder


def test_bert_score_is_greedy_matching_of_the_last_layer(encoder):
    """Worked from the encoder's states: P and R are means of best cosines, special tokens apart (Zhang et al.)."""
    pytest.importorskip("bert_score")
    said, given = "a red dog", "a cat sits"
    ids = {"[CLS]": 2, "[SEP]": 3, "a": 5, "red": 6, "dog": 7, "cat": 10, "sits": 11}
    model = BertModel.from_pretrained(encoder).eval()

    def states(text):
        tokens = torch.tensor([[2, *(ids[word] for word in text.split()), 3]])
        with torch.no_grad():
            return torch.nn.functional.normalize(model(tokens).last_hidden_state[0], dim=-1)[1:-1]

    cosine = states(said) @ states(given).T
    precision, recall = cosine.amax(1).mean(), cosine.amax(0).mean()
    by_hand = float(2 * precision * recall / (precision + recall))
    assert text_metrics.bert_score([said], [[given]], str(encoder)) == pytest.approx(by_hand, abs=1e-5)
    assert text_metrics.bert_score([said], [[said]], str(encoder)) == pytest.approx(1, abs=1e-5)


def test_exact_match():
    assert text_metrics.exact_match(["Yes.", "no ", "a dog"], [["yes"], ["yes", "No"], ["dog"]]) == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("names", "message"),
    [(["blue"], "metric is 'blue'; it should be one of loss, bleu, bertscore"), (["loss"], "metric is 'loss'")],
)
def test_unknown_metrics_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        text_metrics.check(names)


def test_a_missing_package_is_one_line_with_the_extra(monkeypatch, capsys, world):
    monkeypatch.setitem(sys.modules, "sacrebleu", None)  # what Python makes an ImportError of
    arguments = ["--data", world / "test.json", "--images", world / "images", "--metrics", "bleu"]
    assert cli.main(["eval", "--model", str(world / "model"), *map(str, arguments)]) == 1
    message = 'error: BLEU needs sacrebleu, which is not installed: pip install "attanchor-kernels[eval]"\n'
    assert capsys.readouterr().err == message


def test_counts_of_predictions_and_references_must_agree():
    with pytest.raises(ValueError, match="1 predictions for 2 references"):
        text_metrics.compute(["exact"], ["a"], [["a"], ["b"]])
    with pytest.raises(ValueError, match="0 predictions"):
        text_metrics.compute(["exact"], [], [])


# --- AMBER. ----------------------------------------------------------------------------------------------------------


def test_amber_by_hand():
    """Six questions. Right: 3 of 6. "no" was said 3 times, 2 of them rightly; 4 were to be denied, 2 of them were."""
    pairs = [("yes", "yes"), ("no", "no"), ("no", "no"), ("no", "yes"), ("yes", "no"), ("no", "maybe")]
    precision, recall = 2 / 3, 2 / 4
    scores = amber.scores(pairs)
    assert scores["accuracy"] == pytest.approx(50)
    assert scores["precision"] == pytest.approx(100 * precision)
    assert scores["recall"] == pytest.approx(100 * recall)
    assert scores["f1"] == pytest.approx(100 * 2 * precision * recall / (precision + recall))


def test_the_amber_score_is_the_published_one():
    """LLaVA-1.5 in AMBER's paper: CHAIR 7.8, F1 74.7, AMBER score 83.5 (83.45 before rounding)."""
    assert amber.combined(7.8, 74.7) == pytest.approx(83.45)


@pytest.mark.parametrize(
    ("response", "answer"), [("Yes.", "yes"), ("No, it is not", "no"), ("Maybe", "maybe"), ("nothing", "nothing")]
)
def test_ambers_answers_are_first_words(response, answer):
    assert amber.said(response) == answer


# --- Loss and answers. -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_the_loss_is_trainers(world, test_samples, tau, tmp_path):
    """`eval_loss` of transformers' Trainer, over a last batch that is not full."""
    from attanchor_vlm.data.batches import Collator
    from attanchor_vlm.training.trainer import AnchorTrainer

    model, processor = load_pretrained(str(world / "model"))
    attach(model, AttAnchorConfig(tau=tau))
    ours = answers.score_answers(model, processor, test_samples, batch_size=4, progress=False)
    eval_arguments = arguments(tmp_path, per_device_eval_batch_size=4)
    trainer = AnchorTrainer(model, eval_arguments, Collator(processor, "each"), eval_dataset=test_samples)
    assert len(test_samples) % 4
    assert ours.loss == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-6)
    assert (ours.inserted_share > 0) == (tau < 1)
    assert ours.image_tokens == 64


@pytest.mark.parametrize("tau", [1.0, 0.3])
def test_forced_predictions_are_the_likeliest_tokens(world, test_samples, tau):
    """Token by token: the greedy continuation of the prompt and the true answer so far. Batch and padding change
    nothing, and the answers of one token are those that are generated."""
    model, processor = load_pretrained(str(world / "model"))
    attach(model, AttAnchorConfig(tau=tau))
    forced = answers.score_answers(model, processor, test_samples, 4, predict=True, progress=False)
    alone = answers.score_answers(model, processor, test_samples, 1, predict=True, progress=False)
    assert forced.predictions == alone.predictions
    made = answers.generate_answers(model, processor, test_samples, 4, 8, progress=False)
    assert made.references == forced.references == tuple(one.messages[-1][1] for one in test_samples)
    first = [text.split()[0] for text in made.predictions]
    assert [text.split()[0] for text in forced.predictions] == first
    assert text_metrics.exact_match(made.predictions, [[one] for one in made.references]) > 0.5  # it has learnt this


def test_rows_that_fit_the_context_without_anchors_alone_are_named_first(world):
    model, processor = load_pretrained(str(world / "model"))
    config = EvalConfig(data=world / "test.json", images=world / "images", metrics=("exact",), limit=1)
    model.config.get_text_config().max_position_embeddings = 64 + 17
    attach(model, AttAnchorConfig(tau=1.0))
    run.evaluate(model, processor, config, progress=False)
    attach(model, AttAnchorConfig(tau=0.3))
    with pytest.raises(DataError, match=r"test\.json, row \d+: \d+ tokens with its images and up to \d+ anchors"):
        run.evaluate(model, processor, config, progress=False)


def test_eval_reports_only_what_was_computed(world, test_samples, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--data", world / "test.json", "--images", world / "images", "--metrics", "loss,exact"]
    command = ["eval", "--model", world / "model", *arguments, "--tau", "0.3", "--output", output, "--json"]
    assert cli.main([str(word) for word in [*command, "--max-new-tokens", "6"]]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed["values"]) == {"loss", "exact"}
    assert printed == json.loads((output / "results.json").read_text())
    assert printed["anchors"]["tau"] == 0.3
    assert printed["samples"] == len(test_samples)
    assert {"commit", "version", "torch", "seed"} <= set(printed)
    pairs = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    right = sum(pair["prediction"] == pair["reference"] for pair in pairs) / len(pairs)
    assert printed["values"]["exact"] == pytest.approx(right)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing is asked for; give --metrics with --data and --images, or --tasks"),
        (["--metrics", "loss"], "metrics of text need --data and --images"),
        (
            ["--metrics", "loss", "--data", "d.json", "--images", "i", "--limit", "0"],
            "limit is 0; it should be at least 1",
        ),
        (
            ["--metrics", "loss", "--data", "d.json", "--images", "i", "--output", __file__],
            "test_metrics.py is a file; it should be a folder",
        ),
    ],
)
def test_eval_refuses_before_it_loads(capsys, arguments, message):
    assert cli.main(["eval", "--model", "./gone", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_bertscore_folder_without_a_model_is_refused(tmp_path):
    pytest.importorskip("bert_score")
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        EvalConfig(data=tmp_path, images=tmp_path, metrics=("bertscore",), bertscore_model=str(tmp_path)).check()
