"""`attanchor report`: rows of the laboratory to one page, a table with verdicts and three pictures.

What is looked at together is corrected together: the comparisons that a plan names are one family, all other arms
against plain in that plan another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attanchor_lab.runner import Row
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.synthetic.laboratory import latest, read
from attanchor_lab.table import compare, interval, number, probability
from attanchor_vlm.records import check_parent, markdown_table, write_atomically

NAMED = "## The comparisons named before the runs"  # the README shows lines of this section
_COMPARED = ("plan", "setting", "arm", "against")


@dataclass(frozen=True)
class Measure:
    """A figure of a run: where it stands in the row, its factor to the unit that is shown, and its digits."""

    title: str
    path: str
    scale: float = 100.0
    digits: int = 1


METRICS: dict[str, Measure] = {
    "mean": Measure("mean accuracy, %", "test.mean"),
    "existence": Measure("existence", "test.existence"),
    "colour": Measure("colour", "test.colour"),
    "place": Measure("place", "test.place"),
    "random": Measure("absent, random", "test.negatives.random"),
    "popular": Measure("absent, popular", "test.negatives.popular"),
    "adversarial": Measure("absent, adversarial", "test.negatives.adversarial"),
    "yes": Measure("yes-share", "test.yes_share"),
    "loss": Measure("answer loss", "test.answer_loss", 1.0, 3),
    "blurred": Measure("mean, blurred", "blurred.mean"),
    "without": Measure("mean, copies left out", "without_copies.mean"),
    "hit": Measure("best patch holds the word", "test.matching.hit"),
    "precision": Measure("anchors at a true patch", "test.matching.precision"),
    "share": Measure("copies / candidates", "test.matching.share"),
    "patch": Measure("attention to the true patch", "attention.with_copies.patch", digits=2),
    "copies": Measure("to copies there", "attention.with_copies.copies", digits=2),
}
_EXPLAINED = ("existence", "colour", "place", "adversarial", "patch")  # of the comparisons that a plan names


class Laboratory:
    """The rows of one plan.

    Attributes:
        plan: Its row.
        rows: All others.
        runs: Finished runs, one a line: setting, arm, seed and what `METRICS` names, in the unit shown.

    Raises:
        ValueError: the rows lack their plan, or none was finished.
    """

    def __init__(self, path: Path) -> None:
        found = read(path)
        plans = [row for row in found if row["kind"] == "plan"]
        if not plans:
            raise ValueError(f"{path} lacks the row of its plan; it should be the rows.jsonl of `attanchor lab`")
        self.plan: Row = dict(plans[-1])
        self.rows = [row for row in found if row["kind"] != "plan"]
        self.latest = latest(self.rows)
        self.done = [row for row in self.latest.values() if row["kind"] == "run" and row["status"] == "done"]
        if not self.done:
            raise ValueError(f"{path} holds no finished run; let `attanchor lab` finish some")
        flat = pd.json_normalize([_first_test(row) for row in self.done])
        columns = {name: flat[name] for name in ("setting", "arm", "seed")}
        for name, metric in METRICS.items():
            columns[name] = metric.scale * pd.to_numeric(flat.get(metric.path, pd.Series(index=flat.index)))
        self.runs = pd.DataFrame(columns)
        # The copies of "end" stand behind the last patch and mean none; older rows count them where that is the true
        # one.
        self.runs.loc[self.runs["arm"] == "end", "copies"] = 0.0

    def wanted(self) -> list[tuple[str, str, int]]:
        """(setting, arm, seed) of the plan's runs."""
        return [
            (setting["name"], arm, seed)
            for setting in self.plan["settings"]
            for seed in setting["seeds"]
            for arm in (
                *setting["arms"],
                *(setting["more"] if seed in setting["seeds"][: setting["more_seeds"]] else ()),
            )
        ]

    def arms(self) -> list[tuple[str, str]]:
        """(setting, arm) that have at least one finished run, in the order of the plan."""
        there = set(zip(self.runs["setting"], self.runs["arm"], strict=True))
        return [pair for pair in dict.fromkeys((setting, arm) for setting, arm, _ in self.wanted()) if pair in there]

    def differences(self, setting: str, arm: str, against: str, metric: str = "mean") -> pd.Series:
        """`arm` minus `against` by seed, of the seeds that have both."""
        runs = self.runs[self.runs["setting"] == setting].set_index(["arm", "seed"])[metric]
        ours, theirs = (runs.loc[runs.index.get_level_values("arm") == one].droplevel("arm") for one in (arm, against))
        return (ours - theirs).dropna().sort_index()

    def named(self) -> pd.DataFrame:
        """The comparisons that the plan names, in mean accuracy, one family."""
        return self._compared([(one["setting"], one["arm"], one["against"]) for one in self.plan["contrasts"]])

    def others(self) -> pd.DataFrame:
        """Every other arm against plain, in mean accuracy, one family."""
        named = {(one["setting"], one["arm"], one["against"]) for one in self.plan["contrasts"]}
        every = [(setting, arm, "plain") for setting, arm in self.arms() if arm != "plain"]
        return self._compared([one for one in every if one not in named])

    def explained(self) -> dict[tuple[str, str, str, str], pd.Series]:
        """By plan, setting, arm and metric, where the named differences from plain come from."""
        return {
            (one["setting"], one["arm"], one["against"], metric): self.differences(
                one["setting"], one["arm"], one["against"], metric
            )
            for one in self.plan["contrasts"]
            for metric in _EXPLAINED
        }

    def _compared(self, comparisons: Sequence[tuple[str, str, str]]) -> pd.DataFrame:
        found = compare({(self.plan["size"], *one): self.differences(*one).tolist() for one in comparisons})
        if comparisons:
            found.index.names = list(_COMPARED)
        return found


def _first_test(row: Row) -> Row:
    """The row with the test under the plan's first blur as `test`, and under its last one as `blurred`."""
    tests = list(row["test"].values())
    return {**row, "test": tests[0], **({"blurred": tests[-1]} if len(tests) > 1 else {})}


def write(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write the page and, beside it, its pictures.

    Args:
        paths: rows.jsonl files, or folders that hold one; each is one plan.
        output: A .md file. Pictures are called after it.

    Returns:
        The files written.

    Raises:
        ValueError: `output` is no .md file or cannot be written, or a path holds no finished runs.
    """
    from attanchor_lab import figures

    if output.suffix != ".md" or output.is_dir():
        raise ValueError(f"output is {output}; it should be a .md file")
    check_parent(output)
    if not paths:
        raise ValueError("no rows are given; name the folders of `attanchor lab`")
    laboratories = [Laboratory(path) for path in paths]
    sizes = [one.plan["size"] for one in laboratories]
    for place, one in enumerate(laboratories):
        if same := sizes[:place].count(sizes[place]):
            one.plan["size"] += f" ({same + 1})"
    named, others = (_stacked([getattr(one, part)() for one in laboratories]) for part in ("named", "others"))
    pictures = {name: output.with_name(f"{output.stem}-{name}.png") for name in ("forest", "curves", "scene")}
    figures.forest(pictures["forest"], {_said(key): line for key, line in pd.concat([named, others]).iterrows()})
    figures.curves(pictures["curves"], _curves(laboratories))
    kept = next((scene for one in laboratories if (scene := _scene(one))), None)
    if kept:
        figures.scene(pictures["scene"], kept)
    else:
        del pictures["scene"]
    lines = _page(laboratories, named, others, {name: path.name for name, path in pictures.items()})
    write_atomically(output, lambda path: path.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8"))
    return [output, *pictures.values()]


def _stacked(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    full = [table for table in tables if len(table)]
    return pd.concat(full) if full else tables[0]


def _page(
    laboratories: Sequence[Laboratory], named: pd.DataFrame, others: pd.DataFrame, pictures: dict[str, str]
) -> list[str]:
    asks = {
        (one.plan["size"], c["setting"], c["arm"], c["against"]): c["asks"]
        for one in laboratories
        for c in one.plan["contrasts"]
    }
    lines = [
        "# Does it help?",
        "",
        "Made by `attanchor report` from the rows of `attanchor lab`; how to run and read it: "
        "[the proving ground](../proving-ground.md). A difference is one arm minus another from the same weights, on "
        "the same data in the same order, paired by seed, in points of mean accuracy over the kinds of question. The "
        "verdict, the interval and p come from one test: Student's t over seeds, corrected by Holm for what is looked "
        "at together (the comparisons that a plan names; all its other arms against plain). The interval leaves out 0 "
        "exactly where p is below .05, and then the verdict is *better* or *worse*. *Not shown* does not mean none: "
        "read the interval.",
        "",
        NAMED,
        "",
        *_verdicts(named, asks),
        "",
        f"![Every difference with its interval]({pictures['forest']})",
        "",
        "## Every other arm against plain",
        "",
        "Arms *at the true patch* are told where the object is: a bound, not a method.",
        "",
        *_verdicts(others),
        "",
        "## Where the named differences come from",
        "",
        "Mean and corrected interval, all cells of a plan one family; bold where the verdict is not open. Attention is "
        "that from the place of the answer to the true patch, in % of all.",
        "",
        *_explained(laboratories),
        "",
        "## Does a gain last, or is it faster learning?",
        "",
        "Answer loss of an arm minus that of plain on the same batch, over the steps of stage 2 (mean of the seeds, "
        "and 95 % interval of each point alone); below 0 the arm is ahead. A gain that lasts stays below 0 to the end "
        "of training; faster learning comes back to it.",
        "",
        f"![Answer loss against plain over the steps]({pictures['curves']})",
        "",
        "## What was measured",
        "",
        "Means over seeds, in % but for the loss.",
        "",
        *_levels(laboratories),
        "",
    ]
    if "scene" in pictures:
        lines += [
            "## One scene",
            "",
            "A test scene of the first seed, then for each arm the attention of the answer's place to the patches "
            "(dark: much), with the words at the patches behind which they were copied.",
            "",
            f"![A scene with anchors and attention]({pictures['scene']})",
            "",
        ]
    return [*lines, "## What this does not show", "", *_limits(laboratories), "", "## Runs", "", *_runs(laboratories)]


def _title(arm: str) -> str:
    return ARMS[arm].title if arm in ARMS else arm


def _where(plan: str, setting: str) -> str:
    return plan if plan == setting else f"{plan}, {setting}"


def _said(key: Any) -> str:
    plan, setting, arm, against = key
    return f"{_where(plan, setting)}: {_title(arm)}" + ("" if against == "plain" else f" − {_title(against)}")


def _verdicts(table: pd.DataFrame, asks: dict[Any, str] | None = None) -> list[str]:
    if not len(table):
        return ["None."]
    lines = []
    for key, line in table.iterrows():
        plan, setting, arm, against = key
        compared = f"{_title(arm)} − {_title(against)}"
        words = [_where(plan, setting), *([asks[key]] if asks else []), compared]
        figures = [number(line["mean"], sign=True), interval(line["low"], line["high"]), probability(line["p"])]
        lines.append([*words, str(line["seeds"]), *figures, line["verdict"]])
    heads = ["plan, setting", *(["question"] if asks else []), "compared"]
    return markdown_table(
        [*heads, "seeds", "difference, points", "95 % interval", "p", "verdict"], lines, words=3 if asks else 2
    )


def _explained(laboratories: Sequence[Laboratory]) -> list[str]:
    lines = []
    for one in laboratories:
        table = compare({key: values.tolist() for key, values in one.explained().items()})
        for c in one.plan["contrasts"]:
            cells = []
            for metric in _EXPLAINED:
                line = table.loc[(c["setting"], c["arm"], c["against"], metric)]
                digits = METRICS[metric].digits
                text = number(line["mean"], digits, True)
                if line["seeds"] and line["low"] == line["low"]:
                    text += f" [{interval(line['low'], line['high'], digits)}]"
                cells.append(f"**{text}**" if line["verdict"] in ("better", "worse") else text)
            where = _where(one.plan["size"], c["setting"])
            lines.append([where, f"{_title(c['arm'])} − {_title(c['against'])}", *cells])
    if not lines:
        return ["No plan names a comparison."]
    return markdown_table(["plan, setting", "compared", *(METRICS[name].title for name in _EXPLAINED)], lines, words=2)


def _levels(laboratories: Sequence[Laboratory]) -> list[str]:
    lines = []
    for one in laboratories:
        means = one.runs.groupby(["setting", "arm"])[list(METRICS)].mean()
        for setting, arm in one.arms():
            cells = [number(means.loc[(setting, arm), name], metric.digits) for name, metric in METRICS.items()]
            lines.append([_where(one.plan["size"], setting), _title(arm), *cells])
    return markdown_table(["plan, setting", "arm", *(metric.title for metric in METRICS.values())], lines, words=2)


def _curves(laboratories: Sequence[Laboratory]) -> dict[str, dict[str, pd.DataFrame]]:
    """For every setting with a named comparison against plain, and each of its arms, (steps, seeds): the answer loss
    minus that of plain in the same step."""
    panels: dict[str, dict[str, pd.DataFrame]] = {}
    for one in laboratories:
        losses = {
            (row["setting"], row["arm"], row["seed"]): pd.Series(
                {point["step"]: point["answer_loss"] for point in row["training"]["log"]}
            )
            for row in one.done
        }
        for c in one.plan["contrasts"]:
            seeds = one.differences(c["setting"], c["arm"], c["against"]).index
            if c["against"] != "plain" or not len(seeds):
                continue
            apart = {seed: losses[c["setting"], c["arm"], seed] - losses[c["setting"], "plain", seed] for seed in seeds}
            where = _where(one.plan["size"], c["setting"])
            panels.setdefault(where, {})[_title(c["arm"])] = pd.DataFrame(apart)
    return panels


def _scene(laboratory: Laboratory) -> dict[str, Row]:
    """For each arm of the first setting that kept pictures, the scene with the most copies."""
    kept = [row for row in laboratory.done if row.get("pictures")]
    kept = [row for row in kept if row["setting"] == kept[0]["setting"]]

    def copies(number: int) -> int:
        matches = [match for row in kept for match in row["pictures"][number]["matches"]]
        return sum(match["patch"] is not None for match in matches)

    if not kept:
        return {}
    most = max(range(len(kept[0]["pictures"])), key=copies)
    return {_title(row["arm"]): row["pictures"][most] for row in kept}


def _limits(laboratories: Sequence[Laboratory]) -> list[str]:
    starts = [row for one in laboratories for row in one.rows if row["kind"] == "start" and row["status"] == "done"]
    seen = pd.DataFrame([100 * pd.Series(row["encoder"]) for row in starts])
    named = [
        f"the {what} of {number(seen[what].min())} to {number(seen[what].max())} %"
        for what in ("colour", "shape")
        if what in seen
    ]
    encoder = f" It names {' and '.join(named)} of the objects." if named else ""
    return [
        "- No pretrained language model: these models have learned thirty words on the scenes themselves, so nothing "
        "here says what anchors do to knowledge that a large model brings along.",
        f"- No real images and no CLIP: the encoder sees one patch at a time.{encoder}",
        "- The models are small and the training is short. An effect that needs scale or patience would not show, and "
        "where plain concatenation has not learned the task to its end, a gain may be faster learning.",
        "- Absolute values of cosine and tau mean nothing for another model.",
    ]


def _runs(laboratories: Sequence[Laboratory]) -> list[str]:
    lines, failures = [], []
    for one in laboratories:
        plan, states = one.plan, []
        for setting, arm, seed in one.wanted():
            row = one.latest.get(("run", setting, arm, seed), {})
            states.append(row.get("status", "not started"))
            if states[-1] == "failed":
                error = row["error"].replace("\n", " ")[:120]
                failures.append(f"- {_where(plan['size'], setting)}, {_title(arm)}, seed {seed} failed: {error}")
        counts = [str(states.count(state)) for state in ("done", "failed", "not started")]
        commits = ", ".join(sorted({row["commit"] for row in one.done}))
        device = plan["gpu"] if plan.get("gpu", "none") != "none" else plan["processor"]
        minutes = sum(row.get("cpu_seconds", 0) for row in one.rows) / 60
        machine = [device, plan["torch"], plan["transformers"], commits, number(minutes, 0)]
        lines.append([plan["size"], plan["written"], *machine, str(len(states)), *counts])
    heads = ["plan", "written", "machine", "torch", "transformers", "commit", "minutes of processor time"]
    return [*markdown_table([*heads, "runs", "done", "failed", "not started"], lines, words=6), "", *failures]
