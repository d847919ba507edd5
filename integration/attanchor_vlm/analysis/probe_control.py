"""A model whose matching means nothing, with nothing else changed: what the probe should tell from a real one."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from attanchor_vlm.model.attach import base_of

# The last layer of the projector, whose output features are compared with the text embeddings.
_LAST = re.compile(
    r"(^|\.)(multi_modal_projector\.(linear_2|linear)|visual\.merger\.(mlp\.2|linear_fc2)|modality_projection\.proj)$"
)


@torch.no_grad()
def permute_projector(model: Any, seed: int = 0) -> Any:
    """Permute the projector's output features, in place: norms, and every cosine between two image tokens, stay what
    they were, while cosines with text lose their meaning. The language model no longer understands its images.
    """
    target = base_of(model)
    generator = torch.Generator().manual_seed(seed)
    layers = [module for name, module in target.named_modules() if _LAST.search(name) and isinstance(module, nn.Linear)]
    if layers:
        order = torch.randperm(layers[0].out_features, generator=generator).to(layers[0].weight.device)
        layers[0].weight.copy_(layers[0].weight[order].clone())
        if layers[0].bias is not None:
            layers[0].bias.copy_(layers[0].bias[order].clone())
        return model
    for name, parameter in target.named_parameters():
        if name.endswith("multi_modal_projector.mm_input_projection_weight"):  # Gemma 3: (features in, features out)
            order = torch.randperm(parameter.shape[1], generator=generator).to(parameter.device)
            parameter.copy_(parameter[:, order].clone())
            return model
    raise ValueError(f"the last layer of {type(target).__name__}'s projector is not known, so it cannot be permuted")
