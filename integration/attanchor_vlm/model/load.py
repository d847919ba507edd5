"""Load a model with its processor, choose what the device can compute in, and put LoRA where it belongs."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attanchor_vlm.errors import SetupError
from attanchor_vlm.training.config import Preset

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


def load(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and processor of a local folder or a Hub id, with the weights in `dtype`.

    Raises:
        SetupError: there is no such folder, the Hub cannot be reached or does not have it, a file of it is damaged, or
            it is no image-text-to-text model.
    """
    from transformers import AutoModelForImageTextToText

    from attanchor_vlm.model.processors import load_processor

    source = source_of(name)
    try:
        # Processor first: it is small, so that a wrong name costs no download.
        processor = load_processor(source)
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
    except Exception as error:  # of damaged files, nearly any kind
        raise cannot_be_loaded(name, error) from error
    if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
        raise SetupError(f"model {name} has no processor for images and text; AttAnchor trains image-text models")
    return model, processor


def cannot_be_loaded(name: str, error: Exception) -> SetupError:
    """What is said of a model that transformers could not load, or its processor."""
    hint = (
        "the folder should hold config.json, weights and processor files, as save_pretrained writes them"
        if Path(name).expanduser().is_dir()
        else "it is no folder here, so it was looked for on the Hugging Face Hub; check name, network and login "
        "(`hf auth login`), or download it elsewhere and give its folder"
    )
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
    return SetupError(f"model {name} cannot be loaded: {reason} ({hint})")


def source_of(name: str) -> str:
    """What transformers is given for `name`: a local folder, or a Hub id whose Hub can be reached.

    Raises:
        SetupError: it is neither, or an adapter.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        refuse_adapter(name)
        return str(path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise SetupError(
            f"model {name} is not a folder; give the folder of a saved model, or a Hub id such as owner/name"
        )
    check_hub(name)
    return name


def refuse_adapter(model: str) -> None:
    """Refuse an adapter's folder in the place of its model's. transformers would load both, unmerged: an export of that
    is no whole model, and training would begin anew.

    Raises:
        SetupError: naming the model that it was trained on.
    """
    folder = Path(model).expanduser()
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return
    try:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        base = f", {config['base_model_name_or_path']}"
    except (OSError, ValueError, LookupError, TypeError):
        base = ""
    raise SetupError(f"model {model} is an adapter; give the model that it was trained on{base}")


def check_hub(name: str) -> None:
    """Refuse a Hub id at once where the Hub cannot be reached: its client would go on trying for minutes."""
    from urllib.parse import urlsplit

    from huggingface_hub import constants, try_to_load_from_cache

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError as error:
        raise SetupError(f"model {name} is no folder here, and cannot be a Hub id: {error}") from error
    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if cached or proxied:
        return
    hint = "download it elsewhere and give its folder"
    if constants.HF_HUB_OFFLINE:
        raise SetupError(
            f"model {name} is no folder here and not in the Hub's cache, and HF_HUB_OFFLINE is set; {hint}"
        )
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError as error:
        raise SetupError(
            f"model {name} is no folder here, and the Hugging Face Hub ({address.hostname}) cannot be reached "
            f"({error}); check name and network, or {hint}"
        ) from error


def choose_dtype(wanted: str, say: Callable[[str], None]) -> torch.dtype:
    """`wanted` if the device computes in it, else float32 with one line that says so."""
    if wanted == "float32":
        return torch.float32
    if not torch.cuda.is_available():
        say(f"{wanted} needs a GPU, and there is none: training in float32")
        return torch.float32
    if wanted == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        say(f"bfloat16 is not supported by {torch.cuda.get_device_name()}: training in float32")
        return torch.float32
    return getattr(torch, wanted)


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


def add_lora(model: Any, preset: Preset) -> nn.Module:
    """A PeftModel with fresh adapters on language model and projector; everything else is frozen.

    Raises:
        SetupError: the model has no module that the adapters could go on, or one of its vision tower would be hit.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=preset.lora_rank, lora_alpha=preset.lora_alpha, lora_dropout=preset.lora_dropout, target_modules=LORA_TARGETS
    )
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
