"""Rows as the report needs them: a laboratory's runs by setting, arm and seed, and paired differences between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from attanchor_lab import lab_rows as rows
from attanchor_lab.lab_rows import Row
from attanchor_lab.scenes.questions import NEGATIVES
from attanchor_lab.statistics import Difference, family
from attanchor_lab.synthetic.arms import ARMS


@dataclass(frozen=True)
class Metric:
    """A figure of a run. `scale` brings it to the unit that is printed; `digits` behind the point."""

    title: str
    unit: str
    of: Callable[[Row], float | None]
    scale: float = 100.0
    digits: int = 1
    higher_is_better: bool | None = True

    def values(self, row: Row) -> float | None:
        value = self.of(row)
        return None if value is None else value * self.scale


def sharp(row: Row) -> dict[str, Any]:
    """The test under the plan's first blur, which is none in the plans of the three sizes."""
    return next(iter(row["test"].values()))


def _tested(name: str) -> Callable[[Row], float | None]:
    return lambda row: sharp(row)[name]


def _denied(name: str) -> Callable[[Row], float | None]:
    return lambda row: sharp(row)["negatives"][name]


def _attention(name: str, copies: str = "with_copies") -> Callable[[Row], float | None]:
    return lambda row: row["attention"].get(copies, {}).get(name)


def _to_copies(row: Row) -> float:
    # The copies of "end" stand behind the last patch and mean none; older rows count them where that is the true one.
    return 0.0 if row["arm"] == "end" else row["attention"]["with_copies"]["copies"]


def _to_both(row: Row) -> float:
    return row["attention"]["with_copies"]["patch"] + _to_copies(row)


MEAN = Metric("mean accuracy", "points", _tested("mean"))


def under_blur(blur: str) -> Metric:
    """Mean accuracy on images with this blur, one of the row's keys."""
    return Metric(f"blur {blur}", "points", lambda row: row["test"][blur]["mean"])


ACCURACIES: dict[str, Metric] = {
    "mean": MEAN,
    "existence": Metric("existence", "points", _tested("existence")),
    "colour": Metric("colour", "points", _tested("colour")),
    "place": Metric("place", "points", _tested("place")),
    "answer_loss": Metric("answer loss", "nats", _tested("answer_loss"), 1.0, 3, False),
}
HALLUCINATION: dict[str, Metric] = {
    "present": Metric("object is there", "points", _tested("present")),
    **{name: Metric(f"absent, {name}", "points", _denied(name)) for name in NEGATIVES},
    "yes_share": Metric("yes-share", "points", _tested("yes_share"), higher_is_better=None),
}
PLACED: dict[str, Metric] = {  # what the place of a copy may change
    **{name: ACCURACIES[name] for name in ("mean", "existence", "colour", "place")},
    **{name: HALLUCINATION[name] for name in ("present", *NEGATIVES)},
}
ATTENTION: dict[str, Metric] = {
    name: Metric(said, "points", of, digits=digits, higher_is_better=None)
    for name, said, of, digits in (
        ("patch", "to the true patch", _attention("patch"), 2),
        ("copies", "to copies there", _to_copies, 2),
        ("both", "to patch and copies", _to_both, 2),
        ("patch_best_head", "to the true patch, best head", _attention("patch_best_head"), 1),
        ("patch_from_question", "to the true patch, from all words", _attention("patch_from_question"), 2),
        ("without", "the same weights, copies left out", _attention("patch", "without_copies"), 2),
    )
}

RANDOM = {"t2i": "random", "t2i-inherit": "random-inherit"}  # arms and their control of placement


class Comparison(NamedTuple):
    """`arm` minus `against` in one setting."""

    setting: str
    arm: str
    against: str = "plain"
    metric: Metric = MEAN


class Laboratory:
    """The rows of one plan.

    Args:
        found: As `rows.read` gives them, the plan's row among them.

    Raises:
        ValueError: the rows lack their plan.
    """

    def __init__(self, found: Sequence[Row]) -> None:
        plans = [row for row in found if row["kind"] == "plan"]
        if not plans:
            raise ValueError("the rows lack that of their plan; they should be the rows.jsonl of `attanchor lab`")
        self.plan = plans[-1]
        self.rows = [row for row in found if row["kind"] != "plan"]
        self.latest = rows.latest(self.rows)
        self.settings: list[dict[str, Any]] = self.plan["settings"]

    @property
    def size(self) -> str:
        return self.plan["size"]

    def setting(self, name: str) -> dict[str, Any]:
        return next(setting for setting in self.settings if setting["name"] == name)

    def wanted(self, setting: dict[str, Any]) -> list[tuple[str, int]]:
        """(arm, seed) of the plan's runs."""
        few = setting["seeds"][: setting["more_seeds"]]
        return [
            (arm, seed)
            for seed in setting["seeds"]
            for arm in (*setting["arms"], *(setting["more"] if seed in few else ()))
        ]

    def arms(self, setting: str) -> list[str]:
        """The arms with at least one finished run, in the order of the plan."""
        entry = self.setting(setting)
        return [arm for arm in (*entry["arms"], *entry["more"]) if self.done(setting, arm)]

    def done(self, setting: str, arm: str) -> dict[int, Row]:
        """Finished runs by seed."""
        return {
            key[3]: row
            for key, row in self.latest.items()
            if key[0] == "run" and key[1] == setting and key[2] == arm and row["status"] == "done"
        }

    def encoders(self) -> list[dict[str, float]]:
        """How often each seed's frozen encoder named the colour and the shape of a patch right."""
        return [row["encoder"] for row in self.rows if row["kind"] == "start" and row["status"] == "done"]

    def values(self, setting: str, arm: str, metric: Metric) -> dict[int, float]:
        found = {seed: metric.values(row) for seed, row in self.done(setting, arm).items()}
        return {seed: value for seed, value in sorted(found.items()) if value is not None}

    def differences(self, comparison: Comparison) -> list[float]:
        """One for every seed that has both arms."""
        setting, arm, against, metric = comparison
        ours, theirs = self.values(setting, arm, metric), self.values(setting, against, metric)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def primary(self) -> dict[Comparison, Difference | None]:
        """The plan's comparisons with their statistics, one family."""
        planned = [Comparison(c["setting"], c["arm"], c["against"]) for c in self.plan["contrasts"]]
        return dict(zip(planned, family([self.differences(one) for one in planned]), strict=True))

    def compared(
        self, comparisons: Sequence[Comparison], further: Sequence[Sequence[float]] = ()
    ) -> list[Difference | None]:
        """Statistics of what one list or table shows: of `comparisons`, and behind them of `further` differences.

        One comparison has one answer on a page: those that the plan names keep theirs, and so do all differences from
        plain in mean accuracy; the others are a family.
        """
        known = self.primary() | self.all_against_plain()
        others = iter(family([*(self.differences(one) for one in comparisons if one not in known), *further]))
        found = [known[one] if one in known else next(others) for one in comparisons]
        return [*found, *others]

    def all_against_plain(self) -> dict[Comparison, Difference | None]:
        """Every arm of every setting, in mean accuracy: what the plan does not name is one family."""
        every = [
            Comparison(setting["name"], arm)
            for setting in self.settings
            for arm in self.arms(setting["name"])
            if arm != "plain"
        ]
        planned = self.primary()
        others = iter(family([self.differences(one) for one in every if one not in planned]))
        return {one: planned[one] if one in planned else next(others) for one in every}

    def against_plain(self, setting: str, metrics: dict[str, Metric]) -> dict[tuple[str, str], Difference | None]:
        """(arm, metric) to the difference from plain, as one table shows them."""
        keys = [(arm, name) for arm in self.arms(setting) if arm != "plain" for name in metrics]
        found = self.compared([Comparison(setting, arm, "plain", metrics[name]) for arm, name in keys])
        return dict(zip(keys, found, strict=True))

    def against_random(self, setting: str) -> dict[tuple[str, str], Difference | None]:
        """(arm, metric) to anchors minus the same tokens at random patches, as one table shows them."""
        arms = [arm for arm in RANDOM if {arm, RANDOM[arm]} <= set(self.arms(setting))]
        keys = [(arm, name) for arm in arms for name in PLACED]
        found = self.compared([Comparison(setting, arm, RANDOM[arm], PLACED[name]) for arm, name in keys])
        return dict(zip(keys, found, strict=True))

    def counts(self) -> dict[str, int]:
        """Runs planned, done, failed, not started."""
        states = [
            self.latest.get(("run", setting["name"], arm, seed), {}).get("status", "not started")
            for setting in self.settings
            for arm, seed in self.wanted(setting)
        ]
        return {"planned": len(states), **{s: states.count(s) for s in ("done", "failed", "not started")}}

    def mended(self) -> int:
        """Failures that a later run of the same arm and seed made good."""
        runs = [row for row in self.rows if row["kind"] == "run" and row["status"] == "failed"]
        return sum(self.latest[rows.key(row)]["status"] == "done" for row in runs)


def title(arm: str) -> str:
    return ARMS[arm].title if arm in ARMS else arm


def load(paths: Sequence[Path]) -> list[Laboratory]:
    """One laboratory for each path.

    Raises:
        ValueError: a file is no rows.jsonl, or nothing in it was finished.
    """
    found = []
    for path in paths:
        laboratory = Laboratory(rows.read(path))
        if not laboratory.counts()["done"]:
            raise ValueError(f"{path} holds no finished run; let `attanchor lab` finish some")
        found.append(laboratory)
    return found
