"""What stands in front of the engine's language model: image encoder, projector, embedding table, anchors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.data.batches import to_model
from attanchor_vlm.data.rows import load_image
from attanchor_vlm.inference.export import ServingError, prompt_rows, refusal
from attanchor_vlm.inference.vllm import ARCHITECTURE
from attanchor_vlm.model.attach import attach
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.load import empty_model, load_front

# vLLM's class for each language model, by the `model_type` of its config, whose tokens were compared with `generate`'s.
LANGUAGE_MODELS = {
    "cohere2": "Cohere2ForCausalLM",
    "glm4v_text": "Glm4ForCausalLM",
    "glm_ocr_text": "Glm4ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "paddleocr_vl_text": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen2_5_omni_text": "Qwen2ForCausalLM",
    "qwen2_5_vl_text": "Qwen2ForCausalLM",
    "qwen2_vl_text": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_vl_text": "Qwen3LLMForCausalLM",
}


class Prompt(NamedTuple):
    """A prompt of L tokens, n of which are given as rows: from the first that no embedding table holds to the last.

    Attributes:
        ids: L token ids; an anchor repeats the id that it copies.
        start: The place of the first row.
        rows: (n, D), or (n, D + …) with the features for further layers behind, on the CPU.
        positions: (3, L) int64 for M-RoPE, otherwise None: 0, 1, 2, …
        inserted: Number of anchors.
        kept: Number of image tokens.
    """

    ids: list[int]
    start: int
    rows: Tensor
    positions: Tensor | None
    inserted: int
    kept: int

    @property
    def digest(self) -> str:
        """The same for no two prompts whose rows or positions differ: by it an engine's caches tell them apart."""
        found = hashlib.blake2b(digest_size=32)
        for part in (self.rows, self.positions):
            if part is not None:
                found.update(part.contiguous().view(torch.uint8).numpy().data)
        return found.hexdigest()


def settings_of(config: Any) -> AttAnchorConfig:
    """The AttAnchor settings in the config of a model that is to be served, which is checked to be one that can be.

    Raises:
        ServingError: there are none, the family has no adapter, or its prompts are more than rows at positions.
    """
    stored = getattr(config, "attanchor", None)
    if stored is None:
        raise ServingError(
            "the model's config holds no AttAnchor settings; start it with `attanchor serve`, or give vLLM "
            """--hf-overrides '{"attanchor": {"tau": 0.6}}'"""
        )
    try:
        settings, model = AttAnchorConfig.from_dict(stored), empty_model(config)
        attach(model, settings)
        text = config.get_text_config()
        deepstack = LANGUAGE_MODELS.get(text.model_type) == "Qwen3LLMForCausalLM"
        reason = refusal(model, layers=deepstack) or _other_language_model(text)
    except (TypeError, ValueError) as error:
        raise ServingError(f"this model cannot be served with anchors: {error}") from error
    if reason:
        raise ServingError(f"{config.model_type} cannot be served with anchors: {reason}")
    return settings


def _other_language_model(text: Any) -> str | None:
    if kinds := {*(getattr(text, "layer_types", None) or ())} - {"full_attention", "sliding_attention"}:
        return (
            f"its language model has layers of {' and '.join(sorted(kinds))}, whose state vLLM keeps beside the KV "
            "cache, and the plugin's model provides for attention alone"
        )
    if text.model_type not in LANGUAGE_MODELS:
        known = ", ".join(LANGUAGE_MODELS)
        return f"its language model is a {text.model_type}; vLLM's say the same as those of transformers for {known}"
    return None


def overrides(config: Any) -> dict[str, Any]:
    """What vLLM is to change in the config of a model with settings, its ``--hf-overrides``.

    Features for further layers (deepstack) stand behind those of the first; vLLM reads the width off `projection_dim`.
    """
    changes: dict[str, Any] = {"architectures": [ARCHITECTURE], "attanchor": config.attanchor}
    if deeper := len(getattr(config.vision_config, "deepstack_visual_indexes", None) or ()):
        changes["text_config"] = {"projection_dim": (1 + deeper) * config.get_text_config().hidden_size}
    return changes


class Front:
    """An attached model without the layers of its language model, with its processor.

    Args:
        folder: A saved model, or a Hub id.
        config: Its config, with the settings in `config.attanchor`; not changed.
        dtype, device: What the rows are made in, and where.

    Raises:
        ServingError: see `settings_of`.
        SetupError: the model cannot be loaded.
    """

    def __init__(self, folder: str, config: Any, dtype: torch.dtype, device: str) -> None:
        self.settings = settings_of(config)
        model, self.processor = load_front(folder, dtype)
        self.model: Any = attach(model.to(device).eval(), self.settings)

    def encode(
        self, chat: Sequence[Mapping[str, Any]], images: Sequence[Any], options: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """A conversation that the assistant is to answer, as `encode_chat` makes it.

        Args:
            images: Bytes of files, paths or PIL images.
            options: Further variables for the chat template.
        """
        opened = [load_image(image) for image in images]
        return encode_chat(
            self.processor,
            [chat],
            [opened],
            add_generation_prompt=True,
            content_words=self.settings.content_words,
            template_options=options,
        )

    @torch.no_grad()
    def prompt(self, encoded: Mapping[str, Tensor]) -> Prompt:
        """What the engine gets for a conversation with images.

        Raises:
            ValueError: it does not fit into the model's context.
        """
        embeds, plan = prompt_rows(self.model, to_model(dict(encoded), self.model))
        ids = plan.input_ids
        is_image = adapter_for(self.model).placeholders(self.model, ids)[0] & ~plan.is_anchor[0]
        given = (is_image | plan.is_anchor[0] | (plan.source[0] < 0)).nonzero()
        start, stop = int(given[0]), int(given[-1]) + 1
        positions = plan.position_ids[:, 0].cpu() if plan.position_ids.dim() == 3 else None
        return Prompt(
            ids[0].tolist(),
            start,
            embeds[start:stop].cpu(),
            positions,
            inserted=int(plan.is_anchor.sum()),
            kept=int(is_image.sum()),
        )
