"""Prompts with images and videos for the small models of `builders`, as each family's processor lays videos out."""

from __future__ import annotations

import table_families
import torch
from builders import BY_NAME, Family, _rows_of, _words
from tiny_families import BOS, END, IMAGE, QWEN_PATCH, SIDE, START, VIDEO
from torch import Tensor

FRAMES = 2
GRID = (4, 4)  # patches of a frame of Qwen's, four of which are a token
TOKENS = 4  # of a frame, in all families
_TABLE = {family.name: family for family in table_families.TABLE}
_NAMES = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5", "llava_onevision")


class Filmed(Family):
    """A family whose prompts have videos: see `prompts`."""

    def prompts(self, media: list[str], side: str = "right", seed: int = 0) -> tuple[dict, list[dict]]:
        return prompts(self, media, side, seed)


FAMILIES = [Filmed(**vars(BY_NAME.get(name) or _TABLE[name])) for name in _NAMES]


def prompts(family, media: list[str], side: str = "right", seed: int = 0) -> tuple[dict, list[dict]]:
    """A batch with a sample for each entry, an "i" for each of its images and a "v" for each of its videos, with words
    behind it; and each of its samples alone. `anchor_mask` selects these words, less the last two."""
    generator = torch.Generator().manual_seed(seed)
    rows, masks, tensors = [], [], []
    for sample, kinds in enumerate(media):
        row, mask, own = [BOS, *_words(2 + sample, generator)], [], []
        mask = [False] * len(row)
        for index, kind in enumerate(kinds):
            if kind == "i":
                picture = family.image(generator, sample + index)
                placed = [START, *[IMAGE] * _rows_of(family, picture), END]
            else:
                picture, placed = _video(family, generator)
            text = _words(6 + sample, generator)
            row += placed + text
            mask += [False] * len(placed) + [True] * (len(text) - 2) + [False] * 2
            own.append(picture)
        rows.append(row)
        masks.append(mask)
        tensors.append(own)

    def batch_of(own: slice) -> dict[str, Tensor]:
        names = ("pixel_values", "pixel_values_videos")
        kinds = ([[one for one in sample if name in one] for sample in tensors[own]] for name in names)
        return family.batch(rows[own], masks[own], side, *kinds)

    return batch_of(slice(None)), [batch_of(slice(n, n + 1)) for n in range(len(media))]


def _video(family, generator: torch.Generator) -> tuple[dict[str, Tensor], list[int]]:
    if not family.inherits:
        frames = torch.randn(1, FRAMES, 3, SIDE, SIDE, generator=generator)
        return {"pixel_values_videos": frames}, [*[VIDEO] * (FRAMES * TOKENS + 1)]
    patches = torch.randn(FRAMES * GRID[0] * GRID[1], 3 * 2 * QWEN_PATCH**2, generator=generator)
    video = {"pixel_values_videos": patches, "video_grid_thw": torch.tensor([[FRAMES, *GRID]])}
    if family.name == "qwen2_5_vl":
        video["second_per_grid_ts"] = torch.tensor([1.0])
    if family.name in ("qwen3_vl", "qwen3_5"):  # every frame on its own, behind its time
        placed = [token for _ in range(FRAMES) for token in [*_words(2, generator), START, *[VIDEO] * TOKENS, END]]
    else:
        placed = [START, *[VIDEO] * (FRAMES * TOKENS), END]
    return video, placed


def features(model, batch: dict[str, Tensor]) -> Tensor:
    """(T, D) features of images and videos in the order of their placeholders, by the model's own methods."""
    filled = torch.zeros(*batch["input_ids"].shape, model.config.get_text_config().hidden_size)
    for kind, token in (("image", IMAGE), ("video", VIDEO)):
        names = ("pixel_values", "image_grid_thw", "image_sizes")
        if kind == "video":
            names = ("pixel_values_videos", "video_grid_thw")
        given = {name: batch[name] for name in names if name in batch}
        if given:
            with torch.no_grad():
                pooled = getattr(model, f"get_{kind}_features")(**given, return_dict=True).pooler_output
            filled[batch["input_ids"] == token] = torch.cat([part.reshape(-1, part.shape[-1]) for part in pooled])
    return filled[(batch["input_ids"] == IMAGE) | (batch["input_ids"] == VIDEO)]
