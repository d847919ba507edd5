"""What ends a training from outside, told in one line: what happened, what is left of the run, what to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from attanchor_vlm.errors import CheckpointError, DataError, SetupError
from attanchor_vlm.training.checkpoints import complete_checkpoints
from attanchor_vlm.training.config import TrainConfig


@contextmanager
def told_in_one_line(config: TrainConfig) -> Iterator[None]:
    """A block that trains.

    Raises:
        DataError: a row or an image can no longer be used.
        SetupError: the GPU's memory is too small.
        CheckpointError: a file cannot be written, or a process that loads data was killed.
    """
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


def _left(output: Path) -> str:
    whole = complete_checkpoints(output)
    return f"; {whole[-1].name} is whole: mend that, and go on from it with --resume" if whole else ""


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
