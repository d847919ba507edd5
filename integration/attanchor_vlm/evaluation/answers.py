"""What a model answers to LLaVA-Instruct samples, and how surprised it is by the answers that are given there."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
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
from attanchor_vlm.model.attach import anchor_counts, base_of, config_of
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
    model.eval()
    collate = Collator(processor, "each", config_of(model).content_words)

    def score(part: Sequence[Sample]) -> _Step:
        batch = to_model(collate(part), model)
        output = model(**batch)
        texts: list[str] = []
        if predict:
            plan = base_of(model).attanchor_plan
            labels = batch["labels"] if plan is None else plan.labels
            texts = processor.tokenizer.batch_decode(_forced(output.logits, labels), skip_special_tokens=True)
        return batch, texts, float(output.loss)

    return _pass(model, samples, batch_size, "scoring", progress, score)


def generate_answers(
    model: Any,
    processor: Any,
    samples: Sequence[Sample],
    batch_size: int = 4,
    max_new_tokens: int = 256,
    progress: bool = True,
) -> Answers:
    """Greedy answers to the last question of every sample, with the turns before it as they are given."""

    def answer(part: Sequence[Sample]) -> _Step:
        images = [[load_image(path) for path in sample.images] for sample in part]
        videos = [[load_video(video) for video in sample.videos] for sample in part]
        chats = [[message(role, text) for role, text in sample.messages[:-1]] for sample in part]
        try:
            batch = encode_questions(model, processor, chats, images, videos)
        except ValueError as error:
            raise DataError(f"a prompt cannot be made of rows {[sample.number for sample in part]}: {error}") from error
        return batch, generated(model, processor, batch, max_new_tokens=max_new_tokens), None

    return _pass(model, samples, batch_size, "answering", progress, answer)


_Step = tuple[dict[str, Tensor], list[str], float | None]  # of some samples: their batch, texts and loss


def _pass(
    model: Any,
    samples: Sequence[Sample],
    batch_size: int,
    what: str,
    progress: bool,
    step: Callable[[Sequence[Sample]], _Step],
) -> Answers:
    started = time.perf_counter()
    target = base_of(model)
    counts, losses, image_tokens = torch.zeros(3, dtype=torch.float64), [], 0
    predictions: list[str] = []
    for start in tqdm(range(0, len(samples), batch_size), what, unit="batch", disable=not progress, leave=False):
        part = samples[start : start + batch_size]
        batch, texts, loss = step(part)
        predictions += [text.strip() for text in texts]
        losses += [] if loss is None else [loss * len(part)]
        if "anchor_mask" in batch:
            counts += anchor_counts(model, batch).cpu().double()
            image_tokens += int(adapter_for(target).placeholders(target, batch["input_ids"]).sum())
    inserted, candidates, score = counts.tolist()
    return Answers(
        predictions=tuple(predictions),
        references=tuple(sample.messages[-1][1].strip() for sample in samples),
        loss=sum(losses) / len(samples) if losses else None,
        inserted_share=inserted / candidates if candidates else 0.0,
        anchor_score=score / inserted if inserted else None,
        image_tokens=image_tokens / len(samples),
        seconds=time.perf_counter() - started,
    )


def _forced(logits: Tensor, labels: Tensor) -> list[list[int]]:
    """For each row the most likely tokens at its supervised places, which the logits before them predict."""
    chosen = logits[:, :-1].argmax(-1)
    places = labels[:, 1:].to(chosen.device) != IGNORE_INDEX
    return [row[place].tolist() for row, place in zip(chosen, places, strict=True)]
