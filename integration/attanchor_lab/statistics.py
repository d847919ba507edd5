"""Paired differences over seeds, with intervals and p-values corrected for how many are looked at together.

A seed changes weights, scenes and order, for all arms alike: the difference of two arms of one seed is one observation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LEVEL = 0.05  # chance of any wrong claim in a family of comparisons
LEAST = 3  # seeds without which no interval is given


@dataclass(frozen=True)
class Difference:
    """A paired difference in a family of comparisons.

    Attributes:
        values: One difference a seed.
        mean: Their mean.
        low, high: 95 % confidence interval of this comparison alone (Student's t).
        wide_low, wide_high: The interval that holds for all comparisons of the family at once (Bonferroni).
        p: Two-sided, alone. adjusted_p: after Holm, over the family.
        among: How many comparisons the family has.
    """

    values: tuple[float, ...]
    mean: float
    low: float
    high: float
    wide_low: float
    wide_high: float
    p: float
    adjusted_p: float
    among: int

    @property
    def seeds(self) -> int:
        return len(self.values)

    @property
    def is_established(self) -> bool:
        """Whether the sign holds after correction."""
        return self.adjusted_p < LEVEL

    @property
    def is_suggested(self) -> bool:
        """Whether it would hold if this had been the only comparison."""
        return not self.is_established and self.p < LEVEL


def family(differences: Sequence[Sequence[float]]) -> list[Difference | None]:
    """Statistics of comparisons that are looked at together; None where there are fewer than three seeds."""
    tested = [values for values in differences if len(values) >= LEAST]
    adjusted = iter(holm([p_value(values) for values in tested]))
    return [
        _difference(values, next(adjusted), len(tested)) if len(values) >= LEAST else None for values in differences
    ]


def _difference(values: Sequence[float], adjusted_p: float, among: int) -> Difference:
    mean = sum(values) / len(values)
    alone, wide = _half_width(values, LEVEL), _half_width(values, LEVEL / among)
    return Difference(
        tuple(values),
        mean,
        low=mean - alone,
        high=mean + alone,
        wide_low=mean - wide,
        wide_high=mean + wide,
        p=p_value(values),
        adjusted_p=adjusted_p,
        among=among,
    )


def holm(ps: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    order = sorted(range(len(ps)), key=ps.__getitem__)
    adjusted, highest = [0.0] * len(ps), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, (len(ps) - rank) * ps[index]))
        adjusted[index] = highest
    return adjusted


def p_value(values: Sequence[float]) -> float:
    """Two-sided p of a mean of 0, Student's t. Without any spread: 1 for all zero, otherwise 0."""
    error = _standard_error(values)
    mean = sum(values) / len(values)
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * _student_t().sf(abs(mean) / error, len(values) - 1))


def _half_width(values: Sequence[float], level: float) -> float:
    return float(_student_t().isf(level / 2, len(values) - 1)) * _standard_error(values)


def _student_t() -> Any:
    try:
        from scipy import stats
    except ImportError as error:
        raise ValueError("the report's intervals need scipy: `pip install scipy`") from error
    return stats.t


def _standard_error(values: Sequence[float]) -> float:
    count = len(values)
    mean = sum(values) / count
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (count - 1) / count)


def mean_and_deviation(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and standard deviation over seeds (NaN for one)."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
