"""The parts of a model by its structure: language model, projectors, and the towers, which are the rest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

# Between tower and language model, by the names that transformers gives it.
_PROJECTOR = re.compile(
    r"^(?!generation_).*(projector|multi_?modal|(?<!vit_)merger|connector|aligner|adapter|resampler|perceiver|embed_vision|img_projection|visual_embeddings|vision_embedder"
    r"|(vision|visual|modality|image|linear)_proj|mm_proj|mlp_AR)"
)


def language_model(model: Any) -> nn.Module:
    """The decoder of a model, without its head."""
    base = model.base_model
    for name in ("language_model", "text_model"):
        if hasattr(base, name):
            inner = getattr(base, name)
            return inner.model if hasattr(inner, "lm_head") else inner
    return model.get_decoder()


def projectors(model: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules of what stands between the encoders and the language model of a transformers model."""
    return [(name, module) for name, module, projects in _parts(model) if projects]


def towers(model: Any) -> list[tuple[str, nn.Module]]:
    """Names and modules of the encoders of a transformers model, less the projectors that may stand inside them."""
    return [(name, module) for name, module, projects in _parts(model) if not projects]


def _parts(model: Any) -> Iterator[tuple[str, nn.Module, bool]]:
    prefix = "" if model.base_model is model else f"{model.base_model_prefix}."
    decoder = [language_model(model)]
    if decoder[0] is model.base_model:  # and the encoders stand inside it
        decoder = [
            model.get_input_embeddings(),
            *(part for part in decoder[0].children() if type(part) is nn.ModuleList),
        ]
    yield from _split(model.base_model, prefix, decoder)


def _split(module: nn.Module, prefix: str, decoder: list[nn.Module]) -> Iterator[tuple[str, nn.Module, bool]]:
    for name, part in module.named_children():
        if part in decoder or name == "lm_head":
            continue
        if "audio" in name:  # hears, and gets no gradient from images
            yield prefix + name, part, False
        elif projects := bool(_PROJECTOR.search(name)):
            yield prefix + name, part, projects
        elif any(inner in decoder or _PROJECTOR.search(path) for path, inner in part.named_modules() if path):
            yield from _split(part, f"{prefix}{name}.", decoder)
        else:
            yield prefix + name, part, False
