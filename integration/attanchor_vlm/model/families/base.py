"""The questions that AttAnchor asks about a family of models, with the answers that most families share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from attanchor_vlm.model.families.grid import Grid, kept
from attanchor_vlm.model.plan import AnchorPlan


class FamilyAdapter:
    """Subclass, answer what differs, and `register` an instance. Adapters hold no state.

    Attributes:
        model_types: Values of ``config.model_type`` that this adapter serves.
        routes: What the model's forward and generate can be given, the default first: "embeds" (`inputs_embeds`),
            "ids" (`input_ids` with `mm_encoder_outputs`).
        positions: Default of `AttAnchorConfig.positions`.
        positions_per_token: 1, or 3 for M-RoPE. With 1, "inherit" would repeat positions, which attention code takes
            for packed sequences: `attach` refuses it unless told otherwise.
        image_arguments: Arguments of forward that hold the images. The first one tells that a call has images; all
            are consumed by `encode_images`.
        video_arguments: Arguments of forward that hold videos, in which nothing is inserted: refused.
        token_types: Further (B, S) inputs with one value per token, and the value that an inserted token gets; None to
            copy the one of the token it copies.
    """

    model_types: tuple[str, ...] = ()
    routes: tuple[str, ...] = ("embeds", "ids")
    positions: str = "sequential"
    positions_per_token: int = 1
    image_arguments: tuple[str, ...] = ("pixel_values",)
    video_arguments: tuple[str, ...] = ("pixel_values_videos",)
    token_types: Mapping[str, int | None] = {}

    def has_images(self, arguments: Mapping[str, Any]) -> bool:
        """Whether a call brings images, as pixels or already encoded."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        return arguments.get(self.image_arguments[0]) is not None or encoded.get("image") is not None

    def video_argument(self, arguments: Mapping[str, Any]) -> str | None:
        """The name of the argument in which a call brings videos, None if it brings none."""
        if (arguments.get("mm_encoder_outputs") or {}).get("video") is not None:
            return "mm_encoder_outputs['video']"
        return next((name for name in self.video_arguments if arguments.get(name) is not None), None)

    def encode_images(self, model: Any, arguments: Mapping[str, Any]) -> Any:
        """The model's own encoding of the call's images, with gradient."""
        encoded = (arguments.get("mm_encoder_outputs") or {}).get("image")
        if encoded is not None:
            if arguments.get(self.image_arguments[0]) is not None:
                raise ValueError(
                    f"{self.image_arguments[0]} and mm_encoder_outputs['image'] are both given; pass one of them"
                )
            return encoded
        given = {name: arguments[name] for name in self.image_arguments if arguments.get(name) is not None}
        return model.get_image_features(**given, return_dict=True)

    def feature_rows(self, encoded: Any) -> Tensor:
        """(T, D) projected features of the whole batch, in row-major order of the placeholders."""
        return torch.cat([part.reshape(-1, part.shape[-1]) for part in encoded.pooler_output])

    def placeholders(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """(B, S) bool, True at the slots that image features fill."""
        return input_ids == model.config.image_token_id

    def silent_features(self, model: PreTrainedModel, rows: Tensor) -> Tensor | None:
        """(T,) bool, True at features that are no image content (newline rows) and take no part; None for none.

        `rows` are as `feature_rows` returned them, in the model's own dtype.
        """
        return None

    def plain_positions(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, arguments: Mapping[str, Any]
    ) -> Tensor | None:
        """(P, B, S) position ids of the prompt without anchors, for "inherit"; None to count over its real tokens."""
        return None

    def remember_positions(self, model: PreTrainedModel, plan: AnchorPlan) -> None:
        """Update what the model itself keeps about the positions of the last prompt, if it does."""

    def regroup(self, encoded: Any, rows: Tensor, order: Tensor, per_sample: list[int]) -> Any:
        """What `mm_encoder_outputs["image"]` should hold for the new prompt.

        Args:
            encoded: From `encode_images`, not to be changed.
            rows: (T, D), from `feature_rows`.
            order: (T',) int64, the row of each placeholder of the new prompt, in row-major order.
            per_sample: How many of them each sample has.
        """
        if isinstance(encoded.pooler_output, Tensor):  # and a tensor is what the model expects back: one row an entry
            return BaseModelOutputWithPooling(pooler_output=rows[order][:, None])  # type: ignore[arg-type]
        # One entry a sample: beam search repeats the list by sample and counts placeholders to find the borders.
        parts = [part for part in rows[order].split(per_sample) if len(part)]
        return BaseModelOutputWithPooling(pooler_output=parts)  # type: ignore[arg-type]  # a list, as models return

    def token_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        """(rows, columns) of the grids of tokens of each image of a call, in the order of the features.

        Where the encoder takes tiles as images of their own, each of them is an image here.

        Args:
            arguments: The call's.
            count: Number of features, those that are no image content left out.
        """
        rows, columns = self.tile_shape(model, arguments)
        return [[(rows, columns)]] * (count // (rows * columns))

    def class_token_attention(self, model: Any, arguments: Mapping[str, Any], encoded: Any) -> Tensor | None:
        """(T,) float32, how much the class token of the image encoder attends to each feature; None if it has none.

        Args:
            arguments: The call's.
            encoded: From `encode_images`.

        Raises:
            ValueError: `encoded` was given without what the encoder's layers were given.
        """
        return None

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        """Where the tokens of one image lie in it, as grids in the order of the tokens.

        Args:
            processor: What made `batch`.
            batch: The model's arguments.
            index: Counts the images of the whole batch.
            size: (height, width) of the original image.
        """
        return [Grid(*self.tile_shape(model, batch), kept(processor.image_processor, size))]

    def tile_shape(self, model: Any, batch: Mapping[str, Any]) -> tuple[int, int]:
        """(rows, columns) of the tokens of one tile, or of one image where images have no tiles."""
        pixels, size = batch.get("pixel_values"), model.config.vision_config.image_size
        sides = (size if isinstance(size, (list, tuple)) else (size, size)) if pixels is None else pixels.shape[-2:]
        height, width = sides
        patch, pooled = model.config.vision_config.patch_size, self.pooling(model)
        patch_height, patch_width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        return int(height // patch_height / pooled), int(width // patch_width / pooled)

    def pooling(self, model: Any) -> float:
        """How many patches of the image encoder lie along the side of a token."""
        return 1

    def vision_tower(self, model: PreTrainedModel) -> nn.Module | None:
        """The image encoder without its projector, which training usually freezes."""
        return getattr(model.base_model, "vision_tower", None)
