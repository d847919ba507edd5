"""The model that vLLM runs: the language model of a family, whose prompts come with their rows."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vllm.config import VllmConfig
from vllm.inputs.engine import MultiModalInput, mm_input
from vllm.model_executor.models.interfaces import SupportsMRoPE, SupportsMultiModal, SupportsPP
from vllm.model_executor.models.utils import AutoWeightsLoader, init_vllm_registered_model, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import (
    MultiModalBatchedField,
    MultiModalFieldElem,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)
from vllm.multimodal.processing import BaseDummyInputsBuilder, BaseMultiModalProcessor, BaseProcessingInfo
from vllm.sequence import IntermediateTensors

from attanchor_vlm.inference.export import ServingError
from attanchor_vlm.inference.vllm.front import LANGUAGE_MODELS, Prompt, overrides, settings_of

# Where vLLM reads a language model's config otherwise than transformers: its windows hold one token more, and what the
# others' code has fixed is asked of the config.
_AS_TRANSFORMERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "cohere2": lambda text: {"sliding_window": text.sliding_window and text.sliding_window - 1},
    "glm4v_text": lambda text: {"attention_bias": True},
    "qwen3_vl_text": lambda text: {"rope_parameters": {**text.rope_parameters, "mrope_interleaved": True}},
}


def engine_input(prompt: Prompt) -> MultiModalInput:
    """A prompt as the engine takes it: its rows are one item, whatever number of images stand in them."""
    on_cpu = MultiModalBatchedField(keep_on_cpu=True)
    fields = {"rows": MultiModalFieldElem(data=prompt.rows, field=MultiModalBatchedField())}
    if prompt.positions is not None:
        fields["positions"] = MultiModalFieldElem(data=prompt.positions, field=on_cpu)
    return mm_input(
        prompt_token_ids=prompt.ids,
        mm_kwargs=MultiModalKwargsItems({"image": [MultiModalKwargsItem(fields)]}),
        mm_hashes={"image": [prompt.digest]},
        mm_placeholders={"image": [PlaceholderRange(offset=prompt.start, length=len(prompt.rows))]},
    )


class AnchorInfo(BaseProcessingInfo):
    """What vLLM asks before any prompt; here a model that cannot be served is refused."""

    def __init__(self, ctx: Any) -> None:
        super().__init__(ctx)
        config, width = self.get_hf_config(), ctx.model_config.get_inputs_embeds_size()
        settings_of(config)
        changes = overrides(config).get("text_config", {"projection_dim": width})
        if changes != {"projection_dim": width}:
            raise ServingError(
                "rows hold features for further layers, which vLLM was not told; start it with `attanchor serve`, or "
                f"add to --hf-overrides {json.dumps({'text_config': changes})}"
            )

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"image": None}

    def get_mm_max_tokens_per_item(self, seq_len: int, mm_counts: Mapping[str, int]) -> Mapping[str, int]:
        return {"image": seq_len}


# vLLM's base classes ask for the four methods below that raise; what would call them is overridden in AnchorProcessor.
class AnchorDummies(BaseDummyInputsBuilder[AnchorInfo]):
    """Nothing is built of dummy images: `AnchorProcessor` makes dummy rows."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        raise NotImplementedError

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        raise NotImplementedError


class AnchorProcessor(BaseMultiModalProcessor[AnchorInfo]):
    """Stands where vLLM makes dummy prompts; real ones are made by the renderer, which knows the user's words."""

    def get_dummy_mm_inputs(self, mm_counts: Mapping[str, int], **options: Any) -> MultiModalInput:
        config = self.info.ctx.model_config
        length, width = config.max_model_len, config.get_inputs_embeds_size()
        rows = torch.zeros(length, width, dtype=config.dtype)
        return engine_input(Prompt([0] * length, 0, rows, None, inserted=0, kept=length))

    def apply(self, inputs: Any, timing_ctx: Any) -> MultiModalInput:
        raise ValueError(
            "images came without a chat, or vLLM runs without --tokenizer-mode attanchor; anchors need the chat, to "
            "know the user's words: use LLM.chat or the Chat Completions API"
        )

    def _get_mm_fields_config(self, hf_inputs: Any, hf_processor_mm_kwargs: Any) -> Mapping[str, Any]:
        raise NotImplementedError

    def _get_prompt_updates(self, mm_items: Any, hf_processor_mm_kwargs: Any, out_mm_kwargs: Any) -> Sequence[Any]:
        raise NotImplementedError


@MULTIMODAL_REGISTRY.register_processor(AnchorProcessor, info=AnchorInfo, dummy_inputs=AnchorDummies)
class AttAnchorForConditionalGeneration(nn.Module, SupportsMultiModal, SupportsMRoPE, SupportsPP):
    """vLLM's own language model, on prompts that hold image features and anchors."""

    language_model: Any

    @classmethod
    def get_placeholder_str(cls, modality: str, i: int) -> str | None:
        return None  # the chat template writes it

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        text = copy.deepcopy(config.get_text_config())
        text.update(_AS_TRANSFORMERS.get(text.model_type, lambda text: {})(text))
        self.width = text.hidden_size
        self.deeper = vllm_config.model_config.get_inputs_embeds_size() - self.width  # of features for further layers
        self.configure_mm_token_handling(text.vocab_size, [config.image_token_id])  # type: ignore[operator]
        with self._mark_language_model(vllm_config):  # type: ignore[operator]
            self.language_model = init_vllm_registered_model(
                vllm_config=vllm_config,
                hf_config=text,
                architectures=[LANGUAGE_MODELS[text.model_type]],
                prefix=maybe_prefix(prefix, "language_model"),
            )
        self.make_empty_intermediate_tensors = self.language_model.make_empty_intermediate_tensors

    def embed_multimodal(self, rows: Tensor | list[Tensor], **_: object) -> list[Tensor]:
        return list(rows)

    def _embed_text_input_ids(self, *args: Any, **options: Any) -> Tensor:
        return F.pad(super()._embed_text_input_ids(*args, **options), (0, self.deeper))

    def get_mrope_input_positions(self, input_tokens: list[int], mm_features: list[Any]) -> tuple[Tensor, int]:
        if mm_features:
            positions = mm_features[0].data["positions"].data
        else:
            positions = torch.arange(len(input_tokens)).expand(3, -1)
        return positions, int(positions.max()) + 1 - len(input_tokens)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **_: object,
    ) -> Any:
        options = {}
        if intermediate_tensors is not None:
            inputs_embeds = None
        elif self.deeper and inputs_embeds is not None:
            inputs_embeds, *deeper = inputs_embeds.split(self.width, -1)
            features = {f"deepstack_input_embeds_{layer}": rows for layer, rows in enumerate(deeper)}
            options["deepstack_input_embeds"] = IntermediateTensors(features)
        return self.language_model.model(
            input_ids, positions, intermediate_tensors, inputs_embeds=inputs_embeds, **options
        )

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        return self.language_model.compute_logits(hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        named = ((language_weight(name), weight) for name, weight in weights)
        return AutoWeightsLoader(self).load_weights((name, weight) for name, weight in named if name is not None)


def language_weight(name: str) -> str | None:
    """The name here of a checkpoint's weight, as transformers writes and wrote it; None for other parts' weights."""
    if name.removeprefix("language_model.").startswith("lm_head."):
        return f"language_model.{name.removeprefix('language_model.')}"
    for prefix in ("model.language_model.", "model.text_model.", "language_model.model.", "model."):
        rest = name.removeprefix(prefix)
        if rest != name and rest.partition(".")[0] in ("embed_tokens", "layers", "norm"):
            return f"language_model.model.{rest}"
    return None
