"""What can be wrong with an experiment is said before its first arm, not after days of training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from attanchor_vlm.data.batches import check_texts
from attanchor_vlm.data.rows import read_rows
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.evaluation import harness
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.training.config import TrainSettings
from attanchor_vlm.training.run_folder import RUN_FILE, as_json

from attanchor_lab.paper.study import Arm, Study, plan_of, slug, train_settings
from attanchor_lab.placements import PLACEMENTS

# Of a run: what changes none of its weights.
_FREE = ("output", "resume", "skip_bad", "workers", "eval_batch_size", "gradient_checkpointing")


def check_arms(study: Study, arms: Sequence[Arm]) -> None:
    """Refuse arms that cannot be told apart, or whose settings have no meaning.

    Raises:
        ValueError: naming the arm.
    """
    names = [arm.name for arm in arms]
    if len(set(names)) < len(names):
        raise ValueError(f"two arms have one name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    folders: dict[str, str] = {}
    for arm in arms:
        if (other := folders.setdefault(slug(arm.name), arm.name)) != arm.name:
            raise ValueError(f"{other!r} and {arm.name!r} would have one folder, {slug(arm.name)}; name one otherwise")
        if arm.placement not in PLACEMENTS:
            raise ValueError(f"placement is {arm.placement!r}; it should be one of {', '.join(PLACEMENTS)}")
        AttAnchorConfig(tau=arm.tau, direction=arm.direction)


def check_pending(study: Study, jobs: Sequence[tuple[Arm, int]], progress: bool = True) -> None:
    """Refuse rows, tasks and earlier trainings that the arms still to be run could not be run with.

    Raises:
        DataError: a row is bad (unless `skip_bad`), does not fit a model's context, or a task's data cannot be loaded.
        SetupError: a model's processor cannot be loaded, or a run in the output folder had other settings.
    """
    if not jobs:
        return
    if study.train is not None:
        for arm, seed in jobs:
            _check_earlier_run(train_settings(study, study.train, arm, seed))
    if study.plan.metrics:
        _check_rows(study, [arm for arm, _ in jobs], progress)
    if study.plan.tasks:
        harness.check_data(study.plan.tasks, study.plan.task_data, study.plan.include)


def _check_rows(study: Study, arms: Sequence[Arm], progress: bool) -> None:
    tests = {(arm.model or study.model, arm.test_rows): arm for arm in arms}
    for (model, _), arm in tests.items():
        processor, context = evaluation.processor_and_context(model)
        evaluation.read(plan_of(study, arm, 0), processor, context, progress)
    # Of the training rows, those of the first arm are checked by its training, right away.
    for model, rows in dict.fromkeys((arm.model or study.model, arm.train_rows) for arm in arms if arm.train_rows):
        processor, context = evaluation.processor_and_context(model)
        found, _ = read_rows(*rows, study.plan.skip_bad, decode=False)
        good, bad = check_texts(rows[0], found, processor, context)
        if bad and (not study.plan.skip_bad or not good):
            raise DataError("\n".join([*map(str, bad[:10]), f"{len(bad)} bad rows to train on"]), bad)


def _check_earlier_run(settings: TrainSettings) -> None:
    """A run that was trained, or begun, with other settings is not this arm's."""
    path: Path = settings.output / RUN_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # nothing there, or nothing that could be gone on from
    now = json.loads(json.dumps(as_json(settings)))
    different = [name for name in now if name not in _FREE and before.get(name) != now[name]]
    if different:
        changes = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in different)
        raise SetupError(
            f"the run in {settings.output} had other settings: {changes}; go on with the same ones, or take another "
            "--output"
        )
