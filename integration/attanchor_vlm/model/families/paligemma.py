"""PaliGemma: the prompt is a bidirectional prefix, told by token types."""

from __future__ import annotations

from collections.abc import Mapping

from attanchor_vlm.model.families.base import FamilyAdapter


class PaliGemmaAdapter(FamilyAdapter):
    """Anchors belong to the prefix (type 0). `generate` takes no `inputs_embeds`: ids only."""

    model_types = ("paligemma",)
    routes = ("ids",)
    token_types: Mapping[str, int | None] = {"token_type_ids": 0}
