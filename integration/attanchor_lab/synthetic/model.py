"""The laboratory's model: LlavaForConditionalGeneration; a frozen patch encoder, two-layer projector, small Llama."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutput

from attanchor_lab.scenes import world as scenes
from attanchor_lab.scenes.questions import IMAGE, PAD, START, WORDS
from attanchor_lab.scenes.world import COLOURS, SHAPES

_FREQUENCIES = 3  # waves per axis of the position features


@dataclass(frozen=True)
class Shape:
    """Size of the language model and of the encoder."""

    width: int = 64
    layers: int = 3
    heads: int = 4
    content: int = 52  # encoder features that say what a patch shows; 12 more say where it is

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.content < 1:
            raise ValueError(f"layers, heads, content are {self.layers}, {self.heads}, {self.content}; at least 1 each")
        if self.width < 1 or self.width % (2 * self.heads):
            raise ValueError(
                f"width is {self.width}; with {self.heads} heads it should be a multiple of {2 * self.heads}"
            )


class PatchEncoderConfig(PretrainedConfig):
    """A grid of `rows` by `columns` patches of `cell` pixels a side; `content` features and 12 of position."""

    model_type = "attanchor-patch-encoder"

    def __init__(self, rows: int = 6, columns: int = 6, cell: int = 8, content: int = 52, **more: Any) -> None:
        self.rows, self.columns, self.cell, self.content = rows, columns, cell, content
        self.image_size, self.patch_size = [rows * cell, columns * cell], cell  # as CLIP's config has them
        self.hidden_size = content + 4 * _FREQUENCIES
        super().__init__(**more)


class PatchEncoder(PreTrainedModel):
    """Every patch by itself through a small network; fixed waves say where it stands. What CLIP is to a real model."""

    config_class = PatchEncoderConfig
    base_model_prefix = "encoder"
    main_input_name = "pixel_values"

    def __init__(self, config: PatchEncoderConfig) -> None:
        super().__init__(config)
        pixels = 3 * config.cell**2
        self.layers = nn.Sequential(
            nn.Linear(pixels, 160), nn.GELU(), nn.Linear(160, config.content), nn.LayerNorm(config.content)
        )
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **unused: Any) -> BaseModelOutput:
        """(B, 3, height, width) to (B, patches, hidden_size)."""
        config = self.config
        parts = pixel_values.unflatten(2, (config.rows, config.cell)).unflatten(4, (config.columns, config.cell))
        parts = parts.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
        content = self.layers(parts.to(self.layers[0].weight.dtype))
        places = _waves(config.rows, config.columns, content.device).to(content.dtype)
        hidden = torch.cat([content, places.expand(len(content), -1, -1)], -1)
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


def _waves(rows: int, columns: int, device: torch.device) -> Tensor:
    """(rows * columns, 12): sine and cosine of both coordinates at rising frequencies."""
    y, x = torch.meshgrid(
        torch.linspace(-1, 1, rows, device=device), torch.linspace(-1, 1, columns, device=device), indexing="ij"
    )
    angles = torch.stack([axis.flatten() * torch.pi / 2 * 2**k for axis in (y, x) for k in range(_FREQUENCIES)], -1)
    return torch.cat([angles.sin(), angles.cos()], -1)


AutoConfig.register(PatchEncoderConfig.model_type, PatchEncoderConfig, exist_ok=True)
AutoModel.register(PatchEncoderConfig, PatchEncoder, exist_ok=True)


def build(world: scenes.World, shape: Shape) -> LlavaForConditionalGeneration:
    """A model with random weights; the caller seeds. The encoder is frozen."""
    vision = PatchEncoderConfig(world.rows, world.columns, world.cell, shape.content)
    text = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=shape.width,
        intermediate_size=2 * shape.width,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=4096,
        initializer_range=0.08 if shape.width < 128 else 0.04,  # the default suits widths of thousands
        pad_token_id=PAD,
        bos_token_id=START,
        eos_token_id=None,
        tie_word_embeddings=False,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=world.patches,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.requires_grad_(False)
    return model


def prompts(words: Tensor, patches: int) -> Tensor:
    """(B, 1 + patches + n) token ids of the plain prompts, from (B, n) questions."""
    start = words.new_full((len(words), 1), START)
    image = words.new_full((len(words), patches), IMAGE)
    return torch.cat([start, image, words], 1)


LANGUAGE: dict[str, Any] = {"betas": (0.9, 0.98), "clip": 1.0}  # how language models are trained here


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def learner(
    trained: list[nn.Parameter],
    steps: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    clip: float = float("inf"),
) -> Callable[[Tensor], None]:
    """What makes one of `steps` steps of AdamW on a loss: linear warm-up over 8 % of them, then half a cosine.

    Args:
        clip: The gradient's norm is cut to this.
    """
    optimizer = torch.optim.AdamW(trained, lr, weight_decay=0.01, betas=betas, fused=trained[0].is_cuda)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.08, final_div_factor=50)

    def learn(loss: Tensor) -> None:
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, clip)
        optimizer.step()
        rate.step()

    return learn


def pretrain_encoder(
    encoder: PatchEncoder, world: scenes.World, steps: int, generator: torch.Generator, blur: float
) -> dict[str, float]:
    """Teach the encoder to name the colour and the shape of a patch, or that it is empty; then freeze it.

    Returns:
        Accuracies on the patches with objects of a fresh batch: "colour" and "shape".
    """
    colours, shapes = len(COLOURS), len(SHAPES)
    # Its own small world with more objects: more named patches in every step, at any number of image tokens.
    crowded = scenes.World(6, 6, world.cell, 12, 24, 8, world.noise)
    config = PatchEncoderConfig(6, 6, world.cell, encoder.config.content)
    small: Any = PatchEncoder(config)
    small = small.to(generator.device)
    small.layers = encoder.layers.requires_grad_(True)
    heads = nn.Linear(config.content, colours + 1 + shapes + 1).to(generator.device)
    learn = learner([*small.layers.parameters(), *heads.parameters()], steps, 3e-3)

    def looked_at(count: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        drawn = scenes.draw(crowded, count, generator)
        hidden = small(scenes.render(crowded, drawn, generator, blur)).last_hidden_state[..., : config.content]
        colour, shape = heads(hidden).flatten(0, 1).split((colours + 1, shapes + 1), -1)
        # -1, the empty patch, becomes the last class.
        true = drawn.on_patches(drawn.colour).flatten() % (colours + 1), drawn.on_patches(drawn.shape).flatten()
        return colour, shape, true[0], true[1] % (shapes + 1)

    for _ in range(steps):
        colour, shape, true_colour, true_shape = looked_at(24)
        learn(F.cross_entropy(colour, true_colour) + F.cross_entropy(shape, true_shape))
    encoder.layers.requires_grad_(False)
    with torch.no_grad():
        colour, shape, true_colour, true_shape = looked_at(200)
        there = true_colour != colours
        return {
            "colour": (colour.argmax(-1) == true_colour)[there].float().mean().item(),
            "shape": (shape.argmax(-1) == true_shape)[there].float().mean().item(),
        }
