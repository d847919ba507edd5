"""Gemma 3: the tokens of an image see each other in both directions, told by token types."""

from __future__ import annotations

from collections.abc import Mapping

from attanchor_vlm.adapters.base import FamilyAdapter


class Gemma3Adapter(FamilyAdapter):
    """An anchor of another type than 1 would cut the image's block in two. `generate` takes no `inputs_embeds`."""

    model_types = ("gemma3",)
    routes = ("ids",)
    token_types: Mapping[str, int | None] = {"token_type_ids": 1}
