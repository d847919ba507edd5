"""transformers' Trainer with anchors: their share and score in every log line, and a run that loses nothing."""

from __future__ import annotations

import contextlib
import json
import math
import signal
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attanchor_vlm.files import write_atomically
from attanchor_vlm.mixin import base_of
from attanchor_vlm.settings import save_settings

LOG_FILE = "log.jsonl"


class AnchorTrainer(Trainer):
    """Logs what was inserted since the last line: a threshold is fixed while the projector trains, so both may drift.

    `inserted_share` is inserted anchors over the text tokens that take part (image-into-text: it may exceed 1), and
    `anchor_score` the mean cosine of the inserted, left out where there are none.

    Raises:
        ValueError: label smoothing is asked for: Trainer would take the labels away before the model lengthens them.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}; it should be 0: the inserted anchors "
                "lengthen the labels inside the model, and Trainer's label smoothing keeps the short ones"
            )
        self._counts: torch.Tensor | None = (
            None  # inserted, taking part, sum of scores; on the device, read when logged
        )

    def compute_loss(self, model, inputs, *args, **kwargs):
        result = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            counts = anchor_counts(self.accelerator.unwrap_model(model), inputs)
            self._counts = counts if self._counts is None else self._counts + counts
        return result

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._counts is not None:
            counts = self.accelerator.reduce(self._counts)
            inserted, candidates, score = counts.tolist()
            logs["inserted_share"] = inserted / candidates if candidates else 0.0
            if inserted:
                logs["anchor_score"] = score / inserted
            self._counts = None
        super().log(logs, *args, **kwargs)


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
        kept = "".join(json.dumps(line) + "\n" for line in state.log_history)
        write_atomically(self.path, lambda path: path.write_text(kept, encoding="utf-8"))

    def on_log(self, args, state, control, logs=None, **kwargs):
        if state.is_world_process_zero and state.log_history:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


class StopOnPlateau(TrainerCallback):
    """Ends the run when validation loss has not improved for `patience` optimiser steps, the paper's unit.

    Reads the history that checkpoints keep, so that a resumed run goes on counting.
    """

    def __init__(self, patience: int):
        self.patience = patience
        self.stopped_at: int | None = None

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        best, best_step = math.inf, 0
        for line in state.log_history:
            if line.get("eval_loss", math.inf) < best:
                best, best_step = line["eval_loss"], line["step"]
        if state.global_step - best_step >= self.patience:
            self.stopped_at = state.global_step
            control.should_training_stop = True


class EvaluateLastStep(TrainerCallback):
    """Validates and saves at the end also where the number of steps is no multiple of the interval."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step >= state.max_steps:
            control.should_evaluate = control.should_save = True


class SettingsBesideCheckpoints(TrainerCallback):
    """Every checkpoint is an adapter that can be loaded, so each gets its AttAnchor settings."""

    def on_save(self, args, state, control, model=None, **kwargs):
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            save_settings(model, folder)


class KeepOnInterrupt(TrainerCallback):
    """The first Ctrl-C ends the run after the current step with a checkpoint; a second one ends it at once."""

    def __init__(self) -> None:
        self.interrupted = False
        self._before: Any = None

    def on_train_begin(self, args, state, control, **kwargs):
        with contextlib.suppress(ValueError):  # not in the main thread, which alone gets signals
            self._before = signal.signal(signal.SIGINT, self._note)

    def _note(self, number, frame) -> None:
        self.interrupted = True
        tqdm.write("interrupted: saving a checkpoint after this step (Ctrl-C again to stop at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_step_end(self, args, state, control, **kwargs):
        if self.interrupted:
            control.should_save = True
            control.should_training_stop = True

    def restore(self) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)


def anchor_counts(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """(3,) of the last call, on the device and without a sync: inserted, text tokens taking part, sum of the inserted
    ones' scores."""
    mask = inputs.get("anchor_mask")
    candidates = torch.zeros(()) if mask is None else mask.sum()
    attached: Any = base_of(model)
    plan = attached.attanchor_plan
    if plan is None:
        return torch.stack([torch.zeros_like(candidates), candidates, torch.zeros_like(candidates)]).float()
    inserted = plan.host >= 0
    score = plan.score.masked_fill(~inserted, 0).sum()
    return torch.stack([inserted.sum().float(), candidates.to(score.device).float(), score.float()])
