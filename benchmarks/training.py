"""Short LoRA training runs of models at their real size, random weights: a step with anchors beside one without.

Both by turns on one model, one optimizer and one batch, so that a busy machine disturbs both alike.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from typing import Any

import torch

import attanchor_vlm
from attanchor_vlm.training.lora import lora_targets
from benchmarks import models, options, timing
from benchmarks.cases import Case
from benchmarks.models import Spec
from benchmarks.overhead import attached, whole_prompt
from benchmarks.rows import Row, Run, ratio

MODELS = ("tinyllava-1b",)
WARM_UP = 3
RANK, ALPHA, DROPOUT, LEARNING_RATE = 32, 64, 0.05, 1e-4  # the paper's settings for TinyLLaVA-1B


def train(on: Run, spec: Spec, toy: bool, count: int, batch: int) -> Row:
    """Forward, backward and an AdamW step on a prompt whose last tokens are the answer, `count` times on each side.

    Raises:
        AssertionError: the loss does not fall on the batch that repeats.
    """
    from peft import LoraConfig, get_peft_model

    base: Any = models.build(spec, on.device, on.dtype, toy)
    arguments = whole_prompt(on.device, on.dtype, spec, base, batch)
    answer = spec.shape.text // 3
    arguments["labels"] = arguments["input_ids"].clone()
    arguments["labels"][:, :-answer] = -100
    question = arguments["input_ids"] != models.IMAGE_TOKEN
    question[:, -answer:] = False
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=lora_targets(base))
    model = get_peft_model(base, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    losses: list[float] = []

    def step() -> None:
        more = {"anchor_mask": question} if attanchor_vlm.is_attached(base) else {}
        loss = model(**arguments, **more).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))

    config = attanchor_vlm.AttAnchorConfig(tau=-1.0, max_anchors=round(0.1 * spec.shape.text))
    plain = timing.prepare_long(step, on.device, eager=True)
    with_anchors = plain._replace(seconds=partial(attached, base, config, plain))
    timing.pairs(plain, with_anchors, WARM_UP)
    found = timing.pairs(plain, with_anchors, count)
    peaks = [timing.peak_of(take.seconds, on.device)[0] for take in (with_anchors, plain)]
    if not all(map(math.isfinite, losses)) or min(losses[-3:]) >= losses[0]:
        raise AssertionError(f"the loss should fall on a batch that repeats: {losses}")
    return {
        "model": spec.name,
        **Case("merge", spec.shape, batch, on.dtype).describe("image", "text", "batch", "dtype"),
        "trained": sum(parameter.numel() for parameter in trained),
        "pairs": count,
        "method": found.method,
        **found.describe("train_step"),
        "peak_bytes": peaks[0],
        "plain_peak_bytes": peaks[1],
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def add_options(parser: argparse.ArgumentParser) -> None:
    options.common(parser, "training")
    served = [name for name, spec in models.SPECS.items() if spec.attachable]
    parser.add_argument("--models", type=options.names(served), default=MODELS, help=f"of {', '.join(served)}")
    parser.add_argument("--pairs", type=options.number, help="timed steps of each side (default: 10, on a CPU 2)")
    parser.add_argument("--batch", type=options.number, help="samples a step (default: 4, on a CPU 2)")
    parser.add_argument("--real-size", action="store_true", help="real sizes on a CPU too (slow)")


def main(given: argparse.Namespace) -> int:
    """Store a row for each model and say the difference; what fails is reported, the rest goes on."""
    on = Run(given.output, given.device, "training", given.dtype)
    on_cpu = on.device.type == "cpu"
    toy = on_cpu and not given.real_size
    for name in given.models:
        spec = models.SPECS[name].toy() if toy else models.SPECS[name]
        with on.guarded(spec.name):
            row = on.add(
                train(on, spec, toy, given.pairs or (2 if on_cpu else 10), given.batch or (2 if on_cpu else 4))
            )
            print(
                f"{spec.name}: a step {row['plain_train_step_us'] / 1e3:.1f} ms, with anchors "
                f"{ratio(row, 'train_step')}, loss {row['first_loss']} -> {row['last_loss']}"
            )
    return on.status()
