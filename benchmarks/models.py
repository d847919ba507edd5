"""Vision-language models of transformers at their real sizes with random weights, and the same at toy sizes."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, StaticCache
from transformers.initialization import no_init_weights

from attanchor_kernels.testing.inputs import SHAPES, Shape
from attanchor_lab.small_vlm.tower import EfficientNetLiteConfig


class Language(NamedTuple):
    """Sizes of a decoder: L layers of grouped-query attention and a gated MLP."""

    layers: int
    hidden: int
    inner: int
    heads: int
    kv_heads: int
    vocabulary: int

    @property
    def head(self) -> int:
        return self.hidden // self.heads

    @property
    def weights(self) -> int:
        """Entries of the matrices that every token is multiplied by, the output head left out."""
        attention = 2 * self.hidden * self.heads * self.head + 2 * self.hidden * self.kv_heads * self.head
        return self.layers * (attention + 3 * self.hidden * self.inner)

    def prefill_flops(self, length: int) -> int:
        """One forward of a sample, logits of the last token alone; of attention what causality leaves, half."""
        attention = self.layers * 2 * self.heads * self.head * length * (length + 1)
        return 2 * self.weights * length + attention + 2 * self.hidden * self.vocabulary

    def cache_bytes(self, length: int, dtype: torch.dtype) -> int:
        """Keys and values of a sample."""
        return dtype.itemsize * length * self.layers * 2 * self.kv_heads * self.head


TOY_LANGUAGE = Language(layers=2, hidden=64, inner=128, heads=4, kv_heads=2, vocabulary=96)
IMAGE_TOKEN = 1
NOISE = 2**20 + 7  # entries: no divisor of a row's length, so that rows differ


class Spec(NamedTuple):
    """One model: its class in transformers, the sizes of its language model, its prompt."""

    name: str
    kind: str  # model_type, or small_vlm
    language: Language
    shape: Shape

    @property
    def attachable(self) -> bool:
        """Whether `attach` is measured too, with the whole model around it."""
        return self.kind in ("llava", "small_vlm")

    def toy(self) -> Spec:
        """The same class with so little of everything that a CPU takes a moment."""
        name = f"{self.name}-toy"
        return self._replace(name=name, language=TOY_LANGUAGE, shape=Shape(name, 16, 10, TOY_LANGUAGE.hidden))


_SHAPE = {shape.name: shape for shape in SHAPES}
_LLAMA_7B = Language(layers=32, hidden=4096, inner=11008, heads=32, kv_heads=32, vocabulary=32064)
SPECS = {
    spec.name: spec
    for spec in (
        Spec("tinyllava-1b", "llava", Language(22, 2048, 5632, 32, 4, 32064), _SHAPE["tinyllava-1b"]),
        Spec("llava-7b", "llava", _LLAMA_7B, _SHAPE["llava-7b"]),
        Spec("qwen2.5-vl-3b", "qwen2_5_vl", Language(36, 2048, 11008, 16, 2, 151936), _SHAPE["qwen2.5-vl-3b"]),
        Spec("llava-next-7b", "llava_next", _LLAMA_7B, _SHAPE["llava-next-7b"]),
        # The laboratory's, of SmolLM2-135M behind EfficientNet-Lite0.
        Spec("small-vlm", "small_vlm", Language(30, 576, 1536, 9, 3, 49280), Shape("small-vlm", 49, 30, 576)),
    )
}


def _text_config(language: Language, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": language.vocabulary,
        "hidden_size": language.hidden,
        "intermediate_size": language.inner,
        "num_hidden_layers": language.layers,
        "num_attention_heads": language.heads,
        "num_key_value_heads": language.kv_heads,
        "max_position_embeddings": 16384,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "eos_token_id": 3,
        **more,
    }


def _config(spec: Spec, toy: bool) -> Any:
    language = spec.language
    if spec.kind == "qwen2_5_vl":
        head = language.head
        sections = [head // 8, head * 3 // 16, head // 2 - head // 8 - head * 3 // 16]
        rope = {"rope_type": "default", "mrope_section": sections, "rope_theta": 1e6}
        depth, hidden, inner, heads = (2, 64, 128, 4) if toy else (32, 1280, 3420, 16)
        vision = {"depth": depth, "hidden_size": hidden, "intermediate_size": inner, "num_heads": heads}
        return transformers.Qwen2_5_VLConfig(
            text_config=_text_config(language, rope_parameters=rope),
            vision_config={**vision, "out_hidden_size": language.hidden},
            image_token_id=IMAGE_TOKEN,
        )
    if spec.kind == "small_vlm":
        side, pool, classes = (128, 1, 16) if toy else (448, 2, 1000)
        return transformers.LlavaConfig(
            vision_config=EfficientNetLiteConfig(side, pool=pool, classes=classes, hidden_size=language.hidden),
            text_config=LlamaConfig(**_text_config(language)),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=spec.shape.image,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
        )
    hidden, inner, layers, heads, side, patch = (32, 64, 2, 2, 16, 4) if toy else (1024, 4096, 24, 16, 336, 14)
    clip = transformers.CLIPVisionConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        projection_dim=768,
    )
    common: dict[str, Any] = {"vision_config": clip, "text_config": LlamaConfig(**_text_config(language))}
    common |= {"image_token_index": IMAGE_TOKEN, "vision_feature_layer": -2}
    common |= {"vision_feature_select_strategy": "default"}
    if spec.kind == "llava_next":
        return transformers.LlavaNextConfig(**common)
    return transformers.LlavaConfig(**common, image_seq_length=(side // patch) ** 2)


def build(spec: Spec, device: torch.device, dtype: torch.dtype, toy: bool) -> Any:
    """The model in evaluation mode, its matrices filled with one stretch of noise over and over.

    To draw the numbers of a 7B model takes a CPU minutes, and nothing here depends on them.
    """
    with no_init_weights(), torch.device(device):
        model = transformers.AutoModelForImageTextToText.from_config(_config(spec, toy), dtype=dtype)
    noise = (0.02 * torch.randn(NOISE, generator=torch.Generator().manual_seed(0))).to(device, dtype)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(name.endswith("weight"))  # of norms; the others are biases
            continue
        for part in parameter.data.view(-1).split(NOISE):
            part.copy_(noise[: len(part)])
    return model.to(device).eval()


class Decoder:
    """The language model alone: fed with embeddings, as every merge feeds it."""

    def __init__(self, model: Any) -> None:
        self.language = model.model.language_model
        self.head = model.lm_head
        self.embed = model.get_input_embeddings()
        self.config = model.config.get_text_config()
        newer = "cache" in inspect.signature(self.language.forward).parameters  # from transformers 5.24 on
        self.cache_name = "cache" if newer else "past_key_values"

    @torch.no_grad()
    def prefill(self, embeds: Tensor, positions: Tensor | None = None, cache: Any = None) -> Tensor:
        """Logits (B, 1, V) of the last token."""
        if cache is None:
            cache = DynamicCache(config=self.config)
        past = {self.cache_name: cache}
        output = self.language(inputs_embeds=embeds, position_ids=positions, use_cache=True, **past).last_hidden_state
        return self.head(output[:, -1:])

    @torch.no_grad()
    def filled_cache(self, embeds: Tensor, positions: Tensor | None, new_tokens: int) -> Any:
        """A static cache that holds the prompt and has room for `new_tokens`."""
        cache = StaticCache(config=self.config, max_cache_len=embeds.shape[1] + new_tokens)
        self.prefill(embeds, positions, cache)
        return cache

    @torch.no_grad()
    def decode(self, token: Tensor, position: Tensor, cache: Any) -> Tensor:
        """One greedy step: (B, 1) tokens to the next, at a cache that is put back to where it was."""
        logits = self.prefill(self.embed(token), position, cache)
        torch._foreach_sub_([layer.cumulative_length for layer in cache.layers], 1)
        return logits.argmax(-1)
