"""LoRA on the language model and the projector, never the vision tower; and the optimizer that can step it here."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from attanchor_vlm.errors import SetupError

# Language model and projector, never the vision tower: "all-linear" and plain names hit the tower as well. Gemma 3's
# projector is a bare parameter, which LoRA cannot adapt.
LORA_TARGETS = (
    r".*(language_model|text_model)\..*\.(q|k|v|o|gate|up|down)_proj"
    r"|.*multi_modal_projector\.linear(_[12])?"
    r"|.*visual\.merger\.mlp\.[02]"
    r"|.*visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc[12]"
    r"|.*connector\.modality_projection\.proj"
)
_TOWERS = ("vision_tower.", "vision_model.", "visual.blocks.", "visual.patch_embed.")


def choose_optimizer(wanted: str, say: Callable[[str], None], sharded: bool = False) -> str:
    """`wanted`, or AdamW with one line that says why, if it is one of bitsandbytes' that cannot run here.

    Args:
        sharded: Whether it steps sharded parameters (FSDP), which bitsandbytes' kernels do not take: its issue 1633, an
            illegal memory access.

    Raises:
        SetupError: transformers has no optimizer of that name.
    """
    from transformers.training_args import OptimizerNames

    names = [member.value for member in OptimizerNames]
    if wanted not in names:
        raise SetupError(f"optimizer is {wanted!r}; it should be one of {', '.join(names)}")
    if not _is_of_bitsandbytes(wanted):
        return wanted
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


def _is_of_bitsandbytes(optimizer: str) -> bool:
    if optimizer.startswith("adamw_torch"):
        return False  # torchao brings its adamw_torch_8bit
    return optimizer.endswith(("8bit", "32bit")) or optimizer in ("ademamix", "rmsprop_bnb")


def add_lora(model: Any, rank: int, alpha: int, dropout: float) -> nn.Module:
    """A PeftModel with fresh adapters on language model and projector; everything else is frozen.

    Args:
        rank, alpha, dropout: Of LoRA.

    Raises:
        SetupError: the model has no module that the adapters could go on, or one of its vision tower would be hit.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=LORA_TARGETS)
    try:
        model = get_peft_model(model, config)
    except ValueError as error:
        raise SetupError(f"LoRA finds no language model or projector in {type(model).__name__}: {error}") from error
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    hit = [name for name in trained if any(tower in name for tower in _TOWERS)]
    if hit:
        raise SetupError(f"LoRA would train the vision tower of {type(model).__name__}: {hit[0]}")
    return model


def layer_classes(model: nn.Module) -> list[str]:
    """Names of the layers that a sharded model is cut into, those of its language model and its vision tower.

    A model's own list (`_no_split_modules`) names classes that need not be in it, which accelerate refuses.
    """
    whole = {name for module in model.modules() for name in getattr(module, "_no_split_modules", None) or ()}
    repeated = {
        type(layer).__name__ for module in model.modules() if isinstance(module, nn.ModuleList) for layer in module
    }
    return sorted(whole & repeated)
