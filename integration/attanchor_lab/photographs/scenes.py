"""Draw scenes: up to four photographed things on a background, one in each corner, and where they can be seen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageFilter

from attanchor_lab.photographs.config import PhotographConfig
from attanchor_lab.photographs.stamps import Stamp, background, cut_out

PLACES = ("top left", "top right", "bottom left", "bottom right")
_SIZES = 0.3, 0.5  # bounds of a thing's longer side, as a share of the scene's
_SHIFT = 0.07  # how far a thing stands from the middle of its corner, as a share of the side: they may overlap
_LEAST_VISIBLE = 0.6  # of a thing, behind those in front of it
_SKEW = 8.0  # concept number r is drawn with weight 1 / (r + _SKEW), so that some are popular
_THEMED, _COLOURED, _REPEATED = 0.5, 0.4, 0.4  # how often all things are of one theme, one's colour is told, some alike


@dataclass(frozen=True)
class Thing:
    """A stamp in a scene. `box` is around what can be seen of it, (left, top, right, bottom) in pixels; `visible` is
    how much of it that is."""

    name: str
    colour: str | None
    place: str
    box: tuple[int, int, int, int]
    visible: float


@dataclass(frozen=True)
class Scene:
    """A picture and what is in it, in the order of `PLACES`."""

    image: Image.Image
    things: tuple[Thing, ...]

    def alone(self) -> list[Thing]:
        """The things of whose concept there is one."""
        names = [thing.name for thing in self.things]
        return [thing for thing in self.things if names.count(thing.name) == 1]


class Drawer:
    """Draws scenes of `stamps`: popular concepts, which the seed chooses, more often, things of one theme together."""

    def __init__(self, config: PhotographConfig, stamps: Sequence[Stamp], generator: np.random.Generator) -> None:
        self.config, self.stamps, self.generator = config, list(stamps), generator
        names = sorted({stamp.name for stamp in stamps})
        if len(names) < config.most:
            raise ValueError(f"{len(names)} concepts are too few for scenes of {config.most} things")
        order = np.random.default_rng(config.seed).permutation(len(names)).tolist()
        rank = {names[number]: place for place, number in enumerate(order)}
        self.weight = {name: 1 / (rank[name] + _SKEW) for name in names}

    def draw(self) -> Scene:
        """A scene of stamps that are drawn."""
        return self.compose(self._choose())

    def compose(self, chosen: Sequence[Stamp]) -> Scene:
        """A scene of stamps that are given, at corners that are drawn; one too far behind others is placed again."""
        corners = sorted(self.generator.permutation(len(PLACES))[: len(chosen)].tolist())
        while (scene := self._compose(chosen, corners)) is None:
            pass
        return scene

    def _choose(self) -> list[Stamp]:
        generator = self.generator
        count = int(generator.integers(self.config.least, self.config.most + 1))
        coloured = [stamp for stamp in self.stamps if stamp.colour]
        first = self._pick(coloured if coloured and generator.random() < _COLOURED else self.stamps)
        themed = [stamp for stamp in self.stamps if stamp.theme == first.theme]
        enough = len({stamp.name for stamp in themed}) >= count
        pool = themed if enough and generator.random() < _THEMED else self.stamps
        alike = int(generator.integers(2, count + 1)) if count > 1 and generator.random() < _REPEATED else 1
        chosen = [first]
        for number in range(1, count):
            taken = {stamp.name for stamp in chosen}
            if number < alike:
                chosen.append(self._pick([stamp for stamp in self.stamps if stamp.name == first.name]))
            else:
                chosen.append(self._pick([stamp for stamp in pool if stamp.name not in taken]))
        return [chosen[number] for number in generator.permutation(count)]

    def _pick(self, stamps: Sequence[Stamp]) -> Stamp:
        """A concept by its weight, then one of its stamps."""
        names = sorted({stamp.name for stamp in stamps})
        weights = np.array([self.weight[name] for name in names])
        name = names[self.generator.choice(len(names), p=weights / weights.sum())]
        own = [stamp for stamp in stamps if stamp.name == name]
        return own[self.generator.integers(len(own))]

    def _compose(self, chosen: Sequence[Stamp], corners: Sequence[int]) -> Scene | None:
        generator, side = self.generator, self.config.pixels
        image = background(side, self.stamps, generator)
        owner = np.full((side, side), -1)
        shown = np.zeros(len(chosen))
        for number in generator.permutation(len(chosen)).tolist():  # who stands in front is drawn
            stamp = cut_out(chosen[number].path)
            scale = side * generator.uniform(*_SIZES) / max(stamp.size)
            width, height = (max(1, round(length * scale)) for length in stamp.size)
            stamp = stamp.resize((width, height), Image.Resampling.LANCZOS)
            if generator.random() < 0.5:
                stamp = stamp.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
            row, column = divmod(corners[number], 2)
            middle = (np.array([column, row]) / 2 + 0.25 + generator.uniform(-_SHIFT, _SHIFT, 2)) * side
            size = np.array([width, height])
            left, top = np.clip(middle - size / 2, 0, side - size).astype(int).tolist()
            image.paste(stamp, (left, top), stamp)
            opaque = np.asarray(stamp.getchannel("A")) > 127
            owner[top : top + height, left : left + width][opaque] = number
            shown[number] = max(1, opaque.sum())
        things = []
        for number, (stamp_, corner) in enumerate(zip(chosen, corners, strict=True)):
            rows, columns = np.nonzero(owner == number)
            visible = len(rows) / shown[number]
            if visible < _LEAST_VISIBLE:
                return None
            box = (int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1)
            things.append(Thing(stamp_.name, stamp_.colour, PLACES[corner], box, round(visible, 3)))
        return Scene(self._degraded(image), tuple(things))

    def _degraded(self, image: Image.Image) -> Image.Image:
        config = self.config
        if config.blur:
            image = image.filter(ImageFilter.GaussianBlur(config.blur * config.pixels / 336))
        if config.noise:
            pixels = np.asarray(image, dtype=np.float32)
            pixels = pixels + self.generator.normal(0, 255 * config.noise, pixels.shape).astype(np.float32)
            image = Image.fromarray(pixels.clip(0, 255).round().astype(np.uint8))
        return image
