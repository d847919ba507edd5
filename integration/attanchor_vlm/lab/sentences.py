"""From statistics to words, by rules: every finding of the report is made here, none is written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attanchor_vlm.lab.records import (
    ACCURACIES,
    ATTENTION,
    HALLUCINATION,
    MEAN,
    PLACED,
    Laboratory,
    Metric,
    sharp,
    title,
)
from attanchor_vlm.lab.statistics import LEAST, Difference, family, mean_and_deviation

ANCHORS = ("t2i", "t2i-inherit", "t2i-content", "t2i-content-inherit")  # at matched patches: the method
_LEARNED = 90  # % of mean accuracy, from which on the task counts as learned
_TOLD = ("true", "true-inherit")  # arms that know the answer: bounds, no methods
_Entry = tuple[Laboratory, str, str, Difference]
_BLURRED = "t2i-inherit", "t2i"  # the arms that are followed into blur and across settings, the first that was run


def number(value: float, digits: int = 1, sign: bool = True) -> str:
    text = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return text.replace("-", "−")


def interval(difference: Difference, digits: int = 1, wide: bool = True) -> str:
    low, high = (difference.wide_low, difference.wide_high) if wide else (difference.low, difference.high)
    return f"{number(low, digits)} to {number(high, digits)}"


def p_text(p: float) -> str:
    return "p < .001" if p < 0.001 else f"p = {p:.3f}".replace("0.", ".", 1)


def verdict(name: str, against: str, difference: Difference | None, metric: Metric, count: int, seeds: int) -> str:
    """One comparison in words.

    Args:
        name, against: The two sides, as subjects of a sentence.
        count: Comparisons in the family.
        seeds: Pairs that were run.
    """
    if difference is None:
        few = f"{_seeds(seeds)}, fewer than the {LEAST} that an interval needs"
        return f"{name} against {against}: {few}; nothing can be said."
    amount = f"{number(difference.mean, metric.digits)} {metric.unit} in {metric.title}"
    doubt = (
        f"{difference.seeds} seeds; 95 % interval {interval(difference, metric.digits)}, corrected for {count} "
        f"comparisons, {p_text(difference.adjusted_p)}"
    )
    if difference.is_established:
        better = (difference.mean > 0) == (metric.higher_is_better is not False)
        word = "better" if better else "worse"
        if metric.higher_is_better is None:
            word = "higher" if difference.mean > 0 else "lower"
        return f"{name}: {word} than {against}, {amount} ({doubt})."
    if difference.is_suggested:
        return (
            f"{name} against {against}: {amount}, which would pass as the only comparison ({p_text(difference.p)}) but "
            f"is not established among {count} ({doubt})."
        )
    return f"{name} against {against}: no difference that these seeds can show, {amount} ({doubt})."


def primary(laboratory: Laboratory) -> list[str]:
    """The plan's questions, each with its answer."""
    found = laboratory.primary()
    count = sum(difference is not None for _, difference, _ in found)
    lines = []
    several = len({contrast["setting"] for contrast, _, _ in found}) > 1
    for contrast, difference, values in found:
        where = f" ({contrast['setting']})" if several else ""
        said = verdict(title(contrast["arm"]), title(contrast["against"]), difference, MEAN, count, len(values))
        lines.append(f"**{contrast['asks'] or 'Compared'}**{where} {_capital(said)}")
    return lines


def in_short(laboratories: Sequence[Laboratory]) -> list[str]:
    """What the whole page comes to: do anchors help, and what else did."""
    helped: list[_Entry] = []
    harmed: list[_Entry] = []
    open_: list[_Entry] = []
    others: list[_Entry] = []
    told: list[_Entry] = []
    tested = 0
    for laboratory in laboratories:
        for setting, arm, difference in all_against_plain(laboratory):
            tested += difference is not None
            if difference is None:
                continue
            entry = (laboratory, setting, arm, difference)
            if not difference.is_established:
                open_ += [entry] if arm in ANCHORS else []
                continue
            if arm in ANCHORS:
                (helped if difference.mean > 0 else harmed).append(entry)
            elif difference.mean > 0:
                (told if arm in _TOLD else others).append(entry)
    if not tested:
        return ["No arm was run with three seeds, so nothing can be said about any difference."]
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
        lines.append(f"Anchors at the matched patches showed no gain that holds after correction: {_listed(open_)}.")
    lines += _room(laboratories)
    if told:
        lines.append(f"Told where the object is, which no method is: {_listed(told)}.")
    return lines


def _room(laboratories: Sequence[Laboratory]) -> list[str]:
    """How far plain concatenation is from having learned the task: where a gain can show, and what it then is."""
    levels = {
        f"{laboratory.size}, {setting['name']}": mean_and_deviation(values)[0]
        for laboratory in laboratories
        for setting in laboratory.settings
        if (values := list(laboratory.values(setting["name"], "plain", MEAN).values()))
    }
    listed = "; ".join(f"{number(level, 0, False)} % ({name})" for name, level in levels.items())
    lines = [f"Plain concatenation itself reached a mean accuracy of {listed}."]
    if unlearned := [name for name, level in levels.items() if level < _LEARNED]:
        lines[0] += (
            f" Below {_LEARNED} % ({'; '.join(unlearned)}) it has not learned the task to its end, so a gain there may "
            "be faster learning."
        )
    return lines


def _listed(entries: Sequence[_Entry]) -> str:
    return "; ".join(
        f"{title(arm)} ({laboratory.size}, {setting}: {number(difference.mean)} points, corrected interval "
        f"{interval(difference)}, {difference.seeds} seeds)"
        for laboratory, setting, arm, difference in entries
    )


def all_against_plain(laboratory: Laboratory) -> list[tuple[str, str, Difference | None]]:
    """Every arm of every setting against plain, in mean accuracy: with the statistics of the plan's comparisons where
    it is one of them, the others as one family."""
    keys = [
        (setting["name"], arm)
        for setting in laboratory.settings
        for arm in laboratory.arms(setting["name"])
        if arm != "plain"
    ]
    values = [laboratory.differences(setting, arm, "plain", MEAN) for setting, arm in keys]
    found, _ = _with_primary(laboratory, [(setting, arm, "plain") for setting, arm in keys], values)
    return [(*key, difference) for key, difference in zip(keys, found, strict=True)]


def _with_primary(
    laboratory: Laboratory, comparisons: Sequence[tuple[str, str, str]], values: Sequence[Sequence[float]]
) -> tuple[list[Difference | None], list[int]]:
    """Statistics of (setting, arm, against), and the number of comparisons that each was corrected for.

    One comparison has one answer on a page: those of the plan keep theirs, the others are a family of their own.
    """
    chosen = laboratory.primary()
    planned = {(c["setting"], c["arm"], c["against"]): difference for c, difference, _ in chosen}
    rest = [index for index, comparison in enumerate(comparisons) if comparison not in planned]
    others = dict(zip(rest, family([values[index] for index in rest]), strict=True))
    found = [others.get(index, planned.get(comparison)) for index, comparison in enumerate(comparisons)]
    of_plan = sum(difference is not None for difference in planned.values())
    of_rest = sum(difference is not None for difference in others.values())
    return found, [of_rest if index in others else of_plan for index in range(len(comparisons))]


# --- Sections of one setting. ----------------------------------------------------------------------------------------


def hallucination(laboratory: Laboratory, setting: str) -> list[str]:
    """Whether there is any, and what the arms did about it."""
    shares = {
        name: list(laboratory.values(setting, "plain", metric).values()) for name, metric in HALLUCINATION.items()
    }
    if not all(shares.values()):
        return []
    affirmed = {name: 100 - mean_and_deviation(values)[0] for name, values in shares.items() if name != "yes_share"}
    lines = [
        f"Plain concatenation affirms {number(affirmed['random'], 0, False)} % of the absent objects drawn at random, "
        f"{number(affirmed['popular'], 0, False)} % of the popular ones and "
        f"{number(affirmed['adversarial'], 0, False)} % of the adversarial ones; it overlooks "
        f"{number(affirmed['present'], 0, False)} % of those that are there. Its yes-share is "
        f"{number(mean_and_deviation(shares['yes_share'])[0], 0, False)} % where 50 % would be right."
    ]
    differences = laboratory.against_plain(setting, HALLUCINATION)
    lines += _established(differences, HALLUCINATION)
    return lines


def accuracies(laboratory: Laboratory, setting: str) -> list[str]:
    return _established(laboratory.against_plain(setting, ACCURACIES), ACCURACIES)


def placement(laboratory: Laboratory, setting: str) -> list[str]:
    """What the place of the copies adds to their being there."""
    return _established(laboratory.against_random(setting), PLACED, "the same tokens at random patches")


def _established(
    differences: dict[tuple[str, str], Difference | None], metrics: dict[str, Metric], against: str = "plain"
) -> list[str]:
    """A sentence for every cell of a table that holds after correction, and one for how many do not."""
    tested = {key: difference for key, difference in differences.items() if difference is not None}
    if not tested:
        return ["Fewer than three seeds: no intervals."]
    lines = []
    for (arm, name), difference in tested.items():
        if difference.is_established:
            metric = metrics[name]
            lines.append(
                f"{_capital(title(arm))}: {metric.title} {number(difference.mean, metric.digits)} {metric.unit} "
                f"against {against} (corrected interval {interval(difference, metric.digits)}, "
                f"{p_text(difference.adjusted_p)})."
            )
    left = len(tested) - len(lines)
    lines.append(
        f"The other {left} of the {len(tested)} differences in this table do not hold after correction."
        if lines
        else f"None of the {len(tested)} differences in this table holds after correction for their number."
    )
    return lines


def matching(laboratory: Laboratory, setting: str) -> list[str]:
    """Whether the cosine means anything."""
    arm = next((arm for arm in (*ANCHORS, "plain") if arm in laboratory.arms(setting)), None)
    if arm is None:
        return []
    found = [sharp(row)["matching"] for row in laboratory.done(setting, arm).values()]
    hits = [100 * entry["hit"] for entry in found if entry["hit"] is not None]
    chances = [100 * entry["chance"] for entry in found if entry["chance"] is not None]
    if not hits:
        return []
    weight = laboratory.setting(setting)["alignment"]
    hit, chance = mean_and_deviation(hits)[0], mean_and_deviation(chances)[0]
    spread = f" ({number(min(hits), 0, False)} to {number(max(hits), 0, False)} over seeds)" if len(hits) > 1 else ""
    return [
        f"{'With' if weight else 'Without'} the alignment loss, the patch with the best cosine truly holds a colour or "
        f"shape of the scene in {number(hit, 0, False)} % of the cases{spread}, where a random patch would in "
        f"{number(chance, 0, False)} % ({title(arm)}, after stage 2)."
    ]


def attention(laboratory: Laboratory, setting: str) -> list[str]:
    """The paper's mechanism: do anchors draw attention to the true patch?"""
    chosen = {"patch": ATTENTION["patch"], "both": ATTENTION["both"]}
    lines = _established(laboratory.against_plain(setting, chosen), chosen)
    inside = []
    arms = [arm for arm in laboratory.arms(setting) if arm in ANCHORS]
    for arm in arms:
        here = laboratory.values(setting, arm, ATTENTION["patch"])
        off = laboratory.values(setting, arm, ATTENTION["without"])
        inside.append([here[seed] - off[seed] for seed in here if seed in off])
    for arm, difference in zip(arms, family(inside), strict=True):
        if difference is None:
            continue
        word = "more" if difference.mean > 0 else "less"
        holds = "" if difference.is_established else ", which does not hold after correction"
        lines.append(
            f"{_capital(title(arm))}: with its copies in the prompt, the same weights give the true patch itself "
            f"{number(abs(difference.mean), 2, False)} % of all attention {word} than without them (corrected interval "
            f"{interval(difference, 2)}){holds}."
        )
    return lines


def without_copies(laboratory: Laboratory, setting: str) -> list[str]:
    """What an arm's weights are worth when its copies are left out at the end."""
    lines = []
    for arm in laboratory.arms(setting):
        rows = [row for row in laboratory.done(setting, arm).values() if "without_copies" in row]
        if not rows or arm not in ("t2i", "t2i-inherit", "front"):
            continue
        drop = [100 * (sharp(row)["mean"] - row["without_copies"]["mean"]) for row in rows]
        mean, deviation = mean_and_deviation(drop)
        spread = f" (deviation over {len(drop)} seeds {number(deviation, 1, False)})" if len(drop) > 1 else ""
        lines.append(
            f"{_capital(title(arm))}: the trained model is {number(mean)} points better with its copies than asked "
            f"plainly{spread}."
        )
    return lines


def blur(laboratory: Laboratory, setting: str) -> list[str]:
    """Whether blur at the test takes more from anchors than from plain."""
    blurs = laboratory.setting(setting)["blur_test"]
    arms = laboratory.arms(setting)
    arm = next((arm for arm in _BLURRED if arm in arms), None)
    if len(blurs) < 2 or arm is None:
        return []
    first, last = f"{blurs[0]:g}", f"{blurs[-1]:g}"

    def fall(of: str) -> dict[int, float]:
        rows = laboratory.done(setting, of)
        return {
            seed: 100 * (row["test"][last]["mean"] - row["test"][first]["mean"]) for seed, row in sorted(rows.items())
        }

    ours, plain = fall(arm), fall("plain")
    interaction = [ours[seed] - plain[seed] for seed in ours if seed in plain]
    mean = mean_and_deviation(list(plain.values()))[0]
    hits = {
        key: mean_and_deviation(
            [100 * row["test"][key]["matching"]["hit"] for row in laboratory.done(setting, arm).values()]
        )[0]
        for key in (first, last)
    }
    lines = [
        f"Blur of {last} pixels at the test changes plain's mean accuracy by {number(mean)} points, and the share of "
        f"words whose best patch holds them from {number(hits[first], 0, False)} to {number(hits[last], 0, False)} %."
    ]
    difference = family([interaction])[0]
    if difference is not None:
        holds = "which holds" if difference.is_established else "which these seeds cannot tell from none"
        lines.append(
            f"The difference between {title(arm)} and plain changes with it by {number(difference.mean)} points "
            f"(95 % interval {interval(difference)}), {holds}."
        )
    return lines


# --- What follows for users. -----------------------------------------------------------------------------------------


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


def for_users(laboratory: Laboratory) -> list[str]:
    """Positions, mask, share and alignment: which did best here, by how much, with what doubt."""
    lines = _highest(laboratory)
    pairs = [
        (topic, setting["name"], one, other)
        for setting in laboratory.settings
        for topic, one, other in _PAIRS
        if {one, other} <= set(laboratory.arms(setting["name"]))
    ]
    crossed = across(laboratory)
    values = [laboratory.differences(name, one, other, MEAN) for _, name, one, other in pairs]
    every = [pair[1:] for pair in pairs] + [(said, "", "") for _, said, _ in crossed]
    found, counts = _with_primary(laboratory, every, [*values, *(changes for *_, changes in crossed)])
    for (topic, name, one, other), difference, runs, count in zip(pairs, found, values, counts, strict=False):
        lines.append(f"**{topic}** ({name}). {_capital(_best(one, other, difference, len(runs), count))}")
    for (topic, words, changes), difference, count in zip(
        crossed, found[len(pairs) :], counts[len(pairs) :], strict=True
    ):
        if difference is None:
            lines.append(f"**{topic}**. {words}: {_seeds(len(changes))}, too few for an interval.")
            continue
        lines.append(
            f"**{topic}**. {words}: {number(difference.mean)} points (interval {interval(difference)}, corrected for "
            f"{count} comparisons, {difference.seeds} seeds), {_doubt(difference)}."
        )
    varied = {topic for topic, *_ in pairs} | {topic for topic, *_ in crossed}
    missing = [topic for topic in ("Positions", "Mask", "Share", "Alignment") if topic not in varied]
    if missing:
        lines.append(f"Not varied at this size: {', '.join(topic.lower() for topic in missing)}.")
    return lines


def _highest(laboratory: Laboratory) -> list[str]:
    """The arm of each setting that stands highest above plain, of those that a user could run."""
    lines = []
    for setting in laboratory.settings:
        able = [
            (arm, difference)
            for name, arm, difference in all_against_plain(laboratory)
            if name == setting["name"] and difference is not None and arm not in _TOLD
        ]
        if not able:
            continue
        arm, difference = max(able, key=lambda entry: entry[1].mean)
        if difference.mean <= 0:
            lines.append(f"**Best** ({setting['name']}). No arm stood above plain in the mean.")
            continue
        lines.append(
            f"**Best** ({setting['name']}). {_capital(title(arm))} stood highest of {len(able)} arms, "
            f"{number(difference.mean)} points against plain (corrected interval {interval(difference)}, "
            f"{difference.seeds} seeds), {_doubt(difference)}."
        )
    return lines


def _best(one: str, other: str, difference: Difference | None, seeds: int, count: int) -> str:
    if difference is None:
        return f"{title(one)} against {title(other)}: {_seeds(seeds)}, too few for an interval."
    better, worse = (one, other) if difference.mean >= 0 else (other, one)
    return (
        f"{title(better)} did best here, by {number(abs(difference.mean), 1, False)} points against {title(worse)} "
        f"(interval of {title(one)} minus {title(other)}: {interval(difference)}, corrected for {count} comparisons, "
        f"{difference.seeds} seeds), {_doubt(difference)}."
    )


def _doubt(difference: Difference) -> str:
    if difference.is_established:
        return "and this holds after correction"
    if difference.is_suggested:
        return "suggestive alone, not established after correction"
    return "which may be chance"


_FACTORS = {  # what two settings may differ in, and the topic that it belongs to
    "alignment": "Alignment",
    "stage2.share": "Share",
    "stage2.hold_share": "Share",
    "stage2.method": "Way to train",
    "stage2.steps": "Length of stage 2",
    "stage1.steps": "Anchors from the first step",
    "shape.layers": "Depth",
    "world.rows": "Number of patches",
    "mixture.yes": "Training questions",
    "blur_train": "Blur in training",
}


def across(laboratory: Laboratory) -> list[tuple[str, str, list[float]]]:
    """(topic, words, changes) for every setting against the first: what it changes in plain, and in the worth of
    anchors, which is their difference from plain."""
    base = laboratory.settings[0]
    found = []
    for setting in laboratory.settings[1:]:
        changed = factors(base, setting)
        topics = [_FACTORS[name] for name in changed if name in _FACTORS]
        arms = set(laboratory.arms(base["name"])) & set(laboratory.arms(setting["name"]))
        arm = next((arm for arm in _BLURRED if arm in arms), None)
        if not topics or arm is None:
            continue
        words = ", ".join(f"{name} {changed[name][0]} to {changed[name][1]}" for name in changed if name in _FACTORS)
        plain = [laboratory.values(name, "plain", MEAN) for name in (base["name"], setting["name"])]
        worth = [
            {
                seed: value - plain[index][seed]
                for seed, value in laboratory.values(name, arm, MEAN).items()
                if seed in plain[index]
            }
            for index, name in enumerate((base["name"], setting["name"]))
        ]
        for what, (before, after) in (("plain concatenation", plain), (f"{title(arm)} minus plain", worth)):
            changes = [after[seed] - before[seed] for seed in after if seed in before]
            said = f"From {base['name']} to {setting['name']} ({words}), {what} changes"
            found.append((topics[0], said, changes))
    return found


def factors(one: dict[str, Any], other: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two settings differ in, by dotted name; not what they are called, which arms they have or how they test."""
    ignored = {"name", "title", "arms", "more", "seeds", "more_seeds", "test_scenes", "test_each", "test_batch"}
    ignored |= {"blur_test"}
    found: dict[str, tuple[Any, Any]] = {}
    for name, value in one.items():
        if name in ignored:
            continue
        if isinstance(value, dict):
            found |= {f"{name}.{key}": pair for key, pair in factors(value, other[name]).items()}
        elif value != other[name]:
            found[name] = (value, other[name])
    return found


def _seeds(count: int) -> str:
    return f"{count} seed" + ("" if count == 1 else "s")


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
