"""The plans of the three sizes. They were fixed before their runs; pilots before them ran the plain arm alone."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pydantic
import torch

from attanchor_lab.scenes.questions import Mixture
from attanchor_lab.scenes.world import World
from attanchor_lab.synthetic.model import Shape
from attanchor_lab.synthetic.plan import Condition, Contrast, LabPlan, Stage1, Stage2

SIZES = ("smoke", "cpu", "gpu")

# Training affirms too often and denies only easy things, so a model learns to say yes where both words are in the
# scene: there is hallucination to be cured. The test is even, and holds every kind of negative.
_PRIOR = Mixture(yes=0.65, negatives=("random",))


def _smoke() -> LabPlan:
    condition = Condition(
        "smoke",
        "36 patches, alignment loss, a few steps",
        arms=("plain", "t2i", "t2i-inherit", "i2t", "random", "front"),
        seeds=(0,),
        more=("t2i-content", "t2i-content-inherit", "random-inherit", "true", "true-inherit", "end"),
        more_seeds=1,
        world=World(least=3, most=6),
        stage1=Stage1(steps=50, batch=24, encoder_steps=120),
        stage2=Stage2(steps=6, batch=24),
        mixture=_PRIOR,
        blur_test=(0.0, 0.8),
        test_scenes=24,
    )
    lora = dataclasses.replace(
        condition, name="lora", title="the same with LoRA", arms=("plain", "t2i"), more=(),
        stage2=Stage2(steps=4, batch=24, method="lora", hold_share=False),
    )  # fmt: skip
    return LabPlan("smoke", (condition, lora), (Contrast("smoke", "t2i", asks="Does text into image help?"),))


_QUESTIONS = {
    ("t2i", "plain"): "Do anchors as published (sequential positions) help?",
    ("t2i-inherit", "plain"): "Do anchors that take the position of their patch help?",
    ("t2i-inherit", "random-inherit"): "Does it matter that they stand at the patch that they match?",
    ("t2i-inherit", "t2i"): "Are inherited positions better than sequential ones?",
    ("front", "plain"): "Does the whole question in front of the image help?",
}


def _contrasts(setting: str, *pairs: tuple[str, str]) -> tuple[Contrast, ...]:
    return tuple(Contrast(setting, arm, against, _QUESTIONS[arm, against]) for arm, against in pairs)


def _cpu() -> LabPlan:
    main = Condition(
        "main",
        "36 patches, 3 layers of width 64, alignment loss, training that induces a yes-prior",
        arms=("plain", "t2i", "t2i-inherit", "random-inherit", "front"),
        seeds=(0, 1, 2, 3, 4, 5),
        world=World(least=3, most=6),
        stage1=Stage1(steps=450, lr=4e-3),
        stage2=Stage2(steps=360, lr=2e-3),
        mixture=_PRIOR,
        blur_test=(0.0, 0.8),
        test_scenes=400,
    )
    return LabPlan("cpu", (main,), _contrasts("main", *_QUESTIONS))


def _gpu() -> LabPlan:
    """d = 256, 8 layers; the most valuable first, so that a slower machine leaves out the least."""
    large = Shape(width=256, layers=8, heads=8)
    main = Condition(
        "main-144",
        "144 patches, 8 layers of width 256, alignment loss, training that induces a yes-prior",
        arms=("plain", "t2i", "t2i-inherit", "random-inherit", "front"),
        world=World(12, 12, least=4, most=9, distractors=12),
        shape=large,
        stage1=Stage1(steps=1200, batch=128, lr=1e-3, encoder_steps=600),
        stage2=Stage2(steps=800, batch=256, lr=5e-4),
        mixture=_PRIOR,
        blur_test=(0.0, 0.8),
        test_scenes=1000,
        test_batch=600,
    )

    def varied(name: str, title: str, *arms: str, **changed: Any) -> Condition:
        changed = {"blur_test": (0.0,), **changed}
        return dataclasses.replace(main, name=name, title=title, arms=arms, **changed)

    first = varied(
        "first-step-144",
        "144 patches, anchors from the first step, no stage 1",
        "plain", "t2i-inherit", "front",
        stage1=Stage1(steps=0, encoder_steps=600),
        stage2=Stage2(steps=2500, batch=256, lr=1e-3, curriculum=0.2),
    )  # fmt: skip
    wide = varied(
        "main-576",
        "576 patches",
        "plain", "t2i-inherit", "front",
        world=World(24, 24, least=4, most=9, distractors=40),
        stage1=Stage1(steps=800, batch=64, lr=1e-3, encoder_steps=600),
        stage2=Stage2(steps=400, batch=128, lr=5e-4),
        test_scenes=500,
        test_batch=300,
    )  # fmt: skip
    more = varied("others-144", "144 patches, other placements", "plain", "i2t", "end", "random", "true-inherit")
    short = Stage2(steps=400, batch=256, lr=5e-4)
    others = (
        # What the others, which are as short, differ from in one thing.
        varied("short-144", "144 patches, a stage 2 of half the steps", "plain", "t2i-inherit", "front", stage2=short),
        varied("no-alignment-144", "144 patches, no alignment loss", "plain", "t2i-inherit", "t2i-content-inherit",
               alignment=0.0, stage2=short),
        varied("few-anchors-144", "144 patches, a tenth of the tokens inserted", "plain", "t2i-inherit",
               stage2=dataclasses.replace(short, share=0.1)),
        varied("fixed-tau-144", "144 patches, tau fixed before stage 2", "plain", "t2i-inherit",
               stage2=dataclasses.replace(short, hold_share=False)),
        varied("long-144", "144 patches, long stage 2", "plain", "t2i-inherit", "front",
               stage2=dataclasses.replace(short, steps=3000)),
        varied("lora-144", "144 patches, LoRA", "plain", "t2i-inherit", "front",
               stage2=dataclasses.replace(short, lr=2e-3, method="lora")),
        varied("balanced-144", "144 patches, even training questions", "plain", "t2i-inherit", "front",
               mixture=Mixture(), stage2=short),
        varied("blur-144", "144 patches, training on blurred images", "plain", "t2i-inherit",
               blur_train=0.8, blur_test=(0.0, 0.8), stage2=short),
        varied("shallow-144", "144 patches, 4 layers", "plain", "t2i-inherit", "front",
               shape=Shape(width=256, layers=4, heads=8), stage2=short),
        varied("main-1152", "1,152 patches", "plain", "t2i-inherit", "front",
               world=World(32, 36, least=4, most=9, distractors=80),
               stage1=Stage1(steps=600, batch=32, lr=1e-3, encoder_steps=600),
               stage2=Stage2(steps=300, batch=64, lr=5e-4), test_scenes=300, test_batch=120),
    )  # fmt: skip
    contrasts = (
        *_contrasts("main-144", *_QUESTIONS),
        *_contrasts("first-step-144", ("t2i-inherit", "plain"), ("front", "plain")),
        *_contrasts("main-576", ("t2i-inherit", "plain"), ("front", "plain")),
    )
    return LabPlan("gpu", (main, first, wide, more, *others), contrasts, minutes=8.0, workers=3)


def _toy(condition: Condition) -> Condition:
    """The same arms and settings, too small and too short to learn anything."""
    lines = condition.world.rows != condition.world.columns
    return dataclasses.replace(
        condition,
        seeds=condition.seeds[:1],
        world=World(4, 6 if lines else 4, condition.world.cell, 2, 4, 3, condition.world.noise),
        shape=Shape(width=32, layers=2, heads=2, content=20),
        stage1=dataclasses.replace(
            condition.stage1, steps=min(condition.stage1.steps, 3), batch=4, each=3, encoder_steps=4
        ),
        stage2=dataclasses.replace(condition.stage2, steps=3, batch=4),
        test_scenes=6,
    )


def rehearsal(plan: LabPlan) -> LabPlan:
    """The same arms and settings at toy size, one seed."""
    settings = tuple(_toy(condition) for condition in plan.settings)
    return dataclasses.replace(plan, size=f"{plan.size} (rehearsal)", settings=settings)


def plan(size: str) -> LabPlan:
    """The plan of one of `SIZES`."""
    return {"smoke": _smoke, "cpu": _cpu, "gpu": _gpu}[size]()


def chosen(
    size: str | None, own: Path | None, rehearse: bool = False, workers: int | None = None, minutes: float | None = None
) -> tuple[LabPlan, str]:
    """The plan that a command asks for, and the device that it runs on.

    Args:
        size: One of `SIZES`, or None for the plan in the file `own`.
        rehearse: At toy size, one seed, on the CPU: what the code does, without what it finds out.
        workers: Processes; None for those of a plan of one's own and of the GPU, otherwise one for every core.
        minutes: Another limit than the plan's.

    Raises:
        ValueError: the file is missing or no plan, or there is no GPU where one is asked for.
    """
    if own is not None:
        (made, device), asked = from_file(own), "device of the plan is 'cuda'"
    else:
        assert size is not None
        made, device, asked = plan(size), "cuda" if size == "gpu" else "cpu", "size is 'gpu'"
    if rehearse:
        made, device = rehearsal(made), "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"{asked}, but there is no GPU here; take 'cpu', or --rehearse for a dry run")
    if workers is None and own is None and device == "cpu":
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = {"workers": workers, "minutes": minutes}
    changed: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    return dataclasses.replace(made, **changed), device


def from_file(path: Path) -> tuple[LabPlan, str]:
    """A plan of the user's own, and the device that it asks for: its key "device", "cpu" by default.

    Raises:
        ValueError: the file is missing or no plan.
    """
    if not path.is_file():
        raise ValueError(f"plan {path} is no file; begin with the plan.json that `attanchor lab` writes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"plan {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"plan {path} is {type(values).__name__}; it should be a JSON object")
    device = values.get("device", "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device of the plan is {device!r}; it should be 'cpu' or 'cuda'")
    return from_dict(values), device


def from_dict(values: Mapping[str, Any]) -> LabPlan:
    """The plan of a plan.json, which also says when and where it was written.

    Raises:
        ValueError: a key is unknown or missing, or a value is wrong.
    """
    names = {field.name for field in dataclasses.fields(LabPlan)}
    text = json.dumps({name: value for name, value in values.items() if name in names})
    try:
        return pydantic.TypeAdapter(LabPlan).validate_json(text, strict=True, extra="forbid")
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        if first["type"] == "value_error":  # of our own, which names the value
            raise ValueError(f"plan, {where}: {first['ctx']['error']}") from None
        raise ValueError(f"plan: {where} is {first['input']!r}: {first['msg']}") from None
