"""LlavaForConditionalGeneration: LLaVA-1.5, TinyLLaVA and whatever else is saved as this class."""

from __future__ import annotations

from attanchor_vlm.adapters.base import FamilyAdapter


class LlavaAdapter(FamilyAdapter):
    """One feature row per patch, one position per token, nothing per token besides."""

    model_types = ("llava",)
    image_arguments = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy", "image_sizes")
