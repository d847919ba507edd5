"""Experiments of one training step on a small stand-in."""

from __future__ import annotations

from attanchor_lab.paper.study import Study
from attanchor_vlm.evaluation.config import EvalConfig
from attanchor_vlm.training.config import Method, TrainConfig


def study(world, output, trains=True, seeds=(0,), **plan):
    places = {"data": world / "train.json", "images": world / "images", "output": output}
    train = TrainConfig(model=str(world / "model"), **places, max_steps=1, eval_steps=1)
    plan = {"metrics": ("loss", "exact"), "batch_size": 16, "max_new_tokens": 4, **plan}
    return Study(
        model=str(world / "model"),
        output=output,
        plan=EvalConfig(data=world / "test.json", images=world / "images", **plan),
        # Without warm-up, whose first step has a learning rate of 0.
        preset=Method.from_preset("small-llava", tau=0.5, batch_size=8, lr=1e-2, warmup=0.0),
        train=train if trains else None,
        seeds=seeds,
        say=lambda line: None,
        progress=False,
    )


def same(rows):
    """Rows less what differs from one run to the next."""
    dropped = ("seconds", "train_seconds")
    return [
        {**row, "commit": "", "date": "", "figures": {k: v for k, v in row["figures"].items() if k not in dropped}}
        for row in rows
    ]
