"""From checked rows to batches: images loaded, chats tokenized, answers labelled, anchors' candidates marked."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from attanchor_vlm.chat.encode import check_processor, encode_chat
from attanchor_vlm.data.rows import Sample, load_image, parts
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import DataError


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
            rows = ", ".join(str(sample.number) for sample in samples)
            raise DataError(f"a batch cannot be made of rows {rows}: {error}") from error
        if not any(images) and not any(videos):
            del batch["anchor_mask"]  # without an image there is nothing to match
        return batch


def message(role: str, text: str) -> dict[str, object]:
    """A turn of a row as chat templates take it."""
    return {"role": role, "content": parts(text)}


def to_model(batch: dict[str, Tensor], model: torch.nn.Module) -> dict[str, Tensor]:
    """A batch on the model's device, its pixels in the dtype of the model's weights."""
    like = next(model.parameters())
    return {
        name: value.to(like.device, like.dtype if value.is_floating_point() else value.dtype)
        for name, value in batch.items()
    }
