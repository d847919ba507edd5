"""From checked rows to batches: images loaded, chats tokenized, answers labelled, anchors' candidates marked."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attanchor_vlm.chat.conversation import placeholder_tokens
from attanchor_vlm.chat.encode import check_processor, encode_chat
from attanchor_vlm.data.images import ImageSource, size_of
from attanchor_vlm.data.rows import PLACEHOLDER, Row, Sample, load_image, parts, without_places
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import BadRow, DataError


class SampleDataset(Dataset):
    """Samples by index; images are loaded where batches are made, in the loader's workers."""

    def __init__(self, samples: Iterable[Sample]):
        self.samples = list(samples)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        return self.samples[index]


class Collator:
    """Makes the model's arguments from samples: tensors with `labels` and `anchor_mask`, padded on the right.

    Args:
        processor: The model's own.
        turns: "each" (a sample's last answer is learned) or "all" (every answer).
        content_words: As in `encode_chat`.

    Raises:
        ValueError: the processor has no chat template, or a tokenizer without offsets.
    """

    def __init__(self, processor: Any, turns: str, content_words: bool | Collection[str] = False):
        check_processor(processor)  # now, and not when the first batch is made
        self.content_words = content_words
        self.processor = processor
        self.supervise = "last" if turns == "each" else "all"

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Tensor]:
        images = [[load_image(path) for path in sample.images] for sample in samples]
        videos = [[load_video(video) for video in sample.videos] for sample in samples]
        chats = [[message(role, text) for role, text in sample.messages] for sample in samples]
        try:
            batch = encode_chat(
                self.processor,
                chats,
                images,
                videos=videos,
                supervise=self.supervise,
                content_words=self.content_words,
            )
        except ValueError as error:
            rows = ", ".join(str(sample.row) for sample in samples)
            raise DataError(f"a batch cannot be made of rows {rows}: {error}") from error
        if not any(images) and not any(videos):
            del batch["anchor_mask"]  # without an image there is nothing to match
        return batch


def message(role: str, text: str) -> dict[str, object]:
    """A turn of a row as chat templates take it."""
    return {"role": role, "content": parts(text)}


def question(
    processor: Any, texts: Sequence[str], images: Sequence[Any], content_words: bool | Collection[str] = False
) -> dict[str, Tensor]:
    """A batch of single questions, each about one image, for `generate`: padded on the left, with `anchor_mask`."""
    chats = [[message("user", text if PLACEHOLDER in text else f"{PLACEHOLDER}\n{text}")] for text in texts]
    own = [[image] for image in images]
    return encode_chat(processor, chats, own, add_generation_prompt=True, content_words=content_words)


@dataclass(frozen=True)
class MostCopies:
    """How many tokens anchors and pauses add to a row at the most, whatever matches, less those that are dropped:
    nearly so in families that drop from tiles one by one, or keep newlines.

    Attributes:
        budget: Of copies, which are no more than there are movers.
        of_images: Whether image tokens are copied.
        pauses: Pause tokens of a prompt with an image.
        keep: As in `AttAnchorConfig`.
    """

    budget: int | None = None
    of_images: bool = False
    pauses: int = 0
    keep: int | float | None = None

    @classmethod
    def of(cls, anchors: Any, pauses: int) -> MostCopies | None:
        """What an AttAnchorConfig, with so many pause tokens, adds; None for calls that are handed on."""
        if anchors.changes_nothing:
            return None
        budget = anchors.max_anchors if anchors.placement != "front" else None  # the whole question, whatever matches
        if anchors.inserts_nothing:
            budget = 0
        return cls(budget, anchors.direction == "image_into_text", pauses, anchors.keep)

    def __call__(self, text_tokens: int, images: Sequence[int]) -> int:
        """Of a row with so many tokens of text that take part, and so many in each of its images."""
        every = sum(images)
        if not every:
            return 0
        movers = every if self.of_images else text_tokens
        copies = movers if self.budget is None else min(movers, self.budget)
        if self.keep is not None:
            left = sum(
                min(size, self.keep if isinstance(self.keep, int) else round(self.keep * size)) for size in images
            )
            copies = max(0, (copies if self.of_images else min(copies, left)) - (every - left))
        return copies + self.pauses


def check_texts(
    file, rows: Sequence[Row], processor: Any, context: int | None, copies: MostCopies | None = None
) -> tuple[list[Row], list[BadRow]]:
    """Rows that this model can be given, and those that it cannot: with a placeholder of its own in the text, with an
    image that its processor does not take, or too long for its context, with all that `copies` says is added.

    Without images being encoded; what a template adds is not counted, nor are videos, so a row at the very edge of the
    context may still be found too long later.
    """
    tokenizer, images = processor.tokenizer, _ImageTokens(processor)
    own = placeholder_tokens(processor)
    good, bad = [], []
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        texts = [without_places("\n".join(text for _, text in row.messages)) for row in part]
        asked = ["\n".join(text for role, text in row.messages if role == "user") for row in part]
        lengths, movers = (
            [len(ids) for ids in tokenizer(given, add_special_tokens=False).input_ids]
            for given in (texts, [without_places(text) for text in asked])
        )
        for row, text, length, words in zip(part, texts, lengths, movers, strict=True):
            try:
                if held := [token for token in own if token in text]:
                    raise ValueError(f"its text holds {held[0]}, which is a placeholder of this model")
                of_images = [images(image) for image in row.images]
                patches = sum(of_images)
                anchors = 0 if copies is None else copies(words, of_images)
                if context is not None and length + patches + anchors > context:
                    raise ValueError(_too_long(length + patches, anchors, context))
                good.append(row)
            except ValueError as error:
                bad.append(BadRow(file, row.number, str(error)))
    return good, bad


def _too_long(length: int, anchors: int, context: int) -> str:
    if length > context or not anchors:
        return f"{length} tokens with its images, more than the model's context, {context}"
    return (
        f"{length} tokens with its images and up to {anchors} anchors, more than the model's context, {context}; "
        "max_anchors bounds them"
    )


def sample_lengths(samples: Sequence[Sample], processor: Any) -> list[int]:
    """Tokens of each sample, with those of its images at their sizes: near enough to group samples by. The template's
    own tokens are not counted, nor are videos."""
    texts = {without_places(text) for sample in samples for _, text in sample.messages}
    of_text: dict[str, int] = {}
    ordered = sorted(texts)
    for start in range(0, len(ordered), 1000):
        part = ordered[start : start + 1000]
        ids = processor.tokenizer(part, add_special_tokens=False).input_ids
        of_text.update((text, len(one)) for text, one in zip(part, ids, strict=True))
    tokens = _ImageTokens(processor)
    of_image = {image: tokens(image) for image in {image for sample in samples for image in sample.images}}
    return [
        sum(of_text[without_places(text)] for _, text in sample.messages)
        + sum(of_image[image] for image in sample.images)
        for sample in samples
    ]


class _ImageTokens:
    """Placeholders of an image, by its size; 0 where the processor does not tell.

    Raises:
        ValueError: the processor does not take an image of this size.
    """

    def __init__(self, processor: Any):
        self.count = getattr(processor, "_get_num_multimodal_tokens", None)
        # Only where sizes matter is every file opened for its own.
        self.fixed: int | None = None
        with contextlib.suppress(ValueError):  # a processor that does not take the narrow one has to see every size
            small, *others = [self._of(*size) for size in ((336, 336), (672, 672), (1, 4000))]
            self.fixed = small if others == [small, small] else None

    def __call__(self, image: ImageSource) -> int:
        return self._of(*size_of(image)) if self.fixed is None else self.fixed

    def _of(self, height: int, width: int) -> int:
        if self.count is None:
            return 0
        try:
            return int(self.count(image_sizes=[[height, width]])["num_image_tokens"][0])
        except (AttributeError, KeyError, TypeError):
            return 0
        except ValueError as error:  # such as Qwen's for images that are too narrow
            raise ValueError(f"an image of {width} x {height} pixels is not taken: {error}") from error


def to_model(batch: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """A batch on the model's device, its pixels in the dtype of the model's weights."""
    like = next(model.parameters())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }
