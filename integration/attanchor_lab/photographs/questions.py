"""Questions about scenes in several wordings, some kept for testing."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from attanchor_lab.photographs.scenes import Scene
from attanchor_lab.photographs.wordings import KINDS

T = TypeVar("T")
NEGATIVES = ("random", "popular", "adversarial")  # POPE's
_NUMBERS = ("one", "two", "three", "four")
_POPULAR = 0.25  # of the concepts, the most frequent ones, are popular
_PLURALS = {"fish": "fish", "deer": "deer", "sheep": "sheep", "bison": "bison", "mouse": "mice", "goose": "geese",
            "tooth": "teeth", "shrimp": "shrimp", "scarf": "scarves", "fireman": "firemen", "woodlouse": "woodlice",
            "lettuce": "heads of lettuce", "garlic": "bulbs of garlic", "squash": "squash"}  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A question about scene number `scene`.

    Attributes:
        asked: The concepts that it names, or that its answer does.
        negative: One of `NEGATIVES` where what it asks for is absent, else None.
    """

    kind: str
    text: str
    answer: str
    scene: int
    asked: tuple[str, ...]
    negative: str | None = None


def ask(
    scenes: Sequence[Scene],
    concepts: Sequence[str],
    wordings: Mapping[str, Sequence[str]],
    generator: np.random.Generator,
    kinds: Sequence[str] = KINDS,
) -> list[Question]:
    """About every scene a question of each of `kinds` that can be asked, and of existence one to deny, too.

    As in POPE, what is to be denied is one of all absent concepts (random), of the most frequent ones (popular), or the
    absent one that is most often in scenes with what is there (adversarial), in turns.
    """
    frequency = Counter(name for scene in scenes for name in {thing.name for thing in scene.things})
    together: Counter[tuple[str, str]] = Counter()
    for scene in scenes:
        together.update(itertools.permutations({thing.name for thing in scene.things}, 2))
    found = []
    for number, scene in enumerate(scenes):
        negative = NEGATIVES[number % len(NEGATIVES)]
        absent = _absent(scene, concepts, negative, frequency, together, generator)
        for kind, values, answer, asked, is_absent in _questions(scene, absent, generator):
            if kind not in kinds:
                continue
            text = _one(wordings[kind], generator).format(**values)
            found.append(Question(kind, text, answer, number, asked, negative if is_absent else None))
    return found


def _questions(
    scene: Scene, absent: str, generator: np.random.Generator
) -> Iterator[tuple[str, dict[str, str], str, tuple[str, ...], bool]]:
    """Kind, what its wording is filled with, answer, concepts, and whether it asks for something absent."""
    thing, alone = _one(scene.things, generator), scene.alone()
    for name, answer in ((thing.name, "yes"), (absent, "no")):
        yield "existence", {"a": with_article(name)}, answer, (name,), answer == "no"
    if coloured := [one for one in alone if one.colour]:
        one = _one(coloured, generator)
        yield "colour", {"name": one.name}, one.colour or "", (one.name,), False
    if alone:
        one = _one(alone, generator)
        yield "place", {"name": one.name}, one.place, (one.name,), False
    left, right = ([one for one in alone if one.place.endswith(side)] for side in ("left", "right"))
    if left and right:
        pair = [_one(left, generator), _one(right, generator)]
        is_left = bool(generator.random() < 0.5)
        first, second = pair if is_left else reversed(pair)
        asked = first.name, second.name
        yield "left", {"name": asked[0], "other": asked[1]}, "yes" if is_left else "no", asked, False
    name, count = Counter(one.name for one in scene.things).most_common(1)[0]
    if count == 1:
        name = thing.name
    yield "count", {"names": plural(name)}, _NUMBERS[count - 1], (name,), False
    one = _one(scene.things, generator)
    yield "what", {"place": one.place}, with_article(one.name), (one.name,), False


def _absent(
    scene: Scene,
    concepts: Sequence[str],
    negative: str,
    frequency: Counter[str],
    together: Counter[tuple[str, str]],
    generator: np.random.Generator,
) -> str:
    there = {thing.name for thing in scene.things}
    absent = [name for name in concepts if name not in there]
    if negative == "popular":
        most = frequency.most_common(max(len(there) + 1, int(_POPULAR * len(concepts))))
        absent = [name for name, _ in most if name not in there] or absent
    elif negative == "adversarial":
        often = {name: sum(together[one, name] for one in there) for name in absent}
        absent = [name for name in absent if often[name] == max(often.values())]
    return _one(absent, generator)


def with_article(name: str) -> str:
    return f"{'an' if name[0] in 'aeiou' else 'a'} {name}"


def plural(name: str) -> str:
    if name in _PLURALS:
        return _PLURALS[name]
    if name.endswith(("s", "x", "ch", "sh")) or name in ("mango", "potato", "tomato"):
        return f"{name}es"
    return f"{name[:-1]}ies" if name.endswith("y") and name[-2] not in "aeiou" else f"{name}s"


def _one(among: Sequence[T], generator: np.random.Generator) -> T:
    return among[int(generator.integers(len(among)))]


def chance(questions: Sequence[Question]) -> float:
    """The share of the commonest answer: what a model that never looks can reach."""
    counts = Counter(question.answer for question in questions)
    return max(counts.values()) / len(questions) if questions else 0.0
