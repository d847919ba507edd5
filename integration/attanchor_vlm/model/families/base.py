"""The questions that AttAnchor asks about a family of models, with the answers that most families share."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from attanchor_vlm.model.families.grid import Grid, Shape, Size
from attanchor_vlm.model.families.structure import towers
from attanchor_vlm.model.plan import AnchorPlan, Call

_HANDED_ON = ("image_sizes", "image_merge_sizes")
_TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids", "moe_mm_token_type_ids")
_SEPARATORS = ("image_newline", "view_separator")


class FamilyAdapter:
    """Any decoder-only model whose images stand in the prompt as placeholders, by the contract of transformers' own
    `generate`: `get_image_features`, `mm_encoder_outputs`, `get_rope_index`. A family that differs subclasses this, or
    `register`s an instance with other facts. Adapters hold no state.

    Args:
        facts: Attributes that differ, such as ``token_types={"mm_token_type_ids": 1}``.

    Attributes:
        model_types: Values of ``config.model_type`` that this adapter serves.
        routes: What the model's forward and generate can be given, the default first: "ids" (`input_ids` with
            `mm_encoder_outputs`), which is always right, "embeds" (`inputs_embeds`), which some families answer
            wrongly without saying so.
        positions: Default of `AttAnchorConfig.positions`; empty for "inherit" with M-RoPE, else "sequential".
        positions_per_token: 1, or more for M-RoPE; 0 for what the model's config says. With 1, "inherit" would repeat
            positions, which attention code takes for packed sequences: `attach` refuses it unless told otherwise.
        image_arguments: Arguments of forward that hold the images. Those that are called pixel values, or the first
            one, tell that a call has images; all are consumed by `encode_images`. Empty for those that
            `get_image_features` takes.
        video_arguments: The same of videos, for `encode_videos` and `get_video_features`; none without that method.
        token_types: Further (B, S) inputs with one value per token, and the value that an inserted token gets; None,
            also for those of forward that are not named here, to copy the one of the token it copies.
    """

    model_types: tuple[str, ...] = ()
    routes: tuple[str, ...] = ("ids",)
    positions: str = ""
    positions_per_token: int = 0
    image_arguments: tuple[str, ...] = ()
    video_arguments: tuple[str, ...] = ()
    token_types: Mapping[str, int | None] = {}

    def __init__(self, **facts: Any) -> None:
        if unknown := [name for name in facts if not hasattr(FamilyAdapter, name)]:
            raise TypeError(f"{unknown[0]} is no attribute of FamilyAdapter")
        vars(self).update(facts)

    def bound_to(self, model: Any) -> FamilyAdapter:
        """A copy in which no attribute is empty: what is left open is read off a model, of this adapter's family."""
        bound, base = copy.copy(self), model.base_model
        takes = inspect.signature(type(base).forward).parameters
        encoder = inspect.signature(base.get_image_features).parameters if not self.image_arguments else {}
        # Not every `get_image_features` names what it hands on.
        names = dict.fromkeys((*encoder, *_HANDED_ON))
        bound.image_arguments = self.image_arguments or tuple(n for n in names if n in takes and n != "kwargs")
        if not self.video_arguments and getattr(model.config, "video_token_id", None) is not None:
            known = inspect.signature(getattr(base, "get_video_features", lambda: None)).parameters
            bound.video_arguments = tuple(name for name in known if name in takes and name != "kwargs")
        bound.token_types = {name: None for name in _TOKEN_TYPES if name in takes} | {**self.token_types}
        bound.positions_per_token = self.positions_per_token or axes(model)
        bound.positions = self.positions or ("inherit" if bound.positions_per_token > 1 else "sequential")
        return bound

    def kinds(self, arguments: Call) -> list[str]:
        """What a call brings, as pixels or already encoded: "image", "video", both or neither."""
        encoded = arguments.get("mm_encoder_outputs") or {}
        given = {name for name, value in arguments.items() if value is not None}
        given |= {kind for kind, value in encoded.items() if value is not None}
        named = (("image", self.image_arguments), ("video", self.video_arguments))
        return [kind for kind, names in named if names and given & {kind, *_pixels(names)}]

    def has_images(self, arguments: Call) -> bool:
        """Whether a call brings images or videos."""
        return bool(self.kinds(arguments))

    def encode_images(self, model: Any, arguments: Call) -> Any:
        """The model's own encoding of the call's images, with gradient."""
        return _encoded("image", self.image_arguments, model, arguments)

    def encode_videos(self, model: Any, arguments: Call) -> Any:
        """The model's own encoding of the call's videos, with gradient."""
        return _encoded("video", self.video_arguments, model, arguments)

    def feature_rows(self, encoded: Any) -> Tensor:
        """(T, D) projected features of the whole batch, of images or of videos, in row-major order of the placeholders
        of that kind."""
        return flat(encoded.pooler_output)

    def placeholders(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """(B, S) bool, True at the slots that features of images and videos fill."""
        return (input_ids == model.config.image_token_id) | self.video_placeholders(model, input_ids)

    def video_placeholders(self, model: PreTrainedModel, input_ids: Tensor) -> Tensor:
        """(B, S) bool, True at those of videos."""
        if not self.video_arguments:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == model.config.video_token_id

    def silent_features(self, model: PreTrainedModel, rows: Tensor) -> Tensor | None:
        """(T,) bool, True at features that are no image content (newline rows) and take no part; None for none.

        They are a learned vector, the same everywhere. `rows` are as `feature_rows` returned them, in the model's own
        dtype.
        """
        base: Any = model.base_model
        found = [getattr(base, name) for name in _SEPARATORS if getattr(base, name, None) is not None]
        if not found:
            return None
        # As the model wrote them into the features, which under autocast have another dtype than the parameters.
        return torch.stack([(rows == vector.detach().to(rows)).all(-1) for vector in found]).any(0)

    def plain_positions(
        self, model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, arguments: Call
    ) -> Tensor | None:
        """(P, B, S) position ids of the prompt without anchors, for "inherit"; None to count over its real tokens.

        Raises:
            ValueError: the call lacks what the model needs to know them.
        """
        known = getattr(model.base_model, "get_rope_index", None)
        if known is None:
            return None
        given = {**arguments, "input_ids": input_ids, "attention_mask": attention_mask}
        if (sound := arguments.get("feature_attention_mask")) is not None:
            given["audio_seqlens"] = sound.sum(-1)  # of Qwen's Omni models, as is the next
        given["second_per_grids"] = arguments.get("video_second_per_grid")
        given = {name: given.get(name) for name in inspect.signature(known).parameters if name != "kwargs"}
        needed = {"mm_token_type_ids": "1 at image tokens, 2 at video tokens"}
        needed |= {f"{kind}_grid_thw": f"the {kind}s' grids" for kind in self.kinds(arguments)}
        for name, meaning in needed.items():
            if name in given and given[name] is None:
                raise ValueError(
                    f"{name} ({meaning}) is missing: without it the positions in the image are unknown, and the model "
                    "would count flatly. Pass what the processor returns, or choose positions='sequential'"
                )
        return known(**{name: value for name, value in given.items() if value is not None})[0].long()

    def remember_positions(self, model: Any, plan: AnchorPlan) -> None:
        """Update what the model itself keeps about the positions of the last prompt, if it does."""
        if hasattr(model.base_model, "rope_deltas") and plan.position_ids.dim() == 3:
            # By which a decoding loop without position_ids continues: next position = tokens so far + delta.
            highest = plan.position_ids.amax((0, 2))
            model.base_model.rope_deltas = (highest + 1 - plan.attention_mask.sum(-1))[:, None]

    def regroup(self, encoded: Any, rows: Tensor, order: Tensor, per_sample: list[int]) -> Any:
        """What `mm_encoder_outputs` should hold of the images, or the videos, of the new prompt.

        Args:
            encoded: From `encode_images` or `encode_videos`, not to be changed.
            rows: (T, D), from `feature_rows`.
            order: (T',) int64, the row of each placeholder of the new prompt, in row-major order.
            per_sample: How many of them each sample has.
        """
        if isinstance(encoded.pooler_output, Tensor):  # and a tensor is what the model expects back: one row an entry
            regrouped: dict[str, Any] = {"pooler_output": rows[order][:, None]}
        else:  # One entry a sample: beam search repeats the list by sample and counts placeholders to find the borders.
            regrouped = {"pooler_output": by_sample(rows[order], per_sample)}
        if (layers := getattr(encoded, "deepstack_features", None)) is not None:
            regrouped["deepstack_features"] = [by_sample(flat(layer)[order], per_sample) for layer in layers]
        return type(encoded)(**{**encoded, **regrouped})  # with whatever else the model reads from it

    def token_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        """(rows, columns) of the grids of tokens of each image of a call, in the order of the features; empty if they
        are not known, and each image is one line of tokens.

        Where the encoder takes tiles as images of their own, each of them is an image here.

        Args:
            arguments: The call's.
            count: Number of features, those that are no image content left out.
        """
        return []

    def video_shapes(self, model: Any, arguments: Call, count: int) -> list[list[Shape]]:
        """As `token_shapes`, of the steps of time of each video."""
        return []

    def class_token_attention(self, model: Any, arguments: Call, encoded: Any) -> Tensor | None:
        """(T,) float32, how much the class token of the image encoder attends to each feature; None if it has none.

        Args:
            arguments: The call's.
            encoded: From `encode_images`.

        Raises:
            ValueError: `encoded` was given without what the encoder's layers were given.
        """
        return None

    def grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size) -> list[Grid]:
        """Where the tokens of one image lie in it, as grids in the order of the tokens.

        Args:
            processor: What made `batch`.
            batch: The model's arguments.
            index: Counts the images of the whole batch.
            size: (height, width) of the original image.

        Raises:
            ValueError: it is not known of this family.
        """
        raise _no_boxes("image tokens lie in the image", model)

    def frame_grids(self, model: Any, processor: Any, batch: Call, index: int, size: Size, frames: int) -> list[Grid]:
        """Where the tokens of one video lie in its frames: a grid for each step of time, of as many frames each.

        Args:
            processor, batch, size: As for `grids`; the size is a frame's.
            index: Counts the videos of the whole batch.
            frames: Number of the video's frames.

        Raises:
            ValueError: it is not known of this family.
        """
        raise _no_boxes("video tokens lie in the frames", model)

    def vision_tower(self, model: PreTrainedModel) -> nn.Module | None:
        """The encoders of the model without projectors, which training usually freezes."""
        return nn.ModuleList(tower for _, tower in towers(model))


def _no_boxes(what: str, model: Any) -> ValueError:
    return ValueError(
        f"where {what} is not known for {model.config.model_type}: boxes are not available. Anchors are inserted all "
        "the same"
    )


def _pixels(names: tuple[str, ...]) -> list[str]:
    return [name for name in names if "pixel_values" in name] or [*names[:1]]


def _encoded(kind: str, names: tuple[str, ...], model: Any, arguments: Call) -> Any:
    encoded = (arguments.get("mm_encoder_outputs") or {}).get(kind)
    if encoded is not None:
        if pixels := [name for name in _pixels(names) if arguments.get(name) is not None]:
            raise ValueError(f"{pixels[0]} and mm_encoder_outputs[{kind!r}] are both given; pass one of them")
        return encoded
    given = {name: arguments[name] for name in names if arguments.get(name) is not None}
    return getattr(model.base_model, f"get_{kind}_features")(**given, return_dict=True)


def flat(features: Any) -> Tensor:
    """(T, D) from features by image or by sample."""
    if isinstance(features, Tensor):
        return features.reshape(-1, features.shape[-1])
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in features])


def by_sample(rows: Tensor, per_sample: list[int]) -> list[Tensor]:
    return [part for part in rows.split(per_sample) if len(part)]


def axes(model: Any) -> int:
    """Positions of a token, by the sections of its M-RoPE."""
    if not hasattr(model.base_model, "get_rope_index"):
        return 1
    rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
    return len(rope.get("mrope_section") or (0, 0, 0))
