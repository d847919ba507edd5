"""The output folder of a run: made ready, told from another run's, gone on from."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Container
from pathlib import Path

from attanchor_vlm import distributed
from attanchor_vlm.data.dataset import SKIPPED_FILE, STREAM_SKIPPED_FILE
from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import write_json
from attanchor_vlm.settings import settings_of
from attanchor_vlm.training import checkpoints
from attanchor_vlm.training.config import TrainConfig

RUN_FILE = "run.json"
_RENAMED = {"keep_fraction": "hold_fraction"}  # as runs of earlier versions have it


def prepare_output(config: TrainConfig) -> Path | None:
    """Make the output folder ready; with `resume`, the checkpoint to go on from.

    Raises:
        SetupError: the folder is in use or cannot be written to, or there is nothing in it to resume.
    """
    output = config.output
    checkpoint = distributed.on_main(lambda: _prepare(config))
    if not (output / RUN_FILE).is_file():
        raise SetupError(f"output {output} is not on a file system that all machines of this run share; take one")
    return checkpoint


def _prepare(config: TrainConfig) -> Path | None:
    output = config.output
    if output.exists() and not output.is_dir():
        raise SetupError(f"output {output} is a file; it should be a folder, or not exist")
    whole = checkpoints.complete_checkpoints(output)
    if not config.resume:
        if whole or (output / "adapter_config.json").exists():
            raise SetupError(f"output {output} holds a trained run; continue it with --resume, or take another folder")
        _check_not_others(output)
    elif not whole:
        raise SetupError(f"output {output} holds no checkpoint to resume from; leave --resume out to start anew")
    else:
        _check_same_run(config)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
        checkpoints.remove_torn(output)
        if not config.resume:
            for name in (SKIPPED_FILE, STREAM_SKIPPED_FILE):  # of a run that ended before its first checkpoint
                (output / name).unlink(missing_ok=True)
            write_json(output / RUN_FILE, {"settings": as_json(config)})
    except OSError as error:
        raise SetupError(f"output {output} cannot be written to: {error.strerror}") from error
    return whole[-1] if config.resume else None


def _check_not_others(output: Path) -> None:
    """Refuse a folder in which something else lies that a run would delete or write over."""
    if (output / "config.json").exists():
        raise SetupError(f"output {output} holds a model; take another folder")
    others = checkpoints.folders(output)
    if others and not (output / RUN_FILE).exists():
        raise SetupError(f"output {output} holds {others[0].name}, which is not of this command; take another folder")


def as_json(config: TrainConfig) -> dict[str, object]:
    """All settings of a run, and the number of its processes. A tau that is yet to be measured is None."""
    values: dict[str, object] = {field.name: getattr(config, field.name) for field in settings_of(config)}
    for name, value in values.items():
        values[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    measured = {"tau": None} if config.fraction is not None else {}
    return {**values, **measured, "processes": distributed.world_size()}


def differences(output: Path, config: TrainConfig, free: Container[str]) -> str:
    """What the run in `output` had other settings in than `config`, in words; empty for nothing.

    Args:
        free: Settings that may differ.

    Raises:
        OSError, ValueError, LookupError, TypeError: there is no such run.
    """
    before = json.loads((output / RUN_FILE).read_text(encoding="utf-8"))["settings"]
    before = {_RENAMED.get(name, name): value for name, value in before.items()}
    before["patience"] = before.get("patience") or 0  # where None was for never
    now, said = as_json(config), []
    for field in settings_of(config):
        if before.get(field.name) is None and field.default is not dataclasses.MISSING:
            before[field.name] = field.default  # earlier versions did not have the setting, or left it unsaid
    if config.fraction is not None:
        before["tau"] = None  # what was measured; it is the fraction that was asked for
    for name, value in now.items():
        if name not in free and before.get(name) != value:
            said.append(f"{name} was {before.get(name)!r} and is {value!r}")
    return "; ".join(said)


def _check_same_run(config: TrainConfig) -> None:
    free = {field.name for field in settings_of(config) if field.metadata["resumable"]}
    if not config.stream:
        free.add("workers")  # of a stream, they decide on the order
    try:
        changes = differences(config.output, config, free)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        path = config.output / RUN_FILE
        raise SetupError(f"{path} cannot be read, so it is not known what to resume: {error}") from error
    if changes:
        raise SetupError(f"the run in {config.output} had other settings: {changes}; resume it with the same ones")


def check_steps_left(checkpoint: Path, planned: int) -> None:
    """Trainer would add a step to a run that has made all of them.

    Raises:
        SetupError: saying how to go on.
        CheckpointError: Trainer's own state in it cannot be read.
    """
    with checkpoints.reading(checkpoint):
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    made = checkpoints.step_of(checkpoint)
    if made >= planned:
        raise SetupError(
            f"{checkpoint.parent} holds a run that has made {made} steps, and {planned} are asked for; "
            "raise --max-steps or --epochs to go on"
        )
