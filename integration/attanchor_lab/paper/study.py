"""What is compared: the arms of an experiment, what they share, and the settings that each arm's figures depend on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.training.config import Preset, TrainSettings

_RUNS = "runs"
_FREE = ("workers", "eval_batch_size", "gradient_checkpointing", "skip_bad")  # of training, change no figure


@dataclass(frozen=True)
class Arm:
    """One column of a table.

    Attributes:
        name: In rows, tables and folders.
        tau: 1 for the baseline.
        direction: As in `AttAnchorConfig`.
        placement: "matched", or a control of `placement.PLACEMENTS`.
        model, preset: Instead of the study's.
        trained_as: Share the training of the arm of this name; by default its own.
        train_rows, test_rows: (data, images) instead of the study's.
        labels: Further entries of the row, such as the degradation.
    """

    name: str
    tau: float
    direction: str = "text_into_image"
    placement: str = "matched"
    model: str | None = None
    preset: Preset | None = None
    trained_as: str | None = None
    train_rows: tuple[Path, Path] | None = None
    test_rows: tuple[Path, Path] | None = None
    labels: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Study:
    """What the arms of an experiment share.

    Attributes:
        model: A folder, or a Hub id.
        output: Folder for rows, table, picture and trained adapters.
        plan: What is measured; its `data` and `images` are the test rows.
        train: What is trained on; None measures the model as it is, anchors switched on without training.
        preset: The method's and the optimiser's settings; arms put in their tau and direction.
        preset_name: Whose column of the paper results are laid beside, if it has one.
        seeds: An arm is trained and measured for each.
    """

    model: str
    output: Path
    plan: evaluation.Plan
    preset: Preset
    preset_name: str = ""
    train: TrainRows | None = None
    seeds: tuple[int, ...] = (0,)

    def check(self) -> None:
        """Refuse what cannot be run, before anything is.

        Raises:
            ValueError: naming what is wrong.
        """
        if not self.seeds:
            raise ValueError("seeds is empty; it should hold at least one number")
        if self.output.exists() and not self.output.is_dir():
            raise SetupError(f"output {self.output} is a file; it should be a folder, or not exist")
        self.plan.check()
        train, val = (None, None) if self.train is None else (self.train.data, self.train.val_data)
        for what, path in (("test", self.plan.data), ("data", train), ("val_data", val)):
            if path is not None and not path.is_file():
                raise DataError(f"{what} {path} is not a file")


@dataclass(frozen=True)
class TrainRows:
    """Training rows and how long to train on them; the rest is the preset's."""

    data: Path
    images: Path
    val_data: Path | None = None
    turns: str = "each"
    max_steps: int | None = None
    eval_steps: int | None = None
    eval_batch_size: int | None = None
    gradient_checkpointing: bool = False
    workers: int = 0


def preset_of(study: Study, arm: Arm) -> Preset:
    return dataclasses.replace(arm.preset or study.preset, tau=arm.tau, direction=arm.direction)


def plan_of(study: Study, arm: Arm, seed: int) -> evaluation.Plan:
    """What is measured of an arm, on its own images if it has such."""
    data, images = arm.test_rows or (study.plan.data, study.plan.images)
    return dataclasses.replace(study.plan, data=data, images=images, seed=seed)


def train_settings(study: Study, rows: TrainRows, arm: Arm, seed: int) -> TrainSettings:
    """What an arm is trained with, in its own folder or in that of the arm whose training it shares."""
    data, images = arm.train_rows or (rows.data, rows.images)
    return TrainSettings(
        model=arm.model or study.model,
        data=data,
        images=images,
        output=study.output / _RUNS / run_name(arm.trained_as or arm.name, seed),
        preset=preset_of(study, arm),
        val_data=rows.val_data,
        turns=rows.turns,
        skip_bad=study.plan.skip_bad,
        max_steps=rows.max_steps,
        eval_steps=rows.eval_steps,
        eval_batch_size=rows.eval_batch_size,
        gradient_checkpointing=rows.gradient_checkpointing,
        workers=rows.workers,
        seed=seed,
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
        rows = {name: value for name, value in dataclasses.asdict(study.train).items() if name not in _FREE}
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
    found = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            found.update(part)
    return found.hexdigest()[:16]
