"""Train and measure the arms of an experiment one after the other, each finished one a row that is never run again."""

from __future__ import annotations

import dataclasses
import functools
import gc
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attanchor_lab import runner
from attanchor_lab.paper.study import (
    Arm,
    Study,
    check_arms,
    check_pending,
    plan_of,
    preset_of,
    run_name,
    settings_of,
    train_settings,
)
from attanchor_lab.runner import Job, Rows
from attanchor_vlm.errors import SetupError
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.evaluation.config import EvalConfig
from attanchor_vlm.model import load as loading
from attanchor_vlm.provenance import environment
from attanchor_vlm.records import Row, alone_in, append_row, read_rows
from attanchor_vlm.settings import differences
from attanchor_vlm.training.config import TrainConfig

Say = Callable[[str], None]
_NEEDED = ("experiment", "arm", "seed", "settings", "values", "figures")
_TOGETHER = ("amber", "amber_g")  # whose figures make a score of both


def run_arms(
    study: Study,
    experiment: str,
    arms: Sequence[Arm],
    after_each: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of all arms and seeds, those that are missing being run first.

    Args:
        after_each: Gets the rows that there are, in the arms' order, whenever one is added.

    Raises:
        KeyboardInterrupt: training was stopped by Ctrl-C; its checkpoint is saved.
        ValueError: something cannot be trained or measured; rows that are finished stay.
    """
    study.check()
    check_arms(study, arms)
    pairs = [(arm, seed) for seed in study.seeds for arm in arms]
    rows = Rows(study.output, _NEEDED, "an experiment")
    if strangers := {row["experiment"] for row in rows.rows} - {experiment}:
        raise SetupError(f"output {study.output} holds rows of the experiment {min(strangers)!r}; take another folder")
    found = {(arm.name, seed): find(rows, arm.name, seed, settings_of(study, arm)) for arm, seed in pairs}
    check_pending(study, [(arm, seed) for arm, seed in pairs if found[arm.name, seed] is None])

    def keep(job: Job, row: Row) -> None:
        rows.add({"experiment": experiment, **row})
        found[row["arm"], row["seed"]] = rows.rows[-1]
        _parts_file(study, row["arm"], row["seed"]).unlink(missing_ok=True)
        after_each(ordered())

    def ordered() -> list[Row]:
        return [row for row in found.values() if row is not None]

    jobs = []
    for number, (arm, seed) in enumerate(pairs, start=1):
        title = f"[{number}/{len(pairs)}] {arm.name}" + (f", seed {seed}" if len(study.seeds) > 1 else "")
        if found[arm.name, seed] is not None:
            study.say(f"{title}: done before")
        else:
            jobs.append(Job((arm.name, seed), title, functools.partial(_run, study, arm, seed, title)))
    with alone_in(study.output):
        runner.run(jobs, keep, say=study.say, progress=study.progress)
        after_each(ordered())
    return ordered()


def find(rows: Rows, arm: str, seed: int, settings: Mapping[str, Any]) -> Row | None:
    """The finished row of an arm, None if it is still to be run.

    Raises:
        SetupError: there is one with other settings.
    """
    wanted = json.loads(json.dumps(settings))
    for row in rows.rows:
        if (row["arm"], row["seed"]) != (arm, seed):
            continue
        before = row["settings"]
        changes = differences(before, {name: wanted.get(name) for name in sorted({*wanted, *before})})
        if changes:
            raise SetupError(
                f"{rows.path} holds {arm!r} with other settings: {changes}; go on with the same ones, or take another "
                "--output"
            )
        return row
    return None


def _run(study: Study, arm: Arm, seed: int, title: str) -> Row:
    def say(line: str) -> None:
        study.say(f"    {line}")

    study.say(title)
    model, settings = arm.model or study.model, settings_of(study, arm)
    adapter: Path | None = None
    trained: dict[str, Any] = {}
    if study.train is not None:
        adapter, trained = _train(study, arm, seed, say)
    dtype = loading.choose_dtype(preset_of(study, arm).dtype, lambda line: None)
    loaded, processor = loading.load(
        model,
        adapter,
        dtype=dtype,
        default_tau=1.0,
        tau=arm.tau,
        direction=arm.direction,
        placement=arm.placement,
        placement_seed=seed,
    )
    plan, tasks = plan_of(study, arm, seed), study.output / "tasks" / run_name(arm.name, seed)
    report = measure(loaded, processor, plan, settings, _parts_file(study, arm.name, seed), tasks, study.progress)
    parameters = sum(parameter.numel() for parameter in loaded.parameters())
    del loaded, processor
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    say(", ".join(f"{name} {value:.4f}" for name, value in report.values.items()))
    if report.not_finite:
        say(evaluation.left_out(report))
    return {
        "arm": arm.name,
        "seed": seed,
        "settings": settings,
        "labels": arm.labels,
        "values": report.values,
        "figures": {**report.figures, **evaluation.finite(trained), "parameters": parameters},
        "samples": report.samples,
        "not_finite": list(report.not_finite),
        **environment(),
    }


def _parts_file(study: Study, arm: str, seed: int) -> Path:
    return study.output / f"{run_name(arm, seed)}.parts.jsonl"


def _train(study: Study, arm: Arm, seed: int, say: Say) -> tuple[Path, dict[str, Any]]:
    """The trained adapter of an arm, trained now, taken up again from a checkpoint, or found."""
    settings = train_settings(study, arm, seed)
    summary = trained_result(settings, arm.name, say, study.progress)
    trained = {"train_steps": summary["steps"], "train_seconds": summary["seconds"]}
    if summary["val_loss"] is not None:
        trained["train_val_loss"] = summary["val_loss"]
    return settings.output, trained


def trained_result(settings: TrainConfig, name: str, say: Say, progress: bool) -> dict[str, Any]:
    """The result of a run that is there, or of one made now, from the last whole checkpoint if there is one.

    Raises:
        KeyboardInterrupt: it was stopped by Ctrl-C; its checkpoint is saved.
    """
    from attanchor_vlm.training import run as train
    from attanchor_vlm.training.checkpoints import RUN_FILE, complete_checkpoints

    if not is_trained(settings.output):
        found = complete_checkpoints(settings.output)
        if not found and settings.output.exists():
            shutil.rmtree(settings.output)  # nothing to go on from; whatever is there was not finished
        if train.run(dataclasses.replace(settings, resume=bool(found)), say, progress).interrupted:
            say(f"interrupted while {name} was trained; the same command goes on")
            raise KeyboardInterrupt
    return json.loads((settings.output / RUN_FILE).read_text(encoding="utf-8"))["result"]


def is_trained(folder: Path) -> bool:
    """Whether a run there came to its end: its result is the last that training writes."""
    try:
        return "result" in json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False


# --- Measurement in parts, each kept when it is done: nine benchmarks take hours, and a kill costs one. --------------


def measure(
    model: Any,
    processor: Any,
    plan: EvalConfig,
    settings: dict[str, Any],
    kept: Path,
    output: Path,
    progress: bool,
) -> evaluation.Report:
    """What `evaluation.evaluate` reports, less its predictions; parts that are kept are not measured again.

    Args:
        settings: What the figures depend on, as JSON has it: parts of other settings do not count.
        kept: A .jsonl file, to be deleted by the caller when the report is stored.
        output: As for `evaluate`.
    """
    parts = parts_of(plan)
    if len(parts) == 1:
        return evaluation.evaluate(model, processor, plan, output, progress)
    done = {row["part"]: row for row in read_rows(kept) if row["settings"] == settings}
    whole = evaluation.Report({}, {}, 0)
    for name, part in parts.items():
        if name not in done:
            report = evaluation.evaluate(model, processor, part, output, progress)
            append_row(kept, evaluation.as_dict(report, {"part": name, "settings": settings}))
            done[name] = evaluation.as_dict(report, {})
        row = done[name]
        whole = evaluation.Report(
            {**whole.values, **row["values"]},
            {**whole.figures, **row["figures"]},
            whole.samples + row["samples"],
            not_finite=(*whole.not_finite, *row["not_finite"]),
        )
    return whole


def parts_of(plan: EvalConfig) -> dict[str, EvalConfig]:
    """The text metrics in one part, which share their passes over the data, and every task in one."""
    parts = {}
    if plan.metrics:
        parts["text"] = dataclasses.replace(plan, tasks=(), task_data={})
    for task in plan.tasks:
        name = "amber" if task in _TOGETHER else task
        tasks = tuple(one for one in plan.tasks if one == task or {one, task} <= set(_TOGETHER))
        data = {one: folder for one, folder in plan.task_data.items() if one in tasks}
        parts[f"task {name}"] = dataclasses.replace(plan, metrics=(), tasks=tasks, task_data=data)
    return parts
