"""What a launch takes on the host, and that the short way of the Triton backend launches what Triton's own way would.

In a process where TRITON_INTERPRET is set nothing is compiled, so the tests run this file in a process of its own, over
a driver that launches nothing.
"""

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Host time over that of a plain autograd.Function with as many arguments and outputs: about 1.6 and 2.0, by Triton's
# own way to a launch 1.8 more; of what is the CUDA backend's alone, 0.6.
MOST = {
    "triton": {("forward", False, False): 2.2, ("forward", False, True): 2.7},
    "cuda": {("construct", False, False): 0.9},
}


def outside(*command: str) -> str:
    """Output of a Python command in a process without the interpreter."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("backend", MOST)
def test_host_time_beside_a_plain_function(tmp_path, backend):
    """Up to three tries, since a busy machine can only make a ratio worse than it is."""
    import emulated

    if backend == "cuda" and emulated.missing():
        pytest.skip(f"the emulator was left out: {emulated.missing()}")
    path = tmp_path / "host.jsonl"
    least: dict = {}
    for _ in range(3):
        outside("-m", "benchmarks", "host", "--backends", backend, "--output", str(path), "--repeats", "5")
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for row in rows:
            kind = row["operation"], row["trim"], row["grad"]
            least[kind] = min(row["ratio"], least.get(kind, row["ratio"]))
        if all(least[kind] <= most for kind, most in MOST[backend].items()):
            return
    raise AssertionError(least)


def test_the_short_way_launches_what_tritons_own_would():
    outside(__file__)


# --- In the process without TRITON_INTERPRET. ------------------------------------------------------------------------


def problems():
    """Everything that makes a kernel another, or its arguments."""
    import torch

    from attanchor_kernels.problem import Problem
    from attanchor_kernels.testing.inputs import merge_form

    image, text = torch.randn(2, 40, 128), torch.randn(2, 9, 128)
    crooked = torch.randn(2, 40, 132)[..., 1:129]
    shifted = torch.randn(2 * 40 * 128 + 1)[1:].view_as(image)
    masks = {"image_mask": torch.ones(2, 40).bool(), "anchor_mask": torch.ones(2, 9).bool()}
    for rows, dtype in product((image, shifted, crooked, image[:1], image[:, ::2]), (torch.float32, torch.bfloat16)):
        yield Problem(rows.to(dtype), text[: len(rows)].to(dtype), 0.5)
    for options in (
        {"max_anchors": 3},
        {"max_anchors": 4},
        {"max_anchors": 0},
        {"tau": 2.0, "max_anchors": 3},
        {"tau": 2.0, "tau_tensor": torch.tensor([9.0, 0.3])[1]},
        {"image_into_text": True},
        {"inherit": True},
        {"inherit": True, "position_ids": torch.zeros(3, 2, 49, dtype=torch.int64)},
        {"pad_left": True},
        {"keep": 5},
        {"keep": 6},
        {"keep": 5, "salience": torch.zeros(2, 40)},
        {"keep": 5, "cells": torch.zeros(2, 40, dtype=torch.int32)},
        masks,
    ):
        yield Problem(**{"image": image, "text": text, "tau": 0.5, **options})
    merged, features, roles = merge_form(image, text, before=2)
    odd = torch.cat([roles.new_zeros(1), roles.flatten()])[1:].view_as(roles)
    turn = torch.zeros(roles.shape, dtype=torch.int32)
    for options in ({"roles": roles}, {"roles": odd}, {"roles": roles, "turn": turn}):
        yield Problem(features, merged, 0.5, **options)
    yield Problem(features, merged, 0.5, roles, keep_each=torch.tensor([3, 4], dtype=torch.int32))


def launches(kernel_class, problem):
    """The kernels that a problem's operators launch, and with what."""
    import torch

    from attanchor_kernels.backends.triton import launch

    kernel_class.launched = launched = []
    embeds, plan = launch.construct(problem)
    launch.plan(problem)
    launch.match(problem)
    source = torch.full_like(plan.source, -1)
    launch.assemble(problem.image, problem.text, source, plan.places)
    for needs in ((True, True), (True, False), (False, True)):
        launch.assemble_backward(embeds, plan.places, tuple(problem.image.shape), tuple(problem.text.shape), *needs)

    def described(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, tuple(value.shape), value.stride(), value.data_ptr() % 16
        return tuple(map(described, value)) if isinstance(value, tuple) else value

    return [(kernel, grid, described(given)) for kernel, grid, given in launched]


def compare_ways():
    from attanchor_kernels.backends.triton import prepared
    from benchmarks.host import no_triton_launch

    with no_triton_launch() as kernel_class:
        given = list(problems())
        first = [launches(kernel_class, problem) for problem in given]
        assert all(len(found) == 7 for found in first)
        kernels = len({kernel for found in first for kernel, _, _ in found})
        again = [launches(kernel_class, problem) for problem in given]  # by now all of them go the short way
        own = []
        for problem in given:
            prepared._prepared.clear()
            own.append(launches(kernel_class, problem))
        assert again == own
        assert kernels > 20
        by_options = [found[0][0] for found in own[-4:-2]]
        assert by_options[0] is by_options[1]  # roles at an odd address compile nothing anew


if __name__ == "__main__":
    compare_ways()
