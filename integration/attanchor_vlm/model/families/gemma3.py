"""Gemma 3: the tokens of an image see each other in both directions, told by token types."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from attanchor_vlm.model.families.grid import Grid, whole
from attanchor_vlm.model.families.tiles import TileAdapter


class Gemma3Adapter(TileAdapter):
    """An anchor of another type than 1 would cut the image's block in two. `generate` takes no `inputs_embeds`."""

    model_types = ("gemma3",)
    routes = ("ids",)
    token_types: Mapping[str, int | None] = {"token_type_ids": 1}

    def pooling(self, model: Any) -> float:
        vision = model.config.vision_config
        return vision.image_size / vision.patch_size / math.isqrt(model.config.mm_tokens_per_image)

    def grids(
        self, model: Any, processor: Any, batch: Mapping[str, Tensor], index: int, size: tuple[int, int]
    ) -> list[Grid]:
        """The whole image, then the crops of pan and scan, if that is on."""
        shape, (height, width) = self.tile_shape(model, batch), size
        grids = [Grid(*shape, whole(size))]
        blank = Image.new("RGB", (width, height))
        # The processor's own defaults come before those of its image processor.
        options = getattr(processor, "images_kwargs", {})
        crops = int(processor.image_processor(blank, **options)["num_crops"][0])
        for tile in range(crops):
            if width >= height:
                side = math.ceil(width / crops)
                region = (tile * side, 0, min((tile + 1) * side, width), height)
            else:
                side = math.ceil(height / crops)
                region = (0, tile * side, width, min((tile + 1) * side, height))
            grids.append(Grid(*shape, region, tile))
        return grids
