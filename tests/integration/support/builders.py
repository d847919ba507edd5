"""Small random models of every family with prompts for them: what differs between families, as a table.

Images are random tensors in the shapes that each family's processor makes; no processor is needed. How many
placeholders an image takes is asked of the model itself.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import tiny_families
import torch
import transformers
from tiny import pad, with_labels
from tiny_families import BOS, END, IMAGE, PAD, PATCH, QWEN_PATCH, SIDE, START, VIDEO, VOCABULARY
from torch import Tensor

FIRST_WORD = 8

Image = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class Family:
    """What the tests need to know of a family.

    Attributes:
        name: `config.model_type`.
        build: A random model.
        image: One random image, as the tensors that forward takes for it; the index varies its shape.
        routes: The routes that must work.
        inherits: M-RoPE: positions are inherited by default.
        newlines: Features hold newline rows.
        stack: From the images of each sample to forward's tensors.
        token_types: Name of a (B, S) input that tells image tokens, or "".
        prefix_types: As PaliGemma has them: 0 in the prompt, 1 in what is learned or generated.
    """

    name: str
    build: Callable[[], transformers.PreTrainedModel]
    image: Callable[[torch.Generator, int], Image]
    routes: tuple[str, ...] = ("embeds", "ids")
    inherits: bool = False
    newlines: bool = False
    stack: Callable[[list[list[Image]]], Image] = lambda samples: _concatenate(samples)
    token_types: str = ""
    prefix_types: bool = False

    def __str__(self) -> str:
        return self.name

    def model(self) -> transformers.PreTrainedModel:
        """Random weights of a size that makes every part matter; evaluation mode, generation never stops."""
        torch.manual_seed(0)
        model = self.build().eval()
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    fan_in = parameter[0].numel() if "projection_weight" not in name else len(parameter)
                    parameter.normal_(0, fan_in**-0.5, generator=generator)
                elif name.endswith("bias") or "newline" in name:
                    parameter.normal_(0, 0.2, generator=generator)
            head = model.lm_head if hasattr(model, "lm_head") else model.language_model.lm_head
            head.weight[:FIRST_WORD] = 0  # never the most likely: a generated placeholder has no image
        model.generation_config.pad_token_id, model.generation_config.eos_token_id = PAD, None
        return model

    def prompts(self, images: list[int], side: str = "right", seed: int = 0) -> tuple[Image, list[Image]]:
        """A batch with `images[b]` images in sample b, and each of its samples alone. Lengths differ.

        `anchor_mask` selects the text behind the first image, less the last two tokens.
        """
        generator = torch.Generator().manual_seed(seed)
        rows, masks, pictures = [], [], []
        for sample, count in enumerate(images):
            row = [BOS, *_words(2 + sample, generator)]
            mask = [False] * len(row)
            pictures.append([self.image(generator, sample + index) for index in range(count)])
            for picture in pictures[-1]:
                text = _words(6 + sample, generator)
                placeholders = _rows_of(self, picture)
                row += [START, *[IMAGE] * placeholders, END, *text]
                mask += [False] * (placeholders + 2) + [True] * (len(text) - 2) + [False] * 2
            rows.append(row)
            masks.append(mask)
        alone = [self.batch([row], [mask], side, [own]) for row, mask, own in zip(rows, masks, pictures, strict=True)]
        return self.batch(rows, masks, side, pictures), alone

    def batch(self, rows: list[list[int]], masks: list[list[bool]], side: str, *kinds: list[list[Image]]) -> Image:
        """Rows padded on a side, with the images of each; of further kinds of media, those of each too."""
        length = max(map(len, rows))
        ids = torch.tensor([pad(row, PAD, length, side) for row in rows])
        real = torch.tensor([pad([1] * len(row), 0, length, side) for row in rows])
        batch = {"input_ids": ids, "attention_mask": real}
        for pictures in filter(any, kinds):
            batch |= {"anchor_mask": torch.tensor([pad(mask, False, length, side) for mask in masks])}
            batch |= self.stack(pictures)
        if self.token_types:
            types = (ids == IMAGE).long() + 2 * (ids == VIDEO).long()
            batch[self.token_types] = torch.zeros_like(types) if self.prefix_types else types
        return batch

    def with_labels(self, batch: Image, answers: int = 2) -> Image:
        """The batch with the last `answers` tokens of each sample supervised."""
        batch = with_labels(batch, answers)
        if self.prefix_types:
            batch[self.token_types] = (batch["labels"] != -100).long()
        return batch

    def longer(self, batch: Image, tokens: Tensor) -> Image:
        """The batch with generated tokens behind it."""
        ones, batch = torch.ones_like(tokens), dict(batch)
        further = {"input_ids": tokens, "attention_mask": ones, "anchor_mask": ones.bool() & False}
        if self.token_types:
            further[self.token_types] = ones * self.prefix_types
        for name, values in further.items():
            if name in batch:
                batch[name] = torch.cat([batch[name], values], 1)
        return batch


def features(model: transformers.PreTrainedModel, batch: Image) -> Tensor:
    """(T, D) image features of a batch, by the model's own method."""
    own = ("input_ids", "attention_mask", "anchor_mask", "labels", "token_type_ids", "mm_token_type_ids")
    with torch.no_grad():
        output = model.base_model.get_image_features(
            **{k: v for k, v in batch.items() if k not in own}, return_dict=True
        )
        found = _ELSEWHERE.get(model.config.model_type, lambda model, output: output.pooler_output)(model, output)
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in found])


def separators(model: transformers.PreTrainedModel) -> list[Tensor]:
    """The vectors that stand between features and are no image content."""
    base, names = model.base_model, ("image_newline", "view_separator")
    if model.config.model_type == "emu3":  # a word ends its lines
        return [model.get_input_embeddings().weight[base.vocabulary_mapping.eol_token_id]]
    if model.config.model_type == "hunyuan_vl":
        merger = base.vision_tower.patch_merger
        learned = torch.stack([merger.image_begin, merger.image_end, merger.mlp(merger.image_newline)])
        return list(merger.after_rms(learned))
    return [getattr(base, name) for name in names if getattr(base, name, None) is not None]


# Where the rows of the prompt stand in encoded images, if not in `pooler_output`.
_ELSEWHERE = {
    "llama4": lambda model, output: model.multi_modal_projector(output.last_hidden_state),
    "granite4_vision": lambda model, output: output.deepstack_features[0][1],
}


def _rows_of(family: Family, picture: Image) -> int:
    shapes = tuple((name, tuple(value.shape)) for name, value in picture.items())
    sizes = tuple(int(x) for name, value in picture.items() if not value.is_floating_point() for x in value.flatten())
    key = (family.name, shapes, sizes)
    if key not in _known_rows:
        _known_rows[key] = len(features(_any_model(family), family.stack([[picture]])))
    return _known_rows[key]


_known_rows: dict[tuple, int] = {}


@functools.cache
def _any_model(family: Family) -> transformers.PreTrainedModel:
    return family.model()


def _words(count: int, generator: torch.Generator) -> list[int]:
    return torch.randint(FIRST_WORD, VOCABULARY, (count,), generator=generator).tolist()


# --- Images. ---------------------------------------------------------------------------------------------------------


def _concatenate(samples: list[list[Image]]) -> Image:
    """One row per image. Images of several tiles (4-D) are padded to as many tiles."""
    pictures = [picture for sample in samples for picture in sample]
    stacked = {}
    for name in pictures[0]:
        values = [picture[name] for picture in pictures]
        if values[0].dim() == 5:
            tiles = max(value.shape[1] for value in values)
            values = [_pad_tiles(value, 1, tiles) for value in values]
        stacked[name] = torch.cat(values)
    return stacked


def _tiles_per_sample(samples: list[list[Image]]) -> Image:
    """As Idefics3 takes them: (B, tiles, …), short samples filled with zeros."""
    first = next(picture for sample in samples for picture in sample)
    stacked = {}
    for name, value in first.items():
        rows = [torch.cat([picture[name] for picture in own], 1) if own else value[:, :0] for own in samples]
        tiles = max(row.shape[1] for row in rows)
        stacked[name] = torch.cat([_pad_tiles(row, 1, tiles) for row in rows])
    return stacked


def _pad_tiles(value: Tensor, axis: int, count: int) -> Tensor:
    shape = list(value.shape)
    shape[axis] = count - shape[axis]
    return torch.cat([value, value.new_zeros(shape)], axis)


def square(generator: torch.Generator, index: int) -> Image:
    return {"pixel_values": torch.randn(1, 3, SIDE, SIDE, generator=generator)}


def tiled(generator: torch.Generator, index: int) -> Image:
    """Any resolution: a base view and the tiles of the best grid, in an image that is not a square."""
    height, width = [(16, 30), (32, 14), (28, 32)][index % 3]
    tiles = 1 + -(-height // SIDE) * -(-width // SIDE)
    return {
        "pixel_values": torch.randn(1, tiles, 3, SIDE, SIDE, generator=generator),
        "image_sizes": torch.tensor([[height, width]]),
    }


def grid(generator: torch.Generator, index: int) -> Image:
    height, width = [(4, 6), (6, 4), (8, 4)][index % 3]
    patches = torch.randn(height * width, 3 * 2 * QWEN_PATCH**2, generator=generator)
    return {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, height, width]])}


def _split(generator: torch.Generator, index: int) -> Image:
    """One or two tiles, the last one with a padded margin."""
    tiles = 1 + index % 2
    mask = torch.ones(1, tiles, SIDE, SIDE, dtype=torch.bool)
    mask[:, -1, SIDE - PATCH :] = False
    return {
        "pixel_values": torch.randn(1, tiles, 3, SIDE, SIDE, generator=generator),
        "pixel_attention_mask": mask,
    }


# --- Families. --------------------------------------------------------------------------------------------------------

QWEN = {"image": grid, "inherits": True, "token_types": "mm_token_type_ids"}
TILES = {"image": _split, "stack": _tiles_per_sample}
IDS = {"routes": ("ids",), "token_types": "token_type_ids"}

FAMILIES = [
    Family("llava", tiny_families.llava, square),
    Family("llava_next", tiny_families.llava_next, tiled, newlines=True),
    Family("llava_onevision", tiny_families.llava_onevision, tiled, newlines=True),
    Family("qwen2_vl", tiny_families.qwen2_vl, **QWEN),
    Family("qwen2_5_vl", tiny_families.qwen2_5_vl, **QWEN),
    Family("qwen3_vl", tiny_families.qwen3_vl, routes=("ids",), **QWEN),
    Family("internvl", tiny_families.internvl, square),
    Family("idefics3", tiny_families.idefics3, **TILES),
    Family("smolvlm", tiny_families.smolvlm, **TILES),
    Family("paligemma", tiny_families.paligemma, square, **IDS, prefix_types=True),
    Family("gemma3", tiny_families.gemma3, square, **IDS),
]

BY_NAME = {family.name: family for family in FAMILIES}
