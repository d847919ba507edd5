"""Random cases of every operator against the float64 oracle, as many as there is time for.

`python tests/fuzz.py --backend triton --cases 10000 --seed 1` draws what tests/strategies.py draws, half of it with
`keep`, and stores how many cases held in benchmarks/results/fuzz.jsonl as it goes. The first that does not hold is made
small and printed, and the exit status is 1. Triton runs in its interpreter, CUDA over the emulated device.
"""

import argparse
import collections
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent / "integration"), str(HERE / "emulator")]
if __name__ == "__main__":  # before anything imports triton
    os.environ.setdefault("TRITON_INTERPRET", "1")

from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from strategies import KERNEL_DTYPES, build_arguments, merge_arguments  # noqa: E402
from test_parity import DTYPES, check_build, check_merge  # noqa: E402

from attanchor_kernels import checks  # noqa: E402
from attanchor_kernels.testing.interpreter import hasten  # noqa: E402
from benchmarks import rows  # noqa: E402

CHUNK = 50  # cases drawn from one seed; a run is told apart, and goes on, by whole chunks


def _public(backend: str) -> dict[str, Callable]:
    """Checks through the Python API."""
    hasten()
    checking = {"build": check_build, "merge": check_merge}
    return {
        name: lambda arguments, data, check=check: check(arguments, data.draw(st.booleans()), backend)
        for name, check in checking.items()
    }


def _emulated() -> dict[str, Callable]:
    """Checks over the emulated device, on any compiled variant."""
    from checking import check, schedules

    def run(call, arguments, data):
        problem = call(**arguments).problem
        check(problem, data.draw(schedules(problem)))

    calls = {"build": checks.build_call, "merge": checks.merge_call}
    return {name: lambda arguments, data, call=call: run(call, arguments, data) for name, call in calls.items()}


def run_chunk(backend: str, check: Callable, strategy: Callable, cases: int, chosen: int) -> collections.Counter:
    """Check so many cases; raises what the smallest failing one raises."""
    held: collections.Counter = collections.Counter()
    dtypes = DTYPES if backend == "reference" else KERNEL_DTYPES

    @seed(chosen)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        derandomize=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy(dtypes, drops=True, tau_tensors=True), st.data())
    def checked(arguments, data):
        check(arguments, data)
        held.update(cases=1, keep=arguments.get("keep") is not None)

    checked()
    return held


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=("reference", "triton", "cuda"), required=True)
    parser.add_argument("--cases", type=int, default=10000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long")
    parser.add_argument("--output", type=Path, default=rows.RESULTS / "fuzz.jsonl")
    given_ = parser.parse_args(arguments)
    begin = time.monotonic()
    strategies = {"build": build_arguments, "merge": merge_arguments}
    checking = _emulated() if given_.backend == "cuda" else _public(given_.backend)
    row = {"run": "fuzz", "backend": given_.backend, "seed": given_.seed, **rows.environment()}
    held: collections.Counter = collections.Counter()
    others = [other for other in rows.read(given_.output) if any(other[key] != row[key] for key in ("backend", "seed"))]
    failed, chunk = False, 0
    while held["cases"] < given_.cases and not failed and time.monotonic() - begin < 60 * given_.minutes:
        name = list(strategies)[chunk % 2]
        try:
            count = min(CHUNK, given_.cases - held["cases"])
            held += run_chunk(given_.backend, checking[name], strategies[name], count, given_.seed * 10**6 + chunk)
        except Exception:
            traceback.print_exc()
            failed = True
        chunk += 1
        told = {"cases": held["cases"], "with_keep": held["keep"], "failed": failed}
        rows.write(given_.output, [*others, {**row, **told, "minutes": round((time.monotonic() - begin) / 60, 1)}])
    print(f"{given_.backend}: {held['cases']} cases held, {held['keep']} of them with keep{', one failed' * failed}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
