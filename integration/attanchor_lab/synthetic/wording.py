"""Numbers, intervals and doubts in words: what the report's sentences share. No finding is written by hand."""

from __future__ import annotations

from collections.abc import Mapping

from attanchor_lab.statistics import LEAST, Difference
from attanchor_lab.table import Metric, title

ANCHORS = ("t2i", "t2i-inherit", "t2i-content", "t2i-content-inherit")  # at matched patches: the method
TOLD = ("true", "true-inherit")  # arms that know the answer: bounds, no methods
FOLLOWED = ("t2i-inherit", "t2i")  # into blur and from setting to setting: the first of them that was run


def number(value: float, digits: int = 1, sign: bool = True) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def interval(difference: Difference, digits: int = 1, wide: bool = True) -> str:
    low, high = (difference.wide_low, difference.wide_high) if wide else (difference.low, difference.high)
    return f"{number(low, digits)} to {number(high, digits)}"


def probability(p: float) -> str:
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


def p_text(p: float) -> str:
    return f"p {probability(p)}" if p < 0.001 else f"p = {probability(p)}"


def seeds(count: int) -> str:
    return f"{count} seed" + ("" if count == 1 else "s")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def doubt(difference: Difference) -> str:
    """How sure a difference is, as the end of a sentence."""
    if difference.is_established:
        return "and this holds after correction"
    if difference.is_suggested:
        return "suggestive alone, not established after correction"
    return "which may be chance"


def verdict(name: str, against: str, difference: Difference | None, metric: Metric, pairs: int) -> str:
    """One comparison in words.

    Args:
        name, against: The two sides, as subjects of a sentence.
        pairs: Seeds that have both.
    """
    if difference is None:
        few = f"{seeds(pairs)}, fewer than the {LEAST} that an interval needs"
        return f"{name} against {against}: {few}; nothing can be said."
    amount = f"{number(difference.mean, metric.digits)} {metric.unit} in {metric.title}"
    sureness = (
        f"{seeds(difference.seeds)}; 95 % interval {interval(difference, metric.digits)}, corrected for "
        f"{difference.among} comparisons, {p_text(difference.adjusted_p)}"
    )
    if difference.is_established:
        return f"{name}: {_direction(difference, metric)} than {against}, {amount} ({sureness})."
    if difference.is_suggested:
        return (
            f"{name} against {against}: {amount}, which would pass as the only comparison ({p_text(difference.p)}) but "
            f"is not established among {difference.among} ({sureness})."
        )
    return f"{name} against {against}: no difference that these seeds can show, {amount} ({sureness})."


def _direction(difference: Difference, metric: Metric) -> str:
    if metric.higher_is_better is None:
        return "higher" if difference.mean > 0 else "lower"
    return "better" if (difference.mean > 0) == metric.higher_is_better else "worse"


def established(
    differences: Mapping[tuple[str, str], Difference | None], metrics: Mapping[str, Metric], against: str = "plain"
) -> list[str]:
    """A sentence for every (arm, metric) of a table that holds after correction, and one for how many do not."""
    tested = {key: difference for key, difference in differences.items() if difference is not None}
    if not tested:
        return ["Fewer than three seeds: no intervals."]
    lines = []
    for (arm, name), difference in tested.items():
        if difference.is_established:
            metric = metrics[name]
            lines.append(
                f"{capital(title(arm))}: {metric.title} {number(difference.mean, metric.digits)} {metric.unit} "
                f"against {against} (corrected interval {interval(difference, metric.digits)}, "
                f"{p_text(difference.adjusted_p)})."
            )
    left = len(tested) - len(lines)
    if not lines:
        lines.append(f"None of the {left} differences in this table holds after correction for their number.")
    elif left:
        lines.append(f"The other {left} of the {len(tested)} differences in this table do not hold after correction.")
    return lines
