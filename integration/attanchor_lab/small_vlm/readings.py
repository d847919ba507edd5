"""What the tower reads, in the words of its classifier: which stamps it knows, and talks that tell its readings.

The talks are for stage 1. A language model that is told the right names of a few dozen things learns those names; told
what the tokens before it say, of hundreds of things, it learns to read them, names that it was never told included.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from attanchor_lab.photographs.config import PhotographConfig
from attanchor_lab.photographs.dataset import talk
from attanchor_lab.photographs.questions import with_article
from attanchor_lab.photographs.scenes import Drawer, Scene
from attanchor_lab.photographs.stamps import cut_out, find_stamps
from attanchor_lab.small_vlm import parts as sources
from attanchor_lab.small_vlm.tower import EfficientNetLite, last_word
from attanchor_vlm.records import write_json

_SIDE = 448  # pixels that the tower is shown a stamp in
_KINDS = ("what", "place", "existence")  # of questions that a reading answers
_TRIES = 10  # scenes drawn for each one kept, at most
Tower = tuple[EfficientNetLite, tuple[Tensor, Tensor]]  # with its classifier, weight and bias


def known_stamps(source: Path, folder: Path) -> Path:
    """Fill `folder` with links to the stamps that the tower knows: alone on grey, their concept is a word of the class
    that it gives them. Of what it cannot tell, nothing reaches the language model."""
    tower, names = sources.read_tower(_SIDE), [name.lower().split() for name in sources.class_names()]
    words = {word for name in names for word in name}
    for stamp in (one for one in find_stamps(source) if one.name in words):
        told = _classes(tower, _alone(stamp.path))[2:-2, 2:-2].mean((0, 1)).argmax()
        if stamp.name in names[told]:
            link = folder / stamp.path.relative_to(source)
            link.parent.mkdir(parents=True, exist_ok=True)
            for suffix in (".png", ".txt"):
                if not link.with_suffix(suffix).exists():
                    link.with_suffix(suffix).symlink_to(stamp.path.with_suffix(suffix))
    return folder


def write_readings(world: Path, stamps: Path, folder: Path, scenes: int, pixels: int, tower: Tower, seed: int) -> Path:
    """Draw scenes and write, in `folder`, a talk about each. What is read of a thing is the likeliest last word of a
    class's name, in the mean of the patches there.

    A talk has every question of one kind, in any order: what is at the corners; where what is read is; whether it is in
    the picture, and as often what was read in others. Of several kinds one would give away the answers of the next.

    Args:
        world: A folder of `write_photographs`. Stamps of its held-out concepts are not drawn, nor are readings of those
            words told; kinds and wordings are those that it trains on.
        stamps: The folder of all stamps, whether the tower knows them or not.

    Returns:
        The file of rows; the images lie beside it.

    Raises:
        ValueError: nearly all that the tower reads is held out.
    """
    told = json.loads((world / "world.json").read_text(encoding="utf-8"))
    left_out = set(told["concepts"]["held_out"])
    config = PhotographConfig(output=folder, **told["settings"] | {"pixels": pixels})
    kinds = [kind for kind in _KINDS if kind in config.kinds] or _KINDS[:1]
    generator = np.random.default_rng([seed, scenes])
    every = [stamp for stamp in find_stamps(stamps) if stamp.name not in left_out]
    drawer = Drawer(config, every, generator)
    last = [last_word(name) for name in sources.class_names()]
    words = sorted(set(last))
    of_word = torch.tensor([[float(one == word) for word in words] for one in last])
    folder.mkdir(parents=True)
    rows: list[dict[str, Any]] = []
    before: list[str] = []
    for _ in range(_TRIES * scenes):
        chosen = generator.choice(len(every), generator.integers(config.least, config.most + 1), replace=False)
        scene = drawer.compose([every[number] for number in chosen])
        readings = [
            (place, word)
            for place, word in _readings(scene, _classes(tower, scene.image) @ of_word, words)
            if not left_out & {word, word.removesuffix("s")}
        ]
        kind = kinds[generator.integers(len(kinds))]
        turns = talk_about(kind, readings, before, told["wordings"]["seen"][kind], generator)
        before += [word for _, word in readings]
        if turns:
            name = f"{len(rows):06d}.jpg"
            scene.image.save(folder / name, quality=92)
            rows.append({"id": f"readings-{len(rows):06d}", "image": name, "conversations": talk(turns)})
        if len(rows) == scenes:
            break
    else:
        raise ValueError(f"the tower reads little but held-out concepts in the stamps of {stamps}; hold out fewer")
    write_json(folder / "readings.json", rows)
    return folder / "readings.json"


def talk_about(
    kind: str,
    things: Sequence[tuple[str, str]],
    before: Sequence[str],
    wordings: Sequence[str],
    generator: np.random.Generator,
) -> list[tuple[str, str]]:
    """Every question of a kind about a scene and its answer, in any order.

    Args:
        things: Place and name of each.
        before: Names in other scenes, of which some are asked for here.
    """
    asked = _asked(kind, things, before, generator)
    return [
        (wordings[int(generator.integers(len(wordings)))].format(**asked[number][0]), asked[number][1])
        for number in generator.permutation(len(asked))
    ]


def _asked(
    kind: str, readings: Sequence[tuple[str, str]], before: Sequence[str], generator: np.random.Generator
) -> list[tuple[dict[str, str], str]]:
    """Of every question of a kind: what its wording is filled with, and the answer."""
    here = [word for _, word in readings]
    if kind == "what":
        return [({"place": place}, with_article(word)) for place, word in readings]
    if kind == "place":
        return [({"name": word}, place) for place, word in readings if here.count(word) == 1]
    elsewhere = [word for word in before if word not in here]
    absent = generator.choice(elsewhere, len(here)).tolist() if elsewhere else []
    answered = dict.fromkeys(here, "yes") | dict.fromkeys(absent, "no")
    return [({"a": with_article(word)}, answer) for word, answer in answered.items()]


def _readings(scene: Scene, told: Tensor, words: Sequence[str]) -> list[tuple[str, str]]:
    """Place and reading of every thing whose box has the middle of a patch in it, of (rows, columns, words)."""
    rows, columns = ((torch.arange(count) + 0.5) * scene.image.height / count for count in told.shape[:2])
    found = []
    for thing in scene.things:
        left, top, right, bottom = thing.box
        inside = ((rows >= top) & (rows <= bottom))[:, None] & (columns >= left) & (columns <= right)
        if inside.any():
            found.append((thing.place, words[int(told[inside].mean(0).argmax())]))
    return found


@torch.no_grad()
def _classes(tower: Tower, image: Image.Image) -> Tensor:
    """(rows, columns, classes): what the classifier makes of every patch."""
    model, (weight, bias) = tower
    pixels = (torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)[None] - 127) / 128
    patches = model(pixels).last_hidden_state[0].unflatten(0, (image.height // model.config.patch_size, -1))
    return F.linear(patches, weight, bias).softmax(-1)


def _alone(path: Path) -> Image.Image:
    """A stamp in the middle of grey, as large as in scenes."""
    stamp = cut_out(path).copy()
    stamp.thumbnail((int(0.43 * _SIDE),) * 2)
    image = Image.new("RGB", (_SIDE, _SIDE), (127, 127, 127))
    image.paste(stamp, ((_SIDE - stamp.width) // 2, (_SIDE - stamp.height) // 2), stamp)
    return image
