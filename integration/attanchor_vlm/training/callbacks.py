"""What happens beside training: progress and log lines, when to validate, save and stop, Ctrl-C."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback

from attanchor_vlm import distributed
from attanchor_vlm.records import write_text
from attanchor_vlm.training.checkpoints import has_stalled

LOG_FILE = "log.jsonl"


class Progress(ProgressCallback):
    """One bar with the latest figures beside it, instead of a printed line per logged step."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is None or not logs:
            return
        shown = {"loss": "loss", "eval_loss": "val", "inserted_share": "inserted", "anchor_score": "score"}
        self._figures = {**getattr(self, "_figures", {}), **{shown[k]: v for k, v in logs.items() if k in shown}}
        self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self._figures.items()}, refresh=False)


class LogFile(TrainerCallback):
    """Appends every log line to `log.jsonl`; a resumed run first drops the lines behind its checkpoint."""

    def __init__(self, folder: Path):
        self.path = folder / LOG_FILE

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        write_text(self.path, "".join(json.dumps(line) + "\n" for line in state.log_history))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or not state.log_history:
            return
        size = self.path.stat().st_size
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, size)  # no half lines
            raise


class StopOnPlateau(TrainerCallback):
    """Ends the run when validation loss has not improved for `patience` optimiser steps, the paper's unit.

    Reads the history that checkpoints keep, so that a resumed run goes on counting.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.stopped_at: int | None = None

    def on_evaluate(self, args, state, control, **kwargs):
        if has_stalled(state.log_history, self.patience):
            self.stopped_at = state.global_step
            control.should_training_stop = True

    on_train_begin = on_evaluate  # resumed behind the validation that ended the run


class SaveOften(TrainerCallback):
    """Saves every so many steps besides, so that a kill loses no more; validates and saves behind the last step too."""

    def __init__(self, steps: int | None, validate: bool):
        self.steps, self.validate = steps, validate

    def on_step_end(self, args, state, control, **kwargs):
        is_last = state.global_step >= state.max_steps
        if is_last or (self.steps is not None and state.global_step % self.steps == 0):
            control.should_save = True
        if is_last:
            control.should_evaluate = self.validate


class SameOrderOnResume(TrainerCallback):
    """Tells the sampler which epoch it is. In a resumed run of several processes Trainer does not reach it behind
    accelerate's wrappers, and the order would begin again with that of the first epoch."""

    def on_epoch_begin(self, args, state, control, train_dataloader=None, **kwargs):
        inner = getattr(train_dataloader, "batch_sampler", None)
        while inner is not None:
            set_epoch = getattr(getattr(inner, "sampler", None), "set_epoch", None)
            if set_epoch is not None:
                set_epoch(int(state.epoch or 0))
            inner = getattr(inner, "batch_sampler", None)


class KeepOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the current step with a checkpoint; a second one ends it at once.

    SIGTERM does as the first Ctrl-C does: torchrun and batch systems announce an end with it, and then wait. If any
    process is told to stop, all stop after the same step.
    """

    def __init__(self) -> None:
        self.interrupted = False
        self._told = False
        self._before: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        with contextlib.suppress(ValueError):  # not in the main thread, which alone gets signals
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)

    def _note(self, number, frame) -> None:
        if not self._told and distributed.is_main():
            again = " (Ctrl-C again to stop at once)" if number == signal.SIGINT else ""
            tqdm.write(f"interrupted: saving a checkpoint after this step{again}")
        self._told = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **kwargs):
        self.interrupted = distributed.any_of(self._told)
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
