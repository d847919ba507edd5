"""Predict what schedules of the CUDA kernel take, by an event simulation: `python -m benchmarks schedule-model`.

Clusters draw tickets, load a tile, match it, wait for its sample, plan and copy. Memory is one pipe that all transfers
share. Every time below is assumed, none is measured; the first run on a GPU is to replace them (`benchmarks phases`).
"""

from __future__ import annotations

import argparse
import heapq
import itertools
import random
import statistics
from collections.abc import Generator, Iterable
from typing import NamedTuple

from attanchor_kernels.testing.inputs import SHAPES, Shape
from benchmarks import options
from benchmarks.cases import MAX_ANCHORS, Case
from benchmarks.rows import Row, Run, table

BYTES_PER_US = 4.3e6  # an H200 copies that much, read and written together: HBM3e at 4.8 TB/s less 10 %
LAUNCH = 2.2  # us, from the start of a graph's node to the first loads, and the last stores to its end: empty kernels
CLUSTERS = {8: 32, 4: 64}  # resident at two blocks a multiprocessor, by size: 132 multiprocessors in groups of 16 to 18
CHUNK, FEW_BLOCKS = 64, 128  # columns of a chunk; csrc/construct.cu: wanted_cluster
BATCHES = (1, 8, 32)
DISTINCT = tuple({shape[1:]: shape for shape in reversed(SHAPES)}.values())[::-1]  # one of those of equal sizes
SPREAD, RUNS = 0.2, 5  # every time varies by that share; the median of so many launches


class Latencies(NamedTuple):
    """Microseconds. Estimates from the machine code: a round trip to L2 0.6-0.7, a fence for the whole GPU 0.5."""

    draw: float = 0.75  # a round trip, and a barrier of the cluster that shows the answer
    memory: float = 0.8  # from a load to its first bytes
    multiply: float = 1.75  # what 64 rows are still multiplied after their last byte came
    publish: float = 1.2  # sums of the cluster behind a barrier and a fence, maxima
    finish: float = 0.5  # a fence, and the way of one atomic to L2
    poll: float = 0.4  # half an interval of polling, and a round trip
    plan: float = 1.3  # one read of the keys, about 15 barriers of the block
    leave: float = 0.0  # beside the plan


# With two fences and an answer for each arrival, four reads of the keys, and the readers counted behind all copies.
BEFORE = Latencies(finish=0.8, plan=2.0, leave=0.9)


class Schedule(NamedTuple):
    """`rows` of a tile (None: as the kernel chooses), and how many tiles a cluster has under way.

    `draws`: when the next ticket is drawn. "between": after a tile, before its sample is waited for; "early": while a
    tile is on its way; "late": early only while tiles of the sample are left, and else after the wait.
    """

    name: str
    rows: int | None = None
    slots: int = 1
    draws: str = "late"
    latencies: Latencies = Latencies()


NOW = Schedule("now")  # as benchmarks.targets calls what the kernel does
SCHEDULES = (
    Schedule("before", draws="between", latencies=BEFORE),
    Schedule("drawn early", draws="early"),
    NOW,
    Schedule("72 rows", 72),
    Schedule("two slots of 32 rows", 32, 2),
)


class Transfer(NamedTuple):
    """What a process yields to move bytes; a number is a delay, a Gate is waited for."""

    bytes: float


class Gate:
    """Opens once."""

    def __init__(self) -> None:
        self.open = False
        self.waiting: list[Process] = []


Process = Generator["Transfer | Gate | float", None, None]


class Simulation:
    """Runs processes to their end; `now` is the time."""

    def __init__(self) -> None:
        self.now = 0.0
        self._order = itertools.count()
        self._timed: list[tuple[float, int, Process]] = []
        self._moving: list[tuple[float, int, Process]] = []  # by the bytes that each flow will have had when it ends
        self._moved = 0.0  # bytes that a flow would have had since the beginning

    def start(self, process: Process, after: float = 0.0) -> None:
        heapq.heappush(self._timed, (self.now + after, next(self._order), process))

    def open(self, gate: Gate) -> None:
        gate.open = True
        for process in gate.waiting:
            self.start(process)
        gate.waiting.clear()

    def run(self) -> float:
        while self._timed or self._moving:
            each = BYTES_PER_US / len(self._moving) if self._moving else 0.0  # all flows share alike
            ends = self.now + (self._moving[0][0] - self._moved) / each if self._moving else float("inf")
            timed = self._timed[0][0] if self._timed else float("inf")
            self._moved += (min(ends, timed) - self.now) * each
            self.now = min(ends, timed)
            self._resume(heapq.heappop(self._moving if ends <= timed else self._timed)[2])
        return self.now

    def _resume(self, process: Process) -> None:
        wish = next(process, None)
        if isinstance(wish, Transfer):
            heapq.heappush(self._moving, (self._moved + wish.bytes, next(self._order), process))
        elif isinstance(wish, Gate):
            if wish.open:
                self.start(process)
            else:
                wish.waiting.append(process)
        elif wish is not None:
            self.start(process, wish)


class Launch:
    """One forward launch of the kernel with held tiles (csrc/construct_held.cuh)."""

    def __init__(self, shape: Shape, batch: int, schedule: Schedule, seed: int = 0) -> None:
        self.case, self.schedule, self.simulation = Case("forward", shape, batch), schedule, Simulation()
        self.latencies, self.random = schedule.latencies, random.Random(seed)
        few = batch * -(-shape.image // 32) * 4 < FEW_BLOCKS
        self.cluster = 8 if shape.hidden / CHUNK >= (32 if few else 48) else 4
        clusters = CLUSTERS[self.cluster]
        full = batch * -(-shape.image // 64) >= clusters
        self.rows = schedule.rows or (64 if full else 32)
        self.tiles = -(-shape.image // self.rows)  # of a sample
        self.total, self.ticket = batch * self.tiles, 0
        self.missing, self.complete = [self.tiles] * batch, [Gate() for _ in range(batch)]
        self.threads = [0.0] * clusters  # when the threads of a cluster are free
        self.given_up = 0

    def run(self) -> float:
        """Microseconds."""
        for _, cluster in itertools.product(range(self.schedule.slots), range(len(self.threads))):
            self.simulation.start(self._slot(cluster), self.latencies.draw)
        return LAUNCH + self.simulation.run()

    def _draw(self) -> int:
        self.ticket += 1
        return self.ticket - 1

    def _busy(self, cluster: int, time: float) -> float:
        """How long until the threads of the cluster, one thing after the other, have done `time` of work."""
        begin = max(self.simulation.now, self.threads[cluster])
        self.threads[cluster] = begin + time * self.random.uniform(1 - SPREAD, 1 + SPREAD)
        return self.threads[cluster] - self.simulation.now

    def _slot(self, cluster: int) -> Process:
        """The tiles that one slot of a cluster takes, one after the other."""
        at, sizes, draws = self.latencies, self.case.shape, self.schedule.draws
        written = self.case.written_bytes / self.total  # a tile's share of text and padding is with it
        ticket, given_up = self._draw(), 0
        while ticket < self.total:
            sample, tile = divmod(ticket, self.tiles)
            image = min(self.rows, sizes.image - tile * self.rows) * self.case.row_bytes
            yield at.memory
            yield Transfer(image + sizes.text * self.case.row_bytes / self.tiles)  # the others find the text in L2
            left = self.ticket < (sample + 1) * self.tiles
            after = self._draw() if draws == "early" or (draws == "late" and left) else None
            yield self._busy(cluster, at.multiply * self.rows / 64 + at.publish + at.finish)
            self.missing[sample] -= 1
            if self.missing[sample] == 0:
                self.simulation.open(self.complete[sample])
            if draws == "between":
                after = self._draw()
                yield at.draw
            if after is not None and after // self.tiles == sample:
                given_up += 1
            else:
                yield self.complete[sample]
                after = self._draw() if after is None else after
                yield self._busy(cluster, at.poll + at.plan + at.leave + at.plan * given_up)
                self.given_up += given_up
                yield Transfer(written * (1 + given_up) + self.rows * self.case.row_bytes * given_up)
                given_up = 0
            ticket = after


def floor(shape: Shape, batch: int) -> float:
    """Microseconds of a copy of the least bytes."""
    return LAUNCH + Case("forward", shape, batch).least_bytes / BYTES_PER_US


def predict(schedule: Schedule, shape: Shape, batch: int) -> Row:
    """What a launch is predicted to take, in microseconds, and its ratio to the floor."""
    launches = [Launch(shape, batch, schedule, seed) for seed in range(RUNS)]
    us, least = statistics.median(launch.run() for launch in launches), floor(shape, batch)
    launch = launches[0]
    return {
        **launch.case.describe("operation", "shape", "image", "text", "hidden", "batch", "dtype", "max_anchors"),
        **{"schedule": schedule.name, "method": "predicted"},
        **{"us": round(us, 3), "floor_us": round(least, 3), "ratio": round(us / least, 4)},
        **{"tile_images": launch.rows, "cluster": launch.cluster, "given_up": launch.given_up},
    }


def tabulated(rows: Iterable[Row]) -> str:
    """The table of docs/kernels.md: us and ratio of every schedule."""
    found = {(row["shape"], row["batch"], row["schedule"]): row for row in rows}
    lines = []
    for shape, batch in itertools.product(DISTINCT, BATCHES):
        own = [found[shape.name, batch, schedule.name] for schedule in SCHEDULES]
        cells = [f"{row['us']:.1f} ({row['ratio']:.2f})" for row in own]
        lines.append([shape.name, str(batch), f"{own[0]['floor_us']:.1f}", *cells])
    return table(["shape", "B", "floor", *(schedule.name for schedule in SCHEDULES)], lines)


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.description = __doc__
    options.output(parser, "schedule-model")


def main(given: argparse.Namespace) -> int:
    """Store a row for each schedule, shape and batch; print the table and what was assumed."""
    on = Run(given.output, "cpu", "schedule-model")
    for schedule, shape, batch in itertools.product(SCHEDULES, SHAPES, BATCHES):
        on.add({**predict(schedule, shape, batch), "assumed": schedule.latencies._asdict()})
    print(tabulated(on.rows))
    print(f"\npredicted, not measured; microseconds, over the floor; {MAX_ANCHORS} anchors at most; {Latencies()}")
    return 0
