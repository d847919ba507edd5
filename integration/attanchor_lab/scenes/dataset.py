"""Rendered scenes: a grid of coloured shapes, questions about them with short answers, as LLaVA-Instruct JSON + PNG.

A scene has at most one object per cell and a cell is one patch of the small LLaVA's vision tower, so the patch that a
word belongs to is known exactly: that is what makes the matching of AttAnchor measurable here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from attanchor_vlm.records import write_json
from PIL import Image

GRID = 8  # cells per side
CELL = 16  # pixels per cell
COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
EMPTY = "empty"  # the label word of a cell without an object
PLACES = ("top left", "top right", "bottom left", "bottom right")
KINDS = ("existence", "colour", "place")

_RGB = np.array(
    [(215, 40, 40), (240, 135, 30), (235, 215, 50), (50, 160, 70), (50, 95, 215), (150, 65, 180)], dtype=np.float32
) / 255.0  # fmt: skip


@dataclass
class Scenes:
    """A batch of scenes. Arrays of shape (scenes, GRID * GRID); -1 = no object in that cell."""

    colour: np.ndarray
    shape: np.ndarray

    def __len__(self) -> int:
        return self.colour.shape[0]


@dataclass
class Question:
    kind: str
    text: str
    answer: str
    scene: int


def draw_scenes(count: int, rng: np.random.Generator, least: int = 5, most: int = 9) -> Scenes:
    """`count` random scenes of `least` to `most` objects; no two objects of a scene share both colour and shape."""
    cells = GRID * GRID
    pairs = len(COLOURS) * len(SHAPES)
    numbers = rng.integers(least, most + 1, count)
    # The first `most` entries of a random permutation are a draw without replacement, for all scenes at once.
    where = rng.random((count, cells)).argsort(1)[:, :most]
    what = rng.random((count, pairs)).argsort(1)[:, :most]
    keep = np.arange(most)[None] < numbers[:, None]
    colour = np.full((count, cells), -1)
    shape = np.full((count, cells), -1)
    rows = np.broadcast_to(np.arange(count)[:, None], where.shape)
    colour[rows[keep], where[keep]] = what[keep] // len(SHAPES)
    shape[rows[keep], where[keep]] = what[keep] % len(SHAPES)
    return Scenes(colour, shape)


def _distance(shape: np.ndarray, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Distance in pixels to the outline of each object, negative inside. `shape` (n,), x, y (n, CELL, CELL)."""
    r = radius[:, None, None]
    ax, ay = np.abs(x), np.abs(y)
    round_ = np.hypot(x, y)
    arm = r * 0.36
    kinds = (
        round_ - r,
        np.maximum(ax, ay) - r * 0.88,
        _triangle(ax, y, r),
        np.minimum(np.maximum(ax - arm, ay - r), np.maximum(ay - arm, ax - r)),
        (ax + ay - r * 1.15) * 0.707,
        np.abs(round_ - r * 0.78) - r * 0.24,
    )
    return np.choose(shape[:, None, None], kinds)


def _triangle(ax: np.ndarray, y: np.ndarray, r: np.ndarray) -> np.ndarray:
    """An upright isosceles triangle; image rows grow downwards."""
    return np.maximum(0.894 * ax - 0.447 * (y + r), y - r * 0.85)


def render(scenes: Scenes, rng: np.random.Generator) -> np.ndarray:
    """(scenes, side, side, 3) uint8: jittered place, size and colour on a tinted, noisy ground."""
    count, side = len(scenes), GRID * CELL
    ground = rng.uniform(0.25, 0.92, (count, 1, 1, 1)) + rng.uniform(-0.06, 0.06, (count, 1, 1, 3))
    slope = rng.uniform(-0.12, 0.12, (count, 2, 1, 1, 1))
    ramp = np.linspace(-1, 1, side)
    image = ground + slope[:, 0] * ramp[None, :, None, None] + slope[:, 1] * ramp[None, None, :, None]
    image = image.astype(np.float32)

    scene, cell = np.nonzero(scenes.shape >= 0)
    objects = len(scene)
    radius = rng.uniform(5.3, 7.2, objects)
    slack = (CELL / 2 - radius)[:, None]
    centre = CELL / 2 - 0.5 + rng.uniform(-1, 1, (objects, 2)) * slack
    pixel = np.arange(CELL)
    y = pixel[None, :, None] - centre[:, 0, None, None]
    x = pixel[None, None, :] - centre[:, 1, None, None]
    alpha = np.clip(0.5 - _distance(scenes.shape[scene, cell], x, y, radius), 0, 1)[..., None]
    colour = _RGB[scenes.colour[scene, cell]]
    colour = colour * rng.uniform(0.8, 1.1, (objects, 1)) + rng.uniform(-0.06, 0.06, (objects, 3))

    cells = image.reshape(count, GRID, CELL, GRID, CELL, 3)
    row, column = cell // GRID, cell % GRID
    under = cells[scene, row, :, column]
    cells[scene, row, :, column] = under + alpha * (colour[:, None, None] - under)
    image = cells.reshape(count, side, side, 3)
    image = image + rng.normal(0, 0.02, image.shape).astype(np.float32)
    return (np.clip(image, 0, 1) * 255).round().astype(np.uint8)


def ask(scenes: Scenes, rng: np.random.Generator, each: int = 2) -> list[Question]:
    """`each` questions of every kind about every scene, in the order of the scenes.

    Half of the existence questions are to be denied; half of those name a colour and a shape that are both there, but
    not on one object (the adversarial negatives of POPE). Colour questions name a shape that is there once.
    """
    questions = []
    for index in range(len(scenes)):
        cells = np.flatnonzero(scenes.shape[index] >= 0)
        colours, shapes = scenes.colour[index, cells], scenes.shape[index, cells]
        there = set(zip(colours.tolist(), shapes.tolist(), strict=True))
        for _ in range(each):
            questions.append(Question("existence", *_existence(colours, shapes, there, rng), index))
        single = np.flatnonzero(np.bincount(shapes, minlength=len(SHAPES)) == 1)
        for shape in rng.permutation(single)[:each]:
            colour = colours[shapes == shape][0]
            questions.append(Question("colour", f"What colour is the {SHAPES[shape]}?", COLOURS[colour], index))
        for which in rng.permutation(len(cells))[:each]:
            name = f"{COLOURS[colours[which]]} {SHAPES[shapes[which]]}"
            questions.append(Question("place", f"Where is the {name}?", place(cells[which]), index))
    return questions


def _existence(colours: np.ndarray, shapes: np.ndarray, there: set, rng: np.random.Generator) -> tuple[str, str]:
    answer = rng.random() < 0.5
    if answer:
        which = rng.integers(len(colours))
        pair = (int(colours[which]), int(shapes[which]))
    else:
        adversarial = [(c, s) for c in set(colours.tolist()) for s in set(shapes.tolist()) if (c, s) not in there]
        anything = [(c, s) for c in range(len(COLOURS)) for s in range(len(SHAPES)) if (c, s) not in there]
        pool = adversarial if adversarial and rng.random() < 0.5 else anything
        pair = pool[rng.integers(len(pool))]
    colour = COLOURS[pair[0]]
    article = "an" if colour[0] in "aeiou" else "a"
    text = f"Is there {article} {colour} {SHAPES[pair[1]]} in the picture?"
    return text, "yes" if answer else "no"


def place(cell: int) -> str:
    """The quadrant of a cell, in words."""
    return PLACES[2 * (cell // GRID >= GRID // 2) + (cell % GRID >= GRID // 2)]


def write_dataset(folder: Path, name: str, count: int, seed: int, each: int = 2) -> Path:
    """Write `count` scenes as PNG under `folder/images` and their questions as `folder/name.json`; return the JSON.

    Rows are LLaVA-Instruct rows with one turn each; the extra key `kind` says what is asked for and is ignored by the
    reader.
    """
    rng = np.random.default_rng(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    scenes = draw_scenes(count, rng)
    files = [f"{name}-{index:05d}.png" for index in range(count)]
    for start in range(0, count, 256):
        part = Scenes(scenes.colour[start : start + 256], scenes.shape[start : start + 256])
        for offset, pixels in enumerate(render(part, rng)):
            Image.fromarray(pixels).save(images / files[start + offset], compress_level=1)
    rows = [
        {
            "id": f"{name}-{number:06d}",
            "image": files[question.scene],
            "kind": question.kind,
            "conversations": [
                {"from": "human", "value": f"<image>\n{question.text}"},
                {"from": "gpt", "value": question.answer},
            ],
        }
        for number, question in enumerate(ask(scenes, rng, each))
    ]
    path = folder / f"{name}.json"
    write_json(path, rows)
    return path


def read_kinds(path: Path) -> list[str]:
    """The kind of every row of a file that `write_dataset` wrote."""
    return [row["kind"] for row in json.loads(path.read_text(encoding="utf-8"))]
