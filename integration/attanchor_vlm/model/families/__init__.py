"""What AttAnchor knows about each family of models: facts where they differ from `FamilyAdapter`, reasons against."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from attanchor_vlm.model.families import encoded, llava_next, tiles
from attanchor_vlm.model.families.base import FamilyAdapter, axes
from attanchor_vlm.model.families.qwen_vl import QwenVLAdapter
from attanchor_vlm.model.families.refusals import REASONS, reason_against

_ANY = FamilyAdapter()
_REGISTRY: dict[str, FamilyAdapter] = {}
_BOUND: dict[tuple[object, ...], FamilyAdapter] = {}


def register(adapter: FamilyAdapter) -> None:
    """Make what a family needs known to `attach`, under every ``config.model_type`` that the adapter names.

    Raises:
        TypeError: `adapter` is no instance of `FamilyAdapter` or a subclass.
        ValueError: its `model_types` are empty, or one string.
    """
    if not isinstance(adapter, FamilyAdapter):
        given = f"the class {adapter.__name__}" if isinstance(adapter, type) else type(adapter).__name__
        raise TypeError(f"adapter is {given}; it should be an instance of a subclass of FamilyAdapter")
    if not adapter.model_types or isinstance(adapter.model_types, str):
        raise ValueError(
            f"{type(adapter).__name__}.model_types is {adapter.model_types!r}; it should be a tuple of the family's "
            "model_type"
        )
    for model_type in adapter.model_types:
        _REGISTRY[model_type] = adapter


def adapter_for(model: PreTrainedModel) -> FamilyAdapter:
    """The adapter of a model's family, the registered one or `FamilyAdapter` itself, bound to what the model is.

    Raises:
        ValueError: anchors cannot be inserted in it; the message says why.
    """
    target: Any = model
    model_type = str(getattr(target.config, "model_type", None))
    adapter = _REGISTRY.get(model_type, _ANY)
    # All that is read off a model when an adapter is bound to it, or refused.
    kinds = (getattr(target.config, f"{kind}_token_id", None) is None for kind in ("image", "video"))
    key = adapter, model_type, type(target.base_model), axes(target), *kinds
    if key not in _BOUND:
        if adapter is _ANY and (reason := reason_against(target)):
            raise ValueError(
                f"AttAnchor cannot insert anchors in {model_type!r} ({type(model).__name__}): {reason}. Where that is "
                "mistaken, register an instance of attanchor_vlm.model.families.FamilyAdapter that says what differs "
                "(image_arguments, encode_images, placeholders, routes, …)"
            )
        _BOUND[key] = adapter.bound_to(target)
    return _BOUND[key]


def refused(model_type: str) -> str | None:
    """Why anchors cannot be inserted in a family that is known by name; to be asked before any weights are there."""
    return None if model_type in _REGISTRY else REASONS.get(model_type)


EMBEDS_FIRST, BOTH = ("embeds", "ids"), ("ids", "embeds")
for known in (
    tiles.LlavaAdapter(),
    llava_next.LlavaNextAdapter(),
    llava_next.LlavaOnevisionAdapter(),
    QwenVLAdapter(model_types=("qwen2_vl", "qwen2_5_vl"), routes=EMBEDS_FIRST),
    QwenVLAdapter(model_types=("qwen3_vl", "qwen3_vl_moe")),  # deepstack features have no place in inputs_embeds
    QwenVLAdapter(model_types=("qwen3_5", "qwen3_5_moe"), routes=BOTH),
    QwenVLAdapter(model_types=("glm4v", "glm46v", "glm4v_moe", "glm_ocr", "glmga", "paddleocr_vl"), routes=BOTH),
    tiles.InternVLAdapter(),
    tiles.Idefics3Adapter(),
    tiles.TileAdapter(model_types=("paligemma",), routes=("ids",), token_types={"token_type_ids": 0}),  # of the prefix
    tiles.Gemma3Adapter(),
    # Of another type than its image, an anchor would cut the image's block of mutual attention in two.
    FamilyAdapter(model_types=("gemma4", "gemma4_unified", "molmo2"), token_types={"mm_token_type_ids": 1}),
    FamilyAdapter(
        model_types=("video_llava",),
        image_arguments=(
            "pixel_values",
            "pixel_values_images",
            "vision_feature_layer",
            "vision_feature_select_strategy",
        ),
        routes=BOTH,
    ),
    encoded.Llama4Adapter(),
    encoded.Granite4VisionAdapter(),
    encoded.HunYuanVLAdapter(),
    encoded.Emu3Adapter(),
    encoded.Phi4MultimodalAdapter(),
    # All that the contract says is right of these, and `inputs_embeds` hold all that their decoders are given.
    FamilyAdapter(
        model_types=(
            "aria",
            "aya_vision",
            "chameleon",
            "cohere2_vision",
            "deepseek_ocr2",
            "deepseek_vl",
            "dots3_note",
            "got_ocr2",
            "idefics2",
            "inkling_mm_model",
            "janus",
            "kimi_k25",
            "lfm2_vl",
            "lfm3_vl",
            "lighton_ocr",
            "llava_next_video",
            "minicpm_ocr",
            "minicpmv4_6",
            "minicpmv4_7",
            "minimax_m3_vl",
            "mistral3",
            "mistral_large4",
            "muse_glimmer",
            "nemotron_h_omni",
            "qianfan_ocr",
            "qwen2_5_omni_thinker",
            "step3p7",
            "video_llama_3",
            "vipllava",
        ),
        routes=BOTH,
    ),
):
    register(known)
_OWN = dict(_REGISTRY)
# Of these the adapters are tested on the models themselves, whatever the prompt.
TESTED = {"llava", "llava_next", "llava_onevision", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "internvl", "idefics3"}
TESTED |= {"smolvlm", "paligemma", "gemma3"}


def is_tested(model_type: str) -> bool:
    """Whether tests hold all that stands in the table of families; not with an adapter that a user registered."""
    return model_type in TESTED and _REGISTRY[model_type] is _OWN[model_type]


__all__ = ["TESTED", "FamilyAdapter", "adapter_for", "is_tested", "refused", "register"]
