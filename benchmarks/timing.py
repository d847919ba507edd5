"""Time of device work, with cold caches, and of two calls side by side.

One call of a GPU kernel takes microseconds, less than its launch from Python and less than a timer resolves. So calls
are captured into a CUDA graph, which is replayed between two events. Each call reads another set of inputs and writes
other outputs, so that what it touches is no longer in the L2 cache when its turn comes again.

What takes long, such as a model's forward, is compared by pairs: one call, then the other, in the other order next
time. A busy machine disturbs both alike, and the spread of the ratios says how much a difference is worth.
"""

from __future__ import annotations

import collections
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from attanchor_kernels.backends import workspace

Call = Callable[[], Any]
LEAST_CALLS = 20
CACHE_TURNS = 4  # rotated sets hold so many times the L2 cache
MOST_SETS = 64
HEAD_START = 400_000  # cycles, about 200 us
CAPTURED_WORDS = 2**23  # enough for every launch that is captured here at a time
UNKNOWN_CACHE = 2**26  # bytes, where PyTorch does not say: more than most have
PROCESS = Path("/proc/self")


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


class Take(NamedTuple):
    """A call that is ready to be timed: `seconds()` runs it and says how long one call took."""

    seconds: Callable[[], float]
    method: str
    calls: int = 1


class Pairs(NamedTuple):
    """Seconds of two calls that were timed by turns, and the quartiles of the ratio of the two in each pair."""

    plain: tuple[float, ...]
    other: tuple[float, ...]
    method: str

    @property
    def quartiles(self) -> list[float]:
        """Lower quartile, median and upper quartile of other / plain."""
        ratios = [other / plain for plain, other in zip(self.plain, self.other, strict=True)]
        return statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3

    def describe(self, what: str) -> dict:
        """The part of a row that says what became of `what`, times in microseconds."""
        return {
            f"{what}_us": round(statistics.median(self.other) * 1e6, 2),
            f"plain_{what}_us": round(statistics.median(self.plain) * 1e6, 2),
            **self.ratios(what),
        }

    def ratios(self, what: str) -> dict:
        """The part of it without times."""
        low, middle, high = self.quartiles
        return {
            f"{what}_ratio": float(f"{middle:.4g}"),
            f"{what}_ratio_q1": float(f"{low:.4g}"),
            f"{what}_ratio_q3": float(f"{high:.4g}"),
            f"{what}_within_spread": high - low >= abs(middle - 1),  # which so swamps the difference
        }


def rotation(bytes_per_call: int, device: torch.device) -> int:
    """How many input sets make every call meet a cold L2 cache; 2 on a CPU, whose cache tests do not depend on."""
    if device.type != "cuda":
        return 2
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", UNKNOWN_CACHE)
    return max(2, min(MOST_SETS, -(-CACHE_TURNS * cache // max(bytes_per_call, 1)) + 1))


def measure(
    calls: Sequence[Call], device: torch.device, *, repeats: int = 15, budget: float = 1.0, eager: bool = False
) -> Timing:
    """Median time of one call. `calls` do the same work on different tensors; about `budget` seconds in all."""
    forget_captures(device)
    take = prepare(calls, device, eager=eager)
    end = time.perf_counter() + budget
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < repeats and time.perf_counter() < end):
        seconds.append(take.seconds())
    ordered = sorted(seconds)
    tenth = statistics.quantiles(ordered, n=10, method="inclusive")
    return Timing(statistics.median(ordered), tenth[0], tenth[-1], ordered[0], take.method, take.calls, len(ordered))


def by_turns(calls: Mapping[str, Call], rounds: int, clock: Call = time.perf_counter, each: int = 1) -> dict:
    """Seconds of one call by name, `rounds` figures of each: all are run `each` times by turns, again and again.

    Args:
        clock: `time.thread_time` leaves out what other processes do, on one thread.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _, (name, call) in itertools.product(range(rounds), calls.items()):
        begin = clock()
        for _ in range(each):
            call()
        taken[name].append((clock() - begin) / each)
    return taken


def pairs(plain: Take, other: Take, count: int) -> Pairs:
    """Time the one beside the other `count` times, now the one first and now the other."""
    taken = []
    for turn in range(count):
        if turn % 2:
            last = other.seconds()
            taken.append((plain.seconds(), last))
        else:
            taken.append((plain.seconds(), other.seconds()))
    firsts, seconds = zip(*taken, strict=True)
    return Pairs(firsts, seconds, "+".join(sorted({plain.method, other.method})))


def prepare(calls: Sequence[Call], device: torch.device, *, eager: bool = False, warm: bool = False) -> Take:
    """On a GPU a graph of many calls, unless `eager`; on a CPU each call by itself, after a first unless `warm`."""
    if device.type == "cuda":
        count = max(LEAST_CALLS, len(calls))
        return _eager(calls, count) if eager else _graph(calls, count)
    turn = 0

    def run() -> float:
        nonlocal turn
        call = calls[turn % len(calls)]
        turn += 1
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin

    if not warm:
        calls[0]()
    return Take(run, "wall")


def prepare_long(call: Call, device: torch.device, *, eager: bool = False, warm: bool = False) -> Take:
    """A call of milliseconds or more, such as a model's: one call in a graph, eager if it cannot be."""
    if device.type != "cuda":
        return prepare([call], device, warm=warm)
    if not eager:
        reason = _why_no_graph(call)
        try:
            if reason is None:
                return _graph([call], 1)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            torch.cuda.synchronize()
        print(f"cannot be captured, timed with its launches: {reason}", flush=True)
    return _eager([call], 1)


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


def _graph(calls: Sequence[Call], count: int) -> Take:
    """Device time of one of `count` calls in a graph that keeps as many outputs apart as there are input sets."""
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
    graph.replay()
    torch.cuda.synchronize()

    def run(kept: collections.deque = kept) -> float:  # the outputs live as long as the graph
        return _elapsed(graph.replay) / count

    return Take(run, "graph", count)


def _eager(calls: Sequence[Call], count: int) -> Take:
    """Eager calls one after the other on a GPU, launches included: what a caller without a graph waits for."""

    def run() -> None:
        for index in range(count):
            calls[index % len(calls)]()

    run()
    torch.cuda.synchronize()
    return Take(lambda: _elapsed(run) / count, "events", count)


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


def forget_captures(device: torch.device, words: int | None = CAPTURED_WORDS) -> None:
    """Have the backends make anew what they keep for captured launches, of `words` words or of their own choice.

    They keep a fixed amount, since nothing tells them when a graph is gone; beyond it a graph zeroes memory of its own
    at each replay. A program with a few graphs would never see that, and here it would be measured. Called where no
    graph of this module that holds their launches lives.
    """
    if device.type == "cuda":
        workspace.forget_captures(words)


def peak_beside_outputs(call: Call, device: torch.device) -> int | None:
    """Bytes that a call takes beside its outputs, what it keeps for later calls included; None on a CPU."""
    if device.type != "cuda":
        return None
    forget_captures(device, None)
    # On a stream of its own, for which a backend has kept nothing yet.
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        peak, outputs = peak_of(call, device)
    assert peak is not None
    unique = {field.untyped_storage().data_ptr(): field.untyped_storage().nbytes() for field in outputs}
    return peak - sum(unique.values())


def peak_of(call: Call, device: torch.device) -> tuple[int | None, Any]:
    """Bytes that a call takes at most beyond what there was before, and what it returns.

    On a CPU of the process's resident memory, which Linux tells; None elsewhere.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        returned = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before, returned
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what is free, but not given back, would hide what the call takes
        (PROCESS / "clear_refs").write_text("5")  # the peak begins anew
        before = resident("VmRSS")
    except (OSError, AttributeError):
        return None, call()
    returned = call()
    return resident("VmHWM") - before, returned


def resident(field: str = "VmRSS") -> int:
    """Bytes of memory that this process holds, as Linux tells."""
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise OSError(f"no {field}")
