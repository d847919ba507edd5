"""What AttAnchor knows about each family of models. A new family is one module here and one line below."""

from __future__ import annotations

from transformers import PreTrainedModel

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.gemma3 import Gemma3Adapter
from attanchor_vlm.model.families.idefics3 import Idefics3Adapter
from attanchor_vlm.model.families.internvl import InternVLAdapter
from attanchor_vlm.model.families.llava import LlavaAdapter
from attanchor_vlm.model.families.llava_next import LlavaNextAdapter
from attanchor_vlm.model.families.llava_onevision import LlavaOnevisionAdapter
from attanchor_vlm.model.families.paligemma import PaliGemmaAdapter
from attanchor_vlm.model.families.qwen2_vl import Qwen2VLAdapter
from attanchor_vlm.model.families.qwen3_vl import Qwen3VLAdapter

_REGISTRY: dict[str, FamilyAdapter] = {}


def register(adapter: FamilyAdapter) -> None:
    """Make a family known to `attach`, under every ``config.model_type`` that the adapter names.

    Raises:
        TypeError: `adapter` is no instance of a subclass of `FamilyAdapter`.
        ValueError: it names no model type.
    """
    if not isinstance(adapter, FamilyAdapter):
        given = f"the class {adapter.__name__}" if isinstance(adapter, type) else type(adapter).__name__
        raise TypeError(f"adapter is {given}; it should be an instance of a subclass of FamilyAdapter")
    if not adapter.model_types:
        raise ValueError(f"{type(adapter).__name__}.model_types is empty; it should name the family's model_type")
    for model_type in adapter.model_types:
        _REGISTRY[model_type] = adapter


def adapter_for(model: PreTrainedModel) -> FamilyAdapter:
    """The adapter of a model's family.

    Raises:
        ValueError: there is none; the message says what one needs.
    """
    model_type = getattr(model.config, "model_type", None)
    if model_type in _REGISTRY:
        return _REGISTRY[model_type]
    raise ValueError(
        f"AttAnchor has no adapter for model_type {model_type!r} ({type(model).__name__}); it knows "
        f"{', '.join(sorted(_REGISTRY))}. An adapter is a subclass of attanchor_vlm.model.families.FamilyAdapter, "
        "passed to attanchor_vlm.model.families.register, that says: which arguments of forward hold the image "
        "(image_arguments), how they become one (T, D) tensor of projected features in the order of the placeholders "
        "(encode_images, feature_rows), where the placeholders are (placeholders), which features are no image content "
        "(silent_features), the position ids of the plain prompt if tokens have several (positions_per_token, "
        "plain_positions), the per-token inputs that must grow with the prompt (token_types), the routes that the "
        "model allows (routes), and, for pictures of anchors, where in an image its tokens lie (grids)"
    )


register(LlavaAdapter())
register(LlavaNextAdapter())
register(LlavaOnevisionAdapter())
register(Qwen2VLAdapter())
register(Qwen3VLAdapter())
register(InternVLAdapter())
register(Idefics3Adapter())
register(PaliGemmaAdapter())
register(Gemma3Adapter())

__all__ = ["FamilyAdapter", "adapter_for", "register"]
