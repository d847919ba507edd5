"""Start a projector from the classifier's words: a patch becomes the names that the classifier gives it, as embeddings.

Of a patch's features f the tower's classifier makes softmax(W f + b); times the names' embeddings that is a token which
the language model has seen no picture for, and knows all the same. LLaVA's two-layer projector is fitted to it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from attanchor_lab.photographs.scenes import Drawer, World
from attanchor_lab.photographs.stamps import find_stamps, photographs
from attanchor_lab.small_vlm.tower import EfficientNetLite
from attanchor_vlm.errors import SetupError

_BATCH = 512  # patches a step
_LR = 3e-3


@torch.no_grad()
def class_words(names: Sequence[str], tokenizer: Any, embeddings: Tensor) -> Tensor:
    """(classes, D): the mean of each name's token embeddings (V, D), less the part along the vocabulary's mean.

    All embeddings share that part: with it a patch would be like every word, and cosines would tell little.
    """
    ids = [tokenizer(f" {name.lower()}", add_special_tokens=False).input_ids for name in names]
    words = torch.stack([embeddings[one].mean(0) for one in ids])
    shared = F.normalize(embeddings.mean(0), dim=0)
    return words - embeddings.mean(0) - ((words - embeddings.mean(0)) @ shared)[:, None] * shared


def pictures(count: int, side: int, seed: int) -> Iterator[Image.Image]:
    """Scenes of stamps where those are installed, otherwise pieces of scikit-image's photographs.

    Raises:
        SetupError: scikit-image is not installed.
    """
    generator = np.random.default_rng(seed)
    every = photographs()
    try:
        drawer = Drawer(World(pixels=side), find_stamps(), generator, seed)
    except SetupError:
        for _ in range(count):
            image = every[generator.integers(len(every))]
            size = int(min(image.size) * generator.uniform(0.2, 1))
            left, top = (int(generator.integers(length - size + 1)) for length in image.size)
            yield image.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.BICUBIC)
    else:
        for _ in range(count):
            yield drawer.draw().image


@torch.no_grad()
def patches(tower: EfficientNetLite, images: Iterable[Image.Image]) -> Tensor:
    """(n, hidden_size): the features of every patch of `images`."""
    found = []
    for image in images:
        pixels = torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1)
        found.append(tower((pixels[None] - 127) / 128).last_hidden_state[0])
    return torch.cat(found)


def distil(projector: nn.Module, features: Tensor, head: tuple[Tensor, Tensor], words: Tensor, steps: int) -> float:
    """Fit `projector` to the classifier's words of `features` (n, hidden_size).

    Returns:
        The mean cosine to them, over all of them.
    """
    weight, bias = head
    wanted = F.linear(features, weight, bias).softmax(-1) @ words
    optimizer = torch.optim.AdamW(projector.parameters(), _LR, weight_decay=0.01)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LR, total_steps=steps)
    for _ in range(steps):
        drawn = torch.randint(len(features), (min(_BATCH, len(features)),))
        loss = F.mse_loss(projector(features[drawn]), wanted[drawn])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    with torch.no_grad():
        return F.cosine_similarity(projector(features), wanted, dim=-1).mean().item()
