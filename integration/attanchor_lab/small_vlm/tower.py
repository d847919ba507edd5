"""EfficientNet-Lite as a vision tower: 7 x 7 tokens from 224 pixels, or from 448 where 2 x 2 are pooled.

Without its classifier a token is 1,280 features. With it, it is what the classifier makes of them, said in words that a
language model knows: the mean of the classes' names, as its embeddings, weighted by their probabilities.

Importing this module makes the class known to AutoConfig and AutoModel; the entry point `attanchor.models` has the
library do it, so that a saved model loads without code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

# Lite0's stages: kernel, stride, expansion, channels, blocks.
LITE0 = (
    (3, 1, 1, 16, 1),
    (3, 2, 6, 24, 2),
    (5, 2, 6, 40, 2),
    (3, 2, 6, 80, 3),
    (5, 1, 6, 112, 3),
    (5, 2, 6, 192, 4),
    (3, 1, 6, 320, 1),
)
_EPS = 1e-3  # of its batch norms


class EfficientNetLiteConfig(PretrainedConfig):
    """Sides of images in pixels, channels of the first and the last layer, and the stages between; `pool` x `pool`
    places become a token, their mean. With `classes` tokens are words of `hidden_size`, otherwise the `channels`."""

    model_type = "efficientnet-lite"

    def __init__(
        self,
        image_size: int = 224,
        stem: int = 32,
        stages: Sequence[Sequence[int]] = LITE0,
        channels: int = 1280,
        classes: int = 0,
        hidden_size: int | None = None,
        pool: int = 1,
        **more: Any,
    ) -> None:
        self.image_size, self.stem, self.channels, self.classes = image_size, stem, channels, classes
        self.hidden_size = channels if hidden_size is None else hidden_size
        self.stages, self.pool = [list(stage) for stage in stages], pool
        self.patch_size = 2 * pool  # as ViTs call the side of what becomes a token
        for _, stride, *_ in self.stages:
            self.patch_size *= stride
        super().__init__(**more)


class _Conv(nn.Conv2d):
    """A convolution padded as TensorFlow does it: what is odd goes to the right and below."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> None:
        super().__init__(inputs, outputs, kernel, stride, groups=groups)

    def forward(self, pixels: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = []
        for side in (pixels.shape[-1], pixels.shape[-2]):
            missing = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [missing // 2, missing - missing // 2]
        return super().forward(F.pad(pixels, pads) if any(pads) else pixels)


class _Block(nn.Module):
    """An inverted bottleneck: widen, convolve each channel by itself, narrow; around it, where shapes allow, itself."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        self.expand = _Conv(inputs, width) if expansion > 1 else None
        self.depthwise = _Conv(width, width, kernel, stride, groups=width)
        self.project = _Conv(width, outputs)
        self.skips = stride == 1 and inputs == outputs

    def forward(self, pixels: Tensor) -> Tensor:
        hidden = pixels if self.expand is None else F.relu6(self.expand(pixels))
        hidden = self.project(F.relu6(self.depthwise(hidden)))
        return pixels + hidden if self.skips else hidden


class EfficientNetLite(PreTrainedModel):
    """The convolutions with their batch norms folded in: nothing in it changes when a model is set to train."""

    config_class = EfficientNetLiteConfig
    base_model_prefix = "tower"
    main_input_name = "pixel_values"

    def __init__(self, config: EfficientNetLiteConfig) -> None:
        super().__init__(config)
        self.stem = _Conv(3, config.stem, 3, 2)
        blocks, inputs = [], config.stem
        for kernel, stride, expansion, channels, repeats in config.stages:
            for number in range(repeats):
                blocks.append(_Block(inputs, channels, kernel, 1 if number else stride, expansion))
                inputs = channels
        self.blocks = nn.ModuleList(blocks)
        self.head = _Conv(inputs, config.channels)
        self.classifier = nn.Linear(config.channels, config.classes) if config.classes else None
        self.words = nn.Linear(config.classes, config.hidden_size, bias=False) if config.classes else None
        self.post_init()

    def forward(self, pixel_values: Tensor, return_dict: bool = True, **unused: Any) -> BaseModelOutput:
        """(B, 3, height, width) to (B, tokens, hidden_size), tokens in reading order."""
        hidden = F.relu6(self.stem(pixel_values.to(self.stem.weight.dtype)))
        for block in self.blocks:
            hidden = block(hidden)
        hidden = F.avg_pool2d(F.relu6(self.head(hidden)), self.config.pool).flatten(2).mT
        if self.classifier is not None and self.words is not None:
            hidden = self.words(self.classifier(hidden).softmax(-1))
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=(hidden,))


AutoConfig.register(EfficientNetLiteConfig.model_type, EfficientNetLiteConfig, exist_ok=True)
AutoModel.register(EfficientNetLiteConfig, EfficientNetLite, exist_ok=True)


def last_word(name: str) -> str:
    """Of a class: "apple" of "Granny Smith apple", "crane" of "crane (bird)"."""
    return name.lower().partition(" (")[0].split()[-1]


@torch.no_grad()
def class_words(names: Sequence[str], tokenizer: Any, embeddings: Tensor) -> Tensor:
    """(classes, D): of each name's last word the mean of its token embeddings (V, D), less the
    part along the vocabulary's mean, twice as long.

    All embeddings share that part: with it a patch would be like every word, and cosines would tell little. A patch
    that the classifier is not sure of gets a mean of words, which is short: doubled, it is about as long as a word.
    """
    ids = [tokenizer(f" {last_word(name)}", add_special_tokens=False).input_ids for name in names]
    words = torch.stack([embeddings[one].mean(0) for one in ids])
    shared = F.normalize(embeddings.mean(0), dim=0)
    return 2 * (words - (words @ shared)[:, None] * shared)


def with_words(tower: EfficientNetLite, classifier: tuple[Tensor, Tensor], words: Tensor) -> EfficientNetLite:
    """`tower` with its classifier, weight and bias, and a row of `words` (classes, D) for each of the classes."""
    told = tower.config.to_dict() | {"classes": len(words), "hidden_size": words.shape[1]}
    knowing = EfficientNetLite(EfficientNetLiteConfig(**told))
    more = dict(zip(("classifier.weight", "classifier.bias", "words.weight"), (*classifier, words.T), strict=True))
    knowing.load_state_dict(tower.state_dict() | more)
    return knowing.eval()


def folded(weights: Mapping[str, Tensor], config: EfficientNetLiteConfig) -> dict[str, Tensor]:
    """The state of an `EfficientNetLite` from that of the package efficientnet-lite-pytorch, less its classifier."""
    pairs = [("stem", "_conv_stem", "_bn0")]
    number = 0
    for _, _, expansion, _, repeats in config.stages:
        parts = [("expand", "_expand_conv")] if expansion > 1 else []
        parts += [("depthwise", "_depthwise_conv"), ("project", "_project_conv")]
        norms = ("_bn0", "_bn1", "_bn2")[-len(parts) :]
        for _ in range(repeats):
            old = f"_blocks.{number}."
            pairs += [
                (f"blocks.{number}.{new}", old + conv, old + norm)
                for (new, conv), norm in zip(parts, norms, strict=True)
            ]
            number += 1
    pairs.append(("head", "_conv_head", "_bn1"))
    state = {}
    for new, conv, norm in pairs:
        scale = weights[f"{norm}.weight"] / (weights[f"{norm}.running_var"] + _EPS).sqrt()
        state[f"{new}.weight"] = weights[f"{conv}.weight"] * scale[:, None, None, None]
        state[f"{new}.bias"] = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
    return state
