"""Alignment before anchors: a contrastive loss between projected image tokens and label words, in `attanchor train`."""

from attanchor_vlm.training.alignment.aligner import KEY, AlignedCollator, Aligner, aligner_for
from attanchor_vlm.training.alignment.captions import CaptionLabels, label_tokens, read_captions
from attanchor_vlm.training.alignment.clip import ClipLabels, Votes, clip_votes, read_word_list
from attanchor_vlm.training.alignment.loss import image_alignment, patch_alignment, two_way_contrast

__all__ = [
    "KEY",
    "AlignedCollator",
    "Aligner",
    "CaptionLabels",
    "ClipLabels",
    "Votes",
    "aligner_for",
    "clip_votes",
    "image_alignment",
    "label_tokens",
    "patch_alignment",
    "read_captions",
    "read_word_list",
    "two_way_contrast",
]
