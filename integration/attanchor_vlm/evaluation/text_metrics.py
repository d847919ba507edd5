"""BLEU, ROUGE-L, METEOR, CIDEr, BERTScore and exact match of predicted answers against reference answers.

The values come from the packages that papers use; this module gives them what they expect and checks what it is given.
All are in the paper's scale: BLEU, ROUGE-L, METEOR, BERTScore and exact match from 0 to 1, CIDEr from 0 to 10.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from attanchor_vlm.evaluation.extras import MissingExtraError, require, require_java

_BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_DROPPED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";", '"'])  # coco-caption's
_ABBREVIATIONS = frozenset(["mr.", "mrs.", "ms.", "dr.", "st.", "jr.", "sr.", "prof.", "vs.", "etc.", "fig."])


def tokenize(text: str) -> str:
    """Words in lower case, without punctuation, as coco-caption feeds METEOR and CIDEr: Penn Treebank tokens.

    coco-caption runs Stanford's PTBTokenizer, which needs java; this is nltk's tokenizer by the same rules.
    """
    words = _package("tokens").NLTKWordTokenizer().tokenize(text.lower())
    return " ".join(word for one in words for word in _split_period(one) if word not in _DROPPED)


def _split_period(word: str) -> list[str]:
    """nltk takes a period off at the end of the text alone, Stanford's tokenizer at every sentence's."""
    word = _BRACKETS.get(word, word)
    if re.fullmatch(r"[^.]+\.", word) and word not in _ABBREVIATIONS:
        return [word[:-1], "."]
    return [word]


def bleu(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Corpus BLEU-4 of sacrebleu with its defaults (13a tokens, exponential smoothing), over 100."""
    most = max(len(each) for each in references)
    streams = [[each[k] if k < len(each) else None for each in references] for k in range(most)]
    return float(_package("bleu").corpus_bleu(list(predictions), streams).score) / 100


def rouge_l(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Mean F-measure of the longest common subsequence (rouge-score, no stemming), with the best reference each."""
    scorer = _package("rougeL").RougeScorer(["rougeL"])
    best = [
        max(scorer.score(reference, prediction)["rougeL"].fmeasure for reference in each)
        for prediction, each in zip(predictions, references, strict=True)
    ]
    return float(sum(best) / len(best))


def meteor(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """METEOR 1.5 of pycocoevalcap, which runs java with 2 GB of memory."""
    package = _package("meteor")
    require_java("METEOR")
    scorer = package.Meteor()
    try:
        score, _ = scorer.compute_score(*_by_number(predictions, references))
    except (ValueError, OSError) as error:  # what the package makes of a java that ended
        if scorer.lock.locked():
            scorer.lock.release()  # which it keeps, and waits for without end when it is collected
        raise MissingExtraError(f"METEOR's java ended early ({error}); it takes 2 GB of memory") from error
    return float(score)


def cider(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """CIDEr (with length penalty, pycocoevalcap). Word weights come from the references: few samples, rough values."""
    score, _ = _package("cider").Cider().compute_score(*_by_number(predictions, references))
    return float(score)


def bert_score(
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    encoder: str = "roberta-large",
    layer: int | None = None,
) -> float:
    """Mean BERTScore F1, without idf weights and without baseline rescaling, with the best reference each.

    Args:
        encoder: A Hub id or the folder of a saved encoder, which needs no network.
        layer: The layer whose states are compared; None for the one that bert-score recommends for this name, and the
            last one for encoders that it does not know.
    """
    _, _, f1 = _package("bertscore").score(
        list(predictions),
        [list(each) for each in references],
        model_type=encoder,
        num_layers=_last_layer(encoder) if layer is None else layer,
        verbose=False,
    )
    return float(f1.mean())


def exact_match(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Share of predictions that equal a reference, but for case, a final period and white space around."""

    def plain(text: str) -> str:
        return text.strip().rstrip(".").lower()

    hits = [plain(p) in {plain(one) for one in each} for p, each in zip(predictions, references, strict=True)]
    return sum(hits) / len(hits)


TEXT_METRICS: dict[str, Callable[..., float]] = {
    "bleu": bleu,
    "bertscore": bert_score,
    "meteor": meteor,
    "cider": cider,
    "rougeL": rouge_l,
    "exact": exact_match,
}
_NEEDS = {  # the module, the package that has it, and what needs it
    "bleu": ("sacrebleu", "sacrebleu", "BLEU"),
    "bertscore": ("bert_score", "bert-score", "BERTScore"),
    "meteor": ("pycocoevalcap.meteor.meteor", "pycocoevalcap", "METEOR"),
    "cider": ("pycocoevalcap.cider.cider", "pycocoevalcap", "CIDEr"),
    "rougeL": ("rouge_score.rouge_scorer", "rouge-score", "ROUGE-L"),
    "tokens": ("nltk.tokenize", "nltk", "CIDEr and METEOR"),
}


def _package(name: str) -> ModuleType:
    return require(*_NEEDS[name])


def check(names: Sequence[str], encoder: str | None = None) -> None:
    """Refuse metrics that do not exist or cannot be computed here, before a model is loaded."""
    for name in names:
        if name not in TEXT_METRICS:
            raise ValueError(f"metric is {name!r}; it should be one of loss, {', '.join(TEXT_METRICS)}")
        if name in _NEEDS:
            _package(name)
        if name in ("meteor", "cider"):
            _package("tokens")
        if name == "meteor":
            require_java("METEOR")
    if "bertscore" in names and encoder is not None:
        _check_encoder(encoder)


def compute(
    names: Sequence[str],
    predictions: Sequence[str],
    references: Sequence[Sequence[str]],
    encoder: tuple[str, int | None] = ("roberta-large", None),
) -> dict[str, float]:
    """Values by name, of one or several `references` for each prediction; `encoder` is BERTScore's, and its layer."""
    if not predictions or len(predictions) != len(references):
        raise ValueError(
            f"{len(predictions)} predictions for {len(references)} references; there should be as many, at least one"
        )
    more = {"bertscore": encoder}
    return {name: TEXT_METRICS[name](predictions, references, *more.get(name, ())) for name in names}


def _by_number(predictions: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[dict, dict]:
    truths = {number: [tokenize(one) for one in each] for number, each in enumerate(references)}
    return truths, {number: [tokenize(one)] for number, one in enumerate(predictions)}


def _check_encoder(name: str) -> None:
    if Path(name).is_dir():
        if not (Path(name) / "config.json").is_file():
            raise ValueError(f"bertscore_model {name} holds no config.json; give the folder of a saved encoder")
    elif name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"bertscore_model {name} is not a folder; give the folder of a saved encoder, or a Hub id")
    else:
        from attanchor_vlm.model.load import check_hub

        check_hub(name)


def _last_layer(encoder: str) -> int:
    known = require("bert_score.utils", "bert-score", "BERTScore").model2layers
    for name in (encoder, Path(encoder).name):
        if name in known:
            return known[name]
    from transformers import AutoConfig

    return int(AutoConfig.from_pretrained(encoder, trust_remote_code=False).num_hidden_layers)
