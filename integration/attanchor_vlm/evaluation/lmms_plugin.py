"""What lmms-eval finds under its entry point group `lmms_eval.models`: the model `attanchor`.

lmms-eval --model attanchor --model_args pretrained=PATH,adapter=PATH --tasks pope --batch_size 8
"""

from __future__ import annotations

from typing import Any


def manifest() -> Any:
    """The manifest of the model `attanchor`, without importing torch."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest("attanchor", chat_class_path="attanchor_vlm.evaluation.lmms_model.AttAnchorLmms")
