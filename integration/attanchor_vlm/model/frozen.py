"""Keep a frozen vision tower out of the autograd graph under gradient checkpointing."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel


def release_frozen_tower(model: PreTrainedModel, tower: nn.Module | None) -> None:
    """Remove the hooks by which gradient checkpointing makes a frozen tower's patch embeddings require gradients.

    `enable_input_require_grads` puts one on the input embedding of every model inside the model. On a tower in which
    nothing is trained it only keeps all activations alive. Does nothing while any parameter of the tower is trained.
    """
    if tower is None or any(parameter.requires_grad for parameter in tower.parameters()):
        return
    for module in tower.modules():
        hooks = module._forward_hooks
        for key in [key for key, hook in hooks.items() if _makes_inputs_require_grads(hook)]:
            del hooks[key]


def _makes_inputs_require_grads(hook: object) -> bool:
    # A closure of transformers, known by its name alone.
    return "enable_input_require_grads" in getattr(hook, "__qualname__", "")
