"""The output folder of a run: made ready, told from another run's, gone on from."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

from attanchor_vlm import distributed
from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import write_json
from attanchor_vlm.training import checkpoints
from attanchor_vlm.training.config import TrainSettings

RUN_FILE = "run.json"
SKIPPED_FILE, STREAM_SKIPPED_FILE = "skipped.json", "skipped.jsonl"
# A resumed run may change these; anything else would make it a different run.
_FREE_ON_RESUME = {"output", "resume", "max_steps", "eval_steps", "save_steps", "epochs", "patience"}
_FREE_ON_RESUME |= {"eval_batch_size", "gradient_checkpointing"}  # on which only memory and time depend
_FREE_IN_MEMORY = {"workers"}  # of a stream, they decide on the order


def prepare_output(settings: TrainSettings) -> Path | None:
    """Make the output folder ready; with `resume`, the checkpoint to go on from.

    Raises:
        SetupError: the folder is in use or cannot be written to, or there is nothing in it to resume.
    """
    output = settings.output
    checkpoint = distributed.on_main(lambda: _prepare(settings))
    if not (output / RUN_FILE).is_file():
        raise SetupError(f"output {output} is not on a file system that all machines of this run share; take one")
    return checkpoint


def _prepare(settings: TrainSettings) -> Path | None:
    output = settings.output
    if output.exists() and not output.is_dir():
        raise SetupError(f"output {output} is a file; it should be a folder, or not exist")
    whole = checkpoints.complete_checkpoints(output)
    if not settings.resume:
        if whole or (output / "adapter_config.json").exists():
            raise SetupError(f"output {output} holds a trained run; continue it with --resume, or take another folder")
        _check_not_others(output)
    elif not whole:
        raise SetupError(f"output {output} holds no checkpoint to resume from; leave --resume out to start anew")
    else:
        _check_same_run(settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
        checkpoints.remove_torn(output)
        if not settings.resume:
            for name in (SKIPPED_FILE, STREAM_SKIPPED_FILE):  # of a run that ended before its first checkpoint
                (output / name).unlink(missing_ok=True)
            write_json(output / RUN_FILE, {"settings": as_json(settings)})
    except OSError as error:
        raise SetupError(f"output {output} cannot be written to: {error.strerror}") from error
    return whole[-1] if settings.resume else None


def _check_not_others(output: Path) -> None:
    """Refuse a folder in which something else lies that a run would delete or write over."""
    if (output / "config.json").exists():
        raise SetupError(f"output {output} holds a model; take another folder")
    others = checkpoints.folders(output)
    if others and not (output / RUN_FILE).exists():
        raise SetupError(f"output {output} holds {others[0].name}, which is not of this command; take another folder")


def as_json(settings: TrainSettings) -> dict[str, object]:
    """All settings of a run, and the number of its processes, in one level."""
    values = dataclasses.asdict(settings)
    values |= values.pop("preset")
    for name, value in values.items():
        values[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return {**values, "processes": distributed.world_size()}


def _check_same_run(settings: TrainSettings) -> None:
    path = settings.output / RUN_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SetupError(f"{path} cannot be read, so it is not known what to resume: {error}") from error
    now = as_json(settings)
    free = _FREE_ON_RESUME if settings.stream else _FREE_ON_RESUME | _FREE_IN_MEMORY
    different = [name for name in now if name not in free and before.get(name) != now[name]]
    if different:
        changes = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in different)
        raise SetupError(f"the run in {settings.output} had other settings: {changes}; resume it with the same ones")


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
