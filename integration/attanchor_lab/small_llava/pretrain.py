"""Make the small LLaVA's stage-1 weights: `attanchor demo-stage1 --output DIR`, some minutes on one core.

Three steps, all on rendered scenes. (1) The vision tower learns to name colour, shape and place of every patch, and is
frozen. (2) Projector and language model learn to answer by plain concatenation, while a contrastive loss in the manner
of SEA (supervised embedding alignment) pulls each projected patch to the embeddings of its label words: without it the
cosine between a patch and a word means nothing in a model that was never trained on text. (3) The share of words whose
best patch holds them is measured on fresh scenes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.scenes.alignment import alignment_loss, match_counts, match_quality
from attanchor_lab.scenes.questions import COLOUR, LABELS, quadrant
from attanchor_lab.scenes.world import Scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_lab.synthetic.model import LANGUAGE, learner, trained_of
from attanchor_vlm.constants import IGNORE_INDEX
from attanchor_vlm.records import check_parent

_PHRASES = (  # together they hold every word of the prompts that names neither a colour nor a shape
    ("Is there a red an orange ring in the picture?", "yes"),
    ("What colour is the ring?", "no"),
    ("Where is the ring?", "top left"),
    ("Where is the ring?", "bottom right"),
)


@dataclass(frozen=True)
class Recipe:
    """The settings of stage 1; the defaults made the weights in the package."""

    tower_steps: int = 500
    tower_batch: int = 48
    tower_lr: float = 2e-3
    steps: int = 1600
    batch: int = 32
    lr: float = 2e-3
    scenes: int = 5000
    alignment_weight: float = 0.5
    temperature: float = 0.1
    seed: int = 0


def make(output: Path, recipe: Recipe = Recipe(), log: Callable[[str], None] = print) -> None:
    """Train from random weights and save model and processor to `output`.

    Raises:
        ValueError: `output` lies in something that is no folder, or that may not be written into.
    """
    check_parent(output)
    started = time.perf_counter()
    torch.manual_seed(recipe.seed)
    generator = scenes.generator_for(recipe.seed)
    processor = small_llava.build_processor()
    model = small_llava.build_model()
    _pretrain_tower(model, processor, recipe, generator, log)
    _pretrain_language(model, processor, recipe, generator, log)
    found = alignment(model, processor, seed=recipe.seed + 1)
    seconds = time.perf_counter() - started
    log(f"matched patch holds the word: {found['hit']:.3f} (chance {found['chance']:.3f}); {seconds:.0f} s in all")
    output.mkdir(parents=True, exist_ok=True)
    model.eval().save_pretrained(output)
    processor.save_pretrained(output)
    for file in output.iterdir():
        file.chmod(0o644)


def pixel_values(processor: LlavaProcessor, images: np.ndarray) -> Tensor:
    """(n, side, side, 3) uint8 to what the image processor makes of them, in one go."""
    mean, std = processor.image_processor.image_mean, processor.image_processor.image_std
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def _pretrain_tower(model, processor, recipe: Recipe, generator: torch.Generator, log) -> None:
    """Name colour, shape, row, column and quadrant of every patch by linear heads, thrown away after; then freeze."""
    tower = model.model.vision_tower
    sizes = (len(scenes.COLOURS) + 1, len(scenes.SHAPES) + 1, scenes.GRID, scenes.GRID, len(scenes.PLACES))
    heads = nn.ModuleList([nn.Linear(tower.config.hidden_size, size) for size in sizes])
    learn = learner([*tower.parameters(), *heads.parameters()], recipe.tower_steps, recipe.tower_lr)
    cells = torch.arange(scenes.GRID**2)
    quadrants = quadrant(scenes.WORLD, cells)
    for step in range(recipe.tower_steps):
        # Crowded scenes: more named patches in every step.
        batch = scenes.draw_scenes(recipe.tower_batch, generator, least=12, most=32)
        hidden = _tower_features(model, pixel_values(processor, scenes.render(batch, generator)))
        targets = (
            batch.on_patches(batch.colour) % sizes[0],  # -1, the empty patch, becomes the last class
            batch.on_patches(batch.shape) % sizes[1],
            (cells // scenes.GRID).expand(recipe.tower_batch, -1),
            (cells % scenes.GRID).expand(recipe.tower_batch, -1),
            quadrants.expand(recipe.tower_batch, -1),
        )
        pairs = list(zip(heads, targets, strict=True))
        loss = torch.stack([F.cross_entropy(head(hidden).flatten(0, 1), t.flatten()) for head, t in pairs]).sum()
        learn(loss)
        if step % 100 == 99 or step + 1 == recipe.tower_steps:
            there = targets[0] != len(scenes.COLOURS)
            right = [(head(hidden).argmax(-1) == t)[there].float().mean().item() for head, t in pairs]
            log(
                f"tower {step + 1}: loss {loss.item():.3f}, right: colour {right[0]:.3f}, shape {right[1]:.3f}, "
                f"place {right[-1]:.3f}"
            )
    tower.requires_grad_(False)


def _tower_features(model, pixels: Tensor) -> Tensor:
    """(n, cells, d): what the projector of this model is given."""
    output = model.model.vision_tower(pixels, output_hidden_states=True)
    return output.hidden_states[model.config.vision_feature_layer][:, 1:]


@dataclass
class _Pool:
    """Scenes with the frozen tower's features, so that each image is rendered and encoded once."""

    drawn: Scenes
    features: Tensor

    @classmethod
    def draw(cls, model, processor, count: int, least: int, most: int, generator: torch.Generator) -> _Pool:
        drawn = scenes.draw_scenes(count, generator, least, most)
        parts = []
        with torch.no_grad():
            for start in range(0, count, 128):
                part = scenes.render(drawn[start : start + 128], generator)
                parts.append(_tower_features(model, pixel_values(processor, part)))
        return cls(drawn, torch.cat(parts))

    def pick(self, count: int, generator: torch.Generator) -> tuple[Scenes, Tensor]:
        index = torch.randint(len(self.drawn), (count,), generator=generator)
        return self.drawn[index], self.features[index]


class _Packer:
    """Several questions about one image behind one copy of the image, kept apart by a block mask.

    A question sees the prompt up to the image and itself, at the positions that it would have alone: the loss equals
    that of as many separate samples, for about a quarter of the work.
    """

    def __init__(self, processor: LlavaProcessor):
        tokenizer = processor.tokenizer
        image = tokenizer.convert_tokens_to_ids("<image>")
        whole = tokenizer(self._render(processor, "?", "yes")).input_ids
        first = whole.index(image)
        self.processor, self.image = processor, image
        self.prefix = torch.tensor(whole[:first] + [image] * scenes.GRID**2)
        self.pad = tokenizer.pad_token_id

    @staticmethod
    def _render(processor: LlavaProcessor, question: str, answer: str) -> str:
        user = [{"type": "image"}, {"type": "text", "text": question}]
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": user},
            {"role": "assistant", "content": [{"type": "text", "text": answer}]},
        ]
        return processor.apply_chat_template(messages)

    def pack(self, questions: list[scenes.Question], count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """ids, labels, positions (count, S) and the additive mask (count, 1, S, S)."""
        texts = [self._render(self.processor, q.text, q.answer) for q in questions]
        prompts = [text[: text.rindex("ASSISTANT:") + len("ASSISTANT:")] for text in texts]
        tokenizer = self.processor.tokenizer
        rows: list[list[tuple[list[int], int]]] = [[] for _ in range(count)]
        for question, ids, prompt in zip(
            questions, tokenizer(texts).input_ids, tokenizer(prompts).input_ids, strict=True
        ):
            after = ids.index(self.image) + 1
            rows[question.scene].append((ids[after:], len(prompt) - after))
        start = len(self.prefix)
        longest = max(sum(len(ids) for ids, _ in row) for row in rows)
        ids_ = torch.full((count, start + longest), self.pad)
        labels = torch.full_like(ids_, IGNORE_INDEX)
        positions = torch.zeros_like(ids_)
        block = torch.full_like(ids_, -1)  # 0 = prefix, 1.. = questions, -1 = padding
        ids_[:, :start], positions[:, :start], block[:, :start] = self.prefix, torch.arange(start), 0
        for number, row in enumerate(rows):
            at = start
            for which, (tokens, asked) in enumerate(row, start=1):
                span = slice(at, at + len(tokens))
                ids_[number, span] = torch.tensor(tokens)
                labels[number, at + asked : span.stop] = ids_[number, at + asked : span.stop]
                positions[number, span] = torch.arange(start, start + len(tokens))
                block[number, span] = which
                at = span.stop
        causal = torch.ones(ids_.shape[1], ids_.shape[1], dtype=torch.bool).tril()
        seen = (block[:, :, None] == block[:, None]) | (block[:, None] == 0)
        mask = torch.zeros(seen.shape).masked_fill(~(seen & causal), torch.finfo(torch.float32).min)
        return ids_, labels, positions, mask[:, None]


def _pretrain_language(model, processor, recipe: Recipe, generator: torch.Generator, log) -> None:
    packer = _Packer(processor)
    words = torch.cat([_label_words(processor), _other_words(processor)])
    model.train()
    learn = learner(trained_of(model), recipe.steps, recipe.lr, **LANGUAGE)
    # First scenes with few objects, where a question can be answered before attention has learnt to select.
    easy = _Pool.draw(model, processor, recipe.scenes // 4, 1, 4, generator)
    full = _Pool.draw(model, processor, recipe.scenes, 5, 9, generator)
    log(f"{len(easy.drawn) + len(full.drawn)} scenes rendered and encoded")
    for step in range(recipe.steps):
        pool = easy if step < recipe.steps // 5 else full
        batch, features = pool.pick(recipe.batch, generator)
        ids, labels, positions, mask = packer.pack(scenes.ask(batch, generator), len(batch))
        projected = model.model.multi_modal_projector(features)
        embedding = model.get_input_embeddings()
        rows = embedding(ids)
        rows = rows.masked_scatter((ids == packer.image)[..., None], projected)
        hidden = model.model.language_model(
            inputs_embeds=rows, attention_mask=mask, position_ids=positions
        ).last_hidden_state
        asked = labels[:, 1:] != IGNORE_INDEX
        answer = F.cross_entropy(model.lm_head(hidden[:, :-1][asked]), labels[:, 1:][asked])
        aligned = alignment_loss(projected, embedding.weight[words], batch, recipe.temperature)
        learn(answer + recipe.alignment_weight * aligned)
        if step % 100 == 99 or step + 1 == recipe.steps:
            log(f"language {step + 1}: answer loss {answer.item():.3f}, alignment loss {aligned.item():.3f}")


def _label_words(processor: LlavaProcessor) -> Tensor:
    """Token ids of colours, shapes and "empty", in this order."""
    return torch.tensor([small_llava.word_id(processor, w) for w in (*scenes.COLOURS, *scenes.SHAPES, scenes.EMPTY)])


def _other_words(processor: LlavaProcessor) -> Tensor:
    """Every other token of the prompts: none of them describes a patch."""
    every = {
        token for question in _PHRASES for token in processor.tokenizer(_Packer._render(processor, *question)).input_ids
    }
    special = set(processor.tokenizer.all_special_ids)
    return torch.tensor(sorted(every - special - set(_label_words(processor).tolist())))


@torch.no_grad()
def alignment(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, count: int = 200, seed: int = 1
) -> dict[str, float | None]:
    """On fresh scenes: how often the patch that a present word matches best holds it ("hit"), and what chance would
    give, as `match_quality` has them."""
    generator = scenes.generator_for(seed)
    batch = scenes.draw_scenes(count, generator)
    pixels = pixel_values(processor, scenes.render(batch, generator))
    patches = torch.cat([torch.stack(list(model.get_image_features(part).pooler_output)) for part in pixels.split(128)])
    table: Any = model.get_input_embeddings().weight
    words = F.normalize(table[_label_words(processor)[:-1]], dim=-1)
    best = (F.normalize(patches, dim=-1) @ words.T).argmax(1)  # (n, words)
    asked, nowhere = torch.arange(COLOUR, COLOUR + LABELS).expand(count, -1), torch.full_like(best, -1)
    return match_quality(match_counts(nowhere, best, asked, batch, nowhere[:, 0]))
