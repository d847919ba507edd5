"""One job of a plan, as a worker process runs it: the weights before stage 2 of a seed, or one arm from them."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attanchor_lab.synthetic.plan import Setting


@dataclass(frozen=True)
class Job:
    """`arm` is None for the weights that the arms of a seed start from."""

    setting: Setting
    seed: int
    arm: str | None
    folder: Path
    device: str

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoints" / f"{self.setting.start_key()}-{self.seed}.pt"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """As `rows.key` gives it for the row of this job."""
        if self.arm is None:
            return "start", self.setting.start_key(), "", self.seed
        return "run", self.setting.name, self.arm, self.seed

    @property
    def name(self) -> str:
        return f"{self.setting.name}, seed {self.seed}: {self.arm or 'weights before stage 2'}"


def set_up() -> None:
    """Of every worker. A model this small is fastest on one thread, with a process on every core."""
    import torch
    from transformers.utils import logging

    _end_with_parent()
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    logging.set_verbosity_error()
    # What one library of Hugging Face says to another about its names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")


def _end_with_parent() -> threading.Thread | None:
    """A worker waits for its next job for ever, with all its memory, when the laboratory that started it is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return None

    def watch() -> None:
        parent.join()
        os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    return watcher


def run(job: Job) -> dict[str, Any]:
    """Do a job; a failure is a row too."""
    from attanchor_lab import lab_rows as rows

    started, begun, cpu = rows.now(), time.perf_counter(), time.process_time()
    row: dict[str, Any] = {"kind": job.key[0], "setting": job.key[1], "seed": job.seed}
    if job.arm is not None:
        row |= {"arm": job.arm}
    row |= {"status": "done", "started": started, "load_before": rows.load_average()}
    try:
        row |= _start(job) if job.arm is None else _run(job)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        row |= {"status": "failed", "error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
    row["seconds"] = round(time.perf_counter() - begun, 2)
    row["cpu_seconds"] = round(time.process_time() - cpu, 2)
    return {**row, "load_after": rows.load_average(), "settings": job.setting.to_dict(), **rows.environment(job.device)}


def _start(job: Job) -> dict[str, Any]:
    import torch
    from attanchor_vlm.records import write_atomically

    from attanchor_lab.synthetic import training

    state, measured = training.stage1(job.setting, job.seed, job.device)
    write_atomically(job.checkpoint, lambda path: torch.save(state, path))
    return measured


def _run(job: Job) -> dict[str, Any]:
    import torch

    from attanchor_lab.synthetic import measure, training
    from attanchor_lab.synthetic.arms import ARMS

    assert job.arm is not None
    state = torch.load(job.checkpoint, map_location="cpu", weights_only=True)
    begun = time.perf_counter()
    asker, log = training.stage2(job.setting, ARMS[job.arm], job.seed, state, job.device)
    trained = time.perf_counter() - begun
    pictures = job.seed == job.setting.seeds[0] and ARMS[job.arm].copies in ("none", "matched", "true")
    measures = measure.measure(job.setting, asker, job.seed, job.device, pictures)
    return {"train_seconds": round(trained, 2), "training": log, **measures}
