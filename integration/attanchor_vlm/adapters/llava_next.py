"""LLaVA-NeXT: images in tiles, with a learned row after every line of patches."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from attanchor_vlm.adapters.base import FamilyAdapter


class LlavaNextAdapter(FamilyAdapter):
    """Feature rows that are line ends are the same learned vector everywhere: no image content, so no hosts."""

    model_types = ("llava_next",)
    image_arguments: tuple[str, ...] = (
        "pixel_values",
        "image_sizes",
        "vision_feature_layer",
        "vision_feature_select_strategy",
    )

    def silent_features(self, model: Any, rows: Tensor) -> Tensor | None:
        newline = getattr(model.base_model, "image_newline", None)
        # As the model wrote it into the features, which under autocast have another dtype than the parameter.
        return None if newline is None else (rows == newline.detach().to(rows)).all(-1)
