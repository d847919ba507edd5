"""What is measured of a trained arm: accuracy by kind, yes-share, matching, attention to the true patch, pictures."""

from __future__ import annotations

import base64
import io
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from attanchor_lab import placements
from attanchor_lab.scenes import questions
from attanchor_lab.scenes.alignment import match_counts, match_quality
from attanchor_lab.scenes.questions import EXISTENCE, LENGTH, NEGATIVES, WORDS, YES, Mixture
from attanchor_lab.scenes.world import KINDS
from attanchor_lab.synthetic.arms import Asker, Batch, Built
from attanchor_lab.synthetic.plan import Condition
from attanchor_lab.synthetic.training import generator_for, hosts_as_patches, new_batch

TEST = Mixture(kinds=(0.5, 0.25, 0.25))  # POPE's balance: half the existence questions are to be denied
_PICTURED, _PICTURES = Mixture(kinds=(0.0, 0.5, 0.5)), 2
_ATTENTION_SAMPLES = 96


@torch.no_grad()
def measure(condition: Condition, asker: Asker, seed: int, device: str, pictures: bool = False) -> dict[str, Any]:
    """Everything that a row says about a trained arm. All arms of a seed are asked the same questions.

    Args:
        pictures: Also keep two scenes with their anchors and attention.
    """
    asker.model.eval()
    measures: dict[str, Any] = {"test": {}}
    for blur in condition.blur_test:
        measures["test"][f"{blur:g}"] = _test(condition, asker, seed, device, blur, condition.test_scenes)
    if asker.arm.copies != "none":
        measures["without_copies"] = _test(
            condition, asker, seed, device, condition.blur_test[0], max(1, condition.test_scenes // 3), copies=False
        )
    measures["attention"] = _attention(condition, asker, seed, device)
    if pictures:
        measures["pictures"] = _pictures(condition, asker, seed, device)
    return measures


def test_batches(condition: Condition, asker: Asker, seed: int, device: str, blur: float, count: int):
    """Batches of `count` held-out scenes; which ones they are depends on nothing but condition, seed and device."""
    generator = generator_for(device, seed, 5)
    left = count
    per_batch = max(1, condition.test_batch // condition.test_each)
    while left > 0:
        size = min(per_batch, left)
        yield new_batch(condition, asker.model, size, condition.test_each, generator, blur, mixture=TEST)
        left -= size


def _test(
    condition: Condition, asker: Asker, seed: int, device: str, blur: float, count: int, copies: bool = True
) -> dict[str, Any]:
    kinds, negatives, right, said_yes, losses = [], [], [], [], []
    counts: Tensor | None = None
    candidates = copied = 0
    asker.generator.manual_seed(seed + 77)
    for batch in test_batches(condition, asker, seed, device, blur, count):
        answered = asker(batch, copies=copies)
        logits = answered.logits.float()
        answer = logits.argmax(-1)
        losses.append(F.cross_entropy(logits, batch.questions.answer, reduction="none"))
        right.append(answer == batch.questions.answer)
        said_yes.append(answer == YES)
        kinds.append(batch.questions.kind)
        negatives.append(batch.questions.negative)
        counted = _matching(asker, batch, answered.built)
        counts = counted if counts is None else counts + counted
        copied += int(answered.built.is_anchor.sum())
        candidates += len(batch.ids) * (batch.patches if asker.arm.copies == "image" else LENGTH)
    assert counts is not None
    kind, negative, marks, yes, loss = (torch.cat(part) for part in (kinds, negatives, right, said_yes, losses))
    of_kind = {name: _mean(marks[kind == number]) for number, name in enumerate(KINDS)}
    known = [value for value in of_kind.values() if value is not None]
    existence = kind == EXISTENCE
    quality = match_quality(counts)
    if not asker.arm.at_patches or not copies:
        quality |= {"precision": None, "recall": None}
    return {
        **of_kind,
        "mean": sum(known) / len(known),
        "present": _mean(marks[existence & (negative < 0)]),
        "negatives": {name: _mean(marks[existence & (negative == n)]) for n, name in enumerate(NEGATIVES)},
        "yes_share": _mean(yes[existence]),
        "answer_loss": loss.mean().item(),
        "questions": len(kind),
        "matching": {**quality, "share": copied / candidates},
    }


def _mean(values: Tensor) -> float | None:
    return values.float().mean().item() if values.numel() else None


def _matching(asker: Asker, batch: Batch, built: Built) -> Tensor:
    """Matching is measured in every arm, also where nothing is copied by it."""
    words = batch.questions.words
    host = torch.full_like(words, -1)
    if asker.arm.at_patches:
        host = hosts_as_patches(built.host, batch.patches)
    return match_counts(host, _best(asker, batch)[1], words, batch.scenes, batch.questions.target)


def _best(asker: Asker, batch: Batch) -> tuple[Tensor, Tensor]:
    """(B, LENGTH) best cosine and its patch for every word of the question."""
    embedded = asker.model.get_input_embeddings()(batch.ids)
    takes_part = torch.zeros_like(batch.is_image)
    takes_part[:, -LENGTH:] = True
    matched = placements.match(embedded, batch.features, batch.is_image, takes_part)
    return matched.score[:, -LENGTH:], matched.best[:, -LENGTH:].clamp(min=1) - 1


# --- Attention to the true patch, the mechanism that the paper names. -----------------------------------------------


def _attention(condition: Condition, asker: Asker, seed: int, device: str) -> dict[str, Any]:
    """Attention from the question to the patch of the object asked for, with the arm's copies and without them."""
    generator = generator_for(device, seed, 6)
    mixture = Mixture(kinds=(0.4, 0.3, 0.3), yes=1.0)  # every question has a true patch
    count = max(4, min(_ATTENTION_SAMPLES, 30_000_000 // condition.world.patches**2))  # the weights are kept whole
    batch = new_batch(condition, asker.model, count, 1, generator, mixture=mixture)
    result: dict[str, Any] = {"with_copies": _attended(asker, batch, True)}
    if asker.arm.copies != "none":
        result["without_copies"] = _attended(asker, batch, False)
    return result


def _attended(asker: Asker, batch: Batch, copies: bool) -> dict[str, float]:
    """Means over samples, layers and heads, in shares of all attention.

    Returns:
        patch: from the place where the answer is predicted to the true patch. patch_from_question: from all words of
        the question. patch_best_head: of the layer and head with the most. copies: from the answer's place to the
        copies at the true patch (image into text: of it). image: to all patches. even: what even attention would give
        one token.
    """
    attentions, built = _attentions(asker, batch, copies)
    true_slot = batch.questions.target + 1
    source, is_anchor, mask = built.source, built.is_anchor, built.attention_mask
    true_patch = (source == true_slot[:, None]) & ~is_anchor
    at_true = torch.zeros_like(is_anchor)
    if asker.arm.copies == "image":
        at_true = (source == true_slot[:, None]) & is_anchor
    elif asker.arm.at_patches:
        at_true = is_anchor & (built.host.gather(1, source.clamp(min=0)) == true_slot[:, None])
    question = (source >= batch.ids.shape[1] - LENGTH) & ~is_anchor
    patches = (source >= 1) & (source <= batch.patches) & ~is_anchor
    end = (mask.sum(1) - 1)[None, :, None, None, None].expand(attentions.shape[0], -1, attentions.shape[2], 1, 1)
    from_end = attentions.gather(3, end.expand(-1, -1, -1, 1, attentions.shape[-1]))[..., 0, :]  # (layers, B, H, L)

    def mass(attention: Tensor, keys: Tensor) -> Tensor:
        return (attention * keys[None, :, None]).sum(-1)

    to_patch = mass(from_end, true_patch)
    column = true_patch.int().argmax(1)[None, :, None, None, None].expand(*attentions.shape[:-1], 1)
    of_question = attentions.gather(-1, column)[..., 0] * true_patch.any(1)[None, :, None, None]  # (layers, B, H, L)
    weights = question[None, :, None].float()
    return {
        "patch": to_patch.mean().item(),
        "patch_from_question": ((of_question * weights).sum(-1) / weights.sum(-1)).mean().item(),
        "patch_best_head": to_patch.mean(1).max().item(),
        "copies": mass(from_end, at_true).mean().item(),
        "image": mass(from_end, patches).mean().item(),
        "even": (1 / mask.sum(1)).mean().item(),
    }


def _attentions(asker: Asker, batch: Batch, copies: bool) -> tuple[Tensor, Built]:
    """(layers, B, heads, L, L): only eager attention gives its weights."""
    language = asker.model.model.language_model
    before = language.config._attn_implementation
    language.set_attn_implementation("eager")
    try:
        answered = asker(batch, copies=copies, output_attentions=True)
    finally:
        language.set_attn_implementation(before)
    return torch.stack(list(answered.output.attentions)).float(), answered.built


def _pictures(condition: Condition, asker: Asker, seed: int, device: str) -> list[dict[str, Any]]:
    """Two scenes as PNG with question, answer, matches and the attention of the answer's place to every patch."""
    generator = generator_for(device, seed, 7)
    batch = new_batch(condition, asker.model, _PICTURES, 1, generator, mixture=_PICTURED)
    asked = batch.questions
    attentions, built = _attentions(asker, batch, True)
    answer = asker(batch).logits.argmax(-1)
    source, is_anchor, mask = built.source, built.is_anchor, built.attention_mask
    score, _ = _best(asker, batch)
    host = torch.full_like(score, -1, dtype=torch.long)
    if asker.arm.at_patches:
        host = hosts_as_patches(built.host, batch.patches)
    found = []
    for row in range(_PICTURES):
        to_all = attentions[:, row, :, mask[row].sum() - 1].mean((0, 1))
        there = (source[row] >= 1) & (source[row] <= batch.patches) & ~is_anchor[row]
        to_patches = to_all.new_zeros(batch.patches)  # and none to those that were dropped
        to_patches[source[row][there] - 1] = to_all[there]
        found.append(
            {
                "png": _png(batch.pixels[row]),
                "grid": [condition.world.rows, condition.world.columns],
                "question": questions.text_of(asked.words[row]),
                "answer": WORDS[int(answer[row])],
                "truth": WORDS[int(asked.answer[row])],
                "target": int(asked.target[row]),
                "tau": asker.tau,
                "matches": [
                    {"text": WORDS[word], "score": round(value, 4), "patch": patch if patch >= 0 else None}
                    for word, value, patch in zip(
                        asked.words[row].tolist(), score[row].tolist(), host[row].tolist(), strict=True
                    )
                ],
                "attention": [round(value, 5) for value in to_patches.tolist()],
            }
        )
    return found


def _png(pixels: Tensor) -> str:
    image = ((pixels.permute(1, 2, 0) / 2 + 0.5).clamp(0, 1) * 255).round().byte().cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
