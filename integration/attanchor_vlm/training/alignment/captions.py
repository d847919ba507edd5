"""Labels from text: an image's label words are the content words of what is said about it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attanchor_vlm.chat.words import FUNCTION_WORDS, content_spans
from attanchor_vlm.data.reading import lines_of, parse
from attanchor_vlm.data.rows import PLACEHOLDER, Sample
from attanchor_vlm.errors import DataError
from attanchor_vlm.records import read_text

_BEFORE = "a"  # in front of every text, so that its first word is tokenized as inside a sentence


def label_tokens(
    tokenizer: Any, text: str, function_words: Collection[str] = FUNCTION_WORDS
) -> tuple[set[int], set[int]]:
    """The token ids of the content words of a text, and those of everything else in it.

    Tokens and not words, as AttAnchor matches tokens: every piece of a word is a label of its own.
    """
    if not text.strip():
        return set(), set()
    text = f"{_BEFORE} {text.strip()}"
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    spans = content_spans(text, function_words)
    content: set[int] = set()
    other: set[int] = set()
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        if start < len(_BEFORE):
            continue
        inside = any(first < end and last > start for first, last in spans)
        (content if inside else other).add(token)
    return content, other - content


class CaptionLabels:
    """Makes the labels of a batch: for every sample the content words of its answers, or of its images' captions.

    Words without content, of the whole batch's texts, come along as words that are right nowhere.

    Args:
        tokenizer: The model's own, a fast one.
        captions: Text for each image; None takes the sample's answers. A sample with an image that has none is not
            labelled, and is no wrong place for other samples' words either.
    """

    per_token = False  # what an image shows, not which token of it

    def __init__(self, tokenizer: Any, captions: Mapping[Path, str] | None = None):
        self.tokenizer, self.captions = tokenizer, captions

    def __call__(self, samples: Sequence[Sample], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`words` (V,) int64 token ids and `right` (B, V) float32."""
        content: list[set[int]] = []
        other: set[int] = set()
        for sample in samples:
            labels, rest = label_tokens(self.tokenizer, self._text(sample))
            content.append(labels)
            other |= rest
            for _, text in sample.messages:
                other |= label_tokens(self.tokenizer, text.replace(PLACEHOLDER, " "))[1]
        # What is said about an image in one sample is true of it in another.
        of_image: dict[tuple, set[int]] = {}
        for sample, labels in zip(samples, content, strict=True):
            if sample.images:
                of_image.setdefault(sample.images, set()).update(labels)
        words = sorted(set().union(*of_image.values())) if of_image else []
        right = torch.zeros(len(samples), len(words) + len(other - set(words)))
        column = {word: index for index, word in enumerate(words)}
        for row, sample in enumerate(samples):
            for word in of_image.get(sample.images, ()):
                right[row, column[word]] = 1
        return {"words": torch.tensor([*words, *sorted(other - set(words))], dtype=torch.int64), "right": right}

    def _text(self, sample: Sample) -> str:
        if self.captions is None:
            return " ".join(text for role, text in sample.messages if role == "assistant")
        if any(image not in self.captions for image in sample.images):
            return ""
        return " ".join(self.captions[image] for image in sample.images)


def read_captions(file: Path, images: Path) -> dict[Path, str]:
    """Texts about images: ``{"name.png": "a red ring", "other.png": ["dog", "grass"]}``; a list (or lines, in a .jsonl)
    of ``{"image": "name.png", "caption": "…"}``; or COCO's captions, ``{"images": …, "annotations": …}``. Several
    captions of an image are joined; names are those of files in `images`.
    """
    text = read_text(file)
    raw: Any
    if file.suffix == ".jsonl":
        raw = [parse(file, line, number) for number, line in lines_of(file, text)]
    else:
        raw = parse(file, text, 1)
    pairs: list[tuple[Any, Any]]
    try:
        if isinstance(raw, dict) and isinstance(raw.get("annotations"), list):
            names = {one["id"]: one["file_name"] for one in raw["images"]}
            pairs = [(names[one["image_id"]], one["caption"]) for one in raw["annotations"]]
        elif isinstance(raw, list):
            pairs = [(one["image"], one["caption"]) for one in raw]
        else:
            pairs = list(raw.items())
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f'captions {file} should be an object of image names with captions, a list of {{"image", "caption"}}, '
            f"or COCO captions; {error!r} came up"
        ) from error
    found: dict[Path, list[str]] = {}
    for name, caption in pairs:
        words = caption if isinstance(caption, list) else [caption]
        if not isinstance(name, str) or not all(isinstance(word, str) for word in words):
            raise DataError(f"captions {file}: {name!r} has {caption!r}; a caption should be text, or a list of words")
        found.setdefault(images / name, []).extend(words)
    if not found:
        raise DataError(f"captions {file} hold no caption")
    return {path: " ".join(parts) for path, parts in found.items()}
