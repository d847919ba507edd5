"""Does the cosine between a patch and a word mean anything: the loss that makes it so, and how well it was made."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from attanchor_lab.scenes.questions import holders
from attanchor_lab.scenes.world import Scenes
from attanchor_vlm.training.alignment.loss import patch_alignment


def alignment_loss(projected: Tensor, words: Tensor, scenes: Scenes, temperature: float) -> Tensor:
    """The library's loss of patches whose labels are known.

    Args:
        projected: (B, P, D).
        words: (V, D), the embeddings of colours, shapes and "empty", then of words that describe no patch.
        temperature: Of the cosines.
    """
    labels = scenes.labels().flatten(0, 1)
    right = F.pad(labels, (0, len(words) - labels.shape[1]))
    return patch_alignment(projected.flatten(0, 1), words, right, temperature)


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
