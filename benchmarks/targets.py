"""Every target of the kernels' design, judged by the stored rows: met, missed by how much, predicted, not measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

from benchmarks.rows import RESULTS, Row, latest, of_newest_gpu, read, span, table

SHAPES = ("tinyllava-1b", "llava-7b", "qwen2.5-vl-3b", "llava-next-7b")
LARGE_MODELS = ("llava-7b", "llava-next-7b")
LARGE_BATCHES = (32, 64)
MOST_OF_UNAVOIDABLE = {"float32": 1.5, "bfloat16": 2.0}
MOST_OF_BUILD = 1.2
NOT_MEASURED = "not measured"


class Verdict(NamedTuple):
    """One target at one size. `value` is None where it is not measured; `limit` None where a figure is only given.

    `predicted` is what the schedule model says of the CUDA kernel, which `auto` takes where it is built.
    """

    target: str
    where: str
    limit: float | None
    at_most: bool
    unit: str
    value: float | None
    note: str = ""
    predicted: float | None = None

    @property
    def met(self) -> bool | None:
        if self.value is None or self.limit is None:
            return None
        return self.value <= self.limit if self.at_most else self.value >= self.limit

    @property
    def outcome(self) -> str:
        if self.value is None:
            if self.predicted is None:
                return NOT_MEASURED
            return f"predicted {_figure(self.predicted)} {self.unit}, {NOT_MEASURED}"
        if self.limit is None:
            return "given"
        if self.met:
            return "met"
        apart = self.value / self.limit - 1 if self.at_most else 1 - self.value / self.limit
        return f"missed by {100 * apart:.1f} %"


class Measured:
    """The rows of the GPU that was measured last, looked up by what they measure; `all` has those of CPUs too."""

    def __init__(self, rows: list[Row]) -> None:
        self.rows, self.all = of_newest_gpu(rows), rows

    def find(self, **wanted: object) -> Row:
        """The last row of that GPU with these values, empty if there is none; without `measure` of those with times."""
        return _last(self.rows, {"measure": None, **wanted})

    def kernel(self, operation: str, shape: str, batch: int, backend: str | None = None) -> Row:
        """A kernel's row: of the backend named, or else of the one that `auto` picks, which is to be the fastest."""
        which = {"backend": backend} if backend else {"auto": True}
        return self.find(run="roofline", operation=operation, shape=shape, batch=batch, **which)

    def predicted(self, shape: str, batch: int) -> Row:
        """Of a forward launch of the CUDA kernel as it is."""
        return _last(self.all, {"run": "schedule-model", "schedule": "now", "shape": shape, "batch": batch})


def _last(rows: list[Row], wanted: dict[str, object]) -> Row:
    matching = [row for row in rows if all(row.get(key) == value for key, value in wanted.items())]
    return matching[-1] if matching else {}


def _of_floor(measured: Measured) -> Iterator[Verdict]:
    batches = (8, *LARGE_BATCHES)
    for operation, shape, batch in product(("forward", "backward"), SHAPES, batches):
        row, limit = measured.kernel(operation, shape, batch), 1.25 if batch == 8 else 1.15
        target, note = f"{operation}, fastest", row.get("backend", "")
        predicted = measured.predicted(shape, batch).get("ratio") if operation == "forward" else None
        yield Verdict(target, f"{shape}, B={batch}", limit, True, "x floor", row.get("ratio"), note, predicted)
    for shape, batch in product(SHAPES, batches):
        row, limit = measured.kernel("forward", shape, batch, "triton"), 1.5 if batch == 8 else 1.25
        yield Verdict("forward, Triton", f"{shape}, B={batch}", limit, True, "x floor", row.get("ratio"))


def _one_sample(measured: Measured) -> Iterator[Verdict]:
    for shape, limit in (("llava-7b", 10.0), ("tinyllava-1b", 8.0)):
        row = measured.kernel("forward", shape, 1)
        note = row.get("backend", "")
        if "us_less_empty" in row:
            note += f", {row['us_less_empty']:.2f} us less an empty kernel"
        predicted = measured.predicted(shape, 1).get("us")
        yield Verdict("forward, fastest", f"{shape}, B=1", limit, True, "us", row.get("us"), note, predicted)


def _speedup(
    measured: Measured,
    title: str,
    baseline: str,
    at_one: float,
    at_more: float,
    operation: str = "forward",
    batches: tuple[int, ...] = (1, 8, *LARGE_BATCHES),
    called: str = "",
) -> Iterator[Verdict]:
    """`called`: the row of the kernel's backend that a caller waits for, launches included."""
    for shape, batch in product(SHAPES, batches):
        size = {"run": "roofline", "operation": operation, "shape": shape, "batch": batch}
        kernel, other = measured.kernel(operation, shape, batch), measured.find(**size, backend=baseline)
        if kernel and called:
            kernel = measured.find(**size, backend=f"{kernel['backend']}, {called}")
        value = other["us"] / kernel["us"] if kernel and other else None
        yield Verdict(title, f"{shape}, B={batch}", at_one if batch == 1 else at_more, False, "x faster", value)


def _share_of_prefill(measured: Measured) -> Iterator[Verdict]:
    title = "construction over prefill of the same model"
    for batch, shape in product((8, 1), SHAPES):
        row = measured.find(run="overhead", model=shape, batch=batch, side="anchors")
        limit = 0.1 if batch == 8 or shape in LARGE_MODELS else None
        # A prefill that waits for its launches takes longer, and would flatter its construction.
        under_graph = row.get("method") == "graph"
        value = 100 * row["device_construction_us"] / row["plain_prefill_us"] if under_graph else None
        note = "the prefill could not be captured into a graph" if row and not under_graph else ""
        yield Verdict(title, f"{shape}, B={batch}", limit, True, "%", value, note)


def _memory(measured: Measured) -> Iterator[Verdict]:
    for (backend, limit), shape in product((("cuda", 1.0), ("triton", 4.0)), SHAPES):
        which = {"run": "roofline", "measure": "memory", "operation": "forward", "backend": backend}
        row = measured.find(**which, shape=shape, batch=8)
        value = row["peak_bytes"] / 1e6 if row else None
        yield Verdict(f"memory beside outputs, {backend}", f"{shape}, B=8", limit, True, "MB", value)


def _dropping(measured: Measured) -> Iterator[Verdict]:
    title = "prefill with anchors and a third of the image tokens"
    for shape in ("tinyllava-1b", "llava-7b"):
        rows = [row for row in measured.all if row.get("side") == "keep 1/3" and row["model"] == shape]
        if not rows:
            yield Verdict(title, shape, 0.5, True, "x plain", None)
        for row in latest(rows, "gpu", "dtype", "batch").values():
            where = f"{shape}, {row['dtype']}, B={row['batch']}, {'CPU' if row['gpu'] == 'none' else row['gpu']}"
            yield Verdict(title, where, 0.5, True, "x plain", row.get("prefill_ratio"))


def _on_a_cpu(measured: Measured) -> Iterator[Verdict]:
    """One thread."""
    rows = [row for row in measured.all if row.get("run") == "cpu-reference" and row.get("on_threads", 1) == 1]
    for shape, (dtype, limit), batch in product(("llava-7b", "tinyllava-1b"), MOST_OF_UNAVOIDABLE.items(), (1, 4, 8)):
        row, where = _last(rows, {"shape": shape, "dtype": dtype, "batch": batch}), f"{shape}, {dtype}, B={batch}"
        yield Verdict("CPU, of its unavoidable work", where, limit, True, "x", row.get("of_unavoidable"))
        yield Verdict("CPU, merge of build", where, MOST_OF_BUILD, True, "x", row.get("merge_of_build"))


def _on_the_host(measured: Measured) -> Iterator[Verdict]:
    """Of `build_sequence(trim=False)`, and of the part of it that is the CUDA backend's, whatever the host."""
    called = [("forward", backend, *of) for backend in ("triton", "cuda") for of in ((False, 90.0), (True, 120.0))]
    for operation, backend, grad, limit in (*called, ("construct", "cuda", False, 25.0)):
        which = {"run": "host", "operation": operation, "trim": False, "grad": grad, "backend": backend}
        row = _last(measured.all, which)
        note = f"{row['ratio']:.1f} x a plain autograd.Function" if row else ""
        where = f"{backend}, with gradient" if grad else backend
        title = f"host time of {'a call' if operation == 'forward' else '`_construct`'}, its launch left out"
        yield Verdict(title, where, limit, True, "us", row.get("us"), note)


REFERENCE, MERGE = "against the eager reference, ", "merge_sequence "
CALLED = "as attach runs it against masked_scatter, launches included"
GROUPS: tuple[Callable[[Measured], Iterator[Verdict]], ...] = (
    _of_floor,
    _one_sample,
    lambda rows: _speedup(rows, REFERENCE + "device time", "reference", 10, 3),
    lambda rows: _speedup(
        rows, REFERENCE + "launches included", "reference, eager", 10, 3, batches=(1, 8), called="eager"
    ),
    *(
        partial(_speedup, title=f"against torch.{name}", baseline=name, at_one=3, at_more=1.5)
        for name in ("compile (default, float32 matmul)", "compile (default, bfloat16 matmul)")
    ),
    _share_of_prefill,
    lambda rows: _speedup(rows, MERGE + "against masked_scatter, device time", "masked_scatter", 1, 1, "merge"),
    lambda rows: _speedup(
        rows, MERGE + CALLED, "masked_scatter, eager", 1, 1, operation="merge", batches=(1, 8), called="trimmed"
    ),
    _memory,
    _dropping,
    _on_a_cpu,
    _on_the_host,
)


def judge(rows: list[Row]) -> list[Verdict]:
    """Every target at every size that it is about."""
    measured = Measured(rows)
    return [verdict for group in GROUPS for verdict in group(measured)]


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def table_of(verdicts: list[Verdict]) -> str:
    """All of them as a Markdown table."""
    lines = []
    for one in verdicts:
        wanted = "the figure" if one.limit is None else f"{'≤' if one.at_most else '≥'} {one.limit:g} {one.unit}"
        measured = "" if one.value is None else f"{_figure(one.value)} {one.unit}"
        note = f" ({one.note})" if one.note else ""
        lines.append([one.target, one.where, wanted, measured + note, one.outcome])
    return table(["target", "size", "wanted", "measured", "outcome"], lines)


def summary(verdicts: list[Verdict]) -> str:
    """One line for each target: how many sizes are met, missed, not measured."""
    lines = []
    for target in dict.fromkeys(one.target for one in verdicts):
        group = [one for one in verdicts if one.target == target]
        limits = dict.fromkeys((one.limit, one.at_most, one.unit) for one in group if one.limit is not None)
        wanted = ", ".join(f"{'≤' if at_most else '≥'} {limit:g} {unit}" for limit, at_most, unit in limits)
        met, missed = (sum(one.met is outcome for one in group) for outcome in (True, False))
        unmeasured = str(sum(one.value is None for one in group))
        for unit in dict.fromkeys(one.unit for one in group):
            values = [one.predicted for one in group if one.value is None and one.unit == unit]
            if predicted := sorted(value for value in values if value is not None):
                unmeasured += f"; predicted {span(_figure(predicted[0]), _figure(predicted[-1]))} {unit}"
        worst = max((one.outcome for one in group if one.met is False), key=_percent, default="")
        lines.append([target, wanted, str(met), f"{missed} ({worst})" if missed else "0", unmeasured])
    return table(["target", "wanted", "met", "missed", "not measured"], lines)


def _percent(outcome: str) -> float:
    return float(outcome.removeprefix("missed by ").removesuffix(" %"))


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of rows (default: %(default)s)")


def main(options: argparse.Namespace) -> int:
    """Print the table and a line that counts. A missed target is a result, not an error of this command."""
    verdicts = judge(read(options.results))
    print(table_of(verdicts))
    met, missed = (sum(one.met is outcome for one in verdicts) for outcome in (True, False))
    unmeasured = sum(one.value is None for one in verdicts)
    print(f"{met} met, {missed} missed, {unmeasured} not measured, of {len(verdicts)}")
    return 0
