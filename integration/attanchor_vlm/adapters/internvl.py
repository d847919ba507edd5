"""InternVL: patches pooled two by two; tiles are images of their own."""

from __future__ import annotations

from attanchor_vlm.adapters.base import FamilyAdapter


class InternVLAdapter(FamilyAdapter):
    model_types = ("internvl",)
    image_arguments = ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
