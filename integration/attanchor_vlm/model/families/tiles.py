"""Families whose images, or tiles of images, are grids of one shape: one place says it for pictures and for `keep`."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

from PIL import Image
from torch import Tensor

from attanchor_vlm.model.families.base import FamilyAdapter
from attanchor_vlm.model.families.clip import clip_attention
from attanchor_vlm.model.families.grid import Grid, Shape, Size, kept, split, whole
from attanchor_vlm.model.plan import Call


class TileAdapter(FamilyAdapter):
    """One grid over what a processor like CLIP's keeps of an image, unless a subclass says otherwise."""

    routes: tuple[str, ...] = ("embeds", "ids")

    def token_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        rows, columns = self.tile_shape(model, arguments)
        return [[(rows, columns)]] * (count // (rows * columns))

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        return [Grid(*self.tile_shape(model, batch), kept(processor.image_processor, size))]

    def frame_grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size, frames: int) -> list[Grid]:
        """Processors that take videos make an image of every frame, which is not cut into tiles."""
        return [Grid(*self.tile_shape(model, batch), whole(size))] * frames

    def tile_shape(self, model: Any, batch: Call) -> Shape:
        """That of the tokens of one tile, or of one image where images have no tiles."""
        pixels, size = batch.get("pixel_values"), model.config.vision_config.image_size
        sides = (size if isinstance(size, (list, tuple)) else (size, size)) if pixels is None else pixels.shape[-2:]
        height, width = sides
        patch, pooled = model.config.vision_config.patch_size, self.pooling(model)
        patch_height, patch_width = patch if isinstance(patch, (list, tuple)) else (patch, patch)
        return int(height // patch_height / pooled), int(width // patch_width / pooled)

    def pooling(self, model: Any) -> float:
        """How many patches of the image encoder lie along the side of a token."""
        return 1

    def tiled(self, model: Any, batch: Call, size: Size, rows: int, columns: int) -> list[Grid]:
        """Tiles in reading order, if there are several, then the whole image."""
        shape, tiles = self.tile_shape(model, batch), split(whole(size), rows, columns) if rows * columns > 1 else []
        return [*(Grid(*shape, region, tile) for tile, region in enumerate(tiles)), Grid(*shape, whole(size))]


class LlavaAdapter(TileAdapter):
    """LLaVA-1.5, TinyLLaVA and whatever else is saved as LlavaForConditionalGeneration.

    Of Pixtral's encoder, images keep their shape, and `image_sizes` says what they were resized to.
    """

    model_types = ("llava",)

    def token_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        if arguments.get("image_sizes") is None:
            return super().token_shapes(model, arguments, count)
        patch = model.config.vision_config.patch_size
        return [[(height // patch, width // patch)] for height, width in arguments["image_sizes"].tolist()]

    def class_token_attention(self, model: Any, arguments: Call, encoded: Any) -> Tensor | None:
        attention = clip_attention(model, arguments, encoded)
        return None if attention is None else attention.flatten()

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        if "image_sizes" not in batch:
            return super().grids(model, processor, batch, index, size)
        return [Grid(*self.token_shapes(model, batch, 0)[index][0], whole(size))]


class InternVLAdapter(TileAdapter):
    """Patches pooled two by two; tiles are images of their own."""

    model_types = ("internvl",)

    def pooling(self, model: Any) -> float:
        return 1 / model.config.downsample_ratio

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        images = processor.image_processor
        # The processor crops unless it is told not to, whatever the image processor's own default is.
        crops = {**getattr(processor, "images_kwargs", {})}.get("crop_to_patches", images.crop_to_patches)
        rows = columns = 1
        if crops and images.max_patches > 1:
            tile = (images.size["height"], images.size["width"])
            columns, rows = _canvas_of(images)(size, tile, images.min_patches, images.max_patches)
        return self.tiled(model, batch, size, rows, columns)


def _canvas_of(image_processor: Any) -> Any:
    """The function by which an image processor chooses (columns, rows) of tiles."""
    for base in type(image_processor).__mro__:
        if hasattr(inspect.getmodule(base), "get_optimal_tiled_canvas"):
            return inspect.getmodule(base).get_optimal_tiled_canvas  # type: ignore[union-attr]
    raise ValueError(f"{type(image_processor).__name__} cuts images into tiles in an unknown way")


class Idefics3Adapter(TileAdapter):
    """Idefics3 and SmolVLM: the tiles of a sample in one row of pixel_values, short samples filled with zeros."""

    model_types = ("idefics3", "smolvlm")

    def pooling(self, model: Any) -> float:
        return model.config.scale_factor

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        blank = Image.new("RGB", (size[1], size[0]))
        # How many there are depends on several roundings: asked of the processor itself.
        encoded = processor.image_processor(blank, return_row_col_info=True)
        return self.tiled(model, batch, size, encoded["rows"][0][0], encoded["cols"][0][0])


class Gemma3Adapter(TileAdapter):
    """The tokens of an image see each other in both directions, told by token types: an anchor of another type than 1
    would cut the image's block in two. `generate` takes no `inputs_embeds`."""

    model_types = ("gemma3",)
    routes = ("ids",)
    token_types: Mapping[str, int | None] = {"token_type_ids": 1}

    def pooling(self, model: Any) -> float:
        vision = model.config.vision_config
        return vision.image_size / vision.patch_size / math.isqrt(model.config.mm_tokens_per_image)

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        """The whole image, then the crops of pan and scan, if that is on."""
        shape, (height, width) = self.tile_shape(model, batch), size
        grids = [Grid(*shape, whole(size))]
        blank = Image.new("RGB", (width, height))
        # The processor's own defaults come before those of its image processor.
        crops = int(processor.image_processor(blank, **getattr(processor, "images_kwargs", {}))["num_crops"][0])
        for tile in range(crops):
            if width >= height:
                side = math.ceil(width / crops)
                region = (tile * side, 0, min((tile + 1) * side, width), height)
            else:
                side = math.ceil(height / crops)
                region = (0, tile * side, width, min((tile + 1) * side, height))
            grids.append(Grid(*shape, region, tile))
        return grids
