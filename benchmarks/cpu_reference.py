"""The CPU implementation at the LLaVA-7B shape, against the work that nothing can avoid and against a literal loop.

On one thread, in that thread's own CPU time: on a shared machine the clock on the wall measures the neighbours.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import build_sequence
from attanchor_kernels.testing.inputs import SHAPES, TAU, Shape, matched_pair
from benchmarks.cases import TOY
from benchmarks.rows import RESULTS, Row, Store

SHAPE_LLAVA = next(shape for shape in SHAPES if shape.name == "llava-7b")
MOST_OF_UNAVOIDABLE = 1.5
LEAST_OF_LOOP = 20.0
BATCHES = (1, 4)


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


def unavoidable_work(image: Tensor, text: Tensor, extra: Tensor) -> tuple[Tensor, ...]:
    """One matrix product, the norms of both inputs, and one `cat` that writes a tensor of the output's size."""
    product = torch.bmm(text, image.mT)
    return product, image.norm(dim=-1), text.norm(dim=-1), torch.cat([image, extra, text], dim=1)


class Comparison(NamedTuple):
    """Seconds of one call: medians over the rounds, and the ratios of the fastest."""

    reference: float
    unavoidable: float
    loop: float
    of_unavoidable: float
    of_loop: float


def compare(batch: int, rounds: int, loop_rounds: int = 2, shape: Shape = SHAPE_LLAVA) -> Comparison:
    """Measure in turn, so that what else the machine does meets all alike; the least of many is nearly free of it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return _compare(batch, rounds, loop_rounds, shape)
    finally:
        torch.set_num_threads(threads)


def _compare(batch: int, rounds: int, loop_rounds: int, shape: Shape) -> Comparison:
    image, text = matched_pair(batch, shape, seed=batch)
    expected = [literal_loop(*sample, TAU) for sample in zip(image, text, strict=True)]
    result = build_sequence(image, text, TAU)
    assert result.embeds is not None
    for rows, mask, sample in zip(result.embeds, result.attention_mask, expected, strict=True):
        if not torch.equal(rows[mask.bool()], sample):
            raise AssertionError("the reference and the literal loop differ")
    extra = text[:, : result.embeds.shape[1] - image.shape[1] - text.shape[1]]

    times: dict[str, list[float]] = {"reference": [], "unavoidable": [], "loop": []}

    def take(name: str, call: Callable[[], object]) -> None:
        begin = time.thread_time()
        call()
        times[name].append(time.thread_time() - begin)

    for turn in range(rounds):
        take("reference", lambda: build_sequence(image, text, TAU))
        take("unavoidable", lambda: unavoidable_work(image, text, extra))
        if turn < loop_rounds:
            take("loop", lambda: [literal_loop(*sample, TAU) for sample in zip(image, text, strict=True)])
    least = {name: min(seconds) for name, seconds in times.items()}
    return Comparison(
        reference=statistics.median(times["reference"]),
        unavoidable=statistics.median(times["unavoidable"]),
        loop=statistics.median(times["loop"]),
        of_unavoidable=least["reference"] / least["unavoidable"],
        of_loop=least["loop"] / least["reference"],
    )


def describe(batch: int, found: Comparison, shape: Shape) -> Row:
    """The row that is stored."""
    return {
        **{"operation": "forward", "shape": shape.name, "image": shape.image, "text": shape.text},
        **{"hidden": shape.hidden, "batch": batch, "dtype": "float32", "backend": "reference", "method": "thread time"},
        "us": round(found.reference * 1e6, 1),
        "unavoidable_us": round(found.unavoidable * 1e6, 1),
        "loop_us": round(found.loop * 1e6, 1),
        "of_unavoidable": round(found.of_unavoidable, 3),
        "of_loop": round(found.of_loop, 1),
    }


def main(options: argparse.Namespace) -> int:
    """Store and print one row for each batch size. At toy size the figures mean nothing, and none can fail."""
    shape = TOY if options.toy else SHAPE_LLAVA
    if options.toy and options.output.parent == RESULTS:
        print(f"--toy would overwrite {options.output}; name another file by --output", file=sys.stderr)
        return 2
    store = Store(options.output, "cpu", "cpu-reference")
    failed = False
    for batch in BATCHES:
        found = compare(batch, options.rounds, shape=shape)
        store.add(describe(batch, found, shape))
        failed |= found.of_unavoidable > MOST_OF_UNAVOIDABLE or found.of_loop < LEAST_OF_LOOP
        print(
            f"B={batch}: {found.reference * 1e3:.2f} ms, {found.of_unavoidable:.2f} x its unavoidable work "
            f"(at most {MOST_OF_UNAVOIDABLE}), {found.of_loop:.0f} x faster than a literal loop "
            f"(at least {LEAST_OF_LOOP:.0f})"
        )
    return int(failed and not options.toy)
