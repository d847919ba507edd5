"""Models in which anchors cannot be inserted, with the reason."""

from __future__ import annotations

import inspect
from typing import Any

_CROSS = "its images do not stand in the prompt but are read by cross-attention"
_QUERIES = "its images become a fixed number of learned queries, none of which is a place in the image"
_ENCODER = "it is an encoder-decoder, whose images do not stand in the decoder's prompt"
_INSIDE = "its thinker is the image-text model inside; attach to `model.thinker`"

REASONS = {
    **dict.fromkeys(("mllama", "idefics", "evolla", "blip"), _CROSS),
    **dict.fromkeys(("blip-2", "instructblip", "instructblipvideo", "kosmos-2", "kosmos-2.5"), _QUERIES),
    **dict.fromkeys(("florence2", "t5gemma2", "udop", "pix2struct", "vision-encoder-decoder"), _ENCODER),
    **dict.fromkeys(("qwen2_5_omni", "qwen3_omni_moe"), _INSIDE),
    "fuyu": "its encoded images have no `pooler_output`, where transformers has the features of a prompt",
    "git": "its image tokens stand in front of every prompt without placeholders",
    "pi0": "it gives actions of a robot, not text",
    "diffusion_gemma": "it denoises blocks of text instead of reading a prompt from left to right",
}


def reason_against(model: Any) -> str | None:
    """Why anchors cannot be inserted in a transformers model; None if nothing speaks against it.

    What is not known by name is judged by what anchors need: placeholders, and images that can be encoded ahead.
    """
    config, base = model.config, model.base_model
    if (known := REASONS.get(str(getattr(config, "model_type", None)))) is not None:
        return known
    if getattr(config, "is_encoder_decoder", False):
        return _ENCODER
    takes = inspect.signature(type(base).forward).parameters
    lacking = [name for name in ("input_ids", "position_ids", "mm_encoder_outputs") if name not in takes]
    if not hasattr(base, "get_image_features") or lacking:
        what = f"{lacking[0]} in forward" if lacking else "get_image_features"
        return f"it has no {what}, so images cannot be encoded before the prompt is put together"
    if getattr(config, "image_token_id", None) is None:
        return "its config names no image_token_id, so where images stand in a prompt is not known"
    return None
