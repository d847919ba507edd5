"""Families whose encoded images hold the rows of the prompt elsewhere than in `pooler_output`, or other separators."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attanchor_vlm.model.families.base import FamilyAdapter, by_sample, flat
from attanchor_vlm.model.families.grid import Shape


class Llama4Adapter(FamilyAdapter):
    """Encoded images are not yet projected: forward does it."""

    model_types = ("llama4",)
    routes = ("ids", "embeds")

    def encode_images(self, model: Any, arguments: Any) -> Any:
        encoded = super().encode_images(model, arguments)
        projected = model.base_model.multi_modal_projector(flat(encoded.last_hidden_state))
        return type(encoded)(**{**encoded, "pooler_output": projected[:, None]})

    def regroup(self, encoded: Any, rows: Tensor, order: Tensor, per_sample: list[int]) -> Any:
        grouped = super().regroup(encoded, rows, order, per_sample)
        return type(encoded)(**{**grouped, "last_hidden_state": flat(encoded.last_hidden_state)[order][:, None]})


class Granite4VisionAdapter(FamilyAdapter):
    """All features are added in layers of the language model, whose prompt is empty at the images' places. Anchors go
    by the first of them, in which each layer's number stands before its features."""

    model_types = ("granite4_vision",)

    def encode_images(self, model: Any, arguments: Any) -> Any:
        encoded = super().encode_images(model, arguments)
        return type(encoded)(**{**encoded, "pooler_output": encoded.deepstack_features[0][1]})

    def regroup(self, encoded: Any, rows: Tensor, order: Tensor, per_sample: list[int]) -> Any:
        layers = [(number, by_sample(flat(layer)[order], per_sample)) for number, layer in encoded.deepstack_features]
        return type(encoded)(**{**encoded, "pooler_output": None, "deepstack_features": layers})


class HunYuanVLAdapter(FamilyAdapter):
    """Learned rows stand around an image and behind its lines, projected and normalised like its features."""

    model_types = ("hunyuan_vl",)
    routes = ("ids", "embeds")

    @torch.no_grad()
    def silent_features(self, model: Any, rows: Tensor) -> Tensor:
        merger = model.base_model.vision_tower.patch_merger
        learned = torch.stack([merger.image_begin, merger.image_end, merger.mlp(merger.image_newline)])
        return _among(rows, merger.after_rms(learned))


class Emu3Adapter(FamilyAdapter):
    """Images become words of the vocabulary, which alone knows their placeholder, and the word that ends a line."""

    model_types = ("emu3",)
    routes = ("ids", "embeds")

    def placeholders(self, model: Any, input_ids: Tensor) -> Tensor:
        return input_ids == model.base_model.vocabulary_mapping.image_token_id

    @torch.no_grad()
    def silent_features(self, model: Any, rows: Tensor) -> Tensor:
        end = torch.tensor(model.base_model.vocabulary_mapping.eol_token_id, device=rows.device)
        return (rows == model.get_input_embeddings()(end).to(rows)).all(-1)


class Phi4MultimodalAdapter(FamilyAdapter):
    """Its forward takes no encoded images: they are read where the model's own embedding writes them, and given back
    as `inputs_embeds`, beside which it takes no sound."""

    model_types = ("phi4_multimodal",)
    routes = ("embeds",)
    image_arguments = ("image_pixel_values", "image_sizes", "image_attention_mask")

    def placeholders(self, model: Any, input_ids: Tensor) -> Tensor:
        return input_ids == model.config.vision_config.image_token_id

    def encode_images(self, model: Any, arguments: Any) -> Tensor:
        if arguments.get("audio_input_features") is not None:
            raise ValueError(
                "audio_input_features is given beside images, which this family's model does not take together with "
                "anchors; leave the sound out, or detach the model"
            )
        ids, given = arguments["input_ids"], {name: arguments.get(name) for name in self.image_arguments}
        written = model.base_model.embed_tokens_extend(ids, model.get_input_embeddings()(ids), **given)
        return written[self.placeholders(model, ids)]

    def feature_rows(self, encoded: Tensor) -> Tensor:
        return encoded

    def token_shapes(self, model: Any, arguments: Any, count: int) -> list[list[Shape]]:
        """Of an image, its crops less their padding as one grid, then the view of the whole."""
        images, shapes = model.base_model.embed_tokens_extend.image_embed, []
        side = math.isqrt(images.num_img_tokens)
        for size, mask in zip(arguments["image_sizes"].view(-1, 2), arguments["image_attention_mask"], strict=True):
            high, wide = (size // images.crop_size).tolist()
            rows = mask[1 : high * wide + 1 : wide, ::2, 0].sum()  # along the first crop of each line of crops
            columns = mask[1 : wide + 1, 0, ::2].sum()
            shapes.append([(int(rows), int(columns)), (side, side)])
        return shapes

    @torch.no_grad()
    def silent_features(self, model: Any, rows: Tensor) -> Tensor:
        images = model.base_model.embed_tokens_extend.image_embed
        learned = torch.cat([images.global_img_feature_extensor[0], images.sub_img_feature_extensor[0, 0]])
        return _among(rows, images.img_projection_down(nn.functional.gelu(images.img_projection_up(learned))))


def _among(rows: Tensor, learned: Tensor) -> Tensor:
    """(T,) bool, which rows are one of the learned vectors, but for rounding."""
    learned = learned.to(rows).float()
    apart = (rows.float()[:, None] - learned).norm(dim=-1)
    return (apart < 0.01 * learned.norm(dim=-1)).any(-1)
