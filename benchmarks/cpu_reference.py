"""The CPU implementation against the work that nothing can avoid, against masked_scatter, and against a literal loop.

All by turns. On one thread in that thread's own CPU time: on a shared machine the clock on the wall measures the
neighbours. On more threads there is no other clock.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attanchor_kernels import build_sequence, merge_sequence
from attanchor_kernels.testing.inputs import TAU
from benchmarks import options, timing
from benchmarks.baselines import plain_merge
from benchmarks.cases import SHAPE_OF, Case, make_inputs
from benchmarks.rows import RESULTS, Row, Run, table
from benchmarks.targets import MOST_OF_BUILD, MOST_OF_UNAVOIDABLE

SHAPES = ("llava-7b", "tinyllava-1b")
BATCHES = (1, 4, 8)
DTYPES = ("float32", "bfloat16")
LEAST_OF_LOOP = 20.0


def literal_loop(image: Tensor, text: Tensor, tau: float) -> Tensor:
    """Algorithm 1 of AttAnchor for one sample as the paper states it, token by token: (L, D).

    One `cosine_similarity` for every pair of tokens, and one stack of all rows in the end.
    """
    copies: list[list[Tensor]] = [[] for _ in range(len(image))]
    for word in text:
        best, host = -math.inf, -1
        for m, patch in enumerate(image):
            score = float(torch.cosine_similarity(word, patch, dim=0))
            if score > best:
                best, host = score, m
        if best >= tau:
            copies[host].append(word)
    rows = [row for patch, inserted in zip(image, copies, strict=True) for row in (patch, *inserted)]
    return torch.stack([*rows, *text])


def unavoidable_work(image: Tensor, text: Tensor, wide: tuple[Tensor, Tensor], extra: Tensor) -> tuple[Tensor, ...]:
    """One product and the norms of both inputs in float32, and one `cat` that writes a tensor of the output's size."""
    product = torch.bmm(wide[1], wide[0].mT)
    return product, wide[0].norm(dim=-1), wide[1].norm(dim=-1), torch.cat([image, extra, text], dim=1)


def compare(case: Case, rounds: int, threads: int = 1, loop: bool = True) -> Row:
    """Medians over the rounds in microseconds, and ratios of the fastest: the least of many is nearly free of others.

    Raises:
        AssertionError: the reference and the loop differ.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return _compare(case, rounds, threads, loop)
    finally:
        torch.set_num_threads(before)


def _compare(case: Case, rounds: int, threads: int, loop: bool) -> Row:
    pair = make_inputs(case._replace(operation="forward"), torch.device("cpu"), seed=case.batch)
    prompt = make_inputs(case._replace(operation="merge"), torch.device("cpu"), seed=case.batch)
    image, text, roles = pair.image, pair.text, prompt.roles
    assert roles is not None
    built = build_sequence(image, text, TAU)
    assert built.embeds is not None
    extra = text[:, : built.embeds.shape[1] - image.shape[1] - text.shape[1]]
    calls: dict[str, Callable[[], Any]] = {
        "unavoidable": partial(unavoidable_work, image, text, (image.float(), text.float()), extra),
        "build": partial(build_sequence, image, text, TAU),
        "merge": partial(merge_sequence, prompt.text, prompt.image, roles, TAU),
        "masked_scatter": partial(plain_merge, prompt),
    }
    clock = time.thread_time if threads == 1 else time.perf_counter
    times = timing.by_turns(calls, rounds, clock)
    if loop:
        begin = clock()
        expected = [literal_loop(*sample, TAU) for sample in zip(image, text, strict=True)]
        times["loop"] = [clock() - begin]
        for rows, mask, sample in zip(built.embeds, built.attention_mask, expected, strict=True):
            if not torch.equal(rows[mask.bool()], sample):
                raise AssertionError("the reference and the literal loop differ")
    least = {name: min(seconds) for name, seconds in times.items()}
    medians = {f"{name}_us": round(statistics.median(seconds) * 1e6, 1) for name, seconds in times.items()}
    return {
        **case.describe("operation", "shape", "image", "text", "hidden", "batch", "dtype"),
        **{"backend": "reference", "method": "thread time" if threads == 1 else "wall", "on_threads": threads},
        "us": medians.pop("build_us"),
        **medians,
        "of_unavoidable": round(least["build"] / least["unavoidable"], 3),
        "merge_of_build": round(least["merge"] / least["build"], 3),
        "merge_of_masked_scatter": round(least["merge"] / least["masked_scatter"], 3),
        **({"of_loop": round(least["loop"] / least["build"], 1)} if loop else {}),
    }


def met(row: Row) -> bool:
    """Whether a row keeps what the design asks of the CPU."""
    return (
        row["of_unavoidable"] <= MOST_OF_UNAVOIDABLE[row["dtype"]]
        and row["merge_of_build"] <= MOST_OF_BUILD
        and row.get("of_loop", LEAST_OF_LOOP) >= LEAST_OF_LOOP
    )


HEAD = ["", "build", "of its unavoidable work", "than a per-token loop", "merge", "of build", "of masked_scatter"]


def lines_of(rows: list[Row]) -> list[list[str]]:
    """The table's lines. A row of before there was a merge beside it leaves cells empty."""
    newest = {(row["shape"], row["dtype"], row.get("on_threads", 1), row["batch"]): row for row in rows}

    def cell(row: Row, key: str, form: str, scale: float = 1.0) -> str:
        return form.format(row[key] * scale) if key in row else ""

    return [
        [
            f"{shape}, {dtype}, B={batch}" + (f", {threads} threads" if threads > 1 else ""),
            cell(row, "us", "{:.1f} ms", 1e-3),
            cell(row, "of_unavoidable", "{:.2f} x"),
            cell(row, "of_loop", "{:.0f} x faster"),
            cell(row, "merge_us", "{:.1f} ms", 1e-3),
            cell(row, "merge_of_build", "{:.2f} x"),
            cell(row, "merge_of_masked_scatter", "{:.2f} x"),
        ]
        for (shape, dtype, threads, batch), row in newest.items()
    ]


def add_options(parser: argparse.ArgumentParser) -> None:
    options.output(parser, "cpu-reference")
    parser.add_argument("--shapes", type=options.names(SHAPE_OF), default=SHAPES, help="default: %(default)s")
    parser.add_argument("--batches", type=options.numbers, default=BATCHES, help="default: 1,4,8")
    parser.add_argument("--dtypes", type=options.names(DTYPES), default=DTYPES, help="default: %(default)s")
    parser.add_argument("--threads", type=options.numbers, default=(1,), help="default: 1")
    parser.add_argument("--rounds", type=options.number, default=15, help="interleaved (default: %(default)s)")
    parser.add_argument("--toy", action="store_true", help="a small shape, to see that the command runs")


def main(given: argparse.Namespace) -> int:
    """Store and print one row for each size. Returns 1 if one is too slow; at toy size the figures mean nothing."""
    if given.toy and given.output.parent == RESULTS:
        print(f"--toy would overwrite {given.output}; name another file by --output", file=sys.stderr)
        return 2
    on = Run(given.output, "cpu", "cpu-reference")
    shapes = ("toy",) if given.toy else given.shapes
    for threads, name, dtype, batch in itertools.product(given.threads, shapes, given.dtypes, given.batches):
        case = Case("forward", SHAPE_OF[name], batch, getattr(torch, dtype))
        row = on.add(compare(case, given.rounds, threads, loop=threads == 1))
        print("" if met(row) else "too slow: ", *lines_of([row])[0], sep="   ", flush=True)
    print(table(HEAD, lines_of(on.rows)))
    return int(not given.toy and not all(map(met, on.rows)))
