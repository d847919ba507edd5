"""Processes of their own for tests that need them: killed ones, and two that train together; limits of this one.

A fork server imports torch and transformers once; what it forks starts at once. Nothing here runs at import.
"""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

LIMIT = 300  # seconds, for what takes ten on a quiet core


def context():
    found = multiprocessing.get_context("forkserver")
    found.set_forkserver_preload(
        ["transformers", "peft", "attanchor_vlm.training.run", "attanchor_vlm.training.trainer", "forked"]
    )
    return found


def start(work: Callable[..., Any], *arguments: Any, rank: int = 0, world: int = 1, port: int = 0):
    process = context().Process(target=_in_process, args=(work, arguments, rank, world, port))
    process.start()
    return process


def finish(process) -> int | None:
    """Wait for a process and return its exit code, None for one that had to be killed: it hung."""
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        process.join()
        return None
    return process.exitcode


@contextmanager
def time_limit() -> Iterator[None]:
    """A block that ends with an error if it takes too long."""

    def end(number, frame):
        raise TimeoutError(f"not done in {LIMIT} s")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(LIMIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def together(work: Callable[..., Any], *arguments: Any) -> list[int]:
    """Run `work` in two processes that find each other as those of torchrun do; returns their exit codes.

    When one fails or time is up, the other, which may wait for it, is killed.
    """
    from torch.distributed import TCPStore

    # As torchrun's agent does, this process holds the store, so that its port is taken from the start.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes = [start(work, *arguments, rank=rank, world=2, port=store.port) for rank in range(2)]
    try:
        with time_limit():
            running = list(processes)
            while running and not any(process.exitcode for process in processes):
                wait([process.sentinel for process in running])
                running = [process for process in running if process.exitcode is None]
    finally:
        for process in processes:
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Every file of this process ends at `size` bytes, as on a disk that is full then."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


_HOLD = """
import os, sys, time
from pathlib import Path
from attanchor_vlm.records import alone_in
with alone_in(Path(sys.argv[1]), sys.argv[2]):
    begun, say = os.pipe()
    if not os.fork():
        os.write(say, b"begun")
        time.sleep(10)  # as a DataLoader's worker it outlives a kill for a while
        os._exit(0)
    os.read(begun, 5)
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held(folder: Path, name: str = "") -> Iterator[int]:
    """Another process holds an output while the block runs, and is killed at its end; gives its id."""
    import attanchor_vlm

    command = [sys.executable, "-c", _HOLD, str(folder), name]
    path = {**os.environ, "PYTHONPATH": str(Path(attanchor_vlm.__file__).parents[1])}
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=path, text=True) as process:
        assert process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()
            process.wait()


def _in_process(work: Callable[..., Any], arguments: tuple, rank: int, world: int, port: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    try:
        work(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
