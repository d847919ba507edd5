"""Ask an attached model: how many answers are right, which tau inserts a wanted share, where the anchors went."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from attanchor_vlm.collate import Collator, question, to_model
from attanchor_vlm.config import AttAnchorConfig
from attanchor_vlm.data import PLACEHOLDER, Row, Sample, load_image
from attanchor_vlm.mixin import attach, base_of
from attanchor_vlm.plots import Anchored, Match, seen_part
from attanchor_vlm.trainer import anchor_counts


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
        batch = to_model(question(processor, [row.messages[0][1] for row in part], images), model)
        sequences = model.generate(**batch, max_new_tokens=most_tokens, do_sample=False)
        counts += anchor_counts(model, batch).cpu()
        new = sequences[:, batch["input_ids"].shape[1] :]
        answers = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        right += [answer.strip() == row.messages[1][1].strip() for row, answer in zip(part, answers, strict=True)]
    share = float(counts[0] / counts[1]) if counts[1] else 0.0
    return Accuracy(tuple(kinds), tuple(right), share, time.perf_counter() - started)


@torch.no_grad()
def threshold_for_share(
    model: Any,
    processor: Any,
    samples: Iterable[Sample],
    share: float,
    config: AttAnchorConfig,
    batch_size: int = 32,
) -> tuple[float, Tensor]:
    """The tau at which about `share` inserted anchors come on every text token that takes part, and all scores, sorted.

    Scores do not depend on tau, so one pass measures them. Leaves `model` attached with that tau. The paper chose its
    thresholds for a share of about 0.1.

    Raises:
        ValueError: `share` is not above 0, or no sample has an image.
    """
    if not share > 0:
        raise ValueError(f"share is {share}; it should be greater than 0")
    attach(model, dataclasses.replace(config, tau=0.999))
    model.eval()
    collate = Collator(processor, "each")
    scores, takers = [], 0
    for part in _chunks([sample for sample in samples if sample.images], batch_size):
        batch = to_model(collate(part), model)
        model(**batch)
        plan = _attached(model).attanchor_plan
        scores.append(plan.score[torch.isfinite(plan.score)].flatten().float().cpu())
        takers += int(batch["anchor_mask"].sum())
    if not takers:
        raise ValueError("no sample has an image and a question, so there is nothing to match")
    ranked = torch.cat(scores).sort(descending=True).values
    wanted = min(max(round(share * takers), 1), len(ranked))
    # Between the last score that is to be inserted and the next, so that rounding decides nothing.
    after = ranked[wanted] if wanted < len(ranked) else ranked[-1] - 0.01
    tau = round(min(float((ranked[wanted - 1] + after) / 2), 0.999), 4)
    attach(model, dataclasses.replace(config, tau=tau))
    return tau, ranked


@torch.no_grad()
def explain(model: Any, processor: Any, image: Any, text: str, most_tokens: int = 12) -> Anchored:
    """The answer to a question about an image, and the patch that each of its tokens was copied behind.

    Args:
        model: Attached with direction "text_into_image" and tau < 1.

    Raises:
        ValueError: the model inserts nothing, or images into text.
    """
    config = _attached(model).attanchor_config
    if config.inserts_nothing or config.direction != "text_into_image":
        raise ValueError(
            f"the model has tau {config.tau} and direction {config.direction}; only text in images can be drawn"
        )
    model.eval()
    batch = to_model(question(processor, [text], [image]), model)
    sequences = model.generate(**batch, max_new_tokens=most_tokens, do_sample=False)
    plan = _attached(model).attanchor_plan
    ids = batch["input_ids"][0]
    image_id = getattr(processor, "image_token_id", None)
    slots = [slot for slot, token in enumerate(ids.tolist()) if token == image_id]
    patch_of = {slot: patch for patch, slot in enumerate(slots)}
    matches = []
    for slot in batch["anchor_mask"][0].nonzero()[:, 0].tolist():
        host = int(plan.host[0, slot])
        word = processor.tokenizer.decode([int(ids[slot])]).strip() or "␣"
        matches.append(Match(word, float(plan.score[0, slot]), patch_of.get(host)))
    answer = processor.tokenizer.decode(sequences[0, len(ids) :], skip_special_tokens=True).strip()
    grid = _grid(len(slots), batch)
    shown = text.replace(PLACEHOLDER, "").strip()
    return Anchored(seen_part(image, processor.image_processor), grid, shown, matches, answer)


def _attached(model: Any) -> Any:
    """The transformers model itself, with the attributes that `attach` gave it."""
    return base_of(model)


def _grid(patches: int, batch: dict[str, Any]) -> tuple[int, int]:
    """(rows, columns) of an image's patches: from the processor where it says so (Qwen), otherwise a square."""
    if "image_grid_thw" in batch:
        _, height, width = batch["image_grid_thw"][0].tolist()
        merged = round(math.sqrt(height * width / patches))
        return height // merged, width // merged
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"the image has {patches} tokens, which is no square grid, so its patches cannot be drawn")
    return side, side


def _chunks(items: Sequence, size: int) -> Iterator[list]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
