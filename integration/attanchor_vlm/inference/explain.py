"""Ask an attached model: how many answers are right, which tau inserts a wanted share, where the anchors went."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch

from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.data.batches import message, question, to_model
from attanchor_vlm.data.rows import PLACEHOLDER, Row, load_image
from attanchor_vlm.inference.ask import Picture, open_images, with_placeholders
from attanchor_vlm.inference.picture import Anchored, Match
from attanchor_vlm.model.attach import base_of, is_attached
from attanchor_vlm.model.geometry import image_slots, patch_boxes
from attanchor_vlm.training.trainer import anchor_counts


@dataclass(frozen=True)
class Accuracy:
    """Exact matches of generated answers. `inserted_share` is inserted anchors over text tokens taking part."""

    kinds: tuple[str, ...]  # of every question
    right: tuple[bool, ...]
    inserted_share: float
    seconds: float

    def of(self, kind: str) -> float:
        marks = [right for right, asked in zip(self.right, self.kinds, strict=True) if asked == kind]
        return sum(marks) / len(marks)

    @property
    def mean(self) -> float:
        """The unweighted mean over the kinds of question."""
        kinds = set(self.kinds)
        return sum(self.of(kind) for kind in kinds) / len(kinds)

    def minus(self, other: Accuracy) -> tuple[float, float]:
        """Difference of the means and its standard error, paired by question: how sure this set of questions makes it,
        not how much another seed of the training would change it."""
        difference, variance = 0.0, 0.0
        kinds = set(self.kinds)
        for kind in kinds:
            pairs = [a - b for a, b, asked in zip(self.right, other.right, self.kinds, strict=True) if asked == kind]
            mean = sum(pairs) / len(pairs)
            difference += mean / len(kinds)
            variance += sum((d - mean) ** 2 for d in pairs) / len(pairs) ** 2 / len(kinds) ** 2
        return difference, math.sqrt(variance)


@torch.no_grad()
def accuracy(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    kinds: Sequence[str],
    batch_size: int = 64,
    most_tokens: int = 6,
) -> Accuracy:
    """Generate an answer to the first question of every row (one image each) and compare it with the row's.

    Args:
        model: Attached, or a PeftModel around an attached one; left in evaluation mode.
        kinds: What each row asks for; accuracies are kept apart by it.
    """
    started = time.perf_counter()
    model.eval()
    right: list[bool] = []
    counts = torch.zeros(3)
    for part in _chunks(rows, batch_size):
        images = [load_image(row.images[0]) for row in part]
        words = _attached(model).attanchor_config.content_words if is_attached(model) else False
        batch = to_model(question(processor, [row.messages[0][1] for row in part], images, words), model)
        sequences = model.generate(**batch, max_new_tokens=most_tokens, do_sample=False)
        counts += anchor_counts(model, batch).cpu()
        new = sequences[:, batch["input_ids"].shape[1] :]
        answers = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        right += [answer.strip() == row.messages[1][1].strip() for row, answer in zip(part, answers, strict=True)]
    share = float(counts[0] / counts[1]) if counts[1] else 0.0
    return Accuracy(tuple(kinds), tuple(right), share, time.perf_counter() - started)


@torch.no_grad()
def explain(
    model: Any, processor: Any, images: Picture | Sequence[Picture], prompt: str, max_new_tokens: int = 64
) -> Anchored:
    """The answer to a question about an image, or several, and the patch that each of its tokens was copied behind.

    Args:
        model: Attached with direction "text_into_image" and tau < 1.
        images: One PIL image or path, or a list of them.
        prompt: The question. Images go in front of it, or where it says ``<image>``.
        max_new_tokens: Bound of the answer's length.

    Raises:
        ValueError: the model is not attached, inserts nothing, or images into text; or the question has places for
            another number of images.
    """
    if not is_attached(model):
        raise ValueError("the model is not attached, so it has no anchors to explain; it should be one given to attach")
    config = _attached(model).attanchor_config
    if config.inserts_nothing or config.direction != "text_into_image":
        raise ValueError(
            f"the model has tau {config.tau} and direction {config.direction}; only text in images can be drawn"
        )
    model.eval()
    opened = open_images(images)
    if not opened:
        raise ValueError("there is no image, and anchors stand in images; give one or more")
    chat = [message("user", with_placeholders(prompt, len(opened)))]
    words = config.content_words
    encoded = encode_chat(processor, [chat], [opened], add_generation_prompt=True, content_words=words)
    batch = to_model(encoded, model)
    sequences = model.generate(**batch, max_new_tokens=max_new_tokens, do_sample=False)
    plan = _attached(model).attanchor_plan
    ids = batch["input_ids"][0]
    boxes = patch_boxes(model, processor, batch, 0, [opened])
    patch_of = {slot: patch for patch, slot in enumerate(image_slots(model, batch, 0))}
    matches = []
    for slot in batch["anchor_mask"][0].nonzero()[:, 0].tolist():
        patch = patch_of.get(int(plan.host[0, slot]))
        word = processor.tokenizer.decode([int(ids[slot])]).strip() or "␣"
        matches.append(Match(word, float(plan.score[0, slot]), patch))
    answer = processor.tokenizer.decode(sequences[0, len(ids) :], skip_special_tokens=True).strip()
    shown = prompt.replace(PLACEHOLDER, "").strip()
    return Anchored(opened, boxes, shown, matches, answer)


def _attached(model: Any) -> Any:
    """The transformers model itself, with the attributes that `attach` gave it."""
    return base_of(model)


def _chunks(items: Sequence, size: int) -> Iterator[list]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
