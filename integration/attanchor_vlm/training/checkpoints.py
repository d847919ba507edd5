"""What a run leaves on disk: a folder that is one run's alone, with checkpoints that are whole or none; and what of it
an error says is left."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch

from attanchor_vlm import distributed
from attanchor_vlm.data.dataset import SKIPPED_FILE, STREAM_SKIPPED_FILE
from attanchor_vlm.errors import CheckpointError, DataError, SetupError
from attanchor_vlm.records import PART, share_files, write_json
from attanchor_vlm.settings import differences, settings_of
from attanchor_vlm.training.config import TrainConfig

RUN_FILE = "run.json"
_RENAMED = {"keep_fraction": "hold_fraction"}  # as runs of earlier versions have it
# Written last, when every process has written its part: a checkpoint without it was cut short.
STATE_FILE = "attanchor_state.json"
_PREFIX = "checkpoint-"


# --- The folder. -----------------------------------------------------------------------------------------------------


def prepare_output(config: TrainConfig) -> Path | None:
    """Make the output folder, which is this run's alone, ready; with `resume`, the checkpoint to go on from."""
    output = config.output
    checkpoint = distributed.on_main(lambda: _prepare(config))
    if not (output / RUN_FILE).is_file():
        raise SetupError(f"output {output} is not on a file system that all machines of this run share; take one")
    return checkpoint


def _prepare(config: TrainConfig) -> Path | None:
    output = config.output
    whole = complete_checkpoints(output)
    if not config.resume:
        if whole or (output / "adapter_config.json").exists():
            raise SetupError(f"output {output} holds a trained run; continue it with --resume, or take another folder")
        _check_not_others(output)
    elif not whole:
        raise SetupError(f"output {output} holds no checkpoint to resume from; leave --resume out to start anew")
    else:
        _check_same_run(config)
    try:
        remove_torn(output)
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
    others = folders(output)
    if others and not (output / RUN_FILE).exists():
        raise SetupError(f"output {output} holds {others[0].name}, which is not of this command; take another folder")


def as_json(config: TrainConfig) -> dict[str, object]:
    """List all settings of a run, and the number of its processes. A tau that is yet to be measured is None."""
    values: dict[str, object] = {field.name: getattr(config, field.name) for field in settings_of(config)}
    for name, value in values.items():
        values[name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    measured = {"tau": None} if config.fraction is not None else {}
    return {**values, **measured, "processes": distributed.world_size()}


def changed_settings(config: TrainConfig, free: Container[str]) -> str:
    """Compare the settings of the run in `config.output` with `config`, as `differences` does, but for those `free`."""
    before = json.loads((config.output / RUN_FILE).read_text(encoding="utf-8"))["settings"]
    before = {_RENAMED.get(name, name): value for name, value in before.items()}
    before["patience"] = before.get("patience") or 0  # where None was for never
    for field in settings_of(config):
        if before.get(field.name) is None and field.default is not dataclasses.MISSING:
            before[field.name] = field.default  # earlier versions did not have the setting, or left it unsaid
    if config.fraction is not None:
        before["tau"] = None  # what was measured; it is the fraction that was asked for
    return differences(before, {name: value for name, value in as_json(config).items() if name not in free})


def _check_same_run(config: TrainConfig) -> None:
    free = {field.name for field in settings_of(config) if field.metadata["resumable"]}
    if not config.stream:
        free.add("workers")  # of a stream, they decide on the order
    try:
        changes = changed_settings(config, free)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        path = config.output / RUN_FILE
        raise SetupError(f"{path} cannot be read, so it is not known what to resume: {error}") from error
    if changes:
        raise SetupError(f"the run in {config.output} had other settings: {changes}; resume it with the same ones")


def check_steps_left(checkpoint: Path, planned: int, patience: int) -> bool:
    """Whether a run goes on behind a checkpoint; if not, it ended before its adapter was written."""
    with reading(checkpoint):
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        before = json.loads((checkpoint.parent / RUN_FILE).read_text(encoding="utf-8"))
    made, stalled = step_of(checkpoint), has_stalled(state.get("log_history", ()), patience)
    is_done = before.get("result", {}).get("steps") == made
    if is_done and stalled and made < planned:
        raise SetupError(
            f"{checkpoint.parent} holds a run that stopped at step {made}, with no better validation loss for "
            f"{patience} steps; raise --patience to go on"
        )
    if made > planned or (is_done and made == planned):
        raise SetupError(
            f"{checkpoint.parent} holds a run that has made {made} steps, and {planned} are asked for; "
            "raise --max-steps or --epochs to go on"
        )
    return made < planned and not stalled


def has_stalled(log: Sequence[Mapping[str, float]], patience: int) -> bool:
    """Whether the last validation of Trainer's log was made `patience` steps or more behind the best; 0 is never."""
    losses = [(line["eval_loss"], line["step"]) for line in log if "eval_loss" in line]
    _, best_step = min((one for one in losses if one[0] < math.inf), default=(0, 0))
    return bool(patience and losses) and losses[-1][1] - best_step >= patience


# --- Checkpoints in it. ----------------------------------------------------------------------------------------------


def complete_checkpoints(output: Path) -> list[Path]:
    """List the whole checkpoints of a run, by step."""
    return sorted((path for path in folders(output) if read_state(path) is not None), key=step_of)


def remove_torn(output: Path) -> list[Path]:
    """Delete what a killed run left of checkpoints it was writing; returns their paths."""
    torn = [path for path in folders(output) if read_state(path) is None]
    for path in torn:
        shutil.rmtree(path, ignore_errors=True)
    return torn


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def folders(output: Path) -> list[Path]:
    """List what is named as a checkpoint is, whole or not, by whichever program."""
    found = output.glob(f"{_PREFIX}*")
    return [path for path in found if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir()]


def mark_complete(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the state that goes with a checkpoint, which makes it one."""
    share_files(checkpoint)
    write_json(checkpoint / STATE_FILE, {**state, "step": step_of(checkpoint)})


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """Read what `mark_complete` wrote; None for a torn checkpoint."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return state if isinstance(state, dict) and state.get("step") == step_of(checkpoint) else None


def delete_old(output: Path, keep: int, best: str | None) -> None:
    """Leave the latest `keep` checkpoints and the best one."""
    kept = Path(best).name if best else None
    for path in complete_checkpoints(output)[:-keep]:
        if path.name != kept:
            (path / STATE_FILE).unlink(missing_ok=True)  # first: what is half deleted is no checkpoint
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _with_files(what: str, then: Callable[[], str]) -> Iterator[None]:
    """A block whose errors of files say `what` is wrong, the reason, and what comes `then`."""
    try:
        yield
    except Exception as error:
        if not _is_of_files(error):
            raise
        raise CheckpointError(f"{what}: {_reason(error)}{then()}") from error


def writing(checkpoint: Path) -> AbstractContextManager[None]:
    """Remove what the block wrote of a checkpoint if it cannot write all; the error names the last good one."""

    def then() -> str:
        shutil.rmtree(checkpoint, ignore_errors=True)
        return _left(checkpoint.parent, "make room") or "; there is no other"

    return _with_files(f"checkpoint {checkpoint} cannot be written", then)


def reading(checkpoint: Path) -> AbstractContextManager[None]:
    """Say of a checkpoint that the block cannot read what to go on from instead."""

    def then() -> str:
        others = [path.name for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
        return f"; delete that folder, and --resume goes on from {others[-1]}" if others else "; there is no other"

    return _with_files(f"checkpoint {checkpoint} cannot be read", then)


def replace_files(output: Path, write: Callable[[Path], object], is_writer: bool = True) -> None:
    """Let `write` fill a temporary folder inside `output`, then move its files into `output`, or leave all as it was.

    Processes that are no writers only take part in gathering what is written.
    """
    if not is_writer:
        write(output)
        return

    def then() -> str:
        left = complete_checkpoints(output)
        return f"; {left[-1].name} in it is an adapter too" if left else ""

    with (
        _with_files(f"the adapter cannot be written to {output}", then),
        tempfile.TemporaryDirectory(prefix=PART, dir=output, ignore_cleanup_errors=True) as folder,
    ):
        temporary = Path(folder)
        write(temporary)
        share_files(temporary)
        # adapter_config.json last: without it the folder is no adapter.
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json"):
            if path.is_dir():  # some processors have one
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)


def _is_of_files(error: Exception) -> bool:
    """Whether it comes from reading or writing files; torch and safetensors have their own kinds for that."""
    if isinstance(error, (OSError, EOFError, json.JSONDecodeError)):
        return True
    if type(error).__name__ in ("SafetensorError", "UnpicklingError"):
        return True
    marks = ("PytorchStream", "inline_container", "unexpected pos", "safetensors")
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in marks)


def _reason(error: BaseException) -> str:
    cause: BaseException | None = error
    while cause is not None:  # torch raises its own error on top of the system's
        if isinstance(cause, OSError) and cause.strerror:
            return cause.strerror + (f" ({cause.filename})" if cause.filename else "")
        cause = cause.__context__
    text = str(error).strip()
    if "unexpected pos" in text or "PytorchStreamWriter" in text:
        return "a file could not be written whole (is the disk full?)"
    return text.splitlines()[0].partition(". ")[0] if text else type(error).__name__


# --- Failures. -------------------------------------------------------------------------------------------------------


@contextmanager
def explain_failures(config: TrainConfig) -> Iterator[None]:
    """Turn what ends a training from outside into an error of one line: what happened, what is left, what to do."""
    try:
        yield
    except DataError as error:  # raised anew, as from a loader's worker it comes out of torch
        raise DataError(f"{error}{_left(config.output)}", error.bad) from error
    except torch.OutOfMemoryError as error:
        raise SetupError(_too_large(config)) from error
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise CheckpointError(
            "training stopped: one of the --workers was killed, as for want of memory or of shared memory (/dev/shm); "
            f"give fewer{_left(config.output)}"
        ) from error
    except OSError as error:
        # A loader's worker's error has its traceback for a message.
        reason = error.strerror or str(error).strip().rpartition("\n")[2]
        reason += f" ({error.filename})" if error.filename else ""
        raise CheckpointError(f"training stopped: {reason}{_left(config.output)}") from error


def _left(output: Path, first: str = "mend that") -> str:
    """What a run can go on from, once the user has done something; empty if there is no checkpoint."""
    whole = complete_checkpoints(output)
    return f"; {whole[-1].name} is whole: {first}, and go on from it with --resume" if whole else ""


def _too_large(config: TrainConfig) -> str:
    whole = complete_checkpoints(config.output)
    left = f"; {whole[-1].name} is whole" if whole else ""
    spare = ""
    if not config.gradient_checkpointing:
        spare = "--gradient-checkpointing, or "
        left += ", and --resume goes on from it with --gradient-checkpointing" if whole else ""
    return (
        f"the GPU's memory does not hold a batch of {config.batch_size} samples; give {spare}a smaller "
        f"--batch-size and as much more --accumulation{left}"
    )
