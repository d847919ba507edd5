"""The images and videos of a call: their features in the order of the placeholders, and back into the model's form."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_vlm.model.families import FamilyAdapter
from attanchor_vlm.model.plan import Call


class Media(NamedTuple):
    """What the encoders made of a call with T placeholders.

    Attributes:
        encoded: The model's own outputs, by kind: "image", "video" or both.
        rows: (T, D), in row-major order of the placeholders.
        is_video: (T,) bool, which of them are of videos; None if all are of one kind.
    """

    encoded: dict[str, Any]
    rows: Tensor
    is_video: Tensor | None

    def frames(self, model: Any, adapter: FamilyAdapter, arguments: Call, silent: Tensor | None) -> Tensor:
        """(T,) int64: the image, or the frame of a video, that each row is of, counted; -1 at rows of no content."""
        content = torch.ones(len(self.rows), dtype=torch.bool) if silent is None else ~silent.cpu()
        of_video = (
            torch.full_like(content, "image" not in self.encoded) if self.is_video is None else self.is_video.cpu()
        )
        found = torch.full(content.shape, -1)
        for kind in self.encoded:
            own = content & (of_video if kind == "video" else ~of_video)
            count, tell = int(own.sum()), adapter.video_shapes if kind == "video" else adapter.token_shapes
            sizes = [sum(rows * columns for rows, columns in grids) for grids in tell(model, arguments, count)]
            if sum(sizes) != count:
                raise ValueError(
                    f"max_anchors_per_frame is set, but which {kind} tokens are of one frame is not known for "
                    f"{model.config.model_type}"
                    + ("" if sizes else ", whose adapter does not tell, or needs the pixels' own arguments")
                )
            numbers = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
            found[own] = numbers + int(found.max()) + 1
        return found

    def regrouped(self, adapter: FamilyAdapter, rows: Tensor, order: Tensor, per_sample: list[int]) -> dict[str, Any]:
        """`mm_encoder_outputs` of a new prompt; `rows` are these in its dtype, the others as for `regroup`."""
        if self.is_video is None:
            return {kind: adapter.regroup(one, rows, order, per_sample) for kind, one in self.encoded.items()}
        made = {}
        for kind, one in self.encoded.items():
            own = (self.is_video if kind == "video" else ~self.is_video).to(rows.device)
            chosen, number = own[order], own.cumsum(0) - 1
            counts = [int(part.sum()) for part in chosen.split(per_sample)]
            made[kind] = adapter.regroup(one, rows[own], number[order][chosen], counts)
        return made


def encode(model: Any, adapter: FamilyAdapter, arguments: Call) -> Media:
    """Encode the images and videos of a call, with gradient."""
    encoders = {"image": adapter.encode_images, "video": adapter.encode_videos}
    encoded = {kind: encoders[kind](model, arguments) for kind in adapter.kinds(arguments)}
    parts = {kind: adapter.feature_rows(one) for kind, one in encoded.items()}
    if len(parts) == 1:
        return Media(encoded, next(iter(parts.values())), None)
    ids, mask = arguments["input_ids"], arguments.get("attention_mask")
    holds = adapter.placeholders(model, ids)
    holds = holds if mask is None else holds & mask.bool()
    is_video = adapter.video_placeholders(model, ids)[holds].to(parts["image"].device)
    for kind, count in (("video", int(is_video.sum())), ("image", int((~is_video).sum()))):
        if count != len(parts[kind]):
            raise ValueError(
                f"the prompts have {count} {kind} placeholders and the {kind}s {len(parts[kind])} features; they "
                f"should be as many (were {kind}s left out, or prompts made by another processor?)"
            )
    place = torch.where(is_video, len(parts["image"]) + is_video.cumsum(0) - 1, (~is_video).cumsum(0) - 1)
    return Media(encoded, torch.cat([parts["image"], parts["video"]])[place], is_video)


def rows_by_sample(model: Any, adapter: FamilyAdapter, rows: Tensor, arguments: Call) -> list[Tensor]:
    """B tensors (M_b, D): the image tokens of every sample that are image content, which newline rows are not.

    `rows` are (T, D), of the whole batch, as `FamilyAdapter.feature_rows` returns them.
    """
    held = adapter.placeholders(model, arguments["input_ids"]) & arguments["attention_mask"].bool()
    counts = held.sum(-1).tolist()
    parts = rows.split(counts)
    silent = adapter.silent_features(model, rows)
    if silent is None:
        return list(parts)
    return [part[~hidden] for part, hidden in zip(parts, silent.split(counts), strict=True)]
