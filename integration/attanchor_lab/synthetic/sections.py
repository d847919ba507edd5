"""What the tables and plots of one setting say, in words: hallucination, matching, attention, blur."""

from __future__ import annotations

from attanchor_lab.statistics import family, mean_and_deviation
from attanchor_lab.synthetic.wording import ANCHORS, FOLLOWED, capital, established, interval, number
from attanchor_lab.table import ACCURACIES, ATTENTION, HALLUCINATION, MEAN, PLACED, Laboratory, sharp, title, under_blur


def accuracies(laboratory: Laboratory, setting: str) -> list[str]:
    return established(laboratory.against_plain(setting, ACCURACIES), ACCURACIES)


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
    return lines + established(laboratory.against_plain(setting, HALLUCINATION), HALLUCINATION)


def placement(laboratory: Laboratory, setting: str) -> list[str]:
    """What the place of the copies adds to their being there."""
    return established(laboratory.against_random(setting), PLACED, "the same tokens at random patches")


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
    chosen = {name: ATTENTION[name] for name in ("patch", "both")}
    lines = established(laboratory.against_plain(setting, chosen), chosen)
    arms = [arm for arm in laboratory.arms(setting) if arm in ANCHORS]
    inside = []
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
            f"{capital(title(arm))}: with its copies in the prompt, the same weights give the true patch itself "
            f"{number(abs(difference.mean), 2, False)} % of all attention {word} than without them (corrected interval "
            f"{interval(difference, 2)}){holds}."
        )
    return lines


def without_copies(laboratory: Laboratory, setting: str) -> list[str]:
    """What an arm's weights are worth when its copies are left out at the end."""
    lines = []
    for arm in laboratory.arms(setting):
        if arm not in (*FOLLOWED, "front"):
            continue
        rows = laboratory.done(setting, arm).values()
        gain = [100 * (sharp(row)["mean"] - row["without_copies"]["mean"]) for row in rows]
        mean, deviation = mean_and_deviation(gain)
        spread = f" (deviation over {len(gain)} seeds {number(deviation, 1, False)})" if len(gain) > 1 else ""
        lines.append(
            f"{capital(title(arm))}: the trained model is {number(mean)} points better with its copies than asked "
            f"plainly{spread}."
        )
    return lines


def blur(laboratory: Laboratory, setting: str) -> list[str]:
    """Whether blur at the test takes more from anchors than from plain."""
    blurs = [f"{blur:g}" for blur in laboratory.setting(setting)["blur_test"]]
    arms = laboratory.arms(setting)
    arm = next((arm for arm in FOLLOWED if arm in arms), None)
    if len(blurs) < 2 or arm is None or "plain" not in arms:
        return []
    first, last = blurs[0], blurs[-1]

    def fall(of: str) -> dict[int, float]:
        before, after = (laboratory.values(setting, of, metric) for metric in (MEAN, under_blur(last)))
        return {seed: after[seed] - before[seed] for seed in before}

    ours, plain = fall(arm), fall("plain")
    hits = [
        mean_and_deviation(
            [100 * row["test"][key]["matching"]["hit"] for row in laboratory.done(setting, arm).values()]
        )[0]
        for key in (first, last)
    ]
    lines = [
        f"Blur of {last} pixels at the test changes plain's mean accuracy by "
        f"{number(mean_and_deviation(list(plain.values()))[0])} points, and the share of words whose best patch holds "
        f"them from {number(hits[0], 0, False)} to {number(hits[1], 0, False)} % ({title(arm)})."
    ]
    (difference,) = family([[ours[seed] - plain[seed] for seed in ours if seed in plain]])
    if difference is not None:
        holds = "which holds" if difference.is_established else "which these seeds cannot tell from none"
        lines.append(
            f"The difference between {title(arm)} and plain changes with it by {number(difference.mean)} points "
            f"(95 % interval {interval(difference)}), {holds}."
        )
    return lines
