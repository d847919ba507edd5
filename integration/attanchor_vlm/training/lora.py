"""LoRA on the language model and the projector, never the vision tower; and the optimizer that can step it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.families.structure import language_model, projectors, towers

# Of these peft takes every name for an expert's, where experts are one parameter, and cannot drop out what it adapts.
_OF_EXPERTS = ("gate_proj", "up_proj", "down_proj", "gate", "w1", "w2", "w3")


def lora_targets(model: nn.Module) -> list[str]:
    """The `target_modules` of peft's LoraConfig: all linear layers of the language model and of the projectors, found
    by the model's structure and named in full. "all-linear" and plain names hit the vision tower as well. In a mixture
    of experts the feed-forward layers are left out.
    """
    target = base_of(model)
    decoder = language_model(target)
    prefix = next(name for name, module in target.named_modules() if module is decoder)
    apart = tuple(f"{name}." for name, _ in (*towers(target), *projectors(target)))

    def is_own(name: str) -> bool:  # the encoders may stand inside the decoder
        return not f"{name}.".startswith(apart) and not any(part.startswith(f"{name}.") for part in apart)

    own = {name: part for name, part in decoder.named_modules(prefix=prefix) if is_own(name)}
    layers = (part for part in own.values() if not isinstance(part, nn.Conv1d))
    mixture = any(parameter.dim() == 3 for layer in layers for parameter in layer.parameters(recurse=False))
    names = [name for name, part in own.items() if isinstance(part, nn.Linear)]
    names += [name for prefix, part in projectors(target) for name in _linear(part, prefix)]
    return [name for name in names if not (mixture and name.rpartition(".")[2] in _OF_EXPERTS)]


def _linear(module: nn.Module, prefix: str) -> list[str]:
    return [name for name, layer in module.named_modules(prefix=prefix) if isinstance(layer, nn.Linear)]


def choose_optimizer(wanted: str, say: Callable[[str], None], sharded: bool = False) -> str:
    """`wanted`, or AdamW with one line that says why, if it is one of bitsandbytes' that cannot run here.

    Args:
        sharded: Whether it steps sharded parameters (FSDP), which bitsandbytes' kernels do not take: its issue 1633, an
            illegal memory access.
    """
    from transformers.training_args import OptimizerNames

    names = [member.value for member in OptimizerNames]
    if wanted not in names:
        raise SetupError(f"optimizer is {wanted!r}; it should be one of {', '.join(names)}")
    if not wanted.endswith(("8bit", "32bit")) and wanted not in ("ademamix", "rmsprop_bnb"):
        return wanted
    if wanted.startswith("adamw_torch"):
        return wanted  # torchao brings its adamw_torch_8bit
    if sharded:
        say(f"{wanted} cannot step sharded parameters (fsdp): training with adamw_torch")
        return "adamw_torch"
    if not torch.cuda.is_available():
        missing = "a GPU"
    else:
        try:
            import bitsandbytes  # noqa: F401  the import is the test
        except ImportError:
            missing = "bitsandbytes (`pip install bitsandbytes`)"
        else:
            return wanted
    say(f"{wanted} needs {missing}: training with adamw_torch")
    return "adamw_torch"


def add_lora(model: Any, rank: int, alpha: int, dropout: float) -> nn.Module:
    """A PeftModel with fresh adapters on language model and projector; everything else is frozen. Projectors without
    linear layers, which are small, are trained whole. A model whose images become words of its vocabulary has none.

    Raises:
        SetupError: there is no projector to be found in the model, so that it would stay as it is.
    """
    from peft import LoraConfig, get_peft_model

    base = base_of(model)
    found = [(name, module) for name, module in projectors(base) if any(True for _ in module.parameters())]
    if not found and not hasattr(base.base_model, "vocabulary_mapping"):
        raise SetupError(
            f"nothing of a projector is found in {type(model).__name__}, so LoRA would leave it untrained; name its "
            "layers in peft's LoraConfig yourself, beside attanchor_vlm.lora_targets(model)"
        )
    whole = [name for name, module in found if not _linear(module, name)]
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_targets(model),
        modules_to_save=whole or None,
    )
    return get_peft_model(model, config)


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the layers that a sharded model is cut into, those of its language model and its vision tower.

    A model's own list (`_no_split_modules`) names classes that need not be in it, which accelerate refuses.
    """
    whole = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    repeated = {
        type(layer).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module
    }
    return sorted(whole & repeated)
