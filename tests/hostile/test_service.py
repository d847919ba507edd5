"""A model, or an operator, that many threads call at once answers each as if it were alone."""

from __future__ import annotations

import gc
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders import BY_NAME
from strategies import LONGER

from attanchor_kernels import build_sequence
from attanchor_vlm import AttAnchorConfig, attach

THREADS, CALLS = 8, 40 * LONGER
OPTIONS = {"max_new_tokens": 3, "do_sample": False}


def resident() -> int:
    """Bytes of memory that this process has."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_service(tried, name):
    """Calls of one model from 8 threads."""
    family = BY_NAME[name]
    model = attach(family.model(), AttAnchorConfig(tau=0.0, keep=0.5))
    sizes = [[1], [2, 1], [1, 1, 2], [1, 1]]
    batches = [family.prompts(images, "left", seed=seed)[0] for seed, images in enumerate(sizes)]

    def ask(number: int) -> tuple[torch.Tensor, list[int] | None]:
        batch = batches[number % len(batches)]
        if number % 3:
            said = model.generate(**batch, **OPTIONS)
        else:
            with torch.no_grad():
                said = model(**batch).logits
        plan = model.attanchor_plan
        return said, None if plan is None else plan.source.tolist()

    alone = [ask(number) for number in range(12)]
    assert any(plan for _, plan in alone)
    grown = []
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(4):
            for number, (said, plan) in enumerate(pool.map(ask, range(CALLS // 4))):
                tried()
                assert torch.equal(said, alone[number % 12][0])
                assert plan == alone[number % 12][1]
            gc.collect()
            grown.append(resident())
    assert grown[-1] - grown[1] < 32 * 2**20, "memory grows"  # the first rounds fill caches


def test_operators(tried):
    """Calls of the operators from 8 threads, with gradients, some while this process forks."""
    generator = torch.Generator().manual_seed(0)
    problems = [
        {
            "img": torch.randn(2, rows, 16, generator=generator),
            "txt": torch.randn(2, 5, 16, generator=generator),
            "tau": 0.1,
            "keep": keep,
        }
        for rows, keep in ((9, None), (12, 6), (30, 4))
    ]

    def call(number: int) -> list[torch.Tensor]:
        problem = problems[number % 3]
        images = problem["img"].clone().requires_grad_()
        made = build_sequence(**{**problem, "img": images})
        return [made.embeds.detach(), made.source, *torch.autograd.grad(made.embeds.square().sum(), images)]

    alone = [call(number) for number in range(3)]
    with ThreadPoolExecutor(THREADS) as pool:
        for round_ in range(4):
            calls = pool.map(call, range(CALLS))
            process = os.fork()
            if not process:
                signal.alarm(60)
                os._exit(int(not all(map(torch.equal, call(round_), alone[round_ % 3]))))
            for number, found in enumerate(calls):
                tried()
                assert all(map(torch.equal, found, alone[number % 3]))
            tried()
            assert os.waitpid(process, 0)[1] == 0
