"""Short training runs of the small LLaVA, on scenes that a test's `world` holds."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm.training import callbacks, trainer
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import TrainConfig


def write_world(tmp_path_factory, model=None, **drawn):
    """A folder with `{name}.json` of so many scenes by a seed, and a model, "random" or "shipped"."""
    folder = tmp_path_factory.mktemp("world")
    if model == "random":
        save_random_model(folder / "model")
    if model == "shipped":
        shutil.copytree(small_llava.SHIPPED, folder / "model")
    for name, (count, seed) in drawn.items():
        scenes.write_dataset(folder, name, count, seed=seed)
    return folder


def save_random_model(folder):
    """Save a small model with random weights, and its processor, which is returned."""
    torch.manual_seed(0)
    processor = small_llava.build_processor()
    small_llava.build_model().save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor


def settings(world, output, **more):
    """Six steps of the model in the world, or else of the shipped one, unless told otherwise."""
    model = world / "model" if (world / "model").exists() else small_llava.SHIPPED
    defaults = {"model": str(model), "batch_size": 4, "lr": 5e-3, "lora_dropout": 0.1}
    defaults |= {"data": world / "train.json", "val_data": world / "val.json", "images": world / "images"}
    defaults |= {"max_steps": 6, "eval_steps": 3}
    return TrainConfig.from_preset("small-llava", output=output, **{**defaults, **more})


def run(world, output, **more):
    return train.run(settings(world, output, **more), say=lambda line: None, progress=False)


def arguments(folder, **more):
    """Those of a Trainer of transformers that computes losses alone, on a CPU."""
    loss_alone = {"prediction_loss_only": True, "label_names": ["labels"], "remove_unused_columns": False}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    return transformers.TrainingArguments(str(folder), **{**loss_alone, **quiet, **more})


def at_the_end_of(step, act, patch=None):
    """Call `act` at the end of a step, in front of all that a run would write then; for good without a `patch`."""
    original = callbacks.KeepOnInterrupt.on_step_end

    def ended(self, args, state, control, **kwargs):
        if state.global_step == step:
            act()
        original(self, args, state, control, **kwargs)

    (patch or pytest.MonkeyPatch()).setattr(callbacks.KeepOnInterrupt, "on_step_end", ended)


def before_every_loss(act, patch=None):
    """Call `act` with the trainer and its inputs in front of every loss that is trained on; as `at_the_end_of`."""
    original = trainer.AnchorTrainer.compute_loss

    def computed(self, model, inputs, *args, **kwargs):
        if model.training:
            act(self, inputs)
        return original(self, model, inputs, *args, **kwargs)

    (patch or pytest.MonkeyPatch()).setattr(trainer.AnchorTrainer, "compute_loss", computed)


def logged(log, *names):
    """{(step, name): value}, which `approx` compares by keys and values; none is there twice."""
    found = [((line["step"], name), line[name]) for line in log for name in names if name in line]
    assert len(found) == len(dict(found)) > 0
    return dict(found)


def lines(output):
    """What a run has logged."""
    return [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
