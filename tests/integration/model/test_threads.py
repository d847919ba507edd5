"""One attached model in many threads: each has its own plan, and nobody sees `detach` midway."""

from __future__ import annotations

import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from tiny import plain, prompts, tiny_llava

from attanchor_vlm import AttAnchorConfig, attach, detach, is_attached

TAU = 0.1
THREADS = 4


def attached():
    return attach(tiny_llava(), AttAnchorConfig(tau=TAU))


def batches():
    """One prompt, or several, for each thread, all of other lengths."""
    return [prompts([1], seed=1), prompts([2, 1], "left", seed=2), prompts([0, 0], seed=3), prompts([1, 2, 0], seed=4)]


def asked(model, batch, how):
    """What a call returns and what its thread then finds on the model, the other threads' calls having returned too."""
    batch = batch if "pixel_values" in batch else plain(batch)
    with torch.no_grad():
        result = model(**batch).logits if how == "forward" else model.generate(**batch, max_new_tokens=3)
    yield
    yield result, model.attanchor_plan, float(model.attanchor_stats.inserted)


@pytest.mark.parametrize("how", ["forward", "generate"])
@pytest.mark.parametrize("make", [attached, lambda: pickle.loads(pickle.dumps(attached()))], ids=["made", "unpickled"])
def test_every_thread_has_the_plan_of_its_own_call(make, how):
    model, barrier = make(), threading.Barrier(THREADS, timeout=60)
    model.generation_config.do_sample = False
    expected = [list(asked(model, batch, how))[1] for batch in batches()]

    def run(batch):
        rounds = []
        for _ in range(3):
            call = asked(model, batch, how)
            next(call)
            barrier.wait()
            rounds.append(next(call))
            barrier.wait()
        return rounds

    calls = model.attanchor_calls
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(run, batches()))
    for (result, plan, inserted), rounds in zip(expected, found, strict=True):
        for other_result, other_plan, other_inserted in rounds:
            assert torch.equal(result, other_result)
            assert inserted == other_inserted
            assert (plan is None) == (other_plan is None)
            assert plan is None or all(a is b or torch.equal(a, b) for a, b in zip(plan, other_plan, strict=True))
    assert sum(inserted for *_, inserted in expected) > 3
    assert model.attanchor_calls == calls + 3 * 3  # one batch has no image


def held(model):
    """A model whose image encoder waits: (reached, go on)."""
    reached, go_on = threading.Event(), threading.Event()

    def wait(*_):
        reached.set()
        assert go_on.wait(60)

    model.model.vision_tower.register_forward_pre_hook(wait)
    return reached, go_on


@pytest.mark.parametrize("change", [detach, lambda model: attach(model, AttAnchorConfig(tau=1))], ids=["off", "again"])
def test_changes_wait_for_calls_under_way(change):
    model, batch = attached(), prompts([1], "left")
    options = {"max_new_tokens": 3, "do_sample": False}
    expected, without = model.generate(**batch, **options), tiny_llava().generate(**plain(batch), **options)
    assert not torch.equal(expected, without)
    reached, go_on = held(model)
    with ThreadPoolExecutor(2) as pool:
        call = pool.submit(model.generate, **batch, **options)
        assert reached.wait(60)
        changed = pool.submit(change, model)
        assert not changed.done()
        assert is_attached(model)
        go_on.set()
        assert torch.equal(call.result(60), expected)
        changed.result(60)
    assert torch.equal(model.generate(**plain(batch), **options), without)


def test_a_method_looked_up_before_detach_is_the_plain_models_afterwards():
    model, batch = attached(), plain(prompts([1], "left"))
    forward, generate = model.forward, model.generate
    detach(model)
    with torch.no_grad():
        assert torch.equal(forward(**batch).logits, model(**batch).logits)
    options = {"max_new_tokens": 3, "do_sample": False}
    assert torch.equal(generate(**batch, **options), model.generate(**batch, **options))


def test_no_change_inside_a_call():
    model = attached()
    model.model.vision_tower.register_forward_pre_hook(lambda *_: detach(model))
    with pytest.raises(RuntimeError, match="inside a call of the model"):
        model(**prompts([1]))
    assert is_attached(model)
