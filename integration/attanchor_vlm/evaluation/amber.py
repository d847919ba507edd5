"""AMBER (arXiv 2311.07397): its yes-or-no half as an lmms-eval task, and the score of both halves together.

lmms-eval has the descriptive half (`amber_g`, which needs spaCy and nltk data). Questions, answers and images are those
of AMBER's own repository and image archive, in one folder:

    DIR/data/query/query_discriminative.json  [{"id": 1005, "image": "AMBER_1.jpg", "query": "Is the sky sunny?"}, …]
    DIR/data/annotations.json  [{"id": 1005, "type": "discriminative-attribute-state", "truth": "yes"}, …]
    DIR/image/AMBER_1.jpg
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from attanchor_vlm.data.rows import load_image
from attanchor_vlm.errors import DataError

TASK = "amber_d"
_SCORES = ("accuracy", "precision", "recall", "f1")
_POST_PROMPT = " Please answer yes or no."
Doc = Mapping[str, Any]


def task_config(folder: Path, rows: Path) -> dict[str, Any]:
    """The task, as a configuration that lmms-eval loads; the joined questions are written to `rows`, a .jsonl."""
    rows.parent.mkdir(parents=True, exist_ok=True)
    joined = questions(folder)
    rows.write_text("".join(json.dumps(one) + "\n" for one in joined), encoding="utf-8")
    return {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(rows)}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_visual": lambda doc: [load_image(Path(doc["image_file"]))],
        "doc_to_text": _text,
        "doc_to_target": "truth",
        "generation_kwargs": {"max_new_tokens": 16, "do_sample": False},
        "process_results": _process,
        "metric_list": [
            {"metric": f"amber_{name}", "aggregation": _aggregation(name), "higher_is_better": True} for name in _SCORES
        ],
        "metadata": [{"version": 1.0}],
    }


def questions(folder: Path) -> list[dict[str, Any]]:
    """AMBER's yes-or-no questions with their answers and image paths."""
    asked = _load(folder / "data" / "query" / "query_discriminative.json")
    annotations = {one["id"]: one for one in _load(folder / "data" / "annotations.json")}
    joined = []
    for one in asked:
        number, image = one["id"], folder / "image" / one["image"]
        truth = annotations.get(number, {}).get("truth")
        if truth not in ("yes", "no"):
            raise DataError(f"{folder / 'data' / 'annotations.json'} has no yes or no for question {number}")
        if not image.is_file():
            raise DataError(f"image {image} does not exist; put AMBER's images in {folder / 'image'}")
        kind = annotations[number]["type"]
        joined.append({"id": number, "image_file": str(image), "query": one["query"], "truth": truth, "type": kind})
    return joined


def scores(answers: Sequence[tuple[str, str]]) -> dict[str, float]:
    """Percentages from (truth, answer) pairs, each "yes" or "no" (or another answer, which is wrong).

    As AMBER's own inference.py counts: precision and recall are of "no", the answer that denies a hallucination. Its
    rounding to one decimal and its 0.001 in the denominators are left out.
    """
    if not answers:
        raise ValueError("there are no answers, so AMBER has no score")
    right = sum(truth == answer for truth, answer in answers)
    denied = [truth for truth, answer in answers if answer == "no"]
    to_deny = [answer for truth, answer in answers if truth == "no"]
    precision = denied.count("no") / len(denied) if denied else 0.0
    recall = to_deny.count("no") / len(to_deny) if to_deny else 0.0
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    shares = right / len(answers), precision, recall, f1
    return {name: 100 * value for name, value in zip(_SCORES, shares, strict=True)}


def combined(chair: float, f1: float) -> float:
    """The AMBER score, (100 - CHAIR + F1) / 2, of percentages (section 3 of AMBER's paper)."""
    return (100 - chair + f1) / 2


def lend_metadata(folder: Path, work: Path) -> None:
    """Show AMBER's folder to lmms-eval's `amber_g`, which looks for it under another name."""
    lent = work / "amber"
    lent.mkdir(exist_ok=True)
    (lent / "metadata").symlink_to((folder / "data").resolve(), target_is_directory=True)
    os.environ["AMBER_BASE_DIR"] = str(lent)


def said(response: str) -> str:
    """The answer in a response: "yes" or "no" if its first word is one, otherwise the response."""
    words = response.strip().lower().replace(",", " ").replace(".", " ").split()
    return words[0] if words and words[0] in ("yes", "no") else response.strip().lower()


def _load(path: Path) -> list[dict[str, Any]]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read: {error}; --task-data amber=DIR should name AMBER's folder") from error
    if not isinstance(found, list) or not all(isinstance(one, dict) and "id" in one for one in found):
        raise DataError(f"{path} should hold a list of objects with an id, as AMBER's repository has it")
    return found


def _text(doc: Doc, lmms_eval_specific_kwargs: Mapping[str, Any] | None = None) -> str:
    return doc["query"] + _POST_PROMPT


def _process(doc: Doc, results: Sequence[str]) -> dict[str, tuple[str, str]]:
    pair = doc["truth"], said(results[0])
    return {f"amber_{name}": pair for name in _SCORES}


def _aggregation(name: str) -> Callable[[Sequence[tuple[str, str]]], float]:
    return lambda pairs: scores(pairs)[name]
