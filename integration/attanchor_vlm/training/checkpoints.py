"""Checkpoints that are whole or are none: what marks them, how they are told from torn ones, how errors are said."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import CheckpointError
from attanchor_vlm.records import write_json

# Written last, when every process has written its part: a checkpoint without it was cut short.
STATE_FILE = "attanchor_state.json"
_PREFIX = "checkpoint-"


def complete_checkpoints(output: Path) -> list[Path]:
    """The whole checkpoints of a run, by step."""
    return sorted((path for path in folders(output) if read_state(path) is not None), key=step_of)


def remove_torn(output: Path) -> list[Path]:
    """Delete what a killed run left of checkpoints it was writing; returns their paths."""
    torn = [path for path in folders(output) if read_state(path) is None]
    for path in [*torn, *output.glob(".adapter-*")]:
        shutil.rmtree(path, ignore_errors=True)
    return torn


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def folders(output: Path) -> list[Path]:
    """What is named as a checkpoint is, whole or not, by whichever program."""
    found = output.glob(f"{_PREFIX}*")
    return [path for path in found if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir()]


def mark_complete(checkpoint: Path, state: dict[str, Any]) -> None:
    """Write the state that goes with a checkpoint, which makes it one."""
    write_json(checkpoint / STATE_FILE, {**state, "step": step_of(checkpoint)})


def read_state(checkpoint: Path) -> dict[str, Any] | None:
    """What `mark_complete` wrote, or None."""
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
def writing(checkpoint: Path) -> Iterator[None]:
    """A block that writes a checkpoint: if it cannot, what it wrote is removed, and the error names the last good one.

    Raises:
        CheckpointError: the disk is full, say.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_files(error):
            raise
        shutil.rmtree(checkpoint, ignore_errors=True)
        left = complete_checkpoints(checkpoint.parent)
        after = f"{left[-1].name} is whole: make room, and go on from it with --resume" if left else "there is no other"
        raise CheckpointError(f"checkpoint {checkpoint} cannot be written: {_reason(error)}; {after}") from error


@contextmanager
def reading(checkpoint: Path) -> Iterator[None]:
    """A block that reads a checkpoint.

    Raises:
        CheckpointError: a file of it is damaged or cannot be read.
    """
    try:
        yield
    except Exception as error:
        if not _is_of_files(error):
            raise
        others = [path.name for path in complete_checkpoints(checkpoint.parent) if path != checkpoint]
        after = f"delete that folder, and --resume goes on from {others[-1]}" if others else "there is no other"
        raise CheckpointError(f"checkpoint {checkpoint} cannot be read: {_reason(error)}; {after}") from error


def replace_files(output: Path, write: Callable[[Path], object], is_writer: bool = True) -> None:
    """Let `write` fill a temporary folder inside `output`, then move its files into `output`, or leave all as it was.

    Args:
        is_writer: False for the processes that only take part in gathering what is written.

    Raises:
        CheckpointError: it cannot be written.
    """
    if not is_writer:
        write(output)
        return
    temporary = Path(tempfile.mkdtemp(prefix=".adapter-", dir=output))
    try:
        write(temporary)
        # adapter_config.json last: without it the folder is no adapter.
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "adapter_config.json"):
            if path.is_dir():  # some processors have one
                shutil.rmtree(output / path.name, ignore_errors=True)
            os.replace(path, output / path.name)
    except Exception as error:
        if not _is_of_files(error):
            raise
        left = complete_checkpoints(output)
        after = f"; {left[-1].name} in it is an adapter too" if left else ""
        raise CheckpointError(f"the adapter cannot be written to {output}: {_reason(error)}{after}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


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
