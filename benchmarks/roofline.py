"""The roofline run: every operator and backend as a multiple of a copy of the same bytes, measured in the same run."""

from __future__ import annotations

import contextlib
import gc
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attanchor_kernels import backends
from benchmarks import floor, timing
from benchmarks.baselines import Compiled, plain_merge, verify_merge
from benchmarks.cases import Case, Inputs, WrongResult, make_inputs, run, verify
from benchmarks.rows import Row, Store
from benchmarks.timing import Timing

PASSES = ("kernels", "baselines")
COMPILED_BATCHES = (1, 8, 32, 64)  # one compilation for the first, one for all the others
MEMORY_BATCH = 8


class Settings:
    """What one run does, and what went wrong in it."""

    def __init__(
        self,
        device: str,
        output: Path,
        names: Sequence[str],
        passes: Sequence[str] = PASSES,
        matmuls: Sequence[str] = (),
        repeats: int = 15,
        budget: float = 0.4,
    ) -> None:
        self.device = torch.device(device)
        self.store = Store(output, device, "roofline")
        self.names = [name for name in names if backends.why_not(name, self.device.type) is None]
        self.passes, self.matmuls = tuple(passes), tuple(matmuls)
        self.repeats, self.budget = repeats, budget
        self.wrong: list[str] = []

    def measure(self, calls: Sequence[Callable[[], Any]]) -> Timing:
        return timing.measure(calls, self.device, repeats=self.repeats, budget=self.budget)


def kernel_backends(device: torch.device) -> list[str]:
    """The backends that are measured against the floor: on a GPU the kernels, on a CPU the reference."""
    if device.type == "cpu":
        return ["reference"]
    return [name for name in ("cuda", "triton") if backends.why_not(name, device.type) is None]


def run_cases(cases: Iterable[Case], settings: Settings) -> list[Row]:
    """Measure the cases, kernels first, and print a line for each figure. Returns the rows, which are stored as well.

    Raises:
        WrongResult: after all cases, if a result was wrong or could not be made. It has no figure, all others have.
    """
    cases = list(cases)
    if "kernels" in settings.passes:
        empty = _measure_machine(settings)
        if settings.device.type == "cuda":
            _measure_each([case for case in cases if case.batch == MEMORY_BATCH], settings, _measure_memory)
        _measure_each(cases, settings, partial(_measure_kernels, empty=empty))
    if "baselines" in settings.passes:
        _measure_each(cases, settings, _measure_baselines)
        for name in dict.fromkeys(case.shape.name for case in cases):
            _measure_compiled([case for case in cases if case.shape.name == name], settings)
    if settings.wrong:
        raise WrongResult("; ".join(settings.wrong))
    return settings.store.rows


def _measure_each(cases: Sequence[Case], settings: Settings, measure: Callable[[Case, Settings], None]) -> None:
    for case in cases:
        with _guarded(case.label, settings):
            measure(case, settings)
        _release(settings.device)


@contextlib.contextmanager
def _guarded(what: str, settings: Settings) -> Iterator[None]:
    """A failure inside is kept for the end and costs no other case or backend its figures.

    What does not fit into the device's memory is left out, and said so.
    """
    try:
        yield
        return
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            print(f"{what}: not enough memory, not measured", flush=True)
        else:
            outcome = "WRONG" if isinstance(error, WrongResult) else f"failed with {type(error).__name__}"
            settings.wrong.append(f"{what} {outcome}: {error}".partition("\n")[0])
            print(f"{what} {outcome}: {error}", flush=True)
        traceback.clear_frames(error.__traceback__)  # they may hold tensors, which the error outlives
    gc.collect()


def _release(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _measure_machine(settings: Settings) -> Timing | None:
    """Copy bandwidth of the device, and what an empty kernel costs in a graph."""
    device = settings.device
    count = 2**27 if device.type == "cuda" else 2**21
    pairs = [(torch.rand(count, device=device), torch.empty(count, device=device)) for _ in range(2)]
    copied = settings.measure([partial(target.copy_, source) for source, target in pairs])
    moved = 8 * count
    _report(settings, {"operation": "copy", "backend": "torch", "bytes": moved, **copied.describe()}, copied, moved)
    if not floor.on_gpu(device):
        return None
    empty = settings.measure(floor.empty_calls(device))
    _report(settings, {"operation": "empty", "backend": "triton", "bytes": 0, **empty.describe()}, empty, 0)
    return empty


def _report(settings: Settings, row: Row, taken: Timing, moved: int) -> Row:
    if moved:
        row["gbps"] = float(f"{moved / taken.p50 / 1e9:.4g}")
    row = settings.store.add(row)
    where = f"{row['operation']:<9}{row.get('shape', ''):<14}B={row.get('batch', '-')!s:<4}{row['backend']:<34}"
    of_floor = f"{row['ratio']:>8.2f} x floor" if "ratio" in row else ""
    print(f"{where}{row['us']:>11.2f} us  {row.get('gbps', 0):>8.1f} GB/s {of_floor}", flush=True)
    return row


def _measure_memory(case: Case, settings: Settings) -> None:
    """Before anything else of a case runs, so that whatever a backend keeps is counted."""
    inputs = make_inputs(case, settings.device, seed=0)
    one = case._replace(batch=1)
    for name in settings.names:
        with _guarded(f"{name}, {case.label}", settings):
            run(one, make_inputs(one, settings.device, seed=0), name)  # compile
            peak = timing.peak_beside_outputs(partial(run, case, inputs, name), settings.device)
            settings.store.add({"measure": "memory", **case.describe(), "backend": name, "peak_bytes": peak})
            where = f"{case.operation:<9}{case.shape.name:<14}B={case.batch:<4}{name:<34}"
            print(f"{where}{(peak or 0) / 1e6:>10.3f} MB beside outputs", flush=True)


def _input_sets(case: Case, settings: Settings) -> list[Inputs]:
    count = timing.rotation(case.least_bytes, settings.device)
    return [make_inputs(case, settings.device, seed) for seed in range(count)]


def _measure_kernels(case: Case, settings: Settings, empty: Timing | None) -> None:
    """Floor, then every backend."""
    sets = _input_sets(case, settings)
    candidates = {name: settings.measure(calls) for name, calls in floor.copies(case, sets, settings.device)}
    variant = min(candidates, key=lambda name: candidates[name].p50)
    least = candidates[variant]
    described = {**case.describe(), **least.describe(), "backend": "floor", "variant": variant}
    _report(settings, described, least, case.least_bytes)
    expected = run(case, sets[0], "reference")
    for name in settings.names:
        with _guarded(f"{name}, {case.label}", settings):
            verify(case, expected, run(case, sets[0], name))
            taken = settings.measure([partial(run, case, inputs, name) for inputs in sets])
            row = {**case.describe(), **taken.describe(), "backend": name, "floor_us": round(least.p50 * 1e6, 3)}
            row["auto"] = name == backends.choose("auto", settings.device, case.dtype)
            row["ratio"] = round(taken.p50 / least.p50, 4)
            # Digits, not decimals: it can be tiny.
            row["percent_of_roofline"] = float(f"{100 * least.p50 / taken.p50:.4g}")
            if empty is not None:
                row["us_less_empty"] = round((taken.p50 - empty.p50) * 1e6, 3)
            _report(settings, row, taken, case.least_bytes)


def _baseline(
    name: str, case: Case, calls: Sequence[Callable[[], Any]], settings: Settings, eager: bool = False
) -> None:
    if eager:
        taken = timing.event_timing(calls, repeats=settings.repeats, budget=settings.budget)
    else:
        taken = settings.measure(calls)
    row = {**case.describe(), **taken.describe(), "backend": name}
    if name == "reference":
        row["peak_bytes"] = timing.peak_beside_outputs(calls[0], settings.device)
    _report(settings, row, taken, case.least_bytes)


def _measure_baselines(case: Case, settings: Settings) -> None:
    """The reference as device time alone and with its launches; for a prompt the merge of transformers.

    The reference is no baseline for a prompt: it matches every slot with every slot, which no user would.
    """
    sets = _input_sets(case, settings)
    if case.operation == "merge":
        if not verify_merge(sets[0], plain_merge(sets[0])):
            raise WrongResult("masked_scatter puts rows where they do not belong")
        _baseline("masked_scatter", case, [partial(plain_merge, inputs) for inputs in sets], settings)
    elif settings.names != ["reference"]:
        calls = [partial(run, case, inputs, "reference") for inputs in sets]
        _baseline("reference", case, calls, settings)
        if settings.device.type == "cuda":
            _baseline("reference, eager", case, calls, settings, eager=True)


def _measure_compiled(cases: list[Case], settings: Settings) -> None:
    """The compiled baselines at one shape: one compilation for B = 1, one for all larger batches."""
    cases = [case for case in cases if case.operation == "forward" and case.batch in COMPILED_BATCHES]
    for matmul in settings.matmuls:
        compiled = Compiled(matmul)
        for case in cases:
            with _guarded(f"{compiled.name}, {case.label}", settings), torch.no_grad():
                sets = _input_sets(case, settings)
                if not torch.equal(compiled(sets[0])[0], run(case, sets[0], "reference")[0]):
                    raise WrongResult("embeds differ from the reference")
                _baseline(compiled.name, case, [partial(compiled, inputs) for inputs in sets], settings)
            _release(settings.device)
