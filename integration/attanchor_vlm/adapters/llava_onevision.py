"""LLaVA-OneVision: LLaVA-NeXT's tiles and line ends, with the number of images per sample and bounded tiles."""

from __future__ import annotations

from attanchor_vlm.adapters.llava_next import LlavaNextAdapter


class LlavaOnevisionAdapter(LlavaNextAdapter):
    model_types = ("llava_onevision",)
    image_arguments = (*LlavaNextAdapter.image_arguments, "vision_aspect_ratio", "batch_num_images")
