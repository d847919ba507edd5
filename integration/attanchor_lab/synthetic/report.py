"""`attanchor report`: rows of the laboratory to one page of tables, plots, pictures and sentences made by rule."""

from __future__ import annotations

import statistics as averages
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attanchor_vlm.records import check_parent, write_atomically

from attanchor_lab import table as records
from attanchor_lab.statistics import Difference, mean_and_deviation
from attanchor_lab.synthetic import advice, sections, summary
from attanchor_lab.synthetic.wording import interval, number, probability
from attanchor_lab.table import ACCURACIES, ATTENTION, HALLUCINATION, MEAN, Laboratory, Metric, sharp, title, under_blur


def write(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write the page and, beside it, its pictures.

    Args:
        paths: rows.jsonl files, or folders that hold one; each is a part of the page.
        output: A .md file. Pictures are called after it.

    Returns:
        The files written.

    Raises:
        ValueError: `output` is no .md file or cannot be written, or a path holds no finished runs.
    """
    if output.suffix != ".md" or output.is_dir():
        raise ValueError(f"output is {output}; it should be a .md file")
    check_parent(output)
    if not paths:
        raise ValueError("no rows are given; name the folders of `attanchor lab`")
    laboratories = records.load(paths)
    written: list[Path] = []
    lines = ["# The proving ground: does it help?", ""]
    lines += _preface(laboratories)
    lines += _section("## In short", _bullets(summary.in_short(laboratories)))
    for laboratory in laboratories:
        if len(laboratories) > 1:
            lines += [f"In the size {laboratory.size}:", ""]
        lines += [*_bullets(summary.primary(laboratory)), ""]
    lines += ["## What follows for users", ""]
    for laboratory in laboratories:
        lines += [
            f"From the size {laboratory.size}. *Best* are differences from plain, corrected as such; what else the "
            "plan does not name is corrected together:",
            "",
        ]
        lines += [*_bullets(advice.for_users(laboratory)), ""]
    lines += _section("## What this does not show", _bullets(_limits(laboratories)))
    for index, laboratory in enumerate(laboratories):
        names = _Pictures(output, f"{index + 1}-" if len(laboratories) > 1 else "", written)
        lines += _part(laboratory, names)
    write_atomically(output, lambda path: path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8"))
    return [output, *written]


class _Pictures:
    """Names of the page's pictures, and which were made."""

    def __init__(self, page: Path, prefix: str, written: list[Path]) -> None:
        self.page, self.prefix, self.written = page, prefix, written

    def path(self, kind: str, setting: str) -> Path:
        return self.page.parent / f"{self.page.stem}-{self.prefix}{setting}-{kind}.png"

    def line(self, kind: str, setting: str, words: str) -> str:
        path = self.path(kind, setting)
        self.written.append(path)
        return f"![{words}]({path.name})"


def _section(heading: str, lines: Sequence[str]) -> list[str]:
    return [heading, "", *lines, ""]


def _bullets(lines: Sequence[str]) -> list[str]:
    return [f"- {line}" for line in lines]


def _preface(laboratories: Sequence[Laboratory]) -> list[str]:
    sizes = ", ".join(laboratory.size for laboratory in laboratories)
    seeds = sorted({len(setting["seeds"]) for laboratory in laboratories for setting in laboratory.settings})
    return [
        f"Made by `attanchor report` from the rows of `attanchor lab` (size: {sizes}). Every finding on this page is "
        "put into words by rules from the rows' statistics. A difference is one arm minus another from the same "
        f"weights, on the same data in the same order, paired by seed (seeds: {_range(seeds)}). Intervals are "
        "Student's t at 95 %. What is looked at together is corrected together: the comparisons that a plan names, all "
        "other differences from plain in mean accuracy, and what else a list or a table shows. *Corrected* intervals "
        "hold for all of these at once (Bonferroni), p-values are Holm's, and *established* means one below .05. "
        "Holm's procedure is a little sharper than the corrected intervals: one of them may include 0 where the "
        "difference is established. How to run and read it: `docs/proving-ground.md`.",
        "",
    ]


def _limits(laboratories: Sequence[Laboratory]) -> list[str]:
    seen = [accuracies for laboratory in laboratories for accuracies in laboratory.encoders()]
    named = [
        f"the {what} of {_range([f'{100 * one[what]:.1f}' for one in sorted(seen, key=lambda one: one[what])])} %"
        for what in ("colour", "shape")
        if seen
    ]
    return [
        "No pretrained language model: these models have learned thirty words on the scenes themselves, so nothing "
        "here says what anchors do to knowledge that a large model brings along.",
        "No real images and no CLIP: the encoder sees one patch at a time"
        + (f", and names {' and '.join(named)} of the objects." if named else "."),
        "The models are small and the training is short. An effect that needs scale or patience would not show; and a "
        "gain may be faster learning, which need not last when plain concatenation is trained to the end.",
        "Absolute values of cosine and tau mean nothing for another model.",
        "Anchors at the true patch are told where the object is; that arm bounds what better matching could give, and "
        "its answers to existence questions are partly given away.",
    ]


def _range(values: Sequence[object]) -> str:
    """Of values in order."""
    return str(values[0]) if values[0] == values[-1] else f"{values[0]} to {values[-1]}"


# --- One laboratory. -------------------------------------------------------------------------------------------------


def _part(laboratory: Laboratory, names: _Pictures) -> list[str]:
    lines = [f"## The size {laboratory.size}", "", *_what_ran(laboratory), ""]
    lines += ["### The comparisons chosen before the runs", "", *_primary_table(laboratory), ""]
    for setting in laboratory.settings:
        if laboratory.arms(setting["name"]):
            lines += _setting(laboratory, setting, names)
        else:
            lines += [f"### {setting['name']}", "", f"{setting['title']}: no run was finished.", ""]
    lines += _section("### Every run", _runs(laboratory))
    return lines


def _what_ran(laboratory: Laboratory) -> list[str]:
    counts, plan = laboratory.counts(), laboratory.plan
    done = [row for row in laboratory.rows if row["status"] == "done"]
    loads = [row["load_before"] for row in done if row.get("load_before") is not None]
    first, last = min(row["started"] for row in done), max(row["started"] for row in done)
    cpu = sum(row.get("cpu_seconds", 0) for row in done)
    wall = sum(row.get("seconds", 0) for row in done)
    commits = sorted({row["commit"] for row in done})
    device = plan["gpu"] if plan.get("gpu", "none") != "none" else f"{plan['processor']}, {plan['cores']} cores"
    lines = [
        f"Planned at {plan['written']}: {counts['planned']} runs. Done: {counts['done']}; failed: {counts['failed']}; "
        f"not started: {counts['not started']}; failures made good by a later run: {laboratory.mended()}. First run "
        f"begun {first}, last one {last}. Machine: {device}; torch {plan['torch']}, transformers "
        f"{plan['transformers']}; commit {', '.join(commits)}. All jobs together took {cpu:.0f} s of processor time "
        f"and {wall:.0f} s on the clock, {plan['workers']} side by side"
        + (
            f"; the machine's load when they began was {averages.median(loads):.1f} in the median (for "
            f"{plan['cores']} cores), {max(loads):.1f} at most."
            if loads
            else "."
        ),
        "",
        "| setting | what | arms and seeds | tokens of an image | stage 1, stage 2 | training |",
        "|---|---|---|---|---|---|",
    ]
    for setting in laboratory.settings:
        stage1, stage2, world = setting["stage1"], setting["stage2"], setting["world"]
        runs = f"{len(setting['arms'])} × {len(setting['seeds'])}"
        if setting["more"]:
            runs += f", {len(setting['more'])} × {min(setting['more_seeds'], len(setting['seeds']))}"
        mixture = setting["mixture"]
        lines.append(
            f"| {setting['name']} | {setting['title']} | {runs} | {world['rows'] * world['columns']} | "
            f"{stage1['steps']} steps of {stage1['batch']} × {stage1['each']} questions, {stage2['steps']} of "
            f"{stage2['batch']} ({stage2['method']}, share {stage2['share']:.2f} "
            f"{'held' if stage2['hold_share'] else 'at first, tau fixed'}) | alignment {setting['alignment']:g}, yes "
            f"{100 * mixture['yes']:.0f} %, negatives {', '.join(mixture['negatives'])} |"
        )
    return lines


def _primary_table(laboratory: Laboratory) -> list[str]:
    found = laboratory.primary()
    if not found:
        return ["The plan names none."]
    lines = [
        "Mean accuracy over the kinds of question, in points.",
        "",
        "| setting | comparison | each seed | mean | 95 % alone | 95 % corrected | p | p, Holm |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for comparison, difference in found.items():
        name = f"{title(comparison.arm)} − {title(comparison.against)}"
        cells = [comparison.setting, name, " ".join(number(one) for one in laboratory.differences(comparison))]
        if difference is None:
            cells += [""] * 5
        else:
            cells += [number(difference.mean), interval(difference, wide=False), interval(difference)]
            cells += [probability(difference.p), probability(difference.adjusted_p)]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _setting(laboratory: Laboratory, setting: dict[str, Any], names: _Pictures) -> list[str]:
    from attanchor_lab import lab_figures as figures

    name = setting["name"]
    lines = [f"### {name}: {setting['title']}", ""]
    # A page of many settings draws in full those that the plan's comparisons are about.
    drawn = name in {contrast["setting"] for contrast in laboratory.plan["contrasts"]}
    more_than_plain = len(laboratory.arms(name)) > 1
    if more_than_plain:
        figures.forest(names.path("forest", name), laboratory, name)
        lines += [names.line("forest", name, f"Differences from plain in mean accuracy, {name}"), ""]
    figures.bars(names.path("bars", name), laboratory, name)
    lines += [names.line("bars", name, f"Accuracy by question and by what is asked for, {name}"), ""]
    lines += ["**Accuracy.** Means over seeds (standard deviation over seeds).", ""]
    lines += [*_levels(laboratory, name, ACCURACIES), ""]
    lines += [
        "Paired differences from plain: mean and 95 % interval of that cell alone; bold: established, mean accuracy "
        "as everywhere on this page, the other cells corrected for their number.",
        "",
    ]
    lines += [*_differences(laboratory, name, ACCURACIES), "", *sections.accuracies(laboratory, name), ""]
    lines += ["**Hallucination.** Existence questions by what they ask for.", ""]
    lines += [*_levels(laboratory, name, HALLUCINATION), "", *_differences(laboratory, name, HALLUCINATION), ""]
    lines += [" ".join(sections.hallucination(laboratory, name)), ""]
    if placed := laboratory.against_random(name):
        lines += [
            "**Place.** Anchors minus the same tokens at random patches: what a copy's place adds to its being there.",
            "",
            *_table(placed, records.PLACED),
            "",
            *sections.placement(laboratory, name),
            "",
        ]
    lines += ["**Matching**, on the test questions after stage 2.", "", *_matching(laboratory, name), ""]
    lines += [" ".join(sections.matching(laboratory, name)), ""]
    if drawn:
        figures.curves(names.path("training", name), laboratory, name)
        words = f"Stage 2 over its steps: loss, share inserted, precision, tau, {name}"
        lines += [names.line("training", name, words), ""]
    lines += ["**Attention** to the true patch, the mechanism that the paper names; eager attention, test scenes.", ""]
    if drawn:
        figures.attention(names.path("attention", name), laboratory, name)
        lines += [names.line("attention", name, f"Attention to the true patch, {name}"), ""]
    lines += [*_levels(laboratory, name, ATTENTION), "", " ".join(sections.attention(laboratory, name)), ""]
    for heading, said in (
        ("**Copies left out at the test**, on a third of its scenes.", sections.without_copies(laboratory, name)),
        ("**Blur at the test.**", sections.blur(laboratory, name)),
    ):
        if said:
            lines += [f"{heading} {' '.join(said)}", ""]
    if len(setting["blur_test"]) > 1:
        lines += [*_blurred(laboratory, setting), ""]
    if drawn and figures.pictures(names.path("pictures", name), laboratory, name):
        lines += [
            "**Pictures.** Two test scenes of the first seed: the scene, then for each arm the attention of the "
            "answer's place to the patches (dark: much), with the words at the patches behind which they were copied.",
            "",
            names.line("pictures", name, f"Scenes with anchors and attention, {name}"),
            "",
        ]
    return lines


def _levels(laboratory: Laboratory, setting: str, metrics: Mapping[str, Metric]) -> list[str]:
    heads = " | ".join(f"{metric.title}{', %' if metric.unit != 'nats' else ''}" for metric in metrics.values())
    lines = [f"| arm | seeds | {heads} |", "|---|---" + "|---" * len(metrics) + "|"]
    for arm in laboratory.arms(setting):
        cells = []
        for metric in metrics.values():
            values = list(laboratory.values(setting, arm, metric).values())
            cells.append(_level(values, metric.digits))
        lines.append(f"| {title(arm)} | {len(laboratory.done(setting, arm))} | {' | '.join(cells)} |")
    return lines


def _level(values: Sequence[float], digits: int) -> str:
    if not values:
        return "–"
    mean, deviation = mean_and_deviation(values)
    text = number(mean, digits, False)
    return f"{text} ({number(deviation, digits, False)})" if len(values) > 1 else text


def _differences(laboratory: Laboratory, setting: str, metrics: dict[str, Metric]) -> list[str]:
    found = laboratory.against_plain(setting, metrics)
    return _table(found, metrics) if found else ["No other arm was finished."]


def _table(found: Mapping[tuple[str, str], Difference | None], metrics: Mapping[str, Metric]) -> list[str]:
    lines = [f"| arm | {' | '.join(metric.title for metric in metrics.values())} |", "|---" * (1 + len(metrics)) + "|"]
    for arm in dict.fromkeys(arm for arm, _ in found):
        cells = [_difference(found[arm, name], metric.digits) for name, metric in metrics.items()]
        lines.append(f"| {title(arm)} | {' | '.join(cells)} |")
    return lines


def _difference(difference: Difference | None, digits: int) -> str:
    if difference is None:
        return "–"
    text = f"{number(difference.mean, digits)} [{interval(difference, digits, wide=False)}]"
    return f"**{text}**" if difference.is_established else text


def _matching(laboratory: Laboratory, setting: str) -> list[str]:
    lines = [
        "| arm | best patch holds the word, % | chance, % | is the object asked for, % | anchors at a true patch "
        "(precision), % | words so anchored (recall), % | copies / candidates, % | tau |",
        "|---|---|---|---|---|---|---|---|",
    ]
    keys = ("hit", "chance", "hit_referred", "precision", "recall", "share")
    for arm in laboratory.arms(setting):
        rows = list(laboratory.done(setting, arm).values())
        found = [sharp(row)["matching"] for row in rows]
        cells = [_level([100 * one[key] for one in found if one[key] is not None], 1) for key in keys]
        taus = [row["training"]["tau"] for row in rows if row["training"]["tau"] < 1]
        lines.append(f"| {title(arm)} | {' | '.join(cells)} | {_level(taus, 2)} |")
    return lines


def _blurred(laboratory: Laboratory, setting: dict[str, Any]) -> list[str]:
    """Mean accuracy under every blur, and its differences from plain under those that no other table shows."""
    name, metrics = setting["name"], {f"{blur:g}": under_blur(f"{blur:g}") for blur in setting["blur_test"]}
    blurred = dict(list(metrics.items())[1:])
    return [
        "Mean accuracy, and its paired difference from plain.",
        "",
        *_levels(laboratory, name, metrics),
        "",
        *_differences(laboratory, name, blurred),
    ]


def _runs(laboratory: Laboratory) -> list[str]:
    lines = [
        "<details><summary>All runs with their seeds</summary>",
        "",
        "| setting | arm | seed | status | mean accuracy, % | seconds | load before |",
        "|---|---|---|---|---|---|---|",
    ]
    for setting in laboratory.settings:
        for arm, seed in laboratory.wanted(setting):
            row = laboratory.latest.get(("run", setting["name"], arm, seed))
            status = "not started" if row is None else row["status"]
            if row is not None and status == "failed":
                status += f": {row['error']}".replace("|", "/").replace("\n", " ")[:120]
            mean = _level([MEAN.values(row) or 0.0], 1) if row is not None and row["status"] == "done" else "–"
            seconds, load = (row or {}).get("seconds", "–"), (row or {}).get("load_before", "–")
            lines.append(f"| {setting['name']} | {title(arm)} | {seed} | {status} | {mean} | {seconds} | {load} |")
    return [*lines, "", "</details>"]
