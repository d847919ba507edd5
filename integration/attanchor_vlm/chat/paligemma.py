"""PaliGemma's prompts: no chat, but images, a prefix (the question) and a suffix (the answer), put together by its own
processor: a BOS token behind the images, a new line behind the prefix, an EOS token behind the suffix."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from attanchor_vlm.chat.conversation import texts_of
from attanchor_vlm.chat.words import special_token_ids
from attanchor_vlm.constants import IGNORE_INDEX

Spans = list[tuple[int, int]]


def is_paligemma(processor: Any) -> bool:
    return any(base.__name__ == "PaliGemmaProcessor" for base in type(processor).__mro__)


def encode(
    processor: Any,
    batch: Sequence[Sequence[Mapping[str, Any]]],
    images: Sequence[Sequence[Any]],
    spans_of: Callable[[str], Spans],
    add_generation_prompt: bool,
    padding_side: str,
) -> dict[str, Tensor]:
    """What `encode_chat` returns, for conversations of one question and, in training, its answer. `spans_of` says where
    in a text its tokens may be copied."""
    prefixes, suffixes = [], []
    for index, messages in enumerate(batch):
        roles = [message["role"] for message in messages]
        if roles != (["user"] if add_generation_prompt else ["user", "assistant"]) and roles != ["user"]:
            raise ValueError(
                f"conversation {index} has messages of {', '.join(roles)}; PaliGemma takes one question of the user"
                + ("" if add_generation_prompt else " and its answer")
            )
        if not images[index]:
            raise ValueError(f"conversation {index} has no image, and PaliGemma's processor takes none without")
        prefixes.append(_joined(texts_of(messages[0]["content"])).strip("\n"))
        suffixes.append(_joined(texts_of(messages[1]["content"])) if len(messages) > 1 else "")
    if any(suffixes) and not all(suffixes):
        raise ValueError("some conversations have an answer and others none; a batch should be of one kind")

    encoded = dict(
        processor(
            text=[processor.image_token * len(own) + text for own, text in zip(images, prefixes, strict=True)],
            images=[list(own) for own in images],
            suffix=suffixes if any(suffixes) else None,
            return_offsets_mapping=True,
            return_tensors="pt",
            padding=True,
            padding_side=padding_side,
            truncation=False,
        )
    )
    offsets, labels = encoded.pop("offset_mapping"), encoded.pop("labels", None)
    of_prefix = (encoded["token_type_ids"] == 0) & encoded["attention_mask"].bool()
    mask = torch.zeros_like(of_prefix)
    for row, (own, text) in enumerate(zip(images, prefixes, strict=True)):
        # As the processor wrote it: the placeholders of all images, BOS, the prefix.
        begin = len(processor.image_token) * processor.image_seq_length * len(own) + len(processor.tokenizer.bos_token)
        for start, end in spans_of(text):
            inside = (offsets[row, :, 0] < begin + end) & (offsets[row, :, 1] > begin + start)
            mask[row] |= inside & (offsets[row, :, 0] < offsets[row, :, 1])
    special = torch.tensor(special_token_ids(processor.tokenizer), dtype=torch.int64)
    encoded["anchor_mask"] = mask & of_prefix & ~torch.isin(encoded["input_ids"], special)
    if not add_generation_prompt:
        if labels is None or not any(suffixes):
            labels = torch.full_like(encoded["input_ids"], IGNORE_INDEX)
        encoded["labels"] = labels
    return encoded


def _joined(texts: Sequence[str]) -> str:
    """One text of several, which images stood between: apart, as no template puts anything there."""
    whole = ""
    for text in texts:
        apart = not whole or not text or whole[-1].isspace() or text[0].isspace()
        whole += text if apart else f" {text}"
    return whole
