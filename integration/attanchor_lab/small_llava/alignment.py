"""Does the cosine between a patch and a word mean anything: the loss that makes it so, and how well it was made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attanchor_lab.scenes.dataset import EMPTY
from attanchor_lab.scenes.questions import COLOUR, ID, LABELS, holders
from attanchor_lab.scenes.world import Scenes

# Colours, shapes, "empty", then the words that describe no patch.
_DESCRIBING = (*range(COLOUR, COLOUR + LABELS), ID[EMPTY])
_OTHERS = tuple(ID[word] for word in ("is", "there", "a", "what", "colour", "where", "the", "?"))


def alignment_loss(projected: Tensor, table: Tensor, scenes: Scenes, temperature: float) -> Tensor:
    """Contrastive loss of projected patches against the embeddings of their label words, after SEA.

    A patch should know its words among all words of the questions, and a word its patches among those of the image:
    that is what AttAnchor's matching asks. What has several right partners sets each against the wrong ones, not
    against the others. Empty patches belong to the word "empty".

    Args:
        projected: (B, P, D).
        table: (V, D), the embedding table; words get no gradient from here.
        temperature: Of the cosines.
    """
    words = table[torch.tensor((*_DESCRIBING, *_OTHERS), device=table.device)].detach()
    logits = F.normalize(projected, dim=-1) @ F.normalize(words, dim=-1).T / temperature
    right = torch.zeros_like(logits, dtype=torch.bool)
    labels = torch.arange(COLOUR, COLOUR + LABELS, device=table.device).expand(len(scenes), -1)
    right[..., :LABELS] = holders(scenes, labels).transpose(1, 2)
    there = scenes.on_patches(scenes.shape) >= 0
    right[..., LABELS] = ~there
    wrong = logits.masked_fill(right, -torch.inf)
    # -log of exp(right) / (exp(right) + sum exp(wrong))
    to_word = F.softplus(wrong.logsumexp(-1, keepdim=True) - logits)
    to_patch = F.softplus(wrong.logsumexp(-2, keepdim=True) - logits)[..., :LABELS]
    # Objects and empty patches count the same, though most patches are empty.
    of_objects = _mean(to_word, right & there[..., None]) + _mean(to_word, right & ~there[..., None])
    return (of_objects / 2 + _mean(to_patch, right[..., :LABELS])) / 2


def _mean(values: Tensor, where: Tensor) -> Tensor:
    return values.masked_fill(~where, 0).sum() / where.sum().clamp(min=1)


def match_counts(host: Tensor, best: Tensor, words: Tensor, scenes: Scenes, target: Tensor) -> Tensor:
    """What matching found in one batch, as counts that can be added up over batches: see `match_quality`.

    Args:
        host: (B, LENGTH) the patch that each word was copied behind, -1 = not inserted.
        best: (B, LENGTH) the patch of each word's best cosine.
        words: (B, LENGTH) token ids.
        target: (B,) the patch of the object asked for, -1 for none.
    """
    holds = holders(scenes, words)
    present = holds.any(-1)
    hit = holds.gather(-1, best[..., None])[..., 0]
    asked = present & (target >= 0)[:, None]
    referred = asked & (best == target[:, None])
    inserted = host >= 0
    right = inserted & holds.gather(-1, host.clamp(min=0)[..., None])[..., 0]
    chance = (holds.float().mean(-1) * present).sum()
    counts = [hit & present, present, referred, asked, right, inserted, torch.ones_like(inserted)]
    return torch.stack([*(count.sum() for count in counts), chance]).double()


def match_quality(counts: Tensor) -> dict[str, float | None]:
    """From summed `match_counts`; None where there was nothing to count.

    Returns:
        hit: How often the best patch of a colour or shape in the scene truly holds it. chance: what a random patch
        would give. hit_referred: how often it is the patch of the object asked for. precision: how many anchors stand
        at a patch that holds their word (function words never do). recall: how many of the colours and shapes in the
        scene got such an anchor. share: anchors over words of the questions.
    """
    hit, present, referred, asked, right, inserted, words, chance = counts.tolist()
    return {
        "hit": _ratio(hit, present),
        "chance": _ratio(chance, present),
        "hit_referred": _ratio(referred, asked),
        "precision": _ratio(right, inserted),
        "recall": _ratio(right, present),
        "share": _ratio(inserted, words),
    }


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if whole else None
