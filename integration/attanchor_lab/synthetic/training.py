"""Stage 1 on plain concatenation from random weights; stage 2 in one arm from the weights that all arms share."""

from __future__ import annotations

import math
import time
from collections import deque
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from attanchor_lab.scenes import questions
from attanchor_lab.scenes import world as scenes
from attanchor_lab.scenes.alignment import alignment_loss, match_counts, match_quality
from attanchor_lab.scenes.questions import COLOUR, ID, IMAGE, LABELS, LENGTH, START, Mixture
from attanchor_lab.scenes.world import EMPTY
from attanchor_lab.synthetic import arms, model
from attanchor_lab.synthetic.arms import Arm, Asker, Batch, Built
from attanchor_lab.synthetic.plan import Condition
from attanchor_vlm.training.config import Method
from attanchor_vlm.training.lora import add_lora

_EVERY = 10  # steps between two choices of tau
_MEMORY = 8  # batches whose scores they rest on
_LOGS = 20  # points of a training curve
# Colours, shapes, "empty", then the words that describe no patch.
_ALIGNED = [
    *range(COLOUR, COLOUR + LABELS),
    *(ID[word] for word in (EMPTY, *["is", "there", "a", "what", "colour", "where", "the", "?"])),
]
_EASY = (1, 4)  # objects in the scenes that a model begins with

State = dict[str, Tensor]


def generator_for(device: str, *numbers: int) -> torch.Generator:
    """A generator whose stream depends on all the numbers; the same numbers give the same stream on one device."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator(device).manual_seed(seed)


def stage1(condition: Condition, seed: int, device: str) -> tuple[State, dict[str, Any]]:
    """The weights that every arm of a seed starts from, and what was measured on the way.

    Without stage-1 steps: random weights with a trained, frozen encoder.
    """
    begun = time.perf_counter()
    torch.manual_seed(seed)
    made: Any = model.build(condition.world, condition.shape)
    made = made.to(device)
    recipe = condition.stage1
    generator = generator_for(device, seed, 1)
    encoder = model.pretrain_encoder(
        made.model.vision_tower, condition.world, recipe.encoder_steps, generator, condition.blur_train
    )
    measured: dict[str, Any] = {"encoder": encoder, "encoder_seconds": time.perf_counter() - begun}
    if recipe.steps:
        measured |= _language(made, condition, generator)
    return {name: value.detach().cpu().clone() for name, value in made.state_dict().items()}, measured


def _language(made: Any, condition: Condition, generator: torch.Generator) -> dict[str, Any]:
    recipe, world = condition.stage1, condition.world
    learn = model.learner(model.trained_of(made), recipe.steps, recipe.lr, **model.LANGUAGE)
    log = []
    made.train()
    for step in range(recipe.steps):
        bounds = _EASY if step < recipe.steps // 5 else (0, 0)
        drawn = scenes.draw(world, recipe.batch, generator, *bounds)
        asked = questions.ask(world, drawn, recipe.each, condition.mixture, generator)
        pixels = scenes.render(world, drawn, generator, condition.blur_train)
        features = torch.stack(list(made.get_image_features(pixels, return_dict=True).pooler_output))
        logits = packed_answers(made, features, asked.words)
        answer = F.cross_entropy(logits.flatten(0, 1).float(), asked.answer.flatten())
        loss = answer
        if condition.alignment:
            words = made.get_input_embeddings().weight[_ALIGNED]
            loss = loss + condition.alignment * alignment_loss(features, words, drawn, condition.temperature)
        learn(loss)
        if _is_logged(step, recipe.steps):
            log.append({"step": step + 1, "answer_loss": _finite(answer)})
    return {"log": log}


def packed_answers(made: Any, features: Tensor, words: Tensor) -> Tensor:
    """(B, Q, V) logits of the answers to Q questions (B, Q, LENGTH) about each of B images (B, P, D).

    The questions stand behind one copy of the image, each at the positions that it would have alone, and a mask keeps
    them apart: the answers are those of as many separate prompts, for a fraction of the work.
    """
    count, each = words.shape[:2]
    prefix = 1 + features.shape[1]
    begin = torch.tensor([START] + [IMAGE] * features.shape[1], device=words.device).expand(count, -1)
    ids = torch.cat([begin, words.flatten(1)], 1)
    rows = made.get_input_embeddings()(ids)
    rows = rows.masked_scatter((ids == IMAGE)[..., None], features.to(rows.dtype))
    block = torch.cat([torch.zeros(prefix), torch.arange(1, each + 1).repeat_interleave(LENGTH)]).to(words.device)
    seen = (block[:, None] == block) | (block[None] == 0)
    seen &= torch.ones_like(seen).tril()
    mask = torch.zeros(seen.shape, device=words.device, dtype=rows.dtype)
    mask = mask.masked_fill(~seen, torch.finfo(rows.dtype).min)[None, None]
    alone = torch.arange(prefix, prefix + LENGTH, device=words.device)
    positions = torch.cat([torch.arange(prefix, device=words.device), alone.repeat(each)]).expand(count, -1)
    hidden = made.model.language_model(
        inputs_embeds=rows, attention_mask=mask, position_ids=positions, use_cache=False
    ).last_hidden_state
    return made.lm_head(hidden[:, prefix + LENGTH - 1 :: LENGTH])


def stage2(condition: Condition, arm: Arm, seed: int, state: State, device: str) -> tuple[Asker, dict[str, Any]]:
    """Fine-tune one arm. Data, order and adapters depend on condition and seed alone, not on the arm.

    Returns:
        The arm's asker around the trained model, in evaluation mode, and its log.
    """
    recipe = condition.stage2
    torch.manual_seed(1000 + seed)
    made: Any = model.build(condition.world, condition.shape)
    made = made.to(device)
    made.load_state_dict(state)
    base = made
    if recipe.method == "lora":
        method = Method.from_preset("small-llava")
        add_lora(made, method.lora_rank, method.lora_alpha, method.lora_dropout)  # puts the adapters into `made` itself
    trained = model.trained_of(made)
    asker = Asker(base, arm, 1.0, generator_for(device, seed, 2))
    data = generator_for(device, seed, 3)
    scores: deque[Tensor] = deque(maxlen=_MEMORY)
    asker.tau = starting_tau(condition, asker, generator_for(device, seed, 4))
    learn = model.learner(trained, recipe.steps, recipe.lr, **model.LANGUAGE)
    log: list[dict[str, float | None]] = []
    made.train()
    for step in range(recipe.steps):
        easy = step < recipe.curriculum * recipe.steps
        batch = new_batch(condition, base, recipe.batch, 1, data, condition.blur_train, easy)
        answered = asker(batch)
        answer = F.cross_entropy(answered.logits.float(), batch.questions.answer)
        loss = answer
        if condition.alignment:
            words = base.get_input_embeddings().weight[_ALIGNED]
            aligned = alignment_loss(batch.features, words, batch.scenes, condition.temperature)
            loss = loss + condition.alignment * aligned
        learn(loss)
        if arm.has_tau:
            scores.append(candidate_scores(answered.built.score))
        if recipe.hold_share and scores and step % _EVERY == _EVERY - 1:
            asker.tau = tau_for(torch.cat(list(scores)), wanted_share(condition, arm))
        if _is_logged(step, recipe.steps):
            log.append({"step": step + 1, "answer_loss": _finite(answer), **inserted(asker, batch, answered.built)})
    made.eval()
    if recipe.hold_share:  # for the test, with the model as it ended
        asker.tau = starting_tau(condition, asker, generator_for(device, seed, 8))
    return asker, {"log": log, "tau": asker.tau, "trained_parameters": sum(p.numel() for p in trained)}


def new_batch(
    condition: Condition,
    base: Any,
    count: int,
    each: int,
    generator: torch.Generator,
    blur: float = 0.0,
    easy: bool = False,
    mixture: Mixture | None = None,
) -> Batch:
    """Fresh scenes with `each` questions; with more than one, a scene is repeated for each of its questions.

    Args:
        mixture: Of the questions, instead of that of training.
    """
    bounds = _EASY if easy else (0, 0)
    drawn = scenes.draw(condition.world, count, generator, *bounds)
    asked = questions.ask(condition.world, drawn, each, mixture or condition.mixture, generator).flat()
    pixels = scenes.render(condition.world, drawn, generator, blur)
    if each > 1:
        index = torch.arange(count, device=generator.device).repeat_interleave(each)
        drawn, pixels = drawn[index], pixels[index]
    return arms.encode(base, drawn, asked, pixels)


def wanted_share(condition: Condition, arm: Arm) -> float:
    """Copies over candidates; arms without function words copy every candidate."""
    if arm.content_only:
        return 1.0
    return condition.stage2.image_share if arm.copies == "image" else condition.stage2.share


def candidate_scores(score: Tensor) -> Tensor:
    """(n,) the scores of the tokens that could be copied; n is the same in every batch but for arms that leave words
    out, which copy all of theirs."""
    return score[torch.isfinite(score)].detach()


def tau_for(scores: Tensor, share: float) -> float:
    """The threshold that the best `share` of the scores reach; -1 for all of them."""
    if share >= 1:
        return -1.0
    wanted = max(1, min(round(share * len(scores)), len(scores) - 1))
    best = scores.topk(wanted + 1).values
    return min(float((best[wanted - 1] + best[wanted]) / 2), 0.999)


@torch.no_grad()
def starting_tau(condition: Condition, asker: Asker, generator: torch.Generator) -> float:
    """The threshold for the wanted share with the model as it is; 1 for arms that have none."""
    if not asker.arm.has_tau:
        return 1.0
    asker.tau = 0.999
    scores = []
    for _ in range(4):
        batch = new_batch(condition, asker.model, condition.stage2.batch, 1, generator, condition.blur_train)
        scores.append(candidate_scores(asker(batch).built.score))
    return tau_for(torch.cat(scores), wanted_share(condition, asker.arm))


@torch.no_grad()
def inserted(asker: Asker, batch: Batch, built: Built) -> dict[str, float | None]:
    """What a training step inserted: tau, share and, for text among patches, precision and recall."""
    arm = asker.arm
    if not arm.has_tau:
        return {}
    candidates = batch.patches * len(batch.ids) if arm.copies == "image" else LENGTH * len(batch.ids)
    line: dict[str, float | None] = {"tau": asker.tau, "share": built.is_anchor.sum().item() / candidates}
    if arm.at_patches:
        host = hosts_as_patches(built.host, batch.patches)
        words = batch.questions.words
        quality = match_quality(match_counts(host, host.clamp(min=0), words, batch.scenes, batch.questions.target))
        line |= {"precision": quality["precision"], "recall": quality["recall"]}
    return line


def hosts_as_patches(host: Tensor, patches: int) -> Tensor:
    """(B, LENGTH) patches from (B, S) slots, -1 where a word was not put behind a patch."""
    host = host[:, -LENGTH:]
    return torch.where((host >= 1) & (host <= patches), host - 1, -1)


def _is_logged(step: int, steps: int) -> bool:
    return step % max(1, steps // _LOGS) == 0 or step + 1 == steps


def _finite(loss: Tensor) -> float:
    value = loss.item()
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss became {value}")
    return value
