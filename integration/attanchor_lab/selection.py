"""Other ways to choose which image tokens stay, controls of `keep_by` that the library does not offer, and down-sampled
images, which have fewer from the beginning.

Importing this module makes them known to `AttAnchorConfig`. The library's own are hosts + cells ("cells"), the best
cosines ("relevance") and the class token's attention ("salience").
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attanchor_kernels import Role, plan_sequence
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.dropping import Images, Rule, register_rule
from attanchor_vlm.model.families import adapter_for
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


def downsample(model: Any, processor: Any, side: int) -> None:
    """Have a LLaVA take images in at `side` pixels, so that each has (side / patch size)² tokens from then on.

    The image encoder's table of positions, where it has one, is interpolated as the encoder itself does it.

    Args:
        model: With or without anchors and adapters; changed, as `processor` is.

    Raises:
        ValueError: `side` is no multiple of the patch size.
    """
    target: Any = base_of(model)
    if side <= 0 or side % processor.patch_size:
        raise ValueError(f"side is {side}; it should be a multiple of the patch size, {processor.patch_size}")
    square = {"height": side, "width": side}
    images = processor.image_processor
    images.size = {"shortest_edge": side} if "shortest_edge" in images.size else square
    if getattr(images, "crop_size", None) is not None:
        images.crop_size = square
    target.config.vision_config.image_size = side
    target.config.image_seq_length = (side // processor.patch_size) ** 2
    tower: Any = adapter_for(target).vision_tower(target)
    for part in tower.modules():
        if hasattr(part, "interpolate_pos_encoding") and isinstance(part.position_embedding, nn.Embedding):
            old = part.position_embedding.weight
            count = target.config.image_seq_length + part.num_positions - part.num_patches
            with torch.no_grad():
                new = part.interpolate_pos_encoding(old.new_zeros(1, count, old.shape[1]), side, side)[0]
            part.position_embedding = nn.Embedding.from_pretrained(new, freeze=not old.requires_grad)
            part.position_ids = torch.arange(count, device=old.device)[None]
            part.image_size, part.num_patches, part.num_positions = side, target.config.image_seq_length, count


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
