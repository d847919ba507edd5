"""Questions about scenes, as tensors: six words each, one word as the answer; negatives are of POPE's kinds."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attanchor_lab.scenes.world import (
    COLOURS,
    EMPTY,
    KINDS,
    PAIRS,
    POPULAR,
    SHAPES,
    Scenes,
    World,
    frequencies,
)

NEGATIVES = ("random", "popular", "adversarial")
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
WORDS = (
    "<pad>", "<s>", "<image>", "is", "there", "a", "what", "colour", "where", "the", "?", "yes", "no",
    *COLOURS, *SHAPES, EMPTY, *PLACES,
)  # fmt: skip
ID = {word: number for number, word in enumerate(WORDS)}
PAD, START, IMAGE, YES, NO = (ID[word] for word in ("<pad>", "<s>", "<image>", "yes", "no"))
COLOUR, SHAPE = ID[COLOURS[0]], ID[SHAPES[0]]  # the first of each; the others follow
LABELS = len(COLOURS) + len(SHAPES)  # words that a patch with an object may have
LENGTH = 6  # words of a question
EXISTENCE, COLOURS_OF, PLACE = range(len(KINDS))
_ASKED = tuple(
    [ID[word] for word in text.split()]
    for text in ("is there a red circle ?", "what colour is the circle ?", "where is the red circle ?")
)


@dataclass(frozen=True)
class Mixture:
    """Which questions are drawn.

    Attributes:
        kinds: Shares of existence, colour and place questions.
        yes: Share of the existence questions that are to be affirmed.
        negatives: The kinds of object that the others ask for, equally often: "random" (any absent pair of colour and
            shape), "popular" (an absent pair that is frequent in the scenes), "adversarial" (absent, though colour and
            shape are both in the scene, on different objects).
    """

    kinds: tuple[float, float, float] = (0.4, 0.25, 0.35)
    yes: float = 0.5
    negatives: tuple[str, ...] = NEGATIVES

    def __post_init__(self) -> None:
        if not self.negatives or set(self.negatives) - set(NEGATIVES):
            raise ValueError(f"negatives is {self.negatives!r}; it should name some of {', '.join(NEGATIVES)}")
        if not 0 <= self.yes <= 1:
            raise ValueError(f"yes is {self.yes}; it should be a share between 0 and 1")
        if len(self.kinds) != len(KINDS) or min(self.kinds) < 0 or not sum(self.kinds) > 0:
            raise ValueError(f"kinds is {self.kinds!r}; it should hold three shares")


@dataclass
class Questions:
    """B scenes, Q questions each.

    Attributes:
        words: (B, Q, LENGTH) int64 token ids.
        answer: (B, Q) int64 token ids.
        kind: (B, Q) int64, an index of KINDS.
        negative: (B, Q) int64, an index of NEGATIVES; -1 where the object asked for is there.
        target: (B, Q) int64, the patch of the object asked for, -1 where there is none.
    """

    words: Tensor
    answer: Tensor
    kind: Tensor
    negative: Tensor
    target: Tensor

    def flat(self) -> Questions:
        """The same with B * Q scenes of one question: every field loses its second axis."""
        fields = (self.words, self.answer, self.kind, self.negative, self.target)
        return Questions(*(field.flatten(0, 1) for field in fields))


def ask(world: World, scenes: Scenes, each: int, mixture: Mixture, generator: torch.Generator) -> Questions:
    """`each` questions about every scene, all of which can be answered."""
    device, count = generator.device, len(scenes)
    shape = (count, each)

    def uniform(*size: int) -> Tensor:
        return torch.rand(*size, generator=generator, device=device)

    def one_of(weights: Tensor) -> Tensor:
        """(B, Q) indices into (B, n) weights, drawn with replacement; all-zero rows give anything."""
        return torch.multinomial(weights.float() + 1e-12, each, replacement=True, generator=generator)

    kind = torch.multinomial(
        torch.tensor(mixture.kinds, device=device).float(), count * each, True, generator=generator
    )
    kind = kind.view(shape)
    # Colour questions need a shape that is there once; without one, a place is asked for.
    holds = torch.nn.functional.one_hot(scenes.shape, len(SHAPES)).bool() & scenes.there[..., None]
    single = (holds & (holds.sum(1, keepdim=True) == 1)).any(-1)  # (B, K): objects whose shape is theirs alone
    kind = torch.where((kind == COLOURS_OF) & ~single.any(-1, keepdim=True), PLACE, kind)

    chosen = torch.where(kind == COLOURS_OF, one_of(single), one_of(scenes.there))  # an object for every question
    colour, shape_, patch = (field.gather(1, chosen) for field in (scenes.colour, scenes.shape, scenes.where))

    is_negative = (kind == EXISTENCE) & (uniform(*shape) >= mixture.yes)
    pairs = scenes.pairs()
    pools = torch.stack(_absent(scenes, pairs), 1)  # (B, 3, PAIRS)
    allowed = torch.tensor([name in mixture.negatives for name in NEGATIVES], device=device).float()
    negative = torch.multinomial(allowed, count * each, True, generator=generator).view(shape)
    has_pool = pools.any(-1)  # a scene may hold every pair that the kind could ask for; then any absent one
    negative = torch.where(has_pool.gather(1, negative), negative, 0)
    absent = torch.stack([one_of(pools[:, number]) for number in range(len(NEGATIVES))], 1)  # (B, 3, Q)
    pair = absent.gather(1, negative[:, None])[:, 0]
    colour = torch.where(is_negative, pair // len(SHAPES), colour)
    shape_ = torch.where(is_negative, pair % len(SHAPES), shape_)

    words = torch.tensor(_ASKED, device=device)[kind]
    first = torch.tensor(ID["red"], device=device)
    second = torch.tensor(ID["circle"], device=device)
    words = torch.where(words == first, (colour + COLOUR)[..., None], words)
    words = torch.where(words == second, (shape_ + SHAPE)[..., None], words)
    exists = torch.where(is_negative, NO, YES)
    answer = torch.stack([exists, colour + COLOUR, quadrant(world, patch) + ID[PLACES[0]]], -1)
    answer = answer.gather(-1, kind[..., None])[..., 0]
    return Questions(words, answer, kind, negative.masked_fill(~is_negative, -1), patch.masked_fill(is_negative, -1))


def _absent(scenes: Scenes, pairs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, PAIRS) bool for each kind of negative."""
    weights = frequencies(pairs.device)
    popular = torch.zeros(PAIRS, dtype=torch.bool, device=pairs.device)
    popular[weights.topk(POPULAR).indices] = True
    table = pairs.unflatten(1, (len(COLOURS), len(SHAPES)))
    both = (table.any(2)[:, :, None] & table.any(1)[:, None]).flatten(1)
    return ~pairs, ~pairs & popular, ~pairs & both


def quadrant(world: World, patch: Tensor) -> Tensor:
    """The index in PLACES of a patch."""
    row, column = patch // world.columns, patch % world.columns
    return 2 * (row >= world.rows // 2) + (column >= world.columns // 2)


def is_content(words: Tensor) -> Tensor:
    """True at colours and shapes; everything else in a question is a function word."""
    return (words >= COLOUR) & (words < COLOUR + LABELS)


def holders(scenes: Scenes, words: Tensor) -> Tensor:
    """(B, n, P) bool from (B, n) token ids: the patches that truly hold a colour or shape; none for other words."""
    colour, shape = scenes.on_patches(scenes.colour)[:, None], scenes.on_patches(scenes.shape)[:, None]
    words = words[..., None]
    colours, shapes = len(COLOURS), len(SHAPES)
    of_colour = (words >= COLOUR) & (words < COLOUR + colours) & (colour == words - COLOUR)
    return of_colour | ((words >= SHAPE) & (words < SHAPE + shapes) & (shape == words - SHAPE))


def text_of(words: Tensor) -> str:
    """A question as a person reads it."""
    return " ".join(WORDS[word] for word in words.tolist()).replace(" ?", "?")
