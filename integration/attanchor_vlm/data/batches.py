"""From checked rows to batches: images loaded, chats tokenized, answers labelled, anchors' candidates marked."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from attanchor_vlm.chat.encode import check_processor, encode_chat
from attanchor_vlm.data.rows import PLACEHOLDER, Row, Sample, load_image, parts
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
        chats = [[message(role, text) for role, text in sample.messages] for sample in samples]
        try:
            batch = encode_chat(
                self.processor, chats, images, supervise=self.supervise, content_words=self.content_words
            )
        except ValueError as error:
            rows = ", ".join(str(sample.row) for sample in samples)
            raise DataError(f"a batch cannot be made of rows {rows}: {error}") from error
        if not any(images):
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


def check_texts(file, rows: Sequence[Row], processor: Any, context: int | None) -> tuple[list[Row], list[BadRow]]:
    """Rows that this model can be given, and those that it cannot: too long for its context, or with its image token in
    the text. Without images being encoded, so a row at the very edge of the context may still be found too long later.
    """
    tokenizer = processor.tokenizer
    own = getattr(processor, "image_token", None)
    per_image = _tokens_per_image(processor)
    good, bad = [], []
    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        texts = ["\n".join(text for _, text in row.messages).replace(PLACEHOLDER, " ") for row in part]
        lengths = [len(ids) for ids in tokenizer(texts, add_special_tokens=False).input_ids]
        for row, text, length in zip(part, texts, lengths, strict=True):
            length += per_image * len(row.images)
            if own and own in text:
                bad.append(BadRow(file, row.number, f"its text holds {own}, which is this model's own image token"))
            elif context is not None and length > context:
                bad.append(
                    BadRow(
                        file, row.number, f"{length} tokens with its images, more than the model's context, {context}"
                    )
                )
            else:
                good.append(row)
    return good, bad


def sample_lengths(samples: Sequence[Sample], processor: Any) -> list[int]:
    """Tokens of each sample, with those of its images at their sizes: near enough to group samples by. The template's
    own tokens are not counted."""
    texts = {text.replace(PLACEHOLDER, " ") for sample in samples for _, text in sample.messages}
    of_text: dict[str, int] = {}
    ordered = sorted(texts)
    for start in range(0, len(ordered), 1000):
        part = ordered[start : start + 1000]
        ids = processor.tokenizer(part, add_special_tokens=False).input_ids
        of_text.update((text, len(one)) for text, one in zip(part, ids, strict=True))
    # Only where sizes matter is every file opened for its own.
    fixed = _tokens_per_image(processor) if _tokens_per_image(processor) == _tokens_per_image(processor, 672) else None
    of_image: dict[Any, int] = {}
    for image in {image for sample in samples for image in sample.images}:
        of_image[image] = fixed if fixed is not None else _tokens_per_image(processor, *load_image(image).size[::-1])
    return [
        sum(of_text[text.replace(PLACEHOLDER, " ")] for _, text in sample.messages)
        + sum(of_image[image] for image in sample.images)
        for sample in samples
    ]


def _tokens_per_image(processor: Any, height: int = 336, width: int | None = None) -> int:
    """Placeholders of an image of so many pixels (`width` None: a square), 0 where the processor does not tell."""
    count = getattr(processor, "_get_num_multimodal_tokens", None)
    if count is None:
        return 0
    try:
        return int(count(image_sizes=[[height, height if width is None else width]])["num_image_tokens"][0])
    except (AttributeError, KeyError, TypeError, ValueError):
        return 0


def to_model(batch: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """A batch on the model's device, its pixels in the dtype of the model's weights."""
    like = next(model.parameters())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }
