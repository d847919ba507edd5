"""A model, or an operator, that many threads call at once, or for many samples, answers each as if it were alone, and
keeps nothing of a call."""

from __future__ import annotations

import gc
import os
import random
import signal
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders import BY_NAME, FAMILIES
from strategies import LONGER
from tiny import difference

from attanchor_kernels import build_sequence
from attanchor_vlm import AttAnchorConfig, attach, detach
from attanchor_vlm.model.config import DIRECTIONS

THREADS, CALLS = 8, 40 * LONGER if LONGER > 1 else 24
OPTIONS = {"max_new_tokens": 3, "do_sample": False}


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_service(tried, resident, name):
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
        for round_ in range(8 if LONGER > 1 else 3):
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


@pytest.mark.parametrize("family", FAMILIES if LONGER > 1 else FAMILIES[:2], ids=str)
def test_batches(tried, family):
    """Batches of any samples and settings, against their samples alone."""
    chance, model = random.Random(family.name), family.model()
    for number in range(max(1, LONGER // 2)):
        config = AttAnchorConfig(
            tau=chance.choice([-1, 0, 0.2]),
            direction=chance.choice(DIRECTIONS),
            route=chance.choice(family.routes),
            max_anchors=chance.choice([None, 3]),
            keep=chance.choice([None, 0.5, 3]),
        )
        attach(model, config)
        images = [chance.randrange(3) for _ in range(chance.randint(1, 4))] + [1]
        batch, alone = family.prompts(images, chance.choice(["left", "right"]), seed=number)
        with torch.no_grad():
            together, plan = model(**batch).logits, model.attanchor_plan
            for row, sample in enumerate(alone):
                assert difference(together[row][plan.source[row] >= 0], model(**sample).logits[0]) < 2e-5, config
                own = model.attanchor_plan
                assert int(plan.is_anchor[row].sum()) == (0 if own is None else int(own.is_anchor.sum()))
                tried()


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"] if LONGER > 1 else ["llava"])
def test_leaks(tried, resident, name):
    """Calls of six kinds in turn, after which no tensor more is alive."""
    family, config = BY_NAME[name], AttAnchorConfig(tau=0.0)
    model, (batch, _) = attach(family.model(), config), family.prompts([1], "left")

    def train() -> None:
        model(**family.with_labels(batch)).loss.backward()
        model.zero_grad()

    def attach_anew() -> None:
        attach(detach(model), config)(**batch)

    def fail() -> None:
        with pytest.raises(ValueError, match="anchor_mask"):
            model(**{**batch, "anchor_mask": batch["anchor_mask"][:, :-1]})

    kinds = [
        torch.no_grad()(lambda: model(**batch)),
        train,
        lambda: model.generate(**batch, **OPTIONS),
        lambda: model.generate(**batch, **OPTIONS, num_beams=2),
        attach_anew,
        fail,
    ]
    for kind in kinds:
        kind()  # fills caches
        kind()
        tensors, size = live_tensors(), resident()
        for _ in range(10 * LONGER if LONGER > 1 else 3):
            tried()
            kind()
        assert live_tensors() <= tensors
        assert resident() - size < 16 * 2**20
