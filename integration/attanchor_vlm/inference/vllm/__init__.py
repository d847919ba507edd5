"""A plugin by which vLLM serves attached models; `attanchor serve` starts it.

vLLM's renderer hands a chat to the `front` of the model (image encoder, projector, embedding table), which makes its
rows with the anchors in them. The engine gets these as one multimodal item and runs the language model alone, so that
the scheduler knows every prompt's true length: thresholds, budgets and dropped tokens are exact, and chunked prefill,
batching and streaming are vLLM's own.
"""

from __future__ import annotations

ARCHITECTURE = "AttAnchorForConditionalGeneration"
MODE = "attanchor"  # of vLLM's tokenizer and renderer


def register() -> None:
    """Make model and renderer known to vLLM, which calls this in each of its processes."""
    from vllm import ModelRegistry
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    ModelRegistry.register_model(ARCHITECTURE, f"{__name__}.model:{ARCHITECTURE}")
    ModelRegistry.register_model("Qwen3LLMForCausalLM", "vllm.model_executor.models.qwen3_vl:Qwen3LLMForCausalLM")
    RENDERER_REGISTRY.renderers[MODE] = (f"{__name__}.renderer", "AnchorRenderer")
    TokenizerRegistry.tokenizers[MODE] = ("vllm.tokenizers.hf", "CachedHfTokenizer")
