"""Rendered scenes, a batch at a time on any device: coloured shapes on a grid, with distractors, noise, optional blur.

One patch of the model holds at most one object, so the patch that a word belongs to is known exactly. Nothing here
depends on the contents of a tensor for its shapes, so no step has to read one back from the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple")
SHAPES = ("circle", "square", "triangle", "cross", "diamond", "ring")
EMPTY = "empty"  # the label word of a patch without an object
KINDS = ("existence", "colour", "place")  # of questions
PAIRS = len(COLOURS) * len(SHAPES)
POPULAR = 12  # so many of the most frequent pairs are the "popular" ones
_RGB = ((215, 40, 40), (240, 135, 30), (235, 215, 50), (50, 160, 70), (50, 95, 215), (150, 65, 180))
_SKEW = 8.0  # pair number r is drawn with weight 1 / (r + _SKEW): the first one five times as often as the last


@dataclass(frozen=True)
class World:
    """What scenes look like. `rows * columns` is the number of image tokens.

    Attributes:
        rows, columns: Patches; both even, so that every patch lies in one quadrant.
        cell: Pixels per side of a patch.
        least, most: Objects in a scene.
        distractors: Patches with grey clutter, which is no object.
        noise: Standard deviation of the pixel noise, of a range of 1.
    """

    rows: int = 6
    columns: int = 6
    cell: int = 8
    least: int = 5
    most: int = 9
    distractors: int = 4
    noise: float = 0.1

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            if (value := getattr(self, name)) < 2 or value % 2:
                raise ValueError(f"{name} is {value}; it should be even and at least 2")
        if self.cell < 2 or self.distractors < 0 or self.noise < 0:
            raise ValueError(
                f"cell, distractors, noise are {self.cell}, {self.distractors}, {self.noise}; they should be at least "
                "2, 0, 0"
            )
        if not 1 <= self.least <= self.most <= PAIRS:
            raise ValueError(f"least and most are {self.least}, {self.most}; they should rise within 1 to {PAIRS}")
        if self.most + self.distractors > self.patches:
            raise ValueError(
                f"most + distractors is {self.most + self.distractors}; there are only {self.patches} patches"
            )

    @property
    def patches(self) -> int:
        return self.rows * self.columns


@dataclass
class Scenes:
    """B scenes with room for K objects each, on P patches.

    Attributes:
        where: (B, K) int64, the patch of each object.
        colour, shape: (B, K) int64.
        there: (B, K) bool, False for a place that holds no object.
        clutter: (B, C) int64, the patches of the distractors.
    """

    where: Tensor
    colour: Tensor
    shape: Tensor
    there: Tensor
    clutter: Tensor
    patches: int

    def __len__(self) -> int:
        return len(self.where)

    def __getitem__(self, index: Tensor | slice) -> Scenes:
        where, colour, shape, there, clutter = (
            field[index] for field in (self.where, self.colour, self.shape, self.there, self.clutter)
        )
        return Scenes(where, colour, shape, there, clutter, self.patches)

    def on_patches(self, kind: Tensor) -> Tensor:
        """(B, P) int64 from (B, K): what each patch holds, -1 for nothing."""
        found = torch.full((len(self), self.patches + 1), -1, device=kind.device)
        # Places without an object write into a column that is cut off.
        return found.scatter(1, self.where.masked_fill(~self.there, self.patches), kind)[:, : self.patches]

    def labels(self) -> Tensor:
        """(B, P, colours + shapes + 1) float32: 1 at the words that describe each patch, the last being "empty"."""
        colour, shape = self.on_patches(self.colour), self.on_patches(self.shape)
        of = (colour, len(COLOURS)), (shape, len(SHAPES))
        known = [kind[..., None] == torch.arange(count, device=kind.device) for kind, count in of]
        return torch.cat([*known, shape[..., None] < 0], -1).float()

    def pairs(self) -> Tensor:
        """(B, PAIRS) bool: which pairs of colour and shape the scene holds."""
        found = torch.zeros(len(self), PAIRS + 1, dtype=torch.bool, device=self.where.device)
        pair = (self.colour * len(SHAPES) + self.shape).masked_fill(~self.there, PAIRS)
        return found.scatter(1, pair, True)[:, :PAIRS]


def frequencies(device: torch.device | str = "cpu") -> Tensor:
    """(PAIRS,) weights with which pairs are drawn; spread over colours and shapes by a fixed shuffle."""
    order = torch.randperm(PAIRS, generator=torch.Generator().manual_seed(7))
    return (1 / (order + _SKEW)).to(device)


def draw(world: World, count: int, generator: torch.Generator, least: int = 0, most: int = 0) -> Scenes:
    """`count` scenes on the generator's device; no two objects of a scene share both colour and shape.

    Args:
        least, most: Other numbers of objects than the world's, `most` no larger; 0 for the world's.
    """
    device, most = generator.device, min(most or world.most, world.most)
    least = least or min(world.least, most)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    # The highest of noisy keys: a draw without replacement, for all scenes at once.
    places = uniform(count, world.patches).topk(most + world.distractors, dim=1).indices
    gumbel = -(-uniform(count, PAIRS).clamp(1e-9, 1 - 1e-7).log()).log()
    pair = (frequencies(device).log() + gumbel).topk(most, dim=1).indices
    number = torch.randint(least, most + 1, (count, 1), generator=generator, device=device)
    there = torch.arange(most, device=device) < number
    where, clutter = places[:, :most], places[:, most:]
    return Scenes(where, pair // len(SHAPES), pair % len(SHAPES), there, clutter, world.patches)


def render(world: World, scenes: Scenes, generator: torch.Generator, blur: float = 0.0, slope: float = 0.0) -> Tensor:
    """(B, 3, height, width) float32 about 0: jittered place, size and colour on a tinted, noisy ground.

    Args:
        blur: Standard deviation in pixels of a Gaussian blur, before the noise; 0 for none.
        slope: How much the ground's brightness may change from the middle to an edge, of a range of 1.
    """
    device, count, cell = generator.device, len(scenes), world.cell

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator, device=device)

    ground = uniform(0.3, 0.85, count, 1, 1, 1) + uniform(-0.05, 0.05, count, 1, 3, 1)
    image = ground.expand(count, world.patches, 3, cell * cell)

    drawn = scenes.where.shape[1]
    where = torch.cat([scenes.where, scenes.clutter], 1)
    shape = torch.cat([scenes.shape, torch.randint(6, scenes.clutter.shape, generator=generator, device=device)], 1)
    there = torch.cat([scenes.there, torch.ones_like(scenes.clutter, dtype=torch.bool)], 1)
    objects = where.shape[1]
    radius = uniform(0.36, 0.46, count, objects, 1, 1) * cell
    centre = cell / 2 - 0.5 + uniform(-1, 1, count, objects, 2, 1, 1) * (cell / 2 - radius)[:, :, None]
    pixel = torch.arange(cell, device=device)
    y, x = pixel[:, None] - centre[:, :, 0], pixel - centre[:, :, 1]
    distances = torch.stack(_distances(x, y, radius), -1)
    # Clutter is the inverse of a shape: a grey patch with a hole.
    distance = distances.gather(-1, shape[:, :, None, None, None].expand(*distances.shape[:-1], 1))[..., 0]
    distance[:, drawn:] *= -1
    alpha = (0.5 - distance).clamp(0, 1).flatten(2)[:, :, None] * there[:, :, None, None]

    rgb = torch.tensor(_RGB, device=device) / 255
    colour = rgb[scenes.colour] * uniform(0.8, 1.1, count, drawn, 1) + uniform(-0.06, 0.06, count, drawn, 3)
    grey = uniform(0.1, 0.9, count, objects - drawn, 1).expand(-1, -1, 3)
    colour = torch.cat([colour, grey], 1)[..., None]
    index = where[:, :, None, None].expand(-1, -1, 3, cell * cell)
    under = image.gather(1, index)
    image = image.scatter(1, index, under + alpha * (colour - under))

    image = image.unflatten(1, (world.rows, world.columns)).unflatten(-1, (cell, cell))
    image = image.permute(0, 3, 1, 4, 2, 5).reshape(count, 3, world.rows * cell, world.columns * cell)
    if slope > 0:
        y, x = (torch.linspace(-1, 1, image.shape[axis], device=device) for axis in (2, 3))
        steep = uniform(-slope, slope, count, 2, 1, 1, 1)
        image = image + steep[:, 0] * y[:, None] + steep[:, 1] * x
    if blur > 0:
        image = _blurred(image, blur)
    noise = torch.randn(image.shape, generator=generator, device=device) * world.noise
    return (image + noise - 0.5) * 2


def _distances(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
    """Distance in pixels to the outline of every shape, negative inside, in the order of SHAPES."""
    ax, ay = x.abs().expand_as(x + y), y.abs().expand_as(x + y)
    round_, arm = torch.hypot(ax, ay), r * 0.36
    return (
        round_ - r,
        torch.maximum(ax, ay) - r * 0.88,
        torch.maximum(0.894 * ax - 0.447 * (y + r), y - r * 0.85),  # upright: image rows grow downwards
        torch.minimum(torch.maximum(ax - arm, ay - r), torch.maximum(ay - arm, ax - r)),
        (ax + ay - r * 1.15) * 0.707,
        (round_ - r * 0.72).abs() - r * 0.28,
    )


def _blurred(image: Tensor, sigma: float) -> Tensor:
    reach = max(1, round(3 * sigma))
    offsets = torch.arange(-reach, reach + 1, device=image.device, dtype=image.dtype)
    weights = torch.exp(-(offsets**2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    image = F.pad(image, (reach, reach, reach, reach), mode="replicate")
    return F.conv2d(F.conv2d(image, weights, groups=3), weights.transpose(2, 3), groups=3)
