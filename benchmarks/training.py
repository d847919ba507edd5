"""A short LoRA training run of TinyLLaVA at its real size, random weights, plain against anchors: steps a second."""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from typing import Any

import torch

from benchmarks import models, rows
from benchmarks.models import Spec
from benchmarks.overhead import whole_prompt

MODEL = "tinyllava-1b"
WARM_UP = 3
RANK, ALPHA, DROPOUT, LEARNING_RATE = 32, 64, 0.05, 1e-4  # the paper's settings for TinyLLaVA-1B


def train(spec: Spec, device: torch.device, toy: bool, steps: int, batch: int, attached: bool) -> rows.Row:
    """Forward, backward and an AdamW step on one batch; a prompt whose last tokens are the answer."""
    from attanchor_vlm import AttAnchorConfig, attach
    from attanchor_vlm.training.lora import LORA_TARGETS
    from peft import LoraConfig, get_peft_model

    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    base: Any = models.build(spec, device, dtype, toy)
    arguments = whole_prompt(device, dtype, spec, base, batch)
    answer = spec.shape.text // 3
    labels = arguments["input_ids"].clone()
    labels[:, :-answer] = -100
    if attached:
        attach(base, AttAnchorConfig(tau=-1.0, max_anchors=round(0.1 * spec.shape.text)))
        questions = arguments["input_ids"] != models.IMAGE_TOKEN
        questions[:, -answer:] = False
        arguments["anchor_mask"] = questions
    settings = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=LORA_TARGETS)
    model = get_peft_model(base, settings).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    on_gpu = device.type == "cuda"

    def wait() -> None:
        if on_gpu:
            torch.cuda.synchronize()

    seconds, losses = [], []
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(WARM_UP + steps):
        wait()
        begin = time.perf_counter()
        loss = model(**arguments, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        wait()
        seconds.append(time.perf_counter() - begin)
        losses.append(float(loss.detach()))
    if not all(map(_finite, losses)) or min(losses[-3:]) >= losses[0]:
        raise AssertionError(f"the loss should fall on a batch that repeats: {losses}")
    return {
        "model": spec.name,
        "attached": attached,
        "batch": batch,
        "image": spec.shape.image,
        "text": spec.shape.text,
        "dtype": str(dtype).removeprefix("torch."),
        "trained": sum(parameter.numel() for parameter in trained),
        "steps": steps,
        "steps_per_second": round(1 / statistics.median(seconds[WARM_UP:]), 4),
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "first_loss": round(losses[0], 4),
        "last_loss": round(losses[-1], 4),
    }


def _finite(value: float) -> bool:
    return value == value and abs(value) != float("inf")


def main(options: argparse.Namespace) -> int:
    """Both runs, one after the other, and the difference."""
    device = torch.device(options.device)
    on_cpu = device.type == "cpu"
    toy = on_cpu and not options.real_size
    spec = models.SPECS[MODEL].toy() if toy else models.SPECS[MODEL]
    steps, batch = options.steps or (2 if on_cpu else 10), options.batch or (2 if on_cpu else 4)
    store = rows.Store(options.output, options.device, "training")
    for attached in (False, True):
        row = store.add(train(spec, device, toy, steps, batch, attached))
        gc.collect()  # a model holds itself, and would be counted in the next one's peak
        if not on_cpu:
            torch.cuda.empty_cache()
        print(
            f"{spec.name}, {'with anchors' if attached else 'plain':<13}{row['steps_per_second']:.3f} steps/s, "
            f"{row['peak_bytes'] / 2**30:.2f} GiB, loss {row['first_loss']} -> {row['last_loss']}",
            flush=True,
        )
    plain, anchored = store.rows
    print(f"anchors cost {100 * (plain['steps_per_second'] / anchored['steps_per_second'] - 1):+.2f} % of a step")
    return 0
