"""A model that many threads ask at once, in batches of several sizes, answers each as if it were alone."""

from __future__ import annotations

import gc
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from builders import BY_NAME
from strategies import LONGER

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
