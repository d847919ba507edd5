"""Several processes under torchrun: what one of them does for all, and what all of them must agree on.

Everything here goes over a gloo group of its own: the processes may wait for an hour of checking images, and nothing
that is agreed on needs a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_control: Any = None  # the group; None in a run of one process


def world_size() -> int:
    """Processes of this run, on all machines."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """This process among them, from 0."""
    return int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    return rank() == 0


def on_cpu() -> bool:
    """Whether several processes train on the CPU: Trainer must be told, or each trains for itself."""
    device = torch.accelerator.current_accelerator()
    return world_size() > 1 and (device is None or device.type == "mps")


def can_shard() -> bool:
    """Whether FSDP2 works here: accelerate shards over accelerators alone."""
    return torch.cuda.is_available()


@contextmanager
def session() -> Iterator[None]:
    """A block in which the processes that torchrun started work together; without torchrun, nothing special."""
    global _control
    if world_size() == 1 or _control is not None:
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cuda:nccl,cpu:gloo")  # gloo for what accelerate gathers on the CPU
    elif on_cpu():
        dist.init_process_group("gloo")
    else:
        from accelerate import PartialState  # knows the other accelerators' ways

        PartialState()
    _control = dist.new_group(backend="gloo", timeout=timedelta(days=1))
    yield
    # After an error the others may be in the middle of something: torchrun ends them all.
    _control = None
    dist.destroy_process_group()


def on_main(work: Callable[[], T]) -> T:
    """Let the first process work, and give its result to all. If it fails, its error is raised there alone, and the
    others end without a word: one mistake is said once."""
    if _control is None:
        return work()
    result: list[Any] = [None, False]
    failed: Exception | None = None
    if is_main():
        try:
            result = [work(), False]
        except Exception as error:
            failed, result = error, [None, True]
    dist.broadcast_object_list(result, src=0, group=_control)
    if failed is not None:
        raise failed
    if result[1]:
        raise SystemExit(1)
    return result[0]


def gather(value: T) -> list[T]:
    """Every process's value, in the order of their ranks."""
    if _control is None:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value, group=_control)
    return values


def add_up(values: Tensor) -> Tensor:
    """The sum over all processes, on the CPU."""
    values = values.detach().to("cpu", copy=True)
    if _control is not None:
        dist.all_reduce(values, group=_control)
    return values


def any_of(flag: bool) -> bool:
    """Whether it is set in any process."""
    return bool(add_up(torch.tensor(int(flag))))


def wait_for_all() -> None:
    if _control is not None:
        dist.barrier(group=_control)
