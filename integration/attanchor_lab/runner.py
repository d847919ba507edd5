"""Run a plan: write it down, do what is missing on several processes, keep every row, go on after a kill."""

from __future__ import annotations

import concurrent.futures
import json
import multiprocessing
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from attanchor_vlm.records import append_row, read_rows, write_json

from attanchor_lab import jobs
from attanchor_lab import lab_rows as rows
from attanchor_lab.jobs import Job
from attanchor_lab.synthetic.plan import Plan

PLAN, ROWS, CHECKPOINTS = "plan.json", "rows.jsonl", "checkpoints"


def run(
    plan: Plan, folder: Path, device: str, say: Callable[[str], None] = print, progress: bool = True
) -> list[rows.Row]:
    """Do what of `plan` is not yet in `folder`.

    Leaves plan.json (before the first run), rows.jsonl and, after a kill, checkpoints.

    Returns:
        The folder's rows.

    Raises:
        ValueError: `folder` holds another plan, or something that is no laboratory's.
    """
    _open(plan, folder, device)
    file = folder / ROWS
    known = rows.latest(rows.read(file)) if file.exists() else {}
    wanted = all_jobs(plan, folder, device)
    done = {job.key for job in wanted if known.get(job.key, {}).get("status") == "done"}
    missing = [job for job in wanted if job.arm is not None and job.key not in done]
    needed = {(job.setting.start_key(), job.seed) for job in missing}
    # A start is done when its weights are there; its row alone is no use to the arms.
    todo = [
        job
        for job in wanted
        if (job.arm is None and (job.key[1], job.seed) in needed and not (job.key in done and job.checkpoint.exists()))
        or job in missing
    ]
    runs = sum(job.arm is not None for job in wanted)
    if len(missing) < runs:
        say(f"{runs - len(missing)} of {runs} runs are there already")
    begun = time.monotonic()
    if todo:
        _work(plan, todo, file, begun, say, progress)
    found = rows.read(file) if file.exists() else []
    latest = rows.latest(found)
    left = [job for job in wanted if job.arm is not None and latest.get(job.key, {}).get("status") != "done"]
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)  # large, and made again where a run still needs them
    failed = sum(job.key in latest for job in left)
    say(
        f"{runs - len(left)} of {runs} runs done"
        + (f", {failed} failed" if failed else "")
        + (f", {len(left) - failed} not started" if len(left) > failed else "")
        + f", {time.monotonic() - begun:.0f} s"
    )
    return found


def all_jobs(plan: Plan, folder: Path, device: str) -> list[Job]:
    """In the order in which they should be done: a seed's weights before its arms."""
    found: dict[tuple[str, str, str, int], Job] = {}
    for setting in plan.settings:
        for arm, seed in setting.runs():
            for job in (Job(setting, seed, None, folder, device), Job(setting, seed, arm, folder, device)):
                found.setdefault(job.key, job)
    return list(found.values())


def _open(plan: Plan, folder: Path, device: str) -> None:
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output {folder} is a file; it should be a folder, or not exist")
    known = {PLAN, ROWS, CHECKPOINTS}
    there = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if PLAN not in there and there & known:
        raise ValueError(f"output {folder} holds {sorted(there & known)[0]} but no {PLAN}; take another folder")
    if PLAN in there:
        before = json.loads((folder / PLAN).read_text(encoding="utf-8"))
        # How many processes do the work, and for how long, is no part of what is found out.
        same = all(before.get(name) == plan.to_dict()[name] for name in ("size", "settings", "contrasts"))
        if not same or before.get("device") != device:
            raise ValueError(
                f"output {folder} holds the plan of another laboratory (size {before.get('size')!r} on "
                f"{before.get('device')!r}); take another folder, or go on with the code that began it"
            )
    else:
        folder.mkdir(parents=True, exist_ok=True)
        before = {"kind": "plan", "written": rows.now(), **plan.to_dict(), **rows.environment(device)}
        write_json(folder / PLAN, before)
    if not read_rows(folder / ROWS):
        append_row(folder / ROWS, before)


def _work(plan: Plan, todo: list[Job], file: Path, begun: float, say: Callable[[str], None], progress: bool) -> None:
    from tqdm import tqdm

    waiting = list(todo)
    finished: set[tuple[str, str, str, int]] = {job.key for job in _starts_not_in(todo)}
    broken: set[tuple[str, str, str, int]] = set()
    running: dict[Future[dict[str, Any]], Job] = {}
    end = begun + 60 * plan.minutes if plan.minutes is not None else float("inf")
    bar = tqdm(total=len(todo), disable=not progress, unit="job", smoothing=0.1, dynamic_ncols=True)
    pool = _pool(plan)

    def keep(job: Job, row: rows.Row) -> None:
        append_row(file, row)
        if row["status"] == "failed":
            broken.add(job.key)
            say(f"failed: {job.name}: {row['error']}")
        finished.add(job.key)
        bar.set_postfix_str(job.name)
        bar.update()

    try:
        while waiting or running:
            for job in list(_ready(waiting, finished)):
                if len(running) >= plan.workers:
                    break
                waiting.remove(job)
                start = ("start", job.setting.start_key(), "", job.seed)
                if job.arm is not None and start in broken:
                    keep(job, _failed(job, "the weights that it starts from could not be made"))
                elif time.monotonic() < end:
                    running[pool.submit(jobs.run, job)] = job
                else:
                    bar.update()
            if not running:
                if not any(_ready(waiting, finished)):
                    break  # what is left waits for weights that no time was left for
                continue
            ended, _ = concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)
            for future in ended:
                job = running.pop(future)
                try:
                    keep(job, future.result())
                except BrokenProcessPool:
                    # The process was killed, with it the pool. What else was running is done again.
                    keep(job, _failed(job, "its process was killed (out of memory?)"))
                    waiting[:0] = running.values()
                    running.clear()
                    pool.shutdown(wait=False, cancel_futures=True)
                    pool = _pool(plan)
                    break
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)


def _pool(plan: Plan) -> ProcessPoolExecutor:
    # Spawned: a forked process has no use of a GPU, and of half-held locks.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(plan.workers, mp_context=context, initializer=jobs.set_up)


def _starts_not_in(todo: list[Job]) -> Iterator[Job]:
    """The starts of runs whose weights are there already."""
    ours = {job.key for job in todo}
    for job in todo:
        start = Job(job.setting, job.seed, None, job.folder, job.device)
        if start.key not in ours:
            yield start


def _ready(waiting: list[Job], finished: set[tuple[str, str, str, int]]) -> Iterator[Job]:
    """Jobs that could be started: starts, and runs whose start is there."""
    for job in waiting:
        if job.arm is None or ("start", job.setting.start_key(), "", job.seed) in finished:
            yield job


def _failed(job: Job, error: str) -> rows.Row:
    row: rows.Row = {"kind": job.key[0], "setting": job.key[1], "seed": job.seed}
    if job.arm is not None:
        row["arm"] = job.arm
    return {
        **row, "status": "failed", "started": rows.now(), "error": error,
        "settings": job.setting.to_dict(), **rows.environment(job.device),
    }  # fmt: skip
