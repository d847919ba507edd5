"""Supervised embedding alignment: a contrastive loss between projected image tokens and embeddings of label words.

After SEA (arXiv 2408.11813), which AttAnchor's paper names as related work. AttAnchor copies a word behind the image
token with the best cosine, so the loss asks the question of the matching, both ways: an image token should prefer its
words to others, and a word its image tokens to others. Embeddings are targets and get no gradient: words stay where the
language model knows them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

TEMPERATURE = 0.1  # of InfoNCE, as in the small LLaVA's first stage
# Temperature of the smooth maximum over an image's tokens, POOLING * logsumexp(cosine / POOLING). Small against the
# differences of cosines, or hundreds of tokens that do not match would outweigh the one that does: 0.02 * log(576) is
# 0.13.
POOLING = 0.02


def two_way_contrast(logits: Tensor, right: Tensor) -> Tensor:
    """InfoNCE over rows and over columns of a table, with several right entries in each.

    A right entry is set against the wrong ones of its row, and of its column, not against other right ones:
    ``-log(exp(right) / (exp(right) + sum exp(wrong)))``. Every row counts the same, and so does every column.

    Args:
        logits: (R, V) float32, cosines over temperature: image tokens, or images, against words.
        right: (R, V) float32, weights of at least 0; 0 = wrong. Rows without a right entry have no label: they take no
            part, not even as wrong ones.

    Returns:
        A scalar; 0, with gradient, where no row has a label.
    """
    labelled = (right > 0).any(1, keepdim=True)
    wrong = logits.masked_fill((right > 0) | ~labelled, torch.finfo(logits.dtype).min / 2)
    to_word = F.softplus(wrong.logsumexp(1, keepdim=True) - logits)
    to_token = F.softplus(wrong.logsumexp(0, keepdim=True) - logits)
    return (_balanced(to_word, right, 1) + _balanced(to_token, right, 0)) / 2


def _balanced(losses: Tensor, right: Tensor, axis: int) -> Tensor:
    """Weighted means along `axis`, averaged over what has a weight at all."""
    weight = right.sum(axis)
    means = (losses * right).sum(axis) / weight.clamp(min=1e-12)
    return means.sum() / (weight > 0).sum().clamp(min=1)


def patch_alignment(patches: Tensor, words: Tensor, right: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Where it is known which image token shows what.

    Args:
        patches: (T, D), the projected image tokens of a batch.
        words: (V, D), embeddings of label words and of words that describe no image token.
        right: (T, V) float32, how much of a token's label each word is, 0 to 1.
    """
    return two_way_contrast(_cosines(patches, words) / temperature, right)


def image_alignment(patches: list[Tensor], words: Tensor, right: Tensor, temperature: float = TEMPERATURE) -> Tensor:
    """Where it is known only which image shows what (multiple instances): a word should be close to at least one token
    of its own image, and far from all tokens of the others.

    Args:
        patches: B tensors (M_b, D), the projected image tokens of each sample; M_b may be 0 where nothing is labelled.
        words: (V, D).
        right: (B, V) float32, 1 where a word belongs to the sample's images.
    """
    table = [
        POOLING * (_cosines(own, words) / POOLING).logsumexp(0) if len(own) else words.new_zeros(len(words)).float()
        for own in patches
    ]
    return two_way_contrast(torch.stack(table) / temperature, right)


def _cosines(patches: Tensor, words: Tensor) -> Tensor:
    return F.normalize(patches.float(), dim=-1) @ F.normalize(words.detach().float(), dim=-1).T
