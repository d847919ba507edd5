"""A condition of the laboratory that is run in a second and finds out nothing."""

from __future__ import annotations

from attanchor_lab.scenes import world as scenes
from attanchor_lab.synthetic import model
from attanchor_lab.synthetic import plan as settings

TOY = settings.Condition(
    "toy",
    "a toy",
    arms=("plain", "t2i"),
    seeds=(0, 1),
    more=("front",),
    more_seeds=1,
    world=scenes.World(4, 4, least=2, most=4, distractors=2),
    shape=model.Shape(width=32, layers=2, heads=2, content=20),
    stage1=settings.Stage1(steps=2, batch=4, each=3, encoder_steps=3),
    stage2=settings.Stage2(steps=3, batch=4),
    test_scenes=6,
)
