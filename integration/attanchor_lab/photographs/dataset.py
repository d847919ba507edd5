"""Photograph scenes on disk: LLaVA-Instruct rows for training and for every kind of question and split of the test."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from attanchor_lab.photographs import questions, stamps
from attanchor_lab.photographs.config import PhotographConfig
from attanchor_lab.photographs.questions import Question
from attanchor_lab.photographs.scenes import Drawer, Scene
from attanchor_lab.photographs.stamps import Stamp
from attanchor_lab.photographs.wordings import KINDS, WORDINGS
from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import check_parent, write_json

SPLITS = ("seen", "concepts", "wordings")  # of the test: as in training; held-out concepts; held-out wordings
_HELD_OUT_WORDINGS = 2  # of each kind
_COLOURED = 0.2  # of the concepts, where they are chosen


def write_photographs(config: PhotographConfig, say: Callable[[str], None] = print) -> list[Path]:
    """Write rows, their images under `images`, and `world.json`, which names what is held out and what guessing gives.

    Files: train-questions.json, and test-KIND-SPLIT.json for every kind of question, where SPLIT is one of `SPLITS`.
    Besides those of LLaVA-Instruct, a row has the keys `kind`, `split`, `negative` (POPE's kind of an absent thing, or
    null), `asked` (concepts) and `things`: name, colour, place, visible box in pixels and visible share of everything
    in the image.

    Returns:
        The files of rows.

    Raises:
        SetupError: the stamps or scikit-image are not installed, or they hold too few concepts.
        ValueError: a setting is out of its bounds, or `output` exists or cannot be written.
    """
    if config.output.exists():
        raise ValueError(f"output {config.output} exists; take another folder")
    check_parent(config.output)
    stamps.photographs()
    every = stamps.find_stamps(config.stamps)
    seen, held_out = split_concepts(every, config)
    known, new = _split_wordings(config.seed)
    images = config.output / "images"
    images.mkdir(parents=True)
    written, chances = [], {}

    def save(name: str, asked: Sequence[Question], drawn: Sequence[Scene], split: str) -> None:
        path = config.output / f"{name}.json"
        write_json(path, [_row(f"{name}-{number:06d}", one, drawn, split) for number, one in enumerate(asked)])
        chances[path.name] = {"rows": len(asked), "chance": round(questions.chance(asked), 4)}
        written.append(path)

    for number, split in enumerate(("train", *SPLITS)):
        generator = np.random.default_rng([config.seed, number])
        concepts, wordings = held_out if split == "concepts" else seen, new if split == "wordings" else known
        drawer = Drawer(config, [stamp for stamp in every if stamp.name in concepts], generator)
        drawn = [drawer.draw() for _ in range(config.scenes if split == "train" else config.test_scenes)]
        for index, scene in enumerate(drawn):
            scene.image.save(images / f"{split}-{index:05d}.jpg", quality=92)
        asked = questions.ask(drawn, concepts, wordings, generator, config.kinds)
        if split == "train":
            save("train-questions", asked, drawn, split)
        else:
            for kind in KINDS:
                if own := [one for one in asked if one.kind == kind]:
                    save(f"test-{kind}-{split}", own, drawn, split)
        say(f"{split}: {len(drawn)} scenes of {len(concepts)} concepts, {len(asked)} questions")
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in ("output", "stamps")}
    about = {"settings": settings, "stamps": len(every), "concepts": {"seen": seen, "held_out": held_out},
             "wordings": {"seen": known, "held_out": new}, "files": chances}  # fmt: skip
    write_json(config.output / "world.json", about)
    return written


def split_concepts(every: Sequence[Stamp], config: PhotographConfig) -> tuple[list[str], list[str]]:
    """The concepts of training, and those held out: a share of those with a colour, and of the others.

    Raises:
        SetupError: too few for scenes of `config.most` things on either side.
    """
    generator = np.random.default_rng(config.seed)
    coloured = sorted({stamp.name for stamp in every if stamp.colour})
    others = sorted({stamp.name for stamp in every} - set(coloured))
    seen: list[str] = []
    held_out: list[str] = []
    for names, share in ((coloured, _COLOURED), (others, 1 - _COLOURED)):
        names = [names[number] for number in generator.permutation(len(names))]
        if config.concepts is not None:
            names = names[: round(share * config.concepts)]
        count = round(config.held_out * len(names))
        held_out += names[:count]
        seen += names[count:]
    if min(len(seen), len(held_out)) <= config.most:
        raise SetupError(
            f"{len(seen)} concepts for training and {len(held_out)} held out are too few for scenes of {config.most} "
            "things; give more stamps, more --concepts, or another --held-out"
        )
    return sorted(seen), sorted(held_out)


def _split_wordings(seed: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    generator = np.random.default_rng([seed, len(SPLITS) + 1])
    known, new = {}, {}
    for kind, texts in WORDINGS.items():
        shuffled = [texts[number] for number in generator.permutation(len(texts))]
        new[kind], known[kind] = shuffled[:_HELD_OUT_WORDINGS], shuffled[_HELD_OUT_WORDINGS:]
    return known, new


def _row(identity: str, asked: Question, drawn: Sequence[Scene], split: str) -> dict[str, Any]:
    return {
        "id": identity,
        "image": f"{split}-{asked.scene:05d}.jpg",
        "kind": asked.kind,
        "split": split,
        "negative": asked.negative,
        "asked": list(asked.asked),
        "things": [dataclasses.asdict(thing) for thing in drawn[asked.scene].things],
        "conversations": talk([(asked.text, asked.answer)]),
    }


def talk(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    """The conversation of a row: questions about one image, and what is answered."""
    said = [turn for question, answer in turns for turn in (("human", question), ("gpt", answer))]
    said[0] = "human", f"<image>\n{turns[0][0]}"
    return [{"from": who, "value": text} for who, text in said]


def read_photographs(path: Path) -> list[Mapping[str, Any]]:
    """The rows of a file that `write_photographs` wrote, with their further keys."""
    return json.loads(path.read_text(encoding="utf-8"))
