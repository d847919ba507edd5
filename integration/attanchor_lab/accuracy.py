"""How often a model's generated answers are the rows' own, by kind of question, and how sure a difference is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from attanchor_vlm.data.rows import Row, samples
from attanchor_vlm.evaluation.answers import generate_answers


@dataclass(frozen=True)
class Accuracy:
    """Which generated answers are right. `inserted_share` is inserted anchors over text tokens taking part."""

    kinds: tuple[str, ...]  # of every question
    right: tuple[bool, ...]
    inserted_share: float
    seconds: float
    anchor_score: float | None = None  # mean cosine of the inserted
    image_tokens: float = 0.0  # of a prompt, before anchors

    def _by_kind(self, values: ArrayLike) -> dict[str, np.ndarray]:
        kinds = np.array(self.kinds)
        return {kind: np.asarray(values, dtype=float)[kinds == kind] for kind in dict.fromkeys(self.kinds)}

    def figures(self) -> dict[str, float]:
        """The share of right answers of each kind, and the unweighted mean over the kinds."""
        found = {kind: float(marks.mean()) for kind, marks in self._by_kind(self.right).items()}
        return {**found, "mean": sum(found.values()) / len(found)}

    def minus(self, other: Accuracy) -> tuple[float, float]:
        """Difference of the means and its standard error, paired by question: how sure this set of questions makes it,
        not how much another seed of the training would change it."""
        pairs = self._by_kind(np.subtract(self.right, other.right, dtype=float)).values()
        difference = sum(float(pair.mean()) for pair in pairs) / len(pairs)
        return difference, sum(float(pair.var()) / len(pair) for pair in pairs) ** 0.5 / len(pairs)


def is_right(said: str, wanted: str) -> bool:
    """Whether an answer is the reference, but for capitals and the full stop."""
    return said.strip().lower().rstrip(".") == wanted.lower()


def accuracy(
    model: Any, processor: Any, rows: Sequence[Row], kinds: Sequence[str], batch_size: int = 64, most_tokens: int = 6
) -> Accuracy:
    """Generate an answer to the question of every row and compare it with the row's.

    Args:
        model: Attached, or a PeftModel around an attached one; left in evaluation mode.
        kinds: What each row asks for; accuracies are kept apart by it.
    """
    asked = list(samples(rows, "all"))
    found = generate_answers(model, processor, asked, batch_size, most_tokens, progress=False)
    right = tuple(map(is_right, found.predictions, found.references))
    figures = found.inserted_share, found.seconds, found.anchor_score, found.image_tokens
    return Accuracy(tuple(kinds), right, *figures)
