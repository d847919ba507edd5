"""What is compared: the arms of an experiment, what they share, and the settings that each arm's figures depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attanchor_vlm.data.lengths import RowLengths, check_texts
from attanchor_vlm.data.rows import read_rows, sorted_out
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.evaluation import harness
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.evaluation.config import EvalConfig
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.training.checkpoints import changed_settings
from attanchor_vlm.training.config import Method, TrainConfig

_RUNS = "runs"
_TRAINED_ON = ("data", "images", "val_data", "turns", "max_steps", "eval_steps")  # beside the preset, change figures
# Of a run, change none.
_FREE = ("output", "resume", "preset", "workers", "eval_batch_size", "gradient_checkpointing", "skip_bad")


@dataclass(frozen=True)
class Arm:
    """One column of a table.

    Attributes:
        name: In rows, tables and folders.
        tau: 1 for the baseline.
        direction: As in `AttAnchorConfig`.
        placement: As in `AttAnchorConfig`; its seed is that of the arm.
        model, preset: Instead of the study's.
        trained_as: Share the training of the arm of this name; by default its own.
        train_rows, test_rows: (data, images) instead of the study's.
        labels: Further entries of the row, such as the degradation.
        paper: The paper's values, if it has such an arm.
    """

    name: str
    tau: float
    direction: str = "text_into_image"
    placement: str = "matched"
    model: str | None = None
    preset: Method | None = None
    trained_as: str | None = None
    train_rows: tuple[Path, Path] | None = None
    test_rows: tuple[Path, Path] | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    paper: dict[str, float] | None = None


@dataclass(frozen=True)
class Study:
    """What the arms of an experiment share.

    Attributes:
        model: A folder, or a Hub id.
        output: Folder for rows, table, picture and trained adapters.
        plan: What is measured; its `data` and `images` are the test rows.
        train: The rows that are trained on, and for how long; arms put in the rest. None measures the model as it is,
            anchors switched on without training.
        preset: The method's and the optimiser's settings; arms put in their tau and direction.
        preset_name: Whose column of the paper results are laid beside, if it has one.
        seeds: An arm is trained and measured for each.
        say, progress: Where lines of what is done go, and whether progress bars are shown.
    """

    model: str
    output: Path
    plan: EvalConfig
    preset: Method
    preset_name: str = ""
    train: TrainConfig | None = None
    seeds: tuple[int, ...] = (0,)
    say: Callable[[str], None] = print
    progress: bool = True

    def check(self) -> None:
        """Refuse what cannot be run, before anything is.

        Raises:
            ValueError: naming what is wrong.
        """
        if not self.seeds:
            raise ValueError("seeds is empty; it should hold at least one number")
        evaluation.check_output(self.output)
        self.plan.check()
        train, val = (None, None) if self.train is None else (self.train.data, self.train.val_data)
        for what, path in (("test", self.plan.data), ("data", train), ("val_data", val)):
            if path is not None and not path.is_file():
                raise DataError(f"{what} {path} is not a file")


def preset_of(study: Study, arm: Arm) -> Method:
    return dataclasses.replace(
        arm.preset or study.preset, tau=arm.tau, direction=arm.direction, placement=arm.placement
    )


def plan_of(study: Study, arm: Arm, seed: int) -> EvalConfig:
    """What is measured of an arm, on its own images if it has such."""
    data, images = arm.test_rows or (study.plan.data, study.plan.images)
    return dataclasses.replace(study.plan, data=data, images=images, seed=seed)


def train_settings(study: Study, arm: Arm, seed: int) -> TrainConfig:
    """What an arm is trained with, in its own folder or in that of the arm whose training it shares."""
    assert study.train is not None
    data, images = arm.train_rows or (study.train.data, study.train.images)
    return dataclasses.replace(
        study.train,
        model=arm.model or study.model,
        data=data,
        images=images,
        output=study.output / _RUNS / run_name(arm.trained_as or arm.name, seed),
        skip_bad=study.plan.skip_bad,
        seed=seed,
        **vars(preset_of(study, arm)) | {"placement_seed": seed, "preset": None},
    )


def settings_of(study: Study, arm: Arm) -> dict[str, Any]:
    """What an arm's figures depend on, as JSON has it. Files are told by their path and what is in them."""
    plan = dataclasses.asdict(study.plan)
    for name in ("seed", "data", "skip_bad"):
        del plan[name]
    if evaluation.LOSS not in study.plan.metrics:
        del plan["batch_size"]  # the loss is a mean over batches; nothing else depends on it
    preset = dataclasses.asdict(preset_of(study, arm))
    settings = {"model": arm.model or study.model, "placement": arm.placement, **plan, **_file("test", study.plan.data)}
    if arm.test_rows is not None:
        settings["test_rows"] = arm.test_rows[0]
    if study.train is not None:
        rows = {name: getattr(study.train, name) for name in _TRAINED_ON}
        rows |= {**_file("data", study.train.data), **_file("val_data", study.train.val_data), "preset": preset}
        if arm.train_rows is not None:
            rows["train_rows"] = arm.train_rows[0]
        settings["train"] = rows
    else:
        settings |= {"tau": arm.tau, "direction": arm.direction, "dtype": preset["dtype"], "train": None}
    return json.loads(json.dumps(settings, default=str))


def run_name(arm: str, seed: int) -> str:
    """The folder of what belongs to one arm and seed."""
    return f"{slug(arm)}-seed{seed}"


def slug(name: str) -> str:
    """An arm's name as a folder's."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-")


def _file(name: str, path: Path | None) -> dict[str, Any]:
    return {name: path, f"{name}_sha256": None if path is None else digest(path)}


def digest(path: Path) -> str:
    """The first 16 digits of a file's SHA-256."""
    status = path.stat()
    return _digest(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=16)
def _digest(path: Path, changed: int, size: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


# --- What can be wrong is said before the first arm, not after days of training. --------------------------------------


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
        AttAnchorConfig(tau=arm.tau, direction=arm.direction, placement=arm.placement)


def check_pending(study: Study, jobs: Sequence[tuple[Arm, int]]) -> None:
    """Refuse rows, tasks and earlier trainings that the arms still to be run could not be run with.

    Raises:
        DataError: a row is bad (unless `skip_bad`), does not fit a model's context, or a task's data cannot be loaded.
        SetupError: a model's processor cannot be loaded, or a run in the output folder had other settings.
    """
    if not jobs:
        return
    if study.train is not None:
        for arm, seed in jobs:
            _check_earlier_run(train_settings(study, arm, seed))
    if study.plan.metrics:
        _check_rows(study, [arm for arm, _ in jobs])
    if study.plan.tasks:
        harness.check_data(study.plan.tasks, study.plan.task_data, study.plan.include_path)


def _check_rows(study: Study, arms: Sequence[Arm]) -> None:
    tests = {(arm.model or study.model, arm.test_rows): arm for arm in arms}
    for (model, _), arm in tests.items():
        processor, context = evaluation.processor_and_context(model)
        evaluation.read(plan_of(study, arm, 0), processor, context, study.progress)
    # Of the training rows, those of the first arm are checked by its training, right away.
    for model, rows in dict.fromkeys((arm.model or study.model, arm.train_rows) for arm in arms if arm.train_rows):
        processor, context = evaluation.processor_and_context(model)
        found, _ = read_rows(*rows, study.plan.skip_bad, decode=False)
        sorted_out(rows[0], *check_texts(rows[0], found, RowLengths(processor), context), study.plan.skip_bad)


def _check_earlier_run(settings: TrainConfig) -> None:
    """A run that was trained, or begun, with other settings is not this arm's."""
    try:
        changes = changed_settings(settings, _FREE)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return  # nothing there, or nothing that could be gone on from
    if changes:
        raise SetupError(
            f"the run in {settings.output} had other settings: {changes}; go on with the same ones, or take another "
            "--output"
        )
