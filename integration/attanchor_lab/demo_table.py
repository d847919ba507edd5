"""A demonstration's results as a table and a verdict, in its own output and on the page of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from attanchor_lab.scenes.world import KINDS

PLAIN, TEXT_INTO_IMAGE, IMAGE_INTO_TEXT = "plain concatenation", "text into image", "image into text"
FIGURES = (*KINDS, "mean")
HEAD = ["", "tau", "validation loss", *FIGURES, "inserted", "training"]
EXPLAINED = "Accuracy in percent on {questions} test questions; inserted: anchors over the text tokens that take part."


def lines_of(results: Mapping[str, Any]) -> list[list[str]]:
    """The table's lines: the model before fine-tuning, then each arm."""

    def accuracies(of: Mapping[str, float]) -> list[str]:
        return [f"{100 * of[kind]:.1f}" for kind in FIGURES]

    lines = [["before fine-tuning", "", "", *accuracies(results["before"]), "", ""]]
    for arm in results["arms"]:
        share, seconds = arm["inserted_share"]["test"], arm["train_seconds"]
        figures = [f"{arm['tau']:.3f}", f"{arm['val_loss']:.4f}", *accuracies(arm["accuracy"])]
        lines.append([arm["name"], *figures, f"{100 * share:.1f} %", f"{seconds:.0f} s"])
    return lines


def verdict(arms: Sequence[Mapping[str, Any]]) -> list[str]:
    """Each arm against plain concatenation, with the interval that the number of questions gives."""
    lines = []
    for arm in arms:
        if arm["name"] == PLAIN:
            continue
        difference, error = (100 * arm["difference_to_plain"][name] for name in ("mean", "standard_error"))
        low, high = difference - 1.96 * error, difference + 1.96 * error
        said = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        lines.append(f"{arm['name']} − {PLAIN}: {difference:+.1f} points, 95 % {low:+.1f} to {high:+.1f}: {said}")
    return [*lines, "One seed, 0.4 M parameters: the method runs; what it is worth in a large model is not shown here."]
