"""`attanchor report`: rows of experiments to one page, a table with verdicts and three pictures.

A folder's plan names what is compared; these comparisons are corrected together. Rows are those of `attanchor lab` and
of experiments on photographs (`photographs.rows`):

- plan: `size` (its name); `settings` with `name`, `arms`, `seeds`, `more`, `more_seeds`; `contrasts` with `setting`,
  `arm`, `against`, `asks`, and where they are given `test` (compare the mean of this test instead of the first one's)
  and `margin` (points; an open difference whose interval ends above -margin is "no worse"); `titles` of arms.
- run: `setting`, `arm`, `seed`, `status`, `test` (by name of the test, the first being the main one, `mean` and further
  shares), `training.log` with `step` and `answer_loss`.
- a picture.png in the folder is the page's picture.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attanchor_lab import figures
from attanchor_lab.photographs.rows import as_laboratory
from attanchor_lab.runner import ROWS, Row
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.synthetic.laboratory import latest, read
from attanchor_lab.table import OPEN, compare, interval, number, probability
from attanchor_vlm.records import check_parent, markdown_table, read_rows, write_text

NAMED = "## The comparisons named before the runs"  # the README shows lines of this section
NO_WORSE = "no worse"
_COMPARED = ("plan", "setting", "arm", "against", "test")
_MEAN = "mean"


@dataclass(frozen=True)
class Measure:
    """A figure of a run: where it stands in the row, its factor to the unit that is shown, and its digits."""

    title: str
    path: str
    scale: float = 100.0
    digits: int = 1


METRICS: dict[str, Measure] = {
    _MEAN: Measure("mean accuracy, %", "main.mean"),
    "random": Measure("absent, random", "main.negatives.random"),
    "popular": Measure("absent, popular", "main.negatives.popular"),
    "adversarial": Measure("absent, adversarial", "main.negatives.adversarial"),
    "yes": Measure("yes-share", "main.yes_share"),
    "loss": Measure("answer loss", "main.answer_loss", 1.0, 3),
    "without": Measure("mean, copies left out", "without_copies.mean"),
    "hit": Measure("best patch holds the word", "main.matching.hit"),
    "precision": Measure("anchors at a true patch", "main.matching.precision"),
    "share": Measure("copies / candidates", "main.matching.share"),
    "patch": Measure("attention to the true patch", "attention.with_copies.patch", digits=2),
    "copies": Measure("to copies there", "attention.with_copies.copies", digits=2),
}
_NO_SHARES = {"main.questions", *(metric.path for metric in METRICS.values())}


class Laboratory:
    """The rows of one plan.

    Attributes:
        plan: Its row.
        rows: All others.
        measures: `METRICS` and the shares of its tests, as far as the rows hold them.
        runs: Finished runs, one a line: setting, arm, seed and what `measures` names, in the unit shown.

    Raises:
        ValueError: the rows lack their plan, or none was finished.
    """

    def __init__(self, path: Path) -> None:
        found = _rows_of(path)
        plans = [row for row in found if row["kind"] == "plan"]
        if not plans:
            raise ValueError(f"{path} lacks the row of its plan; it should be the rows.jsonl of `attanchor lab`")
        self.plan: Row = dict(plans[-1])
        self.folder = path if path.is_dir() else path.parent
        self.rows = [row for row in found if row["kind"] != "plan"]
        self.latest = latest(self.rows)
        self.done = [row for row in self.latest.values() if row["kind"] == "run" and row["status"] == "done"]
        if not self.done:
            raise ValueError(f"{path} holds no finished run; let `attanchor lab` finish some")
        flat = pd.json_normalize([{**row, "main": next(iter(row["test"].values()))} for row in self.done])
        kinds = [name for name in flat if name.startswith("main.") and name.count(".") == 1 and name not in _NO_SHARES]
        mean = {_MEAN: METRICS[_MEAN]}
        shares = {name.partition(".")[2]: Measure(name.partition(".")[2], name) for name in kinds}
        tested = dict.fromkeys(name for row in self.done for name in row["test"])
        others = [name for name in tested if name != next(iter(tested))]  # the laboratory calls them by their blur
        titles = {name: f"blur {name}" if name.replace(".", "").isdigit() else name for name in others}
        tests = {name: Measure(f"mean, {titles[name]}", f"test.{name}.mean") for name in others}
        every = {**mean, **shares, **tests, **METRICS}
        self.measures = {name: one for name, one in every.items() if one.path in flat and flat[one.path].notna().any()}
        columns = {name: flat[name] for name in ("setting", "arm", "seed")}
        for name, metric in self.measures.items():
            columns[name] = metric.scale * pd.to_numeric(flat[metric.path])
        self.runs = pd.DataFrame(columns)
        # The copies of "end" stand behind the last patch and mean none; older rows count them where that is the true
        # one.
        if "copies" in columns:
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

    def differences(self, setting: str, arm: str, against: str, metric: str = _MEAN) -> pd.Series:
        """`arm` minus `against` by seed, of the seeds that have both."""
        runs = self.runs[self.runs["setting"] == setting].set_index(["arm", "seed"])[metric]
        ours, theirs = (runs.loc[runs.index.get_level_values("arm") == one].droplevel("arm") for one in (arm, against))
        return (ours - theirs).dropna().sort_index()

    def named(self) -> pd.DataFrame:
        """The comparisons that the plan names, in mean accuracy of their test, one family; with what each asks."""
        contrasts = {
            (self.plan["size"], one["setting"], one["arm"], one["against"], one.get("test", _MEAN)): one
            for one in self.plan["contrasts"]
        }
        found = compare({key: self.differences(*key[1:]).tolist() for key in contrasts})
        if contrasts:
            found.index.names = list(_COMPARED)
            found["asks"] = [one["asks"] for one in contrasts.values()]
            found["compared"] = [f"{self.title(key[2])} − {self.title(key[3])}" for key in contrasts]
            margins = pd.Series([one.get("margin") for one in contrasts.values()], found.index, dtype=float)
            found.loc[(found["verdict"] == OPEN) & (found["low"] > -margins), "verdict"] = NO_WORSE
        return found

    def title(self, arm: str) -> str:
        """An arm as the page calls it."""
        known = ARMS[arm].title if arm in ARMS else arm
        return self.plan.get("titles", {}).get(arm, known)

    def where(self, setting: str) -> str:
        """A setting as the page calls it."""
        plan = self.plan["size"]
        return plan if plan == setting else f"{plan}, {setting}"


def _rows_of(path: Path) -> list[Row]:
    """Those of a plan and its runs, wherever they come from."""
    folder = path if path.is_dir() else path.parent
    plan = folder / "plan.json"
    told = json.loads(plan.read_text(encoding="utf-8")) if plan.is_file() else {}
    if "question" not in told:
        return read(path)
    return as_laboratory(told, read_rows(folder / ROWS), folder.name)


def write(paths: Sequence[Path], output: Path) -> list[Path]:
    """Write the page and, beside it, its pictures.

    Args:
        paths: rows.jsonl files, or folders that hold one; each is one plan, the first the one in full.
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
    laboratories = [Laboratory(path) for path in paths]
    sizes = [one.plan["size"] for one in laboratories]
    for place, one in enumerate(laboratories):
        if same := sizes[:place].count(sizes[place]):
            one.plan["size"] += f" ({same + 1})"
    tables = {one.plan["size"]: one.named() for one in laboratories}
    named = pd.concat([table for table in tables.values() if len(table)] or list(tables.values())[:1])
    pictures = {name: output.with_name(f"{output.stem}-{name}.png") for name in ("forest", "curves", "scene")}
    figures.forest(pictures["forest"], {f"{_where(key)}: {line['compared']}": line for key, line in named.iterrows()})
    figures.curves(pictures["curves"], _curves(laboratories))
    drawn = next((one.folder / "picture.png" for one in laboratories if (one.folder / "picture.png").is_file()), None)
    kept = next((scene for one in laboratories if (scene := _scene(one))), None)
    if drawn:
        shutil.copyfile(drawn, pictures["scene"])
    elif kept:
        figures.scene(pictures["scene"], kept)
    else:
        del pictures["scene"]
    lines = _page(laboratories, named, {name: path.name for name, path in pictures.items()})
    write_text(output, "\n".join(lines).rstrip() + "\n")
    return [output, *pictures.values()]


def _page(laboratories: Sequence[Laboratory], named: pd.DataFrame, pictures: dict[str, str]) -> list[str]:
    lines = [
        "# Does it help?",
        "",
        "Does copying each word of the question behind the image token that it matches make a model answer better, "
        "compared with the same model, trained on the same data in the same order, without the copies? How to run and "
        "read this: [the proving ground](../proving-ground.md).",
        "",
        NAMED,
        "",
        "A difference is one arm minus another, paired by seed, in points of mean accuracy over the kinds of question. "
        "Verdict, interval and p come from one test: Student's t over seeds, corrected by Holm for the comparisons of "
        "its plan. The interval leaves out 0 exactly where p is below .05, and then the verdict is *better* or "
        "*worse*. *Not shown* does not mean none: read the interval.",
        "",
        *_verdicts(named),
        "",
        f"![Every difference with its interval]({pictures['forest']})",
        "",
        "## Does a gain last, or is it faster learning?",
        "",
        "Answer loss of an arm minus that of plain on the same batch, over the steps of training (mean of the seeds, "
        "and 95 % interval of each point alone). A gain that lasts stays below 0 to the end; faster learning comes "
        "back to it.",
        "",
        f"![Answer loss against plain over the steps]({pictures['curves']})",
        "",
    ]
    if "scene" in pictures:
        lines += ["## One picture", "", f"![Words at the image tokens that they match]({pictures['scene']})", ""]
    return [
        *lines,
        f"## What was measured: {laboratories[0].plan['size']}",
        "",
        "Means over seeds, in % but for the loss, in brackets over how many if not all; every run of every plan is in "
        "the rows.",
        "",
        *_levels(laboratories[0]),
        "",
        "## Runs",
        "",
        *_runs(laboratories),
    ]


def _where(key: Any) -> str:
    plan, setting, _, _, test = key
    parts = [plan, *([setting] if setting != plan else []), *([test] if test != _MEAN else [])]
    return ", ".join(parts)


def _verdicts(table: pd.DataFrame) -> list[str]:
    lines = [
        [_where(key), line["asks"], line["compared"], str(line["seeds"]), number(line["mean"], sign=True),
         interval(line["low"], line["high"]), probability(line["p"]), line["verdict"]]
        for key, line in table.iterrows()
    ]  # fmt: skip
    heads = ["plan, setting", "question", "compared", "seeds", "difference, points", "95 % interval", "p", "verdict"]
    return markdown_table(heads, lines, words=3) if lines else ["None."]


def _levels(one: Laboratory) -> list[str]:
    groups = one.runs.groupby(["setting", "arm"])[list(one.measures)]
    means, seeds = groups.mean(), groups.count()

    def cell(key: tuple[str, str], name: str) -> str:
        value, few = number(means.loc[key, name], one.measures[name].digits), seeds.loc[key, name]
        return f"{value} ({few})" if 0 < few < seeds.loc[key].max() else value

    several = len({setting for setting, _ in one.arms()}) > 1
    heads = [f"{one.where(setting)}: {one.title(arm)}" if several else one.title(arm) for setting, arm in one.arms()]
    lines = [[metric.title, *(cell(key, name) for key in one.arms())] for name, metric in one.measures.items()]
    return markdown_table(["", *heads], lines, words=1)


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
            panels.setdefault(one.where(c["setting"]), {})[one.title(c["arm"])] = pd.DataFrame(apart)
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
    return {laboratory.title(row["arm"]): row["pictures"][most] for row in kept}


def _runs(laboratories: Sequence[Laboratory]) -> list[str]:
    lines, failures = [], []
    for one in laboratories:
        plan, states = one.plan, []
        for setting, arm, seed in one.wanted():
            row = one.latest.get(("run", setting, arm, seed), {})
            states.append(row.get("status", "not started"))
            if states[-1] == "failed":
                error = row["error"].replace("\n", " ")[:120]
                failures.append(f"- {one.where(setting)}, {one.title(arm)}, seed {seed} failed: {error}")
        counts = [str(states.count(state)) for state in ("done", "failed", "not started")]
        commits = ", ".join(sorted({row["commit"] for row in one.done}))
        device = plan["gpu"] if plan.get("gpu", "none") != "none" else plan["processor"]
        minutes = sum(row.get("cpu_seconds", float("nan")) for row in one.rows) / 60
        machine = [device, plan["torch"], plan["transformers"], commits, number(minutes, 0)]
        lines.append([plan["size"], plan["written"], *machine, str(len(states)), *counts])
    heads = ["plan", "written", "machine", "torch", "transformers", "commit", "minutes of processor time"]
    return [*markdown_table([*heads, "runs", "done", "failed", "not started"], lines, words=6), "", *failures]
