"""AttAnchor settings beside a peft adapter, whose own files have no place for them."""

from __future__ import annotations

import json
import warnings
from os import PathLike
from pathlib import Path
from typing import Any

from torch import nn

from attanchor_vlm.model.attach import attach, base_of, is_attached
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.records import write_json

FILE_NAME = "attanchor.json"


def save_settings(settings: AttAnchorConfig | nn.Module, directory: str | PathLike[str]) -> Path:
    """Write ``attanchor.json`` into an adapter's directory, whole or not at all.

    Args:
        settings: The settings, or an attached model (or a PeftModel around one) that has them.

    Returns:
        The path of the file.

    Raises:
        ValueError: a model that is not attached.
    """
    if isinstance(settings, nn.Module):
        if not is_attached(settings):
            raise ValueError("the model is not attached, so it has no AttAnchor settings to save")
        settings = _settings_of(settings)
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
        return AttAnchorConfig.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error


def _settings_of(model: nn.Module) -> AttAnchorConfig:
    attached: Any = base_of(model)
    return attached.attanchor_config


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
    """
    from peft import PeftModel

    directory = Path(directory)
    settings = load_settings(directory) if (directory / FILE_NAME).is_file() else None
    loaded = PeftModel.from_pretrained(model, directory, **options)
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
    elif _settings_of(loaded) != settings:
        warnings.warn(
            f"the adapter in {directory} was trained with {settings}, but the model it is loaded into is attached with "
            f"{_settings_of(loaded)}",
            stacklevel=2,
        )
    return loaded
