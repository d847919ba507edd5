"""Train and measure the arms of an experiment one after the other, each finished one a row that is never run again."""

from __future__ import annotations

import dataclasses
import gc
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.model import load as loading
from attanchor_vlm.provenance import provenance
from attanchor_vlm.training.config import TrainSettings

from attanchor_lab.paper import checks, parts
from attanchor_lab.paper.rows import Row, Rows
from attanchor_lab.paper.study import Arm, Study, TrainRows, plan_of, preset_of, run_name, settings_of, train_settings
from attanchor_lab.placements import mark_adapter, placed

Say = Callable[[str], None]


class InterruptedStudyError(Exception):
    """Training was stopped by Ctrl-C; a checkpoint is there, and the same command goes on from it."""


def run_arms(
    study: Study,
    experiment: str,
    arms: Sequence[Arm],
    say: Say = print,
    progress: bool = True,
    after_each: Callable[[list[Row]], None] = lambda rows: None,
) -> list[Row]:
    """The rows of all arms and seeds, those that are missing being run first.

    Args:
        after_each: Gets the rows that there are, in the arms' order, whenever one is added.

    Raises:
        InterruptedStudyError: training was stopped by Ctrl-C.
        ValueError: something cannot be trained or measured; rows that are finished stay.
    """
    study.check()
    checks.check_arms(study, arms)
    rows = Rows(study.output, experiment)
    jobs = [(arm, seed) for seed in study.seeds for arm in arms]
    found = {(arm.name, seed): rows.find(arm.name, seed, settings_of(study, arm)) for arm, seed in jobs}

    checks.check_pending(study, [job for job in jobs if found[job[0].name, job[1]] is None], progress)

    def ordered() -> list[Row]:
        return [row for job in jobs if (row := found[job[0].name, job[1]]) is not None]

    for number, (arm, seed) in enumerate(jobs, start=1):
        title = f"[{number}/{len(jobs)}] {arm.name}" + (f", seed {seed}" if len(study.seeds) > 1 else "")
        if found[arm.name, seed] is not None:
            say(f"{title}: done before")
            continue
        say(title)
        row = _run(study, arm, seed, lambda line: say(f"    {line}"), progress)
        rows.add(row)
        _parts_file(study, arm, seed).unlink(missing_ok=True)
        found[arm.name, seed] = rows.rows[-1]
        after_each(ordered())
    after_each(ordered())
    return ordered()


def _run(study: Study, arm: Arm, seed: int, say: Say, progress: bool) -> Row:
    model, settings = arm.model or study.model, settings_of(study, arm)
    with placed(arm.placement, seed):
        adapter: Path | None = None
        trained: dict[str, Any] = {}
        if study.train is not None:
            adapter, trained = _train(study, study.train, arm, seed, say, progress)
        dtype = loading.choose_dtype(preset_of(study, arm).dtype, lambda line: None)
        loaded, processor = evaluation.load(model, adapter, arm.tau, arm.direction, dtype)
        plan, tasks = plan_of(study, arm, seed), study.output / "tasks" / run_name(arm.name, seed)
        report = parts.measure(loaded, processor, plan, settings, _parts_file(study, arm, seed), tasks, progress)
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
        **provenance(),
    }


def _parts_file(study: Study, arm: Arm, seed: int) -> Path:
    return study.output / f"{run_name(arm.name, seed)}.parts.jsonl"


def _train(study: Study, rows: TrainRows, arm: Arm, seed: int, say: Say, progress: bool) -> tuple[Path, dict[str, Any]]:
    """The trained adapter of an arm, trained now, taken up again from a checkpoint, or found."""
    from attanchor_vlm.training.run_folder import RUN_FILE

    settings = train_settings(study, rows, arm, seed)
    folder = settings.output
    if not is_trained(folder) and _train_or_go_on(settings, say, progress).interrupted:
        raise InterruptedStudyError(f"interrupted while {arm.name} was trained; the same command goes on")
    mark_adapter(folder, arm.placement, seed)
    summary = json.loads((folder / RUN_FILE).read_text(encoding="utf-8"))["result"]
    trained = {"train_steps": summary["steps"], "train_seconds": summary["seconds"]}
    if summary["val_loss"] is not None:
        trained["train_val_loss"] = summary["val_loss"]
    return folder, trained


def _train_or_go_on(settings: TrainSettings, say: Say, progress: bool) -> Any:
    """Train from the last whole checkpoint, if there is one.

    A run killed between its last checkpoint and its adapter has no step left to make, which `train.run` refuses: it
    goes on from the checkpoint before, and makes the same steps again.
    """
    from attanchor_vlm.training import run as train
    from attanchor_vlm.training.checkpoints import complete_checkpoints

    while found := complete_checkpoints(settings.output):
        made = json.loads((found[-1] / "trainer_state.json").read_text(encoding="utf-8"))
        if made["global_step"] < made["max_steps"]:
            break
        shutil.rmtree(found[-1])
    if not found and settings.output.exists():
        shutil.rmtree(settings.output)  # nothing to go on from; whatever is there was not finished
    return train.run(dataclasses.replace(settings, resume=bool(found)), say, progress)


def is_trained(folder: Path) -> bool:
    """Whether a run there came to its end: its result is the last that training writes."""
    try:
        return "result" in json.loads((folder / "run.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
