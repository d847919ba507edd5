"""Run a plan of the laboratory: write it down, do what is missing, keep every row, failures too.

The arms of a seed start from the same weights, which are a job of their own.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from attanchor_lab import runner
from attanchor_lab.runner import ROWS, Job, Rows, now
from attanchor_lab.synthetic import measure, training
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.synthetic.plan import Condition, LabPlan
from attanchor_vlm.cli.options import quiet
from attanchor_vlm.errors import SetupError
from attanchor_vlm.provenance import environment
from attanchor_vlm.records import Row, alone_in, write_atomically, write_json

PLAN, CHECKPOINTS = "plan.json", "checkpoints"
Key = tuple[str, str, str, int]  # kind of the row, setting (of a start: its key), arm, seed


def run(
    plan: LabPlan, folder: Path, device: str, say: Callable[[str], None] = print, progress: bool = True
) -> list[Row]:
    """Do what of `plan` is not yet in `folder`.

    Leaves plan.json (before the first run), rows.jsonl and, after a kill, checkpoints.

    Returns:
        The folder's rows.

    Raises:
        ValueError: `folder` holds another plan, or something that is no laboratory's, or is in use; and when all is
            done that could be, that a run failed.
    """
    with alone_in(folder):
        rows = _open(plan, folder, device)
        begun = time.monotonic()
        known = latest(rows.rows)
        jobs = _jobs(plan, folder, device)
        arms = [job for job in jobs if job.after is not None]
        missing = [job for job in arms if known.get(job.key, {}).get("status") != "done"]
        needed = {job.after for job in missing}
        # A start is done when its weights are there; its row alone is no use to the arms.
        todo = [job for job in jobs if job in missing or (job.key in needed and not _weights(folder, job.key).exists())]
        if len(missing) < len(arms):
            say(f"{len(arms) - len(missing)} of {len(arms)} runs are there already")
        if todo:
            end = begun + 60 * plan.minutes if plan.minutes is not None else float("inf")
            runner.run(todo, lambda job, row: rows.add(row), plan.workers, end, say, progress)
        shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # large, and made again where a run still needs them
    states = [latest(rows.rows).get(job.key, {}).get("status", "not started") for job in arms]
    counts = [f"{states.count(state)} {state}" for state in ("failed", "not started") if state in states]
    summary = ", ".join([f"{states.count('done')} of {len(arms)} runs done", *counts])
    say(f"{summary}, {time.monotonic() - begun:.0f} s")
    if "failed" in states:
        raise SetupError(f"{summary}; {folder / ROWS} says why, and the same command tries them again")
    return rows.rows


def read(path: Path) -> list[Row]:
    """The rows of a file, or of the rows.jsonl in a folder; a last line that a kill cut short is left out.

    Raises:
        ValueError: the file is missing, or a line is no row of the laboratory, naming file and line.
    """
    file = path / ROWS if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{file} is no file; it should be the rows.jsonl that `attanchor lab` wrote")
    found = runner.read_rows(file)
    for number, row in enumerate(found, 1):
        if row.get("kind") not in ("plan", "start", "run"):
            raise ValueError(f"{file}, row {number} is no row of the laboratory")
    return found


def latest(rows: Iterable[Row]) -> dict[Any, Row]:
    """The last row of every job: one that failed may have been repeated."""
    return {
        (row["kind"], row["setting"], row.get("arm", ""), row["seed"]): row for row in rows if row["kind"] != "plan"
    }


def _open(plan: LabPlan, folder: Path, device: str) -> Rows:
    there = {path.name for path in folder.iterdir()}
    if PLAN not in there and (strange := there & {ROWS, CHECKPOINTS}):
        raise SetupError(f"output {folder} holds {min(strange)} but no {PLAN}; take another folder")
    if PLAN in there:
        before = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        # How many processes do the work, and for how long, is no part of what is found out.
        same = all(before.get(name) == plan.to_dict()[name] for name in ("size", "settings", "contrasts"))
        if not same or before.get("device") != device:
            raise SetupError(
                f"output {folder} holds the plan of another laboratory (size {before.get('size')!r} on "
                f"{before.get('device')!r}); take another folder, or go on with the code that began it"
            )
    else:
        before = {"kind": "plan", "written": now(), **plan.to_dict(), **environment(device, "docs")}
        write_json(folder / PLAN, before)
    rows = Rows(folder, ("kind",), "the laboratory")
    if not rows.rows:
        rows.add(before)
    return rows


def _jobs(plan: LabPlan, folder: Path, device: str) -> list[Job]:
    """In the order in which they should be done: a seed's weights before its arms."""
    found: dict[Key, Job] = {}
    for condition in plan.settings:
        for arm, seed in condition.runs():
            start: Key = ("start", condition.start_key(), "", seed)
            own: Key = ("run", condition.name, arm, seed)
            for key, name, after in ((start, "weights before stage 2", None), (own, arm, start)):
                about = functools.partial(_row, key, condition, device)
                work = functools.partial(_do, key, condition, device, _weights(folder, start))
                found.setdefault(key, Job(key, f"{condition.name}, seed {seed}: {name}", work, about, after))
    return list(found.values())


def _weights(folder: Path, key: Any) -> Path:
    return folder / CHECKPOINTS / f"{key[1]}-{key[3]}.pt"


def _row(key: Key, condition: Condition, device: str, error: str = "", **measured: Any) -> Row:
    kind, setting, arm, seed = key
    return {
        "kind": kind,
        "setting": setting,
        "seed": seed,
        **({"arm": arm} if arm else {}),
        "status": "failed" if error else "done",
        "started": now(),
        **({"error": error} if error else {}),
        **measured,
        "settings": condition.to_dict(),
        **environment(device, "docs"),
    }


def _do(key: Key, condition: Condition, device: str, weights: Path) -> Row:
    """One job, in whatever process; a failure is a row too."""
    _set_up()
    measured: Row = {"started": now(), "load_before": _load_average()}
    begun, cpu = time.perf_counter(), time.process_time()
    error = ""
    try:
        measured |= (
            _start(condition, key[3], device, weights)
            if key[0] == "start"
            else _arm(condition, key[2], key[3], device, weights)
        )
    except Exception as found:
        error = f"{type(found).__name__}: {found}"
        measured["traceback"] = traceback.format_exc()
    measured["seconds"] = round(time.perf_counter() - begun, 2)
    measured["cpu_seconds"] = round(time.process_time() - cpu, 2)
    measured["load_after"] = _load_average()
    return _row(key, condition, device, error, **measured)


def _set_up() -> None:
    """A model this small is fastest on one thread, with a process on every core."""
    torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = True
    quiet()


def _start(condition: Condition, seed: int, device: str, weights: Path) -> Row:
    state, measured = training.stage1(condition, seed, device)
    write_atomically(weights, lambda path: torch.save(state, path))
    return measured


def _arm(condition: Condition, arm: str, seed: int, device: str, weights: Path) -> Row:
    state = torch.load(weights, map_location="cpu", weights_only=True)
    begun = time.perf_counter()
    asker, log = training.stage2(condition, ARMS[arm], seed, state, device)
    trained = time.perf_counter() - begun
    pictures = seed == condition.seeds[0] and ARMS[arm].copies in ("none", "matched", "true")
    measures = measure.measure(condition, asker, seed, device, pictures)
    return {"train_seconds": round(trained, 2), "training": log, **measures}


def _load_average() -> float | None:
    """Processes that wanted a core over the last minute, or None where the system does not say."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
