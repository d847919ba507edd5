"""Run jobs and keep a row of each: in this process or in several, going on after a kill.

Laboratory and paper studies run through here. A job leaves one row in rows.jsonl; what has its row is not run again.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import Row, append_row, read_rows

ROWS = "rows.jsonl"


@dataclass(frozen=True)
class Job:
    """What leaves one row.

    Attributes:
        key: No two jobs have the same.
        name: In messages.
        work: Returns the row; can be pickled where it is to run in another process.
        failed: The row of a job that could not be done, from the reason.
        after: The key of the job that has to be done before this one.
    """

    key: Hashable
    name: str
    work: Callable[[], Row]
    failed: Callable[[str], Row] | None = None
    after: Hashable = None


def run(
    jobs: Sequence[Job],
    keep: Callable[[Job, Row], object],
    workers: int = 0,
    end: float = float("inf"),
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> None:
    """Do `jobs` in their order, each behind the one that it comes after; a job that is not among them is done already.

    Args:
        keep: Gets every row as soon as it is there.
        workers: Processes side by side; 0 for this one, where an error of a job ends the run.
        end: No job is started after this time of `time.monotonic`.
    """
    from tqdm import tqdm

    waiting, running = list(jobs), dict[Future[Row], Job]()
    finished, broken = {job.after for job in jobs} - {job.key for job in jobs}, set[Hashable]()
    alone = set[Hashable]()  # jobs of a pool of which a process was killed
    bar = tqdm(total=len(jobs), disable=not (progress and workers), unit="job", smoothing=0.1, dynamic_ncols=True)
    pool = executor(workers)

    def store(job: Job, row: Row) -> None:
        keep(job, row)
        if row.get("status") == "failed":
            broken.add(job.key)
            say(f"failed: {job.name}: {row['error']}")
        finished.add(job.key)
        bar.set_postfix_str(job.name)
        bar.update()

    try:
        while waiting or running:
            for job in [job for job in waiting if job.after in finished]:
                beside = {other.key for other in running.values()}
                if len(beside) >= max(1, workers) or (beside and alone & {job.key, *beside}):
                    break
                waiting.remove(job)
                if job.after in broken and job.failed:
                    store(job, job.failed("what it starts from could not be made"))
                elif time.monotonic() < end:
                    running[pool.submit(job.work)] = job
                else:
                    bar.update()
            if not running:
                if not any(job.after in finished for job in waiting):
                    break  # what is left waits for a job that no time was left for
                continue
            for future in concurrent.futures.wait(running, return_when=concurrent.futures.FIRST_COMPLETED)[0]:
                job = running.pop(future)
                try:
                    store(job, future.result())
                except BrokenProcessPool:
                    # A process was killed, with it the pool. Whose it was is known of one job; several are done again.
                    if job.failed is None:
                        raise
                    if running:
                        waiting[:0] = again = [job, *running.values()]
                        alone.update(one.key for one in again)
                    else:
                        store(job, job.failed("its process was killed (out of memory?)"))
                    running.clear()
                    pool.shutdown(wait=False, cancel_futures=True)
                    pool = executor(workers)
                    break
    finally:
        bar.close()
        pool.shutdown(wait=False, cancel_futures=True)


class _Here(Executor):
    """Runs what it is given right away, in this process."""

    def submit(self, fn: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*arguments, **options))
        return future


def executor(workers: int) -> Executor:
    if not workers:
        return _Here()
    # Spawned: a forked process has no use of a GPU, and of half-held locks.
    return ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_end_with_parent)


def _end_with_parent() -> threading.Thread | None:
    """A worker waits for its next job for ever, with all its memory, when what started it is killed."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return None

    def watch() -> None:
        parent.join()
        os._exit(1)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    return watcher


class Rows:
    """The rows.jsonl of a folder.

    Args:
        needed: What every row has.
        name: Of what writes them, for errors.

    Raises:
        SetupError: the file holds something else.
    """

    def __init__(self, folder: Path, needed: Iterable[str], name: str) -> None:
        self.path = Path(folder) / ROWS
        self.rows = read_rows(self.path)
        for number, row in enumerate(self.rows, start=1):
            if not set(row) >= set(needed):
                raise SetupError(f"{self.path}, row {number} is no row of {name}; take another folder")

    def add(self, row: Row) -> None:
        """Append a row; when this returns, it is on disk."""
        append_row(self.path, row)
        self.rows.append(row)


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
