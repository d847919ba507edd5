"""Qwen2-VL and Qwen2.5-VL: M-RoPE, three positions per token (time, height, width)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.grid import Grid, whole
from attanchor_vlm.model.plan import AnchorPlan


class Qwen2VLAdapter(FamilyAdapter):
    """Anchors take their host's place in the image's grid; nothing that was pretrained moves."""

    model_types: tuple[str, ...] = ("qwen2_vl", "qwen2_5_vl")
    positions = "inherit"
    positions_per_token = 3
    image_arguments = ("pixel_values", "image_grid_thw")
    token_types: Mapping[str, int | None] = {"mm_token_type_ids": None}

    def plain_positions(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, arguments: Mapping[str, Any]
    ) -> Tensor | None:
        for name, meaning in (("mm_token_type_ids", "1 at image tokens"), ("image_grid_thw", "the images' grids")):
            if arguments.get(name) is None:
                raise ValueError(
                    f"{name} ({meaning}) is missing: without it the positions in the image are unknown, and the model "
                    "would count flatly. Pass what the processor returns, or choose positions='sequential'"
                )
        positions, _ = model.base_model.get_rope_index(
            input_ids,
            mm_token_type_ids=arguments["mm_token_type_ids"],
            image_grid_thw=arguments["image_grid_thw"],
            attention_mask=attention_mask,
        )
        return positions

    def remember_positions(self, model: Any, plan: AnchorPlan) -> None:
        # By which a decoding loop without position_ids continues: next position = tokens so far + delta.
        highest = plan.position_ids.amax((0, 2))
        model.base_model.rope_deltas = (highest + 1 - plan.attention_mask.sum(-1))[:, None]

    def token_shapes(self, model: Any, arguments: Mapping[str, Any], count: int) -> list[list[tuple[int, int]]]:
        grids, merged = arguments.get("image_grid_thw"), model.config.vision_config.spatial_merge_size
        if grids is None:
            return []
        return [[(height // merged, width // merged)] * frames for frames, height, width in grids.tolist()]

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        _, height, width = batch["image_grid_thw"][index].tolist()
        merged = model.config.vision_config.spatial_merge_size
        return [Grid(height // merged, width // merged, whole(size))]

    def vision_tower(self, model: Any) -> nn.Module | None:
        # Less the mergers, which are the projector.
        parts = model.base_model.visual.named_children()
        return nn.ModuleList([part for name, part in parts if "merger" not in name])
