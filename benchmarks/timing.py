"""Time of device work, with cold caches: a graph of many calls over rotated inputs, total over count; on a CPU medians.

One call of a GPU kernel takes microseconds, less than its launch from Python and less than a timer resolves. So calls
are captured into a CUDA graph, which is replayed between two events. Each call reads another set of inputs and writes
other outputs, so that what it touches is no longer in the L2 cache when its turn comes again.
"""

from __future__ import annotations

import collections
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from attanchor_kernels.backends import workspace

Call = Callable[[], Any]
LEAST_CALLS = 20
CACHE_TURNS = 4  # rotated sets hold so many times the L2 cache
MOST_SETS = 64
HEAD_START = 400_000  # cycles, about 200 us
CAPTURED_WORDS = 2**23  # enough for every launch of one graph here
UNKNOWN_CACHE = 2**26  # bytes, where PyTorch does not say: more than most have


class Timing(NamedTuple):
    """Seconds of one call. `method`: "graph" (device time), "events" (eager on a GPU), "wall" (CPU)."""

    p50: float
    p10: float
    p90: float
    least: float
    method: str
    calls: int  # in one repeat
    repeats: int

    def describe(self) -> dict:
        """The part of a row that says how long it took, in microseconds."""
        figures = {"us": self.p50, "us_p10": self.p10, "us_p90": self.p90, "us_min": self.least}
        rounded = {name: round(seconds * 1e6, 3) for name, seconds in figures.items()}
        return {**rounded, "method": self.method, "calls": self.calls, "repeats": self.repeats}


def _summary(seconds: Sequence[float], method: str, calls: int) -> Timing:
    ordered = sorted(seconds)
    tenth = statistics.quantiles(ordered, n=10, method="inclusive") if len(ordered) > 1 else ordered * 9
    return Timing(statistics.median(ordered), tenth[0], tenth[-1], ordered[0], method, calls, len(ordered))


def rotation(bytes_per_call: int, device: torch.device) -> int:
    """How many input sets make every call meet a cold L2 cache; 2 on a CPU, whose cache tests do not depend on."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", UNKNOWN_CACHE)
    return max(2, min(MOST_SETS, -(-CACHE_TURNS * cache // max(bytes_per_call, 1)) + 1))


def measure(calls: Sequence[Call], device: torch.device, *, repeats: int = 15, budget: float = 1.0) -> Timing:
    """Median time of one call. `calls` do the same work on different tensors; about `budget` seconds in all."""
    if device.type == "cuda":
        return graph_timing(calls, repeats=repeats, budget=budget)
    return wall_timing(calls, repeats=repeats, budget=budget)


def measure_long(call: Call, device: torch.device, *, repeats: int = 7, budget: float = 2.0) -> Timing:
    """Median time of a call of milliseconds or more, such as a model's: one call in a graph, eager if it cannot be."""
    if device.type != "cuda":
        return wall_timing([call], repeats=repeats, budget=budget)
    reason = _why_no_graph(call)
    if reason is None:
        try:
            return graph_timing([call], repeats=repeats, budget=budget, least_calls=1)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            torch.cuda.synchronize()
    print(f"cannot be captured, timed with its launches: {reason}", flush=True)
    return event_timing([call], repeats=repeats, budget=budget, least_calls=1)


def _why_no_graph(call: Call) -> str | None:
    """Whether a call waits for the device, found out beforehand: a capture that fails leaves PyTorch in disorder."""
    call()  # what it makes at its first run may wait
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def wall_timing(calls: Sequence[Call], *, repeats: int, budget: float) -> Timing:
    """Each call by itself on the CPU's clock."""
    calls[0]()
    seconds: list[float] = []
    end = time.perf_counter() + budget
    while len(seconds) < 3 or (len(seconds) < repeats and time.perf_counter() < end):
        call = calls[len(seconds) % len(calls)]
        begin = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - begin)
    return _summary(seconds, "wall", 1)


def graph_timing(calls: Sequence[Call], *, repeats: int, budget: float, least_calls: int = LEAST_CALLS) -> Timing:
    """Device time: total of one graph replay over the number of its calls."""
    count = max(least_calls, len(calls))
    graph, kept = _capture(calls, count)
    graph.replay()
    torch.cuda.synchronize()
    once = _elapsed(graph.replay)
    times = max(3, min(repeats, int(budget / max(once, 1e-6))))
    seconds = [_elapsed(graph.replay) / count for _ in range(times)]
    del graph, kept
    return _summary(seconds, "graph", count)


def event_timing(
    calls: Sequence[Call], *, repeats: int = 15, budget: float = 1.0, least_calls: int = LEAST_CALLS
) -> Timing:
    """Eager calls one after the other on a GPU, launches included: what a caller without a graph waits for."""
    count = max(least_calls, len(calls))

    def run() -> None:
        for index in range(count):
            calls[index % len(calls)]()

    run()
    torch.cuda.synchronize()
    once = _elapsed(run)
    times = max(3, min(repeats, int(budget / max(once, 1e-6))))
    return _summary([_elapsed(run) / count for _ in range(times)], "events", count)


def _elapsed(run: Call) -> float:
    """Seconds on the device between two events around `run`.

    The device is kept busy first, so that what is to be timed is queued when its turn comes: on an idle device the time
    that a launch takes on the host would count.
    """
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(HEAD_START)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def _capture(calls: Sequence[Call], count: int) -> tuple[torch.cuda.CUDAGraph, collections.deque]:
    """A graph of `count` calls that keeps as many outputs apart as there are input sets."""
    _forget_captures(CAPTURED_WORDS)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    kept: collections.deque = collections.deque(maxlen=len(calls))
    with torch.cuda.graph(graph, stream=stream):
        for index in range(count):
            kept.append(calls[index % len(calls)]())
    return graph, kept


def _forget_captures(words: int | None = None) -> None:
    """Have the backends make anew what they keep for captured launches, of `words` words or of their own choice.

    They keep a fixed amount, since nothing tells them when a graph is gone; beyond it a graph zeroes memory of its own
    at each replay. A program with a few graphs would never see that, and here it would be measured. No graph of this
    module outlives its measurement.
    """
    workspace.forget_captures(words)


def peak_beside_outputs(call: Call, device: torch.device) -> int | None:
    """Bytes that a call takes beside its outputs, what it keeps for later calls included; None on a CPU."""
    if device.type != "cuda":
        return None
    _forget_captures()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    # On a stream of its own, for which a backend has kept nothing yet.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        outputs = call()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated(device)
    unique = {field.untyped_storage().data_ptr(): field.untyped_storage().nbytes() for field in outputs}
    return peak - before - sum(unique.values())
