"""What the tests of every family share: settings, decorators, and the ways in which results are compared."""

from __future__ import annotations

import functools

import pytest
import torch
from builders import FAMILIES, Family
from torch import Tensor

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.model.config import DIRECTIONS

NEW = 4
MIXED = [1, 2, 0]
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}

MROPE = [family for family in FAMILIES if family.inherits]
FLAT = [family for family in FAMILIES if not family.inherits]
NEWLINES = [family for family in FAMILIES if family.newlines]
VIDEO = [family for family in FAMILIES if family.inherits or family.name == "llava_onevision"]

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_route = pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(family, route, id=f"{family}-{route}") for family in FAMILIES for route in family.routes],
)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
both_sides = pytest.mark.parametrize("side", ["left", "right"])
# Padding and direction do not meet: each is tried with one of the other.
both_sides_and_directions = pytest.mark.parametrize(
    ("side", "direction"), list(zip(["left", "right"], DIRECTIONS, strict=True)), ids=["left", "right"]
)


@functools.cache
def tau_for(family: Family, direction: str = "text_into_image") -> float:
    """A threshold that inserts about half of the candidates, in the middle between two scores."""
    model, (batch, _) = attach(family.model(), AttAnchorConfig(tau=-1, direction=direction)), family.prompts(MIXED)
    with torch.no_grad():
        model(**batch)
    scores = model.attanchor_plan.score
    scores = scores[torch.isfinite(scores)].unique()
    middle = len(scores) // 2
    return float(scores[middle - 1 : middle + 1].mean())


def attached(family: Family, route: str | None = None, direction: str = "text_into_image", **settings):
    tau = settings.pop("tau", None)
    tau = tau_for(family, direction) if tau is None else tau
    return attach(family.model(), AttAnchorConfig(tau=tau, route=route, direction=direction, **settings))


@torch.no_grad()
def greedy_by_forward(family: Family, model, batch: dict) -> tuple[Tensor, Tensor]:
    """New tokens (B, NEW) and their logits (B, NEW, V), every one from a forward of the whole sequence."""
    tokens, scores = [], []
    for _ in range(NEW):
        scores.append(model(**batch).logits[:, -1])  # left padding: the last token is at the end
        tokens.append(scores[-1].argmax(-1, keepdim=True))
        batch = family.longer(batch, tokens[-1])
    return torch.cat(tokens, 1), torch.stack(scores, 1)
