"""What a page comes to: the answers to the plan's questions, and in short whether anchors help and what else does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from attanchor_lab.statistics import Difference, mean_and_deviation
from attanchor_lab.synthetic.wording import ANCHORS, TOLD, capital, interval, number, verdict
from attanchor_lab.table import MEAN, Comparison, Laboratory, title

_LEARNED = 90  # % of mean accuracy, from which on the task counts as learned
_MANY = 6  # of which more are told by their range


class _Found(NamedTuple):
    """The difference of an arm from plain in one setting of one laboratory."""

    laboratory: Laboratory
    setting: str
    arm: str
    difference: Difference


def primary(laboratory: Laboratory) -> list[str]:
    """The plan's questions, each with its answer."""
    found = laboratory.primary()
    several = len({contrast.setting for contrast in found}) > 1
    lines = []
    for contrast in laboratory.plan["contrasts"]:
        comparison = Comparison(contrast["setting"], contrast["arm"], contrast["against"])
        where = f" ({comparison.setting})" if several else ""
        pairs = len(laboratory.differences(comparison))
        said = verdict(title(comparison.arm), title(comparison.against), found[comparison], MEAN, pairs)
        lines.append(f"**{contrast['asks'] or 'Compared'}**{where} {capital(said)}")
    return lines


def in_short(laboratories: Sequence[Laboratory]) -> list[str]:
    """What the whole page comes to: do anchors help, and what else did."""
    found = [
        _Found(laboratory, comparison.setting, comparison.arm, difference)
        for laboratory in laboratories
        for comparison, difference in laboratory.all_against_plain().items()
        if difference is not None
    ]
    if not found:
        return ["No arm was run with three seeds, so nothing can be said about any difference."]
    better = [one for one in found if one.difference.is_established and one.difference.mean > 0]
    worse = [one for one in found if one.difference.is_established and one.difference.mean < 0]
    unsure = [one for one in found if not one.difference.is_established]
    helped, harmed, open_ = ([one for one in part if one.arm in ANCHORS] for part in (better, worse, unsure))
    others = [one for one in better if one.arm not in (*ANCHORS, *TOLD)]
    told = [one for one in better if one.arm in TOLD]
    lines = []
    if helped:
        lines.append(f"Anchors at the matched patches improved mean accuracy over plain: {_listed(helped)}.")
    else:
        lines.append(
            "In no setting run here did anchors at the matched patches, with whatever positions, improve mean accuracy "
            "over plain concatenation so that it holds after correction."
        )
    if harmed:
        lines.append(f"They made it worse: {_listed(harmed)}.")
    if others:
        lines.append(f"{'Also better than' if helped else 'What did improve on'} plain: {_listed(others)}.")
    else:
        lines.append("No other placement improved on plain concatenation so that it holds after correction.")
    if helped and open_:
        lines.append(f"Anchors at the matched patches showed no gain that holds after correction{_unsure(open_)}.")
    lines += _room(laboratories)
    if told:
        lines.append(f"Told where the object is, which no method is: {_listed(told)}.")
    if better or worse:
        lines[-1] += " (In brackets: 95 % intervals, corrected for what was compared together.)"
    return lines


def _room(laboratories: Sequence[Laboratory]) -> list[str]:
    """How far plain concatenation is from having learned the task: where a gain can show, and what it then is."""
    levels = [
        (_where(laboratory, setting["name"]), mean_and_deviation(values)[0])
        for laboratory in laboratories
        for setting in laboratory.settings
        if (values := list(laboratory.values(setting["name"], "plain", MEAN).values()))
    ]
    if len(levels) > _MANY:
        ends = min(levels, key=lambda one: one[1]), max(levels, key=lambda one: one[1])
        listed = " to ".join(f"{number(level, 0, False)} % ({name})" for name, level in ends)
    else:
        listed = "; ".join(f"{number(level, 0, False)} % ({name})" for name, level in levels)
    lines = [f"Plain concatenation itself reached a mean accuracy of {listed}."]
    if unlearned := [name for name, level in levels if level < _LEARNED]:
        where = "in all of them" if len(unlearned) == len(levels) > 1 else "; ".join(unlearned)
        lines[0] += (
            f" Below {_LEARNED} % ({where}) it has not learned the task to its end, so a gain there may be faster "
            "learning."
        )
    return lines


def _unsure(found: Sequence[_Found]) -> str:
    """All of them; many by their number and the ends of their range."""
    if len(found) <= _MANY:
        return f": {_listed(found)}"
    by_mean = sorted(found, key=lambda one: one.difference.mean)
    seeds = sorted({one.difference.seeds for one in found})
    counts = f"{seeds[0]} seeds" if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    return f" in {len(found)} comparisons of {counts}, from {_listed(by_mean[:1])} to {_listed(by_mean[-1:])}"


def _listed(found: Sequence[_Found]) -> str:
    return "; ".join(
        f"{title(arm)} ({_where(laboratory, setting)}: {number(difference.mean)} points [{interval(difference)}], "
        f"{difference.seeds} seeds)"
        for laboratory, setting, arm, difference in found
    )


def _where(laboratory: Laboratory, setting: str) -> str:
    """Size and setting; a plan of one setting may give both one name."""
    return setting if setting == laboratory.size else f"{laboratory.size}, {setting}"
