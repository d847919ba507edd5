"""The arms: what is copied, where to, with which positions. Where `attach` offers it, `attach` is what runs."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

import attanchor_lab.selection  # noqa: F401  makes its rules known as values of keep_by
from attanchor_kernels import AnchoredSequence, place_sequence
from attanchor_lab import placements
from attanchor_lab.scenes.questions import LENGTH, Questions, holders, is_content
from attanchor_lab.scenes.world import Scenes
from attanchor_lab.synthetic.model import prompts
from attanchor_vlm.model.attach import attach
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.plan import AnchorPlan


@dataclass(frozen=True)
class Arm:
    """One way to build the prompt.

    Attributes:
        title: As reports name it.
        copies: "none"; "matched" (text behind its best patch, by `attach`); "image" (image tokens behind their best
            word, by `attach`); "random" (the tokens that "matched" would copy, behind random patches); "true" (colours
            and shapes behind the patch that they belong to); "front" and "end" (the whole question, before and behind
            the image).
        positions: "sequential" or "inherit".
        content_only: Function words take no part.
        keep, keep_by: As in `AttAnchorConfig`: how much of the image stays, and what; only where `attach` runs.
    """

    title: str
    copies: str
    positions: str = "sequential"
    content_only: bool = False
    keep: float | None = None
    keep_by: str = "cells"

    @property
    def by_attach(self) -> bool:
        return self.copies in ("none", "matched", "image")

    @property
    def at_patches(self) -> bool:
        """Words are copied, each behind a patch that is chosen for it."""
        return self.copies in ("matched", "random", "true")

    @property
    def has_tau(self) -> bool:
        return self.copies in ("matched", "image", "random")


ARMS: dict[str, Arm] = {
    "plain": Arm("plain", "none"),
    "t2i": Arm("text into image", "matched"),
    "t2i-inherit": Arm("text into image, inherited positions", "matched", "inherit"),
    "t2i-content": Arm("text into image, function words left out", "matched", content_only=True),
    "t2i-content-inherit": Arm(
        "text into image, inherited positions, function words left out", "matched", "inherit", True
    ),
    "i2t": Arm("image into text", "image"),
    "random": Arm("same tokens at random patches", "random"),
    "random-inherit": Arm("same tokens at random patches, inherited positions", "random", "inherit"),
    "true": Arm("anchors at the true patch", "true", content_only=True),
    "true-inherit": Arm("anchors at the true patch, inherited positions", "true", "inherit", True),
    "front": Arm("whole question before the image", "front"),
    "end": Arm("whole question twice behind the image", "end"),
    # A third of 36 patches, a ninth, and as many more as anchors would take (a quarter of the question's words).
    **{f"keep-{count}": Arm(f"{count} patches, one a cell", "none", keep=count) for count in (12, 14, 4, 6)},
    **{
        f"keep-{count}-inherit": Arm(f"{count} patches, one a cell, positions kept", "none", "inherit", keep=count)
        for count in (12, 14)
    },
    "keep-12-random": Arm("12 patches, random", "none", keep=12, keep_by="random"),
    "keep-12-pooling": Arm("12 patches, averages of cells", "none", keep=12, keep_by="pooling"),
    "keep-12-relevance": Arm("12 patches, best cosines", "none", keep=12, keep_by="relevance"),
    "t2i-keep-12": Arm("text into image, 12 patches, one a cell", "matched", keep=12),
    "t2i-keep-12-inherit": Arm(
        "text into image, 12 patches, one a cell, inherited positions", "matched", "inherit", keep=12
    ),
    "t2i-keep-4": Arm("text into image, 4 patches, one a cell", "matched", keep=4),
}


@dataclass
class Batch:
    """Samples of one question each; `features` are the projected patches (B, P, D), `encoded` what the model made."""

    scenes: Scenes
    questions: Questions
    pixels: Tensor
    ids: Tensor
    is_image: Tensor
    features: Tensor
    encoded: Any

    @property
    def patches(self) -> int:
        return self.features.shape[1]

    @property
    def images(self) -> dict[str, Any]:
        """The images as a forward takes them, encoded already."""
        return {"mm_encoder_outputs": {"image": self.encoded}}


def encode(model: Any, scenes: Scenes, questions: Questions, pixels: Tensor) -> Batch:
    """Run the model's own image path, once: its result is what every arm goes on with."""
    encoded = model.get_image_features(pixels, return_dict=True)
    features = torch.stack(list(encoded.pooler_output))
    ids = prompts(questions.words, features.shape[1])
    return Batch(scenes, questions, pixels, ids, ids == model.config.image_token_id, features, encoded)


# What a call's prompt was made of: both say `source`, `is_anchor`, `attention_mask`, `score` and `host`.
Built: TypeAlias = AnchorPlan | AnchoredSequence


class Answered(NamedTuple):
    """`logits` (B, V) at the end of the prompt, `output` of the model, and what was built."""

    logits: Tensor
    output: Any
    built: Built


class Asker:
    """A model that answers by way of one arm.

    Args:
        model: A LlavaForConditionalGeneration; a PeftModel's base model.
        tau: The threshold of arms that match; changed by setting `tau`.
        generator: For arms with chance in them; on the model's device.
    """

    def __init__(self, model: Any, arm: Arm, tau: float, generator: torch.Generator) -> None:
        self.model, self.arm, self.generator = model, arm, generator
        self.tau = tau

    @property
    def tau(self) -> float:
        return self._tau

    @tau.setter
    def tau(self, value: float) -> None:
        self._tau = value
        attach(self.model, self._config(value))

    def _config(self, tau: float) -> AttAnchorConfig:
        arm = self.arm
        if not arm.by_attach:
            return AttAnchorConfig(tau=1.0)
        return AttAnchorConfig(
            1.0 if arm.copies == "none" else tau,
            "image_into_text" if arm.copies == "image" else "text_into_image",
            arm.positions,
            keep=arm.keep,
            keep_by=arm.keep_by,
            route="embeds",
            force_inherit=arm.positions == "inherit",
        )

    def takes_part(self, batch: Batch) -> Tensor:
        """(B, S) bool, the tokens of the question that may be copied (image into text: that may host)."""
        mask = torch.zeros_like(batch.is_image)
        mask[:, -LENGTH:] = is_content(batch.questions.words) if self.arm.content_only else True
        return mask

    def __call__(self, batch: Batch, copies: bool = True, **more: Any) -> Answered:
        """Answer a batch.

        Args:
            copies: False for the plain prompt, whatever the arm.
            more: For the model, such as `output_attentions`.
        """
        if self.arm.by_attach or not copies:
            return self._through_attach(batch, copies, more)
        placed = self.placed(batch)
        output = self.model(
            inputs_embeds=placed.embeds,
            attention_mask=placed.attention_mask,
            position_ids=placed.position_ids,
            use_cache=False,
            **more,
        )
        return _answered(output, placed)

    def _through_attach(self, batch: Batch, copies: bool, more: dict[str, Any]) -> Answered:
        config = self.model.config.attanchor
        if not copies:
            plain = dataclasses.replace(self._config(self.tau), tau=1.0, keep=None)
            self.model.config.attanchor = plain.to_dict()
        try:
            output = self.model(
                input_ids=batch.ids,
                attention_mask=torch.ones_like(batch.ids),
                anchor_mask=self.takes_part(batch),
                use_cache=False,
                **batch.images,
                **more,
            )
        finally:
            self.model.config.attanchor = config
        plan = self.model.attanchor_plan
        if plan is None:  # the prompt as it is
            roles, nowhere = placements.roles_of(batch.is_image, self.takes_part(batch)), torch.full_like(batch.ids, -1)
            rows = self.model.get_input_embeddings()(batch.ids)
            plan = place_sequence(rows, batch.features.flatten(0, 1).to(rows.dtype), roles, nowhere, copy=False)
        return _answered(output, plan)

    def placed(self, batch: Batch) -> AnchoredSequence:
        """The prompt of an arm that `attach` does not offer, and of "matched" as the operator builds it."""
        embedded = self.model.get_input_embeddings()(batch.ids)
        matched = placements.match(embedded, batch.features, batch.is_image, self.takes_part(batch))
        roles = placements.roles_of(batch.is_image, self.takes_part(batch))
        features = batch.features.flatten(0, 1).to(embedded.dtype)
        made = place_sequence(embedded, features, roles, self._hosts(batch, matched), positions=self.arm.positions)
        return made._replace(score=matched.score)

    @torch.no_grad()
    def _hosts(self, batch: Batch, matched: placements.Matched) -> Tensor:
        copies, takes_part = self.arm.copies, self.takes_part(batch)
        inserted = (matched.score >= self.tau) & (self.tau < 1)
        if copies == "matched":
            return matched.best.masked_fill(~inserted, -1)
        if copies == "random":
            return placements.random_patches(inserted, batch.patches, self.generator)
        if copies == "front":
            return placements.at_slot(takes_part, 0)
        if copies == "end":
            return placements.at_slot(takes_part, batch.patches)
        if copies == "true":
            holds = holders(batch.scenes, batch.questions.words)
            patch = placements.true_patches(holds, batch.questions.target, self.generator)
            host = torch.full_like(batch.ids, -1)
            host[:, -LENGTH:] = torch.where(patch >= 0, patch + 1, -1)
            return host
        raise ValueError(f"copies is {copies!r}; it is no placement")


def _answered(output: Any, built: Built) -> Answered:
    """With the logits where the answer is predicted, at the end of prompts that are padded on the right."""
    last = built.attention_mask.sum(1) - 1
    return Answered(output.logits[torch.arange(len(last), device=last.device), last], output, built)
