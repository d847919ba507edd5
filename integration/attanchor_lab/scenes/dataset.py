"""Scenes on disk: rows of LLaVA-Instruct with a PNG for each, drawn and rendered as all scenes are (`world`).

A cell is one patch of the small LLaVA's vision tower, so the patch that a word belongs to is known exactly: that is
what makes the matching of AttAnchor measurable here.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from attanchor_lab.scenes import questions, world
from attanchor_lab.scenes.questions import ID, WORDS
from attanchor_lab.scenes.world import COLOURS, EMPTY, KINDS, SHAPES, Scenes, World  # noqa: F401  of all scenes
from attanchor_vlm.records import write_json

GRID = 8  # cells per side
CELL = 16  # pixels per cell
WORLD = World(GRID, GRID, CELL, least=5, most=9, distractors=0, noise=0.02)
PLACES = ("top left", "top right", "bottom left", "bottom right")


@dataclass
class Question:
    kind: str
    text: str
    answer: str
    scene: int


def generator_for(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw_scenes(count: int, generator: torch.Generator, least: int = 5, most: int = 9) -> Scenes:
    """`count` random scenes of `least` to `most` objects; no two objects of a scene share both colour and shape."""
    return world.draw(dataclasses.replace(WORLD, least=least, most=most), count, generator)


def render(scenes: Scenes, generator: torch.Generator) -> np.ndarray:
    """(scenes, side, side, 3) uint8."""
    pixels = world.render(WORLD, scenes, generator, slope=0.12) / 2 + 0.5
    return (pixels.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def ask(scenes: Scenes, generator: torch.Generator, each: int = 2) -> list[Question]:
    """`each` questions of every kind about every scene, in the order of the scenes; fewer where a scene has no more.

    Half of the existence questions are to be denied; half of those name a colour and a shape that are both there, but
    not on one object (the adversarial negatives of POPE). Colour questions name a shape that is there once.
    """
    found: list[list[Question]] = [[] for _ in range(len(scenes))]
    for number, shares in enumerate(((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))):
        mixture = questions.Mixture(shares, 0.5, ("random", "adversarial"))
        asked = questions.ask(
            WORLD, scenes, 6 * each, mixture, generator
        )  # some twice, or a place for want of a colour
        for scene, own in enumerate(found):
            told: dict[str, Question] = {}
            kinds, answers = asked.kind[scene].tolist(), asked.answer[scene].tolist()
            for kind, words, answer in zip(kinds, asked.words[scene].tolist(), answers, strict=True):
                if kind == number and len(told) < each:
                    text = _text(KINDS[kind], words)
                    told[text] = Question(KINDS[kind], text, _answer(answer), scene)
            own += told.values()
    return [question for own in found for question in own]


def _text(kind: str, words: list[int]) -> str:
    """The sentence of a question of six words."""
    name = " ".join(WORDS[word] for word in words if questions.COLOUR <= word < questions.COLOUR + questions.LABELS)
    if kind == "existence":
        return f"Is there {'an' if name[0] in 'aeiou' else 'a'} {name} in the picture?"
    return f"What colour is the {name}?" if kind == "colour" else f"Where is the {name}?"


def _answer(word: int) -> str:
    place = word - ID[questions.PLACES[0]]
    return PLACES[place] if 0 <= place < len(PLACES) else WORDS[word]


def write_dataset(folder: Path, name: str, count: int, seed: int, each: int = 2) -> Path:
    """Write `count` scenes as PNG under `folder/images` and their questions as `folder/name.json`; return the JSON.

    Rows are LLaVA-Instruct rows with one turn each; the extra key `kind` says what is asked for and is ignored by the
    reader.
    """
    generator = generator_for(seed)
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    scenes = draw_scenes(count, generator)
    files = [f"{name}-{index:05d}.png" for index in range(count)]
    for start in range(0, count, 256):
        for offset, pixels in enumerate(render(scenes[start : start + 256], generator)):
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
        for number, question in enumerate(ask(scenes, generator, each))
    ]
    path = folder / f"{name}.json"
    write_json(path, rows)
    return path


def read_kinds(path: Path) -> list[str]:
    """The kind of every row of a file that `write_dataset` wrote."""
    return [row["kind"] for row in json.loads(path.read_text(encoding="utf-8"))]
