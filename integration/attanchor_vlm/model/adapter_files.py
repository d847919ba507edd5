"""AttAnchor settings beside a peft adapter, whose own files have no place for them."""

from __future__ import annotations

import json
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import nn

from attanchor_vlm.model.attach import attach, base_of, config_of, is_attached
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.records import write_json

FILE_NAME = "attanchor.json"
_CONTROL_FILE = "placement.json"  # in which earlier versions kept the placement of a control


def save_settings(settings: AttAnchorConfig | nn.Module, directory: str | PathLike[str]) -> Path:
    """Write ``attanchor.json`` into an adapter's directory, whole or not at all.

    Args:
        settings: The settings, or an attached model (or a PeftModel around one) that has them.

    Raises:
        ValueError: a model that is not attached.
    """
    if isinstance(settings, nn.Module):
        if not is_attached(settings):
            raise ValueError("the model is not attached, so it has no AttAnchor settings to save")
        settings = config_of(settings)
    path = Path(directory) / FILE_NAME
    write_json(path, settings.to_dict())
    return path


def load_settings(directory: str | PathLike[str]) -> AttAnchorConfig:
    """The settings in a directory, or in a file of `save_settings` named directly.

    Raises:
        FileNotFoundError: there are none.
        ValueError: the file is not what `save_settings` writes.
    """
    path = Path(directory)
    path = path / FILE_NAME if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: the adapter was trained or copied without its settings")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        control = path.with_name(_CONTROL_FILE)
        if control.is_file() and isinstance(found, dict):
            told = json.loads(control.read_text(encoding="utf-8"))
            found |= {"placement": told["placement"], "placement_seed": told["seed"]}
        return AttAnchorConfig.from_dict(found)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ValueError(f"{path}: {error}") from error


def _check_rank(model: nn.Module, directory: Path) -> None:
    """Refuse a rank that would take memory without end before anything is allocated."""
    try:
        rank = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))["r"]
        width = base_of(model).config.get_text_config().hidden_size
    except (OSError, LookupError, TypeError, AttributeError):
        return  # not LoRA, or nothing that peft could load: it says so itself
    if isinstance(rank, int) and rank > width:
        raise ValueError(f"its rank is {rank}; it should be at most the model's width, {width}")


def _check_tensors(loaded: Any, directory: Path) -> None:
    """Refuse an adapter whose file lacks tensors, which peft leaves at their fresh values, or holds broken ones."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(loaded, save_embedding_layers=False)
    file = directory / "adapter_model.safetensors"
    if file.is_file():
        with safe_open(file, framework="pt") as stored:
            missing = sorted(set(state) - set(stored.keys()))
        if missing:
            raise ValueError(f"it lacks {len(missing)} of its {len(state)} tensors, such as {missing[0]}")
    if broken := [name for name, tensor in state.items() if not tensor.isfinite().all()]:
        raise ValueError(f"it has tensors that are NaN or infinite, such as {broken[0]}")


def load_adapter(
    model: nn.Module, directory: str | PathLike[str], *, attach_model: bool = True, **options: Any
) -> nn.Module:
    """A PeftModel of `model` with the adapter in `directory`, attached with the settings that it was trained with.

    Args:
        model: A transformers model, attached or plain.
        directory: Holds the adapter and, if it was trained with anchors, ``attanchor.json``.
        attach_model: False leaves the model as it is, with a warning where that differs from how the adapter was
            trained: a plain model, or other settings.
        options: For ``PeftModel.from_pretrained``.

    Raises:
        ValueError: the adapter lacks tensors, or has some that are NaN or infinite; its rank is beyond the model's
            width; or its settings are damaged.
    """
    from peft import PeftModel

    directory = Path(directory)
    settings = load_settings(directory) if (directory / FILE_NAME).is_file() else None
    _check_rank(model, directory)
    loaded = PeftModel.from_pretrained(model, directory, **options)
    _check_tensors(loaded, directory)
    if settings is None:
        return loaded
    if attach_model:
        return attach(loaded, settings)
    if not is_attached(loaded):
        warnings.warn(
            f"the adapter in {directory} was trained with AttAnchor (tau={settings.tau}, {settings.direction}), but "
            "the model it is loaded into is not attached: it will run without anchors",
            stacklevel=2,
        )
    elif config_of(loaded) != settings:
        warnings.warn(
            f"the adapter in {directory} was trained with {settings}, but the model it is loaded into is attached with "
            f"{config_of(loaded)}",
            stacklevel=2,
        )
    return loaded
