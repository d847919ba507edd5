"""What a model answers to LLaVA-Instruct samples, and how surprised it is by the answers that are given there."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from attanchor_vlm.constants import IGNORE_INDEX
from attanchor_vlm.data.batches import Collator, message, to_model
from attanchor_vlm.data.rows import Sample, load_image
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import DataError
from attanchor_vlm.inference.ask import encode_questions, generated
from attanchor_vlm.model.attach import anchor_counts, base_of
from attanchor_vlm.model.families import adapter_for


@dataclass(frozen=True)
class Answers:
    """What came out of one pass over the samples.

    Attributes:
        predictions, references: One text for each sample; `predictions` is empty if none were asked for.
        loss: The mean of the batches' losses, weighted by their samples, which is transformers' `eval_loss`; None if
            answers were generated.
        inserted_share: Inserted anchors over the text tokens that take part.
        anchor_score: Mean cosine of the inserted, None without any.
        image_tokens: Mean number of image tokens in a prompt, before anchors.
        seconds: For the pass, without loading the model.
    """

    predictions: tuple[str, ...]
    references: tuple[str, ...]
    loss: float | None
    inserted_share: float
    anchor_score: float | None
    image_tokens: float
    seconds: float


@torch.no_grad()
def score_answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 4,
    predict: bool = False,
    progress: bool = True,
) -> Answers:
    """Loss of the given answers, and with `predict` the most likely token at each of their places.

    Such teacher-forced predictions see the true answer up to each token. They are what a `compute_metrics` in
    transformers' Trainer gets, score far higher than generated text, and cost one pass.

    Args:
        model: Attached, or a PeftModel around an attached model; left in evaluation mode.
        samples: As `data.samples` makes them; the last answer of each counts.
    """
    started = time.perf_counter()
    model.eval()
    target: Any = base_of(model)
    collate = Collator(processor, "each", target.attanchor_config.content_words)
    total, texts, tally = 0.0, [], _Tally()
    for part in _batches(samples, batch_size, "scoring", progress):
        batch = to_model(collate(part), model)
        output = model(**batch)
        total += float(output.loss) * len(part)
        tally.add(model, batch)
        if predict:
            labels = batch["labels"] if target.attanchor_plan is None else target.attanchor_plan.labels
            said = processor.tokenizer.batch_decode(_forced(output.logits, labels), skip_special_tokens=True)
            texts += [text.strip() for text in said]
    return tally.answers(texts, _references(samples), total / len(samples), time.perf_counter() - started)


def generate_answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 4,
    max_new_tokens: int = 256,
    progress: bool = True,
) -> Answers:
    """Greedy answers to the last question of every sample, with the turns before it as they are given.

    Args:
        model: Attached, or a PeftModel around an attached model; left in evaluation mode.
    """
    started = time.perf_counter()
    texts: list[str] = []
    tally = _Tally()
    for part in _batches(samples, batch_size, "answering", progress):
        images = [[load_image(path) for path in sample.images] for sample in part]
        videos = [[load_video(video) for video in sample.videos] for sample in part]
        chats = [[message(role, text) for role, text in sample.messages[:-1]] for sample in part]
        try:
            batch = encode_questions(model, processor, chats, images, videos)
        except ValueError as error:
            raise DataError(f"a prompt cannot be made of rows {[sample.number for sample in part]}: {error}") from error
        said = generated(model, processor, batch, max_new_tokens=max_new_tokens)
        texts += [text.strip() for text in said]
        tally.add(model, batch)
    return tally.answers(texts, _references(samples), None, time.perf_counter() - started)


class _Tally:
    """What was inserted so far."""

    def __init__(self) -> None:
        self.counts, self.image_tokens, self.prompts = torch.zeros(3, dtype=torch.float64), 0, 0

    def add(self, model: Any, batch: dict[str, Tensor]) -> None:
        if "anchor_mask" in batch:
            self.counts += anchor_counts(model, batch).cpu().double()
            target: Any = base_of(model)
            self.image_tokens += int(adapter_for(target).placeholders(target, batch["input_ids"]).sum())
        self.prompts += len(batch["input_ids"])

    def answers(self, texts: Sequence[str], references: tuple[str, ...], loss: float | None, seconds: float) -> Answers:
        inserted, candidates, score = self.counts.tolist()
        return Answers(
            predictions=tuple(texts),
            references=references,
            loss=loss,
            inserted_share=inserted / candidates if candidates else 0.0,
            anchor_score=score / inserted if inserted else None,
            image_tokens=self.image_tokens / self.prompts,
            seconds=seconds,
        )


def _forced(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """For each row the most likely tokens at its supervised places, which the logits before them predict."""
    chosen = logits[:, :-1].argmax(-1)
    places = labels[:, 1:].to(chosen.device) != IGNORE_INDEX
    return [row[place].tolist() for row, place in zip(chosen, places, strict=True)]


def _references(samples: Sequence[Sample]) -> tuple[str, ...]:
    return tuple(sample.messages[-1][1].strip() for sample in samples)


def _batches(samples: Sequence[Sample], size: int, what: str, progress: bool) -> Iterator[Sequence[Sample]]:
    starts = range(0, len(samples), size)
    for start in tqdm(starts, what, unit="batch", disable=not progress, leave=False):
        yield samples[start : start + size]
