"""What a run depends on: conditions, the plan that holds them, and what is compared. Written down before the runs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from attanchor_lab.scenes.questions import Mixture
from attanchor_lab.scenes.world import World
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.synthetic.model import Shape


def _at_least(part: object, **bounds: float) -> None:
    for name, bound in bounds.items():
        if not (value := getattr(part, name)) >= bound:
            raise ValueError(f"{name} is {value}; it should be at least {bound}")


def _above_zero(part: object, *names: str) -> None:
    for name in names:
        if not (value := getattr(part, name)) > 0:
            raise ValueError(f"{name} is {value}; it should be above 0")


@dataclass(frozen=True)
class Stage1:
    """Projector and language model from random weights, on plain concatenation.

    Attributes:
        steps: 0 for none: stage 2 then starts from random weights, and anchors are there from the first step.
        batch, each: Scenes a step, and questions a scene, packed behind one copy of the image.
        encoder_steps: Of the patch encoder, before it is frozen.
    """

    steps: int = 700
    batch: int = 32
    each: int = 6
    lr: float = 3e-3
    encoder_steps: int = 400

    def __post_init__(self) -> None:
        _at_least(self, steps=0, batch=1, each=1, encoder_steps=1)
        _above_zero(self, "lr")


@dataclass(frozen=True)
class Stage2:
    """Fine-tuning in arms, one question a prompt.

    Attributes:
        steps: Of `batch` questions.
        curriculum: Share of the steps that see scenes with few objects, for models that start from random weights.
        method: "full" (projector and language model) or "lora" (rank 16 on both).
        share: Copies over candidates that tau is chosen for: the tokens of the question, or the patches in image into
            text (`image_share`).
        hold_share: Choose tau again every few steps, from the scores of the last batches; otherwise it stays what it
            was before the first step.
    """

    steps: int = 400
    batch: int = 32
    lr: float = 1e-3
    curriculum: float = 0.0
    method: str = "full"
    share: float = 0.25
    image_share: float = 0.2
    hold_share: bool = True

    def __post_init__(self) -> None:
        if self.method not in ("full", "lora"):
            raise ValueError(f"method is {self.method!r}; it should be 'full' or 'lora'")
        _at_least(self, steps=1, batch=1, curriculum=0)
        _above_zero(self, "lr")
        for name in ("share", "image_share"):
            if not 0 < (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name} is {value}; it should be above 0 and at most 1")


@dataclass(frozen=True)
class Condition:
    """One world, one model, one way to train; `arms` start from the same weights and see the same data in each seed.

    Attributes:
        name, title: A short word for rows, and words for the report.
        seeds: Of `arms`. `more` names further arms, run with the first `more_seeds` of them.
        alignment: Weight of the alignment loss in both stages, 0 for none; `temperature` of its cosines.
        mixture: The questions of training. Models are tested on even ones of every kind.
        blur_train: Blur of the training images, in pixels.
        blur_test: Blurs under which the models are tested.
        test_scenes, test_each: Held-out scenes and questions for each.
    """

    name: str
    title: str
    arms: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    more: tuple[str, ...] = ()
    more_seeds: int = 3
    world: World = field(default_factory=World)
    shape: Shape = field(default_factory=Shape)
    stage1: Stage1 = field(default_factory=Stage1)
    stage2: Stage2 = field(default_factory=Stage2)
    mixture: Mixture = field(default_factory=Mixture)
    alignment: float = 0.5
    temperature: float = 0.1
    blur_train: float = 0.0
    blur_test: tuple[float, ...] = (0.0,)
    test_scenes: int = 600
    test_each: int = 6
    test_batch: int = 100

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"name of a setting is {self.name!r}; it should be one word, for rows and file names")
        every = (*self.arms, *self.more)
        if unknown := sorted(set(every) - set(ARMS)):
            raise ValueError(f"setting {self.name!r} names the arms {unknown}; known are {', '.join(ARMS)}")
        if "plain" not in self.arms:
            raise ValueError(f"setting {self.name!r} lacks the arm 'plain', with which all others are compared")
        if len(set(every)) < len(every) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"setting {self.name!r} names an arm or a seed twice")
        if not self.seeds or not self.blur_test:
            raise ValueError(f"setting {self.name!r} needs at least one of seeds and of blur_test")
        _at_least(self, alignment=0, blur_train=0, more_seeds=0, test_scenes=1, test_each=1, test_batch=1)
        _above_zero(self, "temperature")

    def runs(self) -> list[tuple[str, int]]:
        """(arm, seed) of every run, seed by seed: cut short, it leaves whole comparisons."""
        few = self.seeds[: self.more_seeds]
        return [(arm, seed) for seed in self.seeds for arm in (*self.arms, *(self.more if seed in few else ()))]

    def start(self) -> dict[str, Any]:
        """What the weights before stage 2 depend on, beside the seed. Settings that agree in it share them."""
        settings = dataclasses.asdict(self)
        keys = ("world", "shape", "stage1", "alignment", "temperature", "blur_train")
        mixture = settings["mixture"] if self.stage1.steps else None
        return {**{key: settings[key] for key in keys}, "mixture": mixture}

    def start_key(self) -> str:
        return hashlib.sha256(json.dumps(self.start(), sort_keys=True).encode()).hexdigest()[:10]

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))


@dataclass(frozen=True)
class Contrast:
    """A comparison that was chosen before the runs: `arm` minus `against`, in mean accuracy, in one setting."""

    setting: str
    arm: str
    against: str = "plain"
    asks: str = ""


@dataclass(frozen=True)
class LabPlan:
    """Everything that one command runs, in this order, and the questions that it is to answer.

    Attributes:
        size: "smoke", "cpu" or "gpu".
        settings: The most valuable first: what no time is left for is not run, and reported so.
        contrasts: The primary comparisons. Their number is what the primary statistics are corrected for.
        minutes: No run is started after so many minutes; None for no limit.
        workers: Processes side by side.
    """

    size: str
    settings: tuple[Condition, ...]
    contrasts: tuple[Contrast, ...]
    minutes: float | None = None
    workers: int = 2

    def __post_init__(self) -> None:
        if not self.settings:
            raise ValueError("the plan has no settings; it should have at least one")
        _at_least(self, workers=1)
        by_name = {condition.name: condition for condition in self.settings}
        if len(by_name) < len(self.settings):
            raise ValueError("two settings of the plan have the same name")
        for contrast in self.contrasts:
            condition = by_name.get(contrast.setting)
            arms = (*condition.arms, *condition.more) if condition else ()
            if contrast.arm not in arms or contrast.against not in arms:
                raise ValueError(f"{contrast} compares what the plan does not run")

    def to_dict(self) -> dict[str, Any]:
        return json.loads(json.dumps(dataclasses.asdict(self)))
