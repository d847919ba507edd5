"""What follows for users: which positions, mask, share and alignment did best, by how much, and with what doubt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from attanchor_lab.statistics import Difference
from attanchor_lab.synthetic.wording import FOLLOWED, TOLD, capital, doubt, interval, number, seeds
from attanchor_lab.table import MEAN, Comparison, Laboratory, title

_PAIRS = (  # what a user can choose, and the two arms that tell
    ("Positions", "t2i-inherit", "t2i"),
    ("Mask", "t2i-content", "t2i"),
    ("Mask", "t2i-content-inherit", "t2i-inherit"),
    ("Place", "t2i-inherit", "random-inherit"),
    ("Place", "t2i", "random"),
    ("Matching", "true-inherit", "t2i-inherit"),
    ("Direction", "i2t", "t2i"),
    ("Without matching", "front", "t2i"),
    ("Without matching", "front", "end"),
)
# What two settings may differ in, and the topic that it belongs to; of several, the first one names the comparison.
_FACTORS = {
    "alignment": "Alignment",
    "stage2.share": "Share",
    "stage2.hold_share": "Share",
    "stage2.method": "Way to train",
    "shape.layers": "Depth",
    "world.rows": "Number of patches",
    "mixture.yes": "Training questions",
    "mixture.negatives": "Training questions",
    "blur_train": "Blur in training",
    "stage1.steps": "Length of stage 1",
    "stage2.steps": "Length of stage 2",
}
_NO_FACTORS = {"name", "title", "arms", "more", "seeds", "more_seeds", "blur_test"}
_NO_FACTORS |= {"test_scenes", "test_each", "test_batch"}
_ASKED = ("Positions", "Mask", "Share", "Alignment")  # what a user wants to know in any case


class _Change(NamedTuple):
    """What a setting changes against another one: `values` are after minus before, by seed."""

    topic: str
    words: str
    values: list[float]


def for_users(laboratory: Laboratory) -> list[str]:
    """A line for every choice that this laboratory compared, and one for those that it did not."""
    pairs = [
        (topic, Comparison(setting["name"], one, other))
        for setting in laboratory.settings
        for topic, one, other in _PAIRS
        if {one, other} <= set(laboratory.arms(setting["name"]))
    ]
    changes = across(laboratory)
    found = laboratory.compared([pair for _, pair in pairs], [change.values for change in changes])
    lines = _highest(laboratory)
    for (topic, pair), difference in zip(pairs, found, strict=False):
        said = _best(pair, difference, len(laboratory.differences(pair)))
        lines.append(f"**{topic}** ({pair.setting}). {capital(said)}")
    for change, difference in zip(changes, found[len(pairs) :], strict=True):
        said = f"**{change.topic}**. {change.words}: "
        if difference is None:
            lines.append(f"{said}{seeds(len(change.values))}, too few for an interval.")
            continue
        lines.append(
            f"{said}{number(difference.mean)} points (interval {interval(difference)}, corrected for "
            f"{difference.among} comparisons, {seeds(difference.seeds)}), {doubt(difference)}."
        )
    varied = {topic for topic, _ in pairs} | {change.topic for change in changes}
    if missing := [topic.lower() for topic in _ASKED if topic not in varied]:
        lines.append(f"Not varied at this size: {', '.join(missing)}.")
    return lines


def _highest(laboratory: Laboratory) -> list[str]:
    """The arm of each setting that stands highest above plain, of those (two or more) that a user could run."""
    lines = []
    against_plain = laboratory.all_against_plain()
    for setting in laboratory.settings:
        able = [
            (comparison.arm, difference)
            for comparison, difference in against_plain.items()
            if comparison.setting == setting["name"] and difference is not None and comparison.arm not in TOLD
        ]
        if len(able) < 2:  # one arm is not the best of any
            continue
        arm, difference = max(able, key=lambda entry: entry[1].mean)
        if difference.mean <= 0:
            lines.append(f"**Best** ({setting['name']}). No arm stood above plain in the mean.")
            continue
        lines.append(
            f"**Best** ({setting['name']}). {capital(title(arm))} stood highest of {len(able)} arms, "
            f"{number(difference.mean)} points against plain (interval {interval(difference)}, corrected for "
            f"{difference.among} comparisons, {seeds(difference.seeds)}), {doubt(difference)}."
        )
    return lines


def _best(pair: Comparison, difference: Difference | None, runs: int) -> str:
    one, other = title(pair.arm), title(pair.against)
    if difference is None:
        return f"{one} against {other}: {seeds(runs)}, too few for an interval."
    better, worse = (one, other) if difference.mean >= 0 else (other, one)
    return (
        f"{better} did best here, by {number(abs(difference.mean), 1, False)} points against {worse} (interval of "
        f"{one} minus {other}: {interval(difference)}, corrected for {difference.among} comparisons, "
        f"{seeds(difference.seeds)}), {doubt(difference)}."
    )


def across(laboratory: Laboratory) -> list[_Change]:
    """What every setting changes in plain, and in the worth of anchors, which is their difference from plain.

    A setting is set against the earlier one that differs from it in the fewest things.
    """
    found = []
    for index, setting in enumerate(laboratory.settings):
        bases = [
            (factors(base, setting), base["name"], arm)
            for base in laboratory.settings[:index]
            if (arm := _followed(laboratory, base["name"], setting["name"])) is not None
        ]
        if not bases:
            continue
        changed, base, arm = min(bases, key=lambda entry: len(entry[0]))
        topic = next((topic for name, topic in _FACTORS.items() if name in changed), None)
        if topic is None:
            continue
        what = ", ".join(f"{name} {_shown(before)} to {_shown(after)}" for name, (before, after) in changed.items())
        words = f"From {base} to {setting['name']} ({what}), "
        if topic != "Share":  # plain has none
            before, after = (laboratory.values(name, "plain", MEAN) for name in (base, setting["name"]))
            found.append(_Change(topic, f"{words}plain concatenation changes", _changes(before, after)))
        before, after = (_worth(laboratory, name, arm) for name in (base, setting["name"]))
        found.append(_Change(topic, f"{words}{title(arm)} minus plain changes", _changes(before, after)))
    return found


def _followed(laboratory: Laboratory, *settings: str) -> str | None:
    """The anchors that both settings have, beside plain."""
    arms = set.intersection(*(set(laboratory.arms(setting)) for setting in settings))
    return next((arm for arm in FOLLOWED if {arm, "plain"} <= arms), None)


def _worth(laboratory: Laboratory, setting: str, arm: str) -> dict[int, float]:
    ours, plain = (laboratory.values(setting, one, MEAN) for one in (arm, "plain"))
    return {seed: ours[seed] - plain[seed] for seed in ours if seed in plain}


def _changes(before: Mapping[int, float], after: Mapping[int, float]) -> list[float]:
    return [after[seed] - before[seed] for seed in after if seed in before]


def _shown(value: Any) -> str:
    return " and ".join(map(str, value)) if isinstance(value, list) else str(value)


def factors(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two settings differ in, by dotted name; not what they are called, which arms they have or how they test."""
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in one.items():
        if name in _NO_FACTORS:
            continue
        if isinstance(value, dict):
            found |= {f"{name}.{key}": pair for key, pair in factors(value, other[name]).items()}
        elif value != other[name]:
            found[name] = (value, other[name])
    return found
