"""A condition of the laboratory that is run in a second and finds out nothing."""

from __future__ import annotations

from attanchor_lab.scenes import world as scenes
from attanchor_lab.synthetic import model
from attanchor_lab.synthetic import plan as settings


def objects(drawn: scenes.Scenes, index: int) -> dict[tuple[str, str], int]:
    """(colour, shape) to patch."""
    where, colour, shape, there = (
        getattr(drawn, name)[index].tolist() for name in ("where", "colour", "shape", "there")
    )
    return {
        (scenes.COLOURS[c], scenes.SHAPES[s]): patch
        for patch, c, s, is_there in zip(where, colour, shape, there, strict=True)
        if is_there
    }


def truth(kind: str, words: list[str], there: dict, world: scenes.World) -> tuple[str, tuple[str, str]]:
    """What is true to answer to a question about `objects`, and the object that it is about."""
    colour = next((word for word in words if word in scenes.COLOURS), "")
    shape = next(word for word in words if word in scenes.SHAPES)
    if kind == "existence":
        return ("yes" if (colour, shape) in there else "no"), (colour, shape)
    if kind == "colour":
        (colour,) = (c for c, s in there if s == shape)
        return colour, (colour, shape)
    row, column = divmod(there[colour, shape], world.columns)
    place = f"{'bottom' if row >= world.rows // 2 else 'top'} {'right' if column >= world.columns // 2 else 'left'}"
    return place, (colour, shape)


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
