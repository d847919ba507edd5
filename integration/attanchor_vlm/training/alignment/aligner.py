"""The alignment loss inside training: labels in every batch, and the image tokens of the step's own forward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from attanchor_vlm.data.rows import Sample
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.load import empty_model
from attanchor_vlm.model.media import rows_by_sample
from attanchor_vlm.training.alignment.captions import CaptionLabels, read_captions
from attanchor_vlm.training.alignment.clip import ClipLabels, clip_votes, read_word_list
from attanchor_vlm.training.alignment.loss import TEMPERATURE, image_alignment, patch_alignment

KEY = "alignment"  # of a batch, beside the model's arguments
CAPTIONS = "captions"  # the value of align_labels that takes the answers

Labels: TypeAlias = CaptionLabels | ClipLabels


class AlignedCollator:
    """A collator whose batches bring their labels, under `KEY`; made where batches are, in the loader's workers."""

    def __init__(self, collate: Callable[[Sequence[Sample]], dict[str, Any]], labels: Labels):
        self.collate, self.labels = collate, labels

    def __call__(self, samples: Sequence[Sample]) -> dict[str, Any]:
        batch = self.collate(samples)
        return {**batch, KEY: self.labels(samples, batch)}


class Aligner:
    """One of `AnchorTrainer`'s extra losses.

        collate = AlignedCollator(collate, aligner.labels)
        trainer = AnchorTrainer(…, data_collator=collate, extra_losses={"align_loss": aligner})
        with aligner.watching(model):
            trainer.train()

    It takes the image tokens that the forward of the step has made, so that nothing is encoded twice and DDP sees one
    backward. Words are looked up in the embedding table without gradient.

    Args:
        labels: `CaptionLabels`, which say what an image shows, or `ClipLabels`, which say what an image token shows.
        weight: What the loss is multiplied with.
        temperature: Of InfoNCE.
    """

    def __init__(self, labels: Labels, weight: float, temperature: float = TEMPERATURE):
        self.labels, self.weight, self.temperature = labels, weight, temperature
        self._encoded: Any = None

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """A block in which training calls of `model`, attached or a PeftModel, leave their image tokens here."""
        inner = base_of(model).base_model
        original = inner.get_image_features

        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            encoded = original(*args, **kwargs)
            if inner.training:
                self._encoded = encoded
            return encoded

        inner.get_image_features = get_image_features
        try:
            yield
        finally:
            del inner.get_image_features
            self._encoded = None

    def __call__(self, model: Any, inputs: Mapping[str, Any], outputs: Any) -> Tensor:
        """The weighted loss of the batch that `model` was just called with; 0 without an image or a label, or
        with videos.
        """
        encoded, self._encoded = self._encoded, None
        target = base_of(model)
        adapter = adapter_for(target)
        if adapter.kinds(inputs) != ["image"]:  # of videos nothing was labelled
            return torch.zeros((), device=inputs["input_ids"].device)
        if encoded is None:
            raise RuntimeError(
                f"{type(target).__name__} encoded its images past get_image_features, so there is nothing to align; "
                "train inside of `with aligner.watching(model)`"
            )
        words, right = inputs[KEY]["words"], inputs[KEY]["right"]
        rows = adapter.feature_rows(encoded)
        embedded = _embedded(target, words)
        with torch.autocast(rows.device.type, enabled=False):
            if not self.labels.per_token:
                parts = rows_by_sample(target, adapter, rows, inputs)
                loss = image_alignment(parts, embedded, right, self.temperature)
            else:
                loss = patch_alignment(rows, embedded, right, self.temperature)
        return self.weight * loss


@torch.no_grad()
def _embedded(model: Any, words: Tensor) -> Tensor:
    table = model.get_input_embeddings()
    if hasattr(table.weight, "full_tensor"):  # FSDP2 may have sharded it again after the forward
        return torch.func.functional_call(table, {"weight": table.weight.full_tensor()}, (words,))
    return table(words)


def aligner_for(
    config: Any, model: Any, processor: Any, samples: Sequence[Sample], progress: bool = True
) -> Aligner | None:
    """What a run's `TrainConfig` asks for, of a model with its adapters on; None without an `align_weight`. Streamed
    `samples` are empty."""
    if not config.align_weight:
        return None
    _check_projector(model)
    labels: Any
    if config.align_clip is not None:
        labels = _clip_labels(config, model, processor, samples, progress)
    elif config.align_labels == CAPTIONS:
        labels = CaptionLabels(processor.tokenizer)
    else:
        captions = read_captions(Path(config.align_labels), config.images)
        labels = CaptionLabels(processor.tokenizer, captions)
        if samples and not any(own.images and captions.keys() >= {*own.images} for own in samples):
            raise DataError(f"align_labels {config.align_labels} has no caption for any image of {config.data}")
    return Aligner(labels, config.align_weight, config.align_temperature)


def _clip_labels(config: Any, model: Any, processor: Any, samples: Sequence[Sample], progress: bool) -> ClipLabels:
    images = sorted({image for sample in samples for image in sample.images if isinstance(image, Path)})
    if not images:
        raise SetupError(
            "align_clip labels files of images before training, and the rows name none (are they streamed?)"
        )
    words = read_word_list(config.align_words)
    votes = clip_votes(config.align_clip, words, images, config.output, progress=progress)
    return ClipLabels(processor, empty_model(base_of(model).config), votes)  # goes to the loader's workers


def _check_projector(model: Any) -> None:
    """Refuse a model in which no gradient of the alignment would arrive."""
    language = ("language_model.", "text_model.", "lm_head", "embed_tokens")
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    if all(any(part in name for part in language) for name in trained):
        raise SetupError(
            f"align_weight is set, but nothing of {type(base_of(model)).__name__}'s projector is trained, so the "
            "alignment has nothing to change: its projector is no linear layer that LoRA could adapt"
        )
