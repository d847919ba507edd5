"""Other ways to choose which image tokens stay: controls of `keep_by` that the library does not offer.

Importing this module makes them known to `AttAnchorConfig`. The library's own are hosts + cells ("cells"), the best
cosines ("relevance") and the class token's attention ("salience").
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attanchor_kernels import Role, plan_sequence
from attanchor_vlm.model.dropping import Images, Rule, register_rule
from attanchor_vlm.model.placements import drawn


def random(images: Images) -> Tensor:
    """Drawn for the prompt and the seed: the same in training and in generation, in any batch."""
    numbers = drawn(images.text_embeds, images.roles, images.seed)
    return numbers[_holds_image(images.roles)].float()


def strided(images: Images) -> Tensor:
    """Every n-th token of an image, first to last."""
    place, size = _places(images.image)
    size, budget = size.clamp(min=1), images.budget.clamp(min=0)
    return ((place + 1) * budget // size - place * budget // size).float()


def lowest_cosine(images: Images) -> Tensor:
    """The tokens whose best match in the question is worst."""
    plan = plan_sequence(images.text_embeds, images.rows, images.roles, 1.0, turn=images.turn, keep=0)
    assert plan.relevance is not None
    return -plan.relevance[_holds_image(images.roles)]


def diverse(images: Images) -> Tensor:
    """As DivPrune (arXiv 2503.02175) chooses: each time the token whose nearest chosen one is farthest, by cosine; the
    first is the one whose nearest neighbour is farthest."""
    score = torch.full(images.image.shape, -torch.inf, device=images.rows.device)
    for image in images.image[images.image >= 0].unique():
        at = (images.image == image).nonzero()[:, 0]
        rows = F.normalize(images.rows[at].float(), dim=-1)
        distance = 1 - rows @ rows.T
        nearest = distance.clone().fill_diagonal_(torch.inf).amin(1)
        for number in range(int(images.budget[at[0]])):
            chosen = nearest.argmax()
            score[at[chosen]] = -number
            nearest = distance[chosen] if number == 0 else torch.minimum(nearest, distance[chosen])
            nearest = nearest.masked_fill(score[at] > -torch.inf, -torch.inf)
    return score


def _holds_image(roles: Tensor) -> Tensor:
    return roles.eq(Role.IMAGE) | roles.eq(Role.SILENT_IMAGE)


def _places(image: Tensor) -> tuple[Tensor, Tensor]:
    """(T,) int64 twice: the place of each token in its image, and how many tokens that has; newline rows left out."""
    order = image.argsort(stable=True)
    ordered = image[order].contiguous()
    start, stop = torch.searchsorted(ordered, ordered), torch.searchsorted(ordered, ordered, right=True)
    index = torch.arange(len(image), device=image.device)
    place, size = torch.empty_like(order), torch.empty_like(order)
    return place.scatter_(0, order, index - start), size.scatter_(0, order, stop - start)


register_rule("random", Rule(random))
register_rule("strided", Rule(strided))
register_rule("lowest-cosine", Rule(lowest_cosine))
register_rule("diverse", Rule(diverse))
register_rule("salience-cells", Rule(lambda images: images.attention(), cells=True))
