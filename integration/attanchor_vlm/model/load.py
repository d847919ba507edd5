"""Load a model with its processor, its adapter and its anchors, in what the device can compute in."""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib.metadata import entry_points
from os import PathLike
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from safetensors import SafetensorError

from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.adapter_files import FILE_NAME, load_adapter, load_settings
from attanchor_vlm.model.attach import attach
from attanchor_vlm.model.candidates import with_tokens_of
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.families import refused
from attanchor_vlm.records import write_folder


def load_pretrained(name: str, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Model and processor of a local folder or a Hub id, with the weights in `dtype`.

    Raises:
        SetupError: there is no such folder, the Hub cannot be reached or does not have it, a file of it is damaged or
            lacks weights, it is no image-text-to-text model, or one of a family that can have no anchors. Code that
            comes with a checkpoint is never run.
    """
    from transformers import AutoConfig

    from attanchor_vlm.model.processors import load_processor

    with source(name) as folder:
        # Processor and config first: they are small, so that what cannot be used costs no download.
        processor = load_processor(folder)
        if getattr(processor, "image_processor", None) is None or getattr(processor, "tokenizer", None) is None:
            raise SetupError(f"model {name} has no processor for images and text; AttAnchor trains image-text models")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        if reason := refused(config.model_type):
            raise SetupError(f"AttAnchor cannot insert anchors in model {name} ({config.model_type}): {reason}")
        model, found = _load(folder, config, dtype)
    _check_weights(name, model, found)
    return model, processor


def auto_class(config: Any) -> Any:
    """The Auto class of transformers by which the models of a config are made and loaded: that for images and text, or
    else that for any media, where models that hear as well may stand alone."""
    from transformers import AutoModelForImageTextToText, AutoModelForMultimodalLM

    kinds = AutoModelForImageTextToText, AutoModelForMultimodalLM
    return next((kind for kind in kinds if type(config) in kind._model_mapping), kinds[0])  # whose error says it all


def _load(folder: str, config: Any, dtype: torch.dtype) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"output_loading_info": True, "trust_remote_code": False}
    return auto_class(config).from_pretrained(folder, config=config, dtype=dtype, **options)


def save_pretrained(model: Any, processor: Any, folder: Path) -> None:
    """Write model and processor to a folder that is empty or not there, whole or not at all."""

    def write(temporary: Path) -> None:
        model.save_pretrained(temporary)
        processor.save_pretrained(temporary)

    write_folder(folder, write)


def empty_model(config: Any) -> Any:
    """The model of a config, without weights (on the meta device)."""
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def load_front(name: str, dtype: torch.dtype) -> tuple[Any, Any]:
    """As `load_pretrained`, without the layers of the language model: for prompts, whose rows need none of them."""
    from transformers import AutoConfig
    from transformers.utils import logging

    from attanchor_vlm.model.processors import load_processor

    loud = logging.get_verbosity()
    with source(name) as folder, ExitStack() as afterwards:
        afterwards.callback(logging.set_verbosity, loud)
        logging.set_verbosity_error()  # it would list the layers
        processor = load_processor(folder)
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        text.num_hidden_layers = 0
        if getattr(text, "layer_types", None):
            text.layer_types = []
        model, found = _load(folder, config, dtype)
    _check_weights(name, model, {**found, "unexpected_keys": ()})
    return model, processor


def _check_weights(name: str, model: torch.nn.Module, found: Mapping[str, Collection[str]]) -> None:
    """Refuse a model with weights that are random, for want of stored ones, or NaN; tell of stored ones left over."""
    if missing := sorted(found["missing_keys"]):
        raise SetupError(
            f"model {name} lacks {len(missing)} of its weights, such as {missing[0]}, which would be random; copy the "
            "checkpoint whole"
        )
    if surplus := sorted(found["unexpected_keys"]):
        warnings.warn(
            f"model {name} has {len(surplus)} weights that {type(model).__name__} does not use, such as {surplus[0]}",
            stacklevel=3,
        )
    broken = [key for key, weight in model.named_parameters() if not torch.isfinite(weight).all()]
    if broken:
        raise SetupError(f"model {name} has weights that are NaN or infinite, such as {broken[0]}; it is damaged")


@contextmanager
def source(name: str) -> Iterator[str]:
    """What `source_of` gives, for a block that loads from it: whatever fails there becomes a `SetupError`."""
    found = source_of(name)
    try:
        yield found
    except SetupError:
        raise
    except Exception as error:  # of damaged files, nearly any kind
        hint = (
            "the folder should hold config.json, weights and processor files, as save_pretrained writes them"
            if Path(name).expanduser().is_dir()
            else "it is no folder here, so it was looked for on the Hugging Face Hub; check name, network and login "
            "(`hf auth login`), or download it elsewhere and give its folder"
        )
        lines = str(error).strip().splitlines() or [type(error).__name__]
        reason = " ".join(line.strip() for line in lines[: 2 if lines[0].endswith(":") else 1])
        raise SetupError(f"model {name} cannot be loaded: {reason} ({hint})") from error


def source_of(name: str) -> str:
    """What transformers is given for `name`: a local folder, or a Hub id whose Hub can be reached.

    Architectures of other packages, which register themselves with transformers on import, are known afterwards: the
    entry points of the group `attanchor.models`.
    """
    for entry in entry_points(group="attanchor.models"):
        entry.load()
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
    from huggingface_hub import constants, try_to_load_from_cache

    try:
        cached = isinstance(try_to_load_from_cache(name, "config.json"), str)
    except ValueError as error:
        raise SetupError(f"model {name} is no folder here, and cannot be a Hub id: {error}") from error
    if cached:
        return
    hint = "download it elsewhere and give its folder"
    if constants.HF_HUB_OFFLINE:
        raise SetupError(
            f"model {name} is no folder here and not in the Hub's cache, and HF_HUB_OFFLINE is set; {hint}"
        )
    if reason := hub_unreachable():
        raise SetupError(
            f"model {name} is no folder here, and the Hugging Face Hub ({constants.ENDPOINT}) cannot be reached "
            f"({reason}); check name and network, or {hint}"
        )


def hub_unreachable() -> str | None:
    """Why the Hub cannot be reached; None if it can, or need not, be: its client would go on trying for minutes."""
    from huggingface_hub import constants

    proxied = any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    if constants.HF_HUB_OFFLINE or proxied:
        return None
    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((address.hostname, port), timeout=10).close()
    except OSError as error:
        return str(error)
    return None


def choose_dtype(wanted: str, say: Callable[[str], None]) -> torch.dtype:
    """`wanted` if the device computes in it, else float32 with one line that says so."""
    if wanted == "float32":
        return torch.float32
    if not torch.cuda.is_available():
        if wanted == "bfloat16" and torch.cpu.get_capabilities().get("amx_bf16"):
            return torch.bfloat16
        say(f"{wanted} needs a GPU, and there is none: float32 is used")
        return torch.float32
    if wanted == "bfloat16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        say(f"bfloat16 is not supported by {torch.cuda.get_device_name()}: float32 is used")
        return torch.float32
    return getattr(torch, wanted)


def settings_for(
    model: str,
    adapter: str | PathLike[str] | None = None,
    **changes: Any,
) -> AttAnchorConfig | None:
    """The settings that `load` will attach with, as far as files tell without loading the model: those of the adapter,
    or of the model's folder (attanchor.json, or config.json if it was saved attached), with every one of
    `changes` that is not None in the place of theirs. None if there are none, and no tau.
    """
    refuse_adapter(model)
    found = None
    if adapter is not None:
        folder = Path(adapter)
        if not (folder / "adapter_config.json").is_file():
            raise SetupError(f"adapter {folder} holds no adapter_config.json; give the folder that train wrote to")
        if (folder / FILE_NAME).is_file():
            found = load_settings(folder)
        elif changes.get("tau") is None:
            raise SetupError(
                f"adapter {folder} has no {FILE_NAME}, so it was trained without anchors; give --tau (1 for none)"
            )
    else:
        folder = Path(model).expanduser()
        found = load_settings(folder) if (folder / FILE_NAME).is_file() else _saved_attached(folder)
    return _changed(found, changes)


def _saved_attached(folder: Path) -> AttAnchorConfig | None:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("attanchor")
    except (OSError, ValueError, AttributeError):
        return None  # whether it is a model at all is said when it is loaded
    return None if stored is None else AttAnchorConfig.from_dict(stored)


def _changed(settings: AttAnchorConfig | None, changes: Mapping[str, Any]) -> AttAnchorConfig | None:
    given = {name: value for name, value in changes.items() if value is not None}
    if settings is None:
        return AttAnchorConfig(**given) if "tau" in given else None
    if "content_words" in given:
        given["function_token_ids"] = ()
    return dataclasses.replace(settings, **given)


def load(
    model: str,
    adapter: str | PathLike[str] | None = None,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    need_settings: bool = True,
    default_tau: float | None = None,
    **changes: Any,
) -> tuple[Any, Any]:
    """A model with its processor, its adapter and its anchors, ready for `answer`.

    Args:
        model: Folder of a saved model, or a Hub id.
        adapter: Folder of an adapter that `attanchor train` or `save_settings` wrote, with its ``attanchor.json``.
        dtype: Of the weights, "auto" for the one that they are saved in; None for bfloat16 on a GPU that computes in
            it, else float32.
        device: None for the GPU, if there is one.
        need_settings: False leaves a model that nothing says a tau for as it is, plain.
        default_tau: The threshold of a model that nothing else says one for.
        changes: Settings of `AttAnchorConfig` in the place of what is stored, such as `tau` (1 for no anchors); None
            leaves one as it is.

    Returns:
        The attached model (with an adapter: a PeftModel around it) in evaluation mode, and the processor.

    Raises:
        SetupError: model or adapter cannot be loaded, or nothing says which tau to use.
    """
    settings = settings_for(model, adapter, **changes)
    missing = SetupError(
        f"model {model} has no AttAnchor settings; give --tau (1 for no anchors), or an --adapter with its own"
    )
    need_settings = need_settings and default_tau is None
    if settings is None and need_settings and (Path(model).expanduser() / "config.json").is_file():
        raise missing  # of a model on the Hub, its config says more
    gpu = torch.cuda.is_available()
    if dtype is None:
        dtype = torch.bfloat16 if gpu and torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    weights: Any = dtype
    loaded, processor = load_pretrained(model, weights)
    stored = getattr(loaded.config, "attanchor", None)
    if stored is not None and adapter is None and not (Path(model).expanduser() / FILE_NAME).is_file():
        settings = _changed(AttAnchorConfig.from_dict(stored), changes)
    if settings is None and need_settings:
        raise missing
    settings = settings or _changed(None, {**changes, "tau": default_tau})
    if settings is not None:
        # Adapters know the tokens of the processor that they were trained with.
        known = settings.special_token_ids and (settings.function_token_ids or not settings.content_words)
        settings = settings if known else with_tokens_of(settings, processor)
        attach(loaded, settings)
    if adapter is not None:
        loaded = with_adapter(loaded, model, adapter)
        if settings is not None:
            attach(loaded, settings)  # in place of the adapter's tau, if another was given
    return loaded.to(device or ("cuda" if gpu else "cpu")).eval(), processor


def with_adapter(loaded: Any, model: str, adapter: str | PathLike[str]) -> Any:
    """`load_adapter` into a model that was `loaded` from `model`."""
    try:
        return load_adapter(loaded, adapter)
    except (json.JSONDecodeError, RecursionError, SafetensorError) as error:
        raise SetupError(f"adapter {adapter} cannot be read; a file of it is damaged: {error}") from error
    except Exception as error:  # of a damaged configuration, nearly any kind
        reason = " ".join(str(error).split())
        raise SetupError(
            f"adapter {adapter} does not fit model {model}, which it should have been trained on: {reason[:300]}"
        ) from error
