"""The experiment on photographs: a plan that is written first, and rows of what each arm of it answers.

All arms of a seed start from one stage 1 without anchors, and see the same questions in the same order. Every row keeps
which answers were right, so that arms are compared question by question.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pydantic

from attanchor_lab import runner, selection  # noqa: F401  plans name its rules of `keep_by`
from attanchor_lab.accuracy import accuracy
from attanchor_lab.paper.arms import trained_result
from attanchor_lab.paper.degrade import write_degraded
from attanchor_lab.photographs.config import FOLDER, PhotographConfig
from attanchor_lab.photographs.dataset import write_photographs
from attanchor_lab.photographs.wordings import KINDS
from attanchor_lab.runner import Job, Rows
from attanchor_lab.small_vlm import build
from attanchor_lab.small_vlm import parts as sources
from attanchor_lab.small_vlm.config import BuildConfig
from attanchor_lab.small_vlm.readings import known_stamps
from attanchor_lab.table import compare, interval, number, probability
from attanchor_vlm.analysis.calibrate import threshold_for_share
from attanchor_vlm.data.dataset import some_samples
from attanchor_vlm.data.rows import read_rows
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.attach import config_of, tau_of
from attanchor_vlm.provenance import environment
from attanchor_vlm.records import Row, alone_in, markdown_table, write_json
from attanchor_vlm.training.config import TrainConfig

PLAN = "plan.json"
_NEEDED = ("arm", "seed", "test", "values", "right")
_BATCH = 20  # prompts at a time
_WORDS = 8  # tokens of an answer
Say = Callable[[str], None]
Settings = dict[str, Any]


@dataclass(frozen=True)
class Measurement:
    """What is measured of trained arms, besides their test as trained.

    Attributes:
        name: In rows.
        arms: Which; every one with the first `seeds` of the plan's.
        change: Settings of `AttAnchorConfig` in the place of the arm's; "fraction" chooses tau on training questions.
        degrade: (kind, level) of the test images, as in `attanchor experiment degrade`.
        splits: Instead of the plan's.
        kinds: Of questions.
    """

    name: str
    arms: tuple[str, ...]
    change: Settings = field(default_factory=dict)
    degrade: tuple[str, float] | None = None
    splits: tuple[str, ...] = ()
    kinds: tuple[str, ...] = KINDS
    seeds: int = 3


@dataclass(frozen=True)
class PhotographPlan:
    """What is run, in this order: the arms for every seed, the tests, then the further arms.

    Attributes:
        question: What the runs are to decide.
        contrasts: (arm, against), a family; the first is the main one.
        margin: The least difference of accuracies that would matter.
        world, build: Settings of `PhotographConfig` and `BuildConfig` besides folders.
        stage2: Settings of `TrainConfig` that the arms share, from the preset small-vlm.
        arms, more: What each adds to them.
        more_seeds: How many of the seeds the further arms have.
        questions: Of each kind and split of the test, at most.
        splits: Of the test: seen, concepts (held out), wordings (held out).
    """

    question: str
    contrasts: tuple[tuple[str, str], ...]
    margin: float
    world: Settings
    build: Settings
    stage2: Settings
    arms: dict[str, Settings]
    seeds: tuple[int, ...]
    tests: tuple[Measurement, ...] = ()
    more: dict[str, Settings] = field(default_factory=dict)
    more_seeds: int = 3
    questions: int = 20
    splits: tuple[str, ...] = ("seen", "concepts")


def read_plan(path: Path) -> PhotographPlan:
    """Raises: ValueError: the file is no plan, naming what is wrong."""
    try:
        return pydantic.TypeAdapter(PhotographPlan).validate_json(path.read_text(encoding="utf-8"), extra="forbid")
    except (OSError, pydantic.ValidationError) as error:
        raise SetupError(f"{path} is no plan of photographs: {error}") from error


def run(plan: PhotographPlan, output: Path, work: Path, say: Say = print) -> list[Row]:
    """Do what of `plan` has no row in `output` yet; data, models and adapters go to `work`.

    Raises:
        SetupError: `output` holds another plan, or a part of model or world is not installed.
    """
    with alone_in(output):
        before = output / PLAN
        if before.is_file() and read_plan(before) != plan:
            raise SetupError(f"output {output} holds another plan; take another folder")
        write_json(before, dataclasses.asdict(plan))
        rows = Rows(output, _NEEDED, "an experiment on photographs")
        done = {(row["arm"], row["seed"], row["test"]) for row in rows.rows}
        jobs = [job for job in _jobs(plan, work, output, say) if job.key not in done]
        say(f"{len(done)} rows are there, {len(jobs)} to come")
        if jobs:
            _prepare(plan, work, say)
        runner.run(jobs, lambda job, row: rows.add(row), say=say)
    return rows.rows


def _jobs(plan: PhotographPlan, work: Path, output: Path, say: Say) -> list[Job]:
    def job(arm: str, seed: int, test: Measurement) -> Job:
        work_of = functools.partial(_measure, plan, work, output, arm, seed, test, say)
        return Job((arm, seed, test.name), f"{arm}, seed {seed}, {test.name}", work_of)

    plain = Measurement("as trained", ())
    jobs = [job("stage 1", plan.seeds[0], Measurement("as built", ()))]
    jobs += [job(arm, seed, plain) for seed in plan.seeds for arm in plan.arms]
    jobs += [job(arm, seed, test) for test in plan.tests for seed in plan.seeds[: test.seeds] for arm in test.arms]
    return jobs + [job(arm, seed, plain) for seed in plan.seeds[: plan.more_seeds] for arm in plan.more]


def _prepare(plan: PhotographPlan, work: Path, say: Say) -> None:
    world, model = work / "world", work / "model"
    if not (world / "world.json").is_file():
        sources.check_installed()
        known = known_stamps(FOLDER, work / "stamps")
        write_photographs(PhotographConfig(output=world, stamps=known, **plan.world), say)
    if not model.exists():
        begun = time.perf_counter()
        build.make(BuildConfig(output=model, pixels=plan.world["pixels"], world=world, **plan.build), say)
        say(f"model in {time.perf_counter() - begun:.0f} s")


def questions(plan: PhotographPlan, world: Path, split: str, kinds: Sequence[str] = KINDS) -> list[dict[str, Any]]:
    """The rows of a split that are asked: the first of each kind, as many as the plan says."""
    found = []
    for kind in kinds:
        path = world / f"test-{kind}-{split}.json"
        if path.is_file():
            found += json.loads(path.read_text(encoding="utf-8"))[: plan.questions]
    return found


def _measure(plan: PhotographPlan, work: Path, output: Path, arm: str, seed: int, test: Measurement, say: Say) -> Row:
    world, model = work / "world", work / "model"
    adapter, trained = (None, {}) if arm == "stage 1" else _train(plan, work, arm, seed, say)
    change = {name: value for name, value in test.change.items() if name != "fraction"}
    dtype = loading.choose_dtype("bfloat16", say)
    loaded, processor = loading.load(str(model), adapter, dtype=dtype, default_tau=1.0, **change)
    if "fraction" in test.change:
        _choose_tau(loaded, processor, world, test.change["fraction"])
    values: dict[str, float] = {}
    right: dict[str, str] = {}
    figures: dict[str, float] = {}
    for split in test.splits or plan.splits:
        values[split], by_kind, right[split], figures = _ask(plan, work, loaded, processor, split, test)
        values |= {f"{split}/{kind}": value for kind, value in by_kind.items()}
    row = {
        "arm": arm, "seed": seed, "test": test.name, "values": values, "right": right,
        "figures": {**figures, "tau": tau_of(loaded), **trained}, "date": runner.now(), **environment("cpu", "docs"),
    }  # fmt: skip
    del loaded
    gc.collect()
    say(f"{arm}, seed {seed}, {test.name}: " + ", ".join(f"{split} {values[split]:.3f}" for split in right))
    return row


def _train(plan: PhotographPlan, work: Path, arm: str, seed: int, say: Say) -> tuple[Path, dict[str, Any]]:
    """The adapter of an arm, trained now or found, and its losses."""
    settings: Settings = {"tau": 1.0, "eval_steps": plan.stage2.get("max_steps"), **plan.stage2}
    settings |= (plan.arms | plan.more)[arm] | {"seed": seed, "placement_seed": seed}
    world, folder = work / "world", work / "runs" / f"{arm}-seed{seed}"
    config = TrainConfig.from_preset(
        "small-vlm", model=str(work / "model"), data=world / "train-questions.json", images=world / "images",
        output=folder, val_fraction=0.0, **settings,
    )  # fmt: skip
    told = trained_result(config, f"{arm}, seed {seed},", say, False)
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [round(line["loss"], 4) for line in lines if "loss" in line]
    return folder, {"train_seconds": told["seconds"], "losses": losses}


def _choose_tau(model: Any, processor: Any, world: Path, fraction: float) -> None:
    samples = some_samples(world / "train-questions.json", world / "images", 100)
    threshold_for_share(model, processor, samples, fraction, config_of(model), _BATCH)


def _ask(
    plan: PhotographPlan, work: Path, model: Any, processor: Any, split: str, test: Measurement
) -> tuple[float, dict[str, float], str, dict[str, float]]:
    """The mean accuracy of the kinds, each of them, right and wrong as 1 and 0 in the order of `questions`, figures."""
    asked = questions(plan, work / "world", split, test.kinds)
    data, images = work / f"test-{split}.json", work / "world" / "images"
    write_json(data, asked)
    if test.degrade is not None:
        kind, level = test.degrade
        data, images = write_degraded(data, images, work / f"{split}-{kind}-{level:g}", kind, level, progress=False)
    rows, _ = read_rows(data, images, False, False)
    found = accuracy(model, processor, rows, [one["kind"] for one in asked], _BATCH, _WORDS)
    by_kind = found.figures()
    figures = {name: getattr(found, name) for name in ("inserted_share", "anchor_score", "image_tokens", "seconds")}
    known = {name: round(value, 4) for name, value in figures.items() if value is not None}
    return by_kind.pop("mean"), by_kind, "".join("01"[mark] for mark in found.right), known


def differences(rows: list[Row], plan: PhotographPlan, scenes: Mapping[str, list[str]]) -> list[dict[str, Any]]:
    """A line for each contrast and split, of the rows as trained: mean difference of right answers, question by
    question, over the seeds that both have, with a 95 % interval over scenes (errors clustered by scene) and one over
    seeds (Student's t, `table.compare`).

    Args:
        scenes: For each split the image of every question.
    """
    import statsmodels.api as sm

    known = {(row["arm"], row["seed"]): row for row in rows if row["test"] == "as trained"}
    lines: list[dict[str, Any]] = []
    by_seed: dict[Hashable, list[float]] = {}
    for arm, against in plan.contrasts:
        seeds = [seed for seed in plan.seeds if (arm, seed) in known and (against, seed) in known]
        if not seeds:
            continue
        for split in plan.splits:
            pairs = [[known[one, seed]["right"][split] for one in (arm, against)] for seed in seeds]
            gain = np.array([[int(a) - int(b) for a, b in zip(*pair, strict=True)] for pair in pairs], dtype=float)
            groups = np.unique(scenes[split] * len(seeds), return_inverse=True)[1]
            fit = sm.OLS(gain.ravel(), np.ones(gain.size)).fit(cov_type="cluster", cov_kwds={"groups": groups})
            low, high = fit.conf_int()[0]
            by_seed[arm, against, split] = gain.mean(1).tolist()
            lines.append({"arm": arm, "against": against, "split": split, "seeds": len(seeds),
                          "difference": float(fit.params[0]), "low": float(low), "high": float(high)})  # fmt: skip
    if by_seed:
        over_seeds = compare(by_seed)
        for line, (_, seed_line) in zip(lines, over_seeds.iterrows(), strict=True):
            line |= {"low_seeds": seed_line["low_alone"], "high_seeds": seed_line["high_alone"], "p": seed_line["p"]}
    return lines


def as_markdown(rows: list[Row], plan: PhotographPlan, work: Path) -> list[str]:
    """What was found, main contrast first: differences with their intervals, then every row's accuracies."""
    scenes = {split: [one["image"] for one in questions(plan, work / "world", split)] for split in plan.splits}
    lines = [
        [line["arm"], line["against"], line["split"], str(line["seeds"]), number(100 * line["difference"], 1, True),
         interval(100 * line["low"], 100 * line["high"]), interval(100 * line["low_seeds"], 100 * line["high_seeds"]),
         probability(line["p"]), verdict(line["low"], line["high"], plan.margin)]
        for line in differences(rows, plan, scenes)
    ]  # fmt: skip
    heads = ["arm", "against", "split", "seeds", "points", "95 %, over scenes", "95 %, over seeds", "p (seeds, Holm)",
             "verdict over scenes"]  # fmt: skip
    groups: dict[tuple[str, str], list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["arm"], row["test"]].append(row)
    means = [
        [arm, test, str(len(own)), *(_mean(own, split) for split in (*plan.splits, "wordings")),
         _mean(own, "inserted_share", "figures")]
        for (arm, test), own in groups.items()
    ]  # fmt: skip
    return [
        *markdown_table(heads, lines, 3), "",
        *markdown_table(["arm", "test", "seeds", *plan.splits, "wordings", "inserted"], means, 2),
    ]  # fmt: skip


def verdict(low: float, high: float, margin: float) -> str:
    """What an interval shows of a difference that is to be at least `margin` to matter."""
    if -margin < low and high < margin:
        return "too small to matter"
    return "better" if low > 0 else "worse" if high < 0 else "not shown"


def _mean(rows: list[Row], name: str, part: str = "values") -> str:
    found = [100 * row[part][name] for row in rows if name in row[part]]
    return f"{statistics.mean(found):.1f}" if found else ""
