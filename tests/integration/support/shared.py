"""What the tests of every family share: settings, decorators, and the ways in which results are compared."""

from __future__ import annotations

import functools

import pytest
import torch
from builders import FAMILIES, Family
from tiny import difference, own_logits, plain
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


# --- What holds of images and of videos, with tokens dropped and without. ---


def check_nothing_allowed(family, route, side, direction, media=MIXED):
    model, batch = family.model(), family.with_labels(family.prompts(media, side)[0])
    with torch.no_grad():
        before = model(**plain(batch))
        attach(model, AttAnchorConfig(tau=-1, route=route, direction=direction))
        after = model(**{**batch, "anchor_mask": torch.zeros_like(batch["anchor_mask"])})
    assert model.attanchor_calls == 1
    assert not model.attanchor_plan.is_anchor.any()
    assert difference(before.logits[batch["attention_mask"].bool()], own_logits(model, after.logits)) < 1e-4
    assert difference(before.loss, after.loss) < 1e-4


def check_routes_agree(family, side, direction, media=MIXED, **settings):
    batch, losses, logits, gradients = family.with_labels(family.prompts(media, side)[0]), [], [], []
    for route in family.routes:
        model = attached(family, route, direction, **settings)
        output = model(**batch)
        output.loss.backward()
        assert model.attanchor_plan.is_anchor.any()
        real = model.attanchor_plan.source >= 0
        losses.append(output.loss)
        logits.append(output.logits[real])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert difference(logits[0], logits[1]) < 1e-4
    assert difference(losses[0], losses[1]) < 1e-5
    assert gradients[0].abs().max() > 1e-3
    assert difference(gradients[0], gradients[1]) < 1e-4


def check_samples_alone(family, route, side, direction, media=(1, 2, 0, 1), bound=2e-5, **settings):
    model, (batch, alone) = attached(family, route, direction, **settings), family.prompts(media, side)
    with torch.no_grad():
        together = model(**batch).logits
        plan, inserted = model.attanchor_plan, 0
        for row, sample in enumerate(alone):
            logits = model(**sample).logits[0]
            inserted += int(model.attanchor_plan.is_anchor.sum()) if model.attanchor_plan else 0
            assert difference(together[row][plan.source[row] >= 0], logits) < bound
    assert inserted == int(plan.is_anchor.sum()) > (2 if "keep" in settings else 4)  # no more than image tokens stay


def check_cached_generation(family, route, direction, media=MIXED, **settings):
    check_generates(family, attached(family, route, direction, **settings), family.prompts(media, "left")[0])


def check_generates(family, model, batch):
    output = model.generate(**batch, **GREEDY, **LOGITS)
    assert model.attanchor_plan.is_anchor.any()
    tokens, logits = greedy_by_forward(family, model, batch)
    assert torch.equal(output.sequences, torch.cat([batch["input_ids"], tokens], 1))
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5
