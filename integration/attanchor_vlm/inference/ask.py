"""Ask a model about images, with its anchors: one question, or a batch.

model, processor = load("llava-hf/llava-1.5-7b-hf", adapter="runs/anchors")
answer(model, processor, "Where is the dog?", ["photo.jpg"]).text
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attanchor_lab.placements import check_adapter
from PIL import Image
from safetensors import SafetensorError

from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.data.batches import message, to_model
from attanchor_vlm.data.reading import check_characters
from attanchor_vlm.data.rows import PLACEHOLDER, load_image
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.adapter_files import FILE_NAME, load_adapter, load_settings
from attanchor_vlm.model.attach import attach, base_of, is_attached
from attanchor_vlm.model.candidates import with_tokens_of
from attanchor_vlm.model.config import AttAnchorConfig

Picture = Image.Image | str | PathLike[str]


class Answer(NamedTuple):
    """What the model said, and how many of the question's `candidates` (text tokens that take part) were `inserted`.
    With direction "image_into_text", `inserted` counts copies of image tokens."""

    text: str
    inserted: int
    candidates: int


def settings_for(
    model: str,
    adapter: str | PathLike[str] | None = None,
    tau: float | None = None,
    content_words: bool | tuple[str, ...] | None = None,
) -> AttAnchorConfig | None:
    """The settings that `load` will attach with, as far as files tell without loading the model: those of the adapter,
    or of the model's folder (attanchor.json, or config.json if it was saved attached), with `tau` and `content_words`
    in place of theirs. None if there are none.

    Raises:
        SetupError: `adapter` is no folder of an adapter, was trained without anchors and there is no `tau`, or is that
            of an experiment's control; or `model` is an adapter.
        ValueError: the settings are damaged, or `tau` is no threshold.
    """
    loading.refuse_adapter(model)
    found = None
    if adapter is not None:
        folder = Path(adapter)
        if not (folder / "adapter_config.json").is_file():
            raise SetupError(f"adapter {folder} holds no adapter_config.json; give the folder that train wrote to")
        check_adapter(folder)
        if (folder / FILE_NAME).is_file():
            found = load_settings(folder)
        elif tau is None:
            raise SetupError(
                f"adapter {folder} has no {FILE_NAME}, so it was trained without anchors; give --tau (1 for none)"
            )
    else:
        folder = Path(model).expanduser()
        found = load_settings(folder) if (folder / FILE_NAME).is_file() else _saved_attached(folder)
    return _changed(found, tau, content_words)


def _saved_attached(folder: Path) -> AttAnchorConfig | None:
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("attanchor")
    except (OSError, ValueError, AttributeError):
        return None  # whether it is a model at all is said when it is loaded
    return None if stored is None else AttAnchorConfig.from_dict(stored)


def _changed(
    settings: AttAnchorConfig | None, tau: float | None, content_words: bool | tuple[str, ...] | None
) -> AttAnchorConfig | None:
    if tau is not None:
        settings = AttAnchorConfig(tau=tau) if settings is None else dataclasses.replace(settings, tau=tau)
    if settings is not None and content_words is not None:
        settings = dataclasses.replace(settings, content_words=content_words, function_token_ids=())
    return settings


def load(
    model: str,
    adapter: str | PathLike[str] | None = None,
    *,
    tau: float | None = None,
    content_words: bool | tuple[str, ...] | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    need_settings: bool = True,
    default_tau: float | None = None,
) -> tuple[Any, Any]:
    """A model with its processor, its adapter and its anchors, ready for `answer`.

    Args:
        model: Folder of a saved model, or a Hub id.
        adapter: Folder of an adapter that `attanchor train` or `save_settings` wrote, with its ``attanchor.json``.
        tau: Instead of the stored threshold; 1 for no anchors.
        content_words: As in `AttAnchorConfig`, instead of what is stored.
        dtype: Of the weights, "auto" for the one that they are saved in; None for bfloat16 on a GPU that computes in
            it, else float32.
        device: None for the GPU, if there is one.
        need_settings: False leaves a model that nothing says a tau for as it is, plain.
        default_tau: The threshold of a model that nothing else says one for.

    Returns:
        The attached model (with an adapter: a PeftModel around it) in evaluation mode, and the processor.

    Raises:
        SetupError: model or adapter cannot be loaded, or nothing says which tau to use.
    """
    settings = settings_for(model, adapter, tau, content_words)
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
    loaded, processor = loading.load(model, weights)
    stored = getattr(loaded.config, "attanchor", None)
    if stored is not None and adapter is None and not (Path(model).expanduser() / FILE_NAME).is_file():
        settings = _changed(AttAnchorConfig.from_dict(stored), tau, content_words)
    if settings is None and need_settings:
        raise missing
    settings = settings or _changed(None, default_tau, content_words)
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
    """`load_adapter` into a model that was `loaded` from `model`.

    Raises:
        SetupError: the adapter is damaged, or that of another model.
    """
    try:
        return load_adapter(loaded, adapter)
    except (json.JSONDecodeError, SafetensorError) as error:
        raise SetupError(f"adapter {adapter} cannot be read; a file of it is damaged: {error}") from error
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise SetupError(
            f"adapter {adapter} does not fit model {model}, which it should have been trained on: {reason[:300]}"
        ) from error


def answer(
    model: Any,
    processor: Any,
    prompt: str,
    images: Picture | Sequence[Picture] = (),
    *,
    max_new_tokens: int = 64,
    **options: Any,
) -> Answer:
    """Ask one question about one or several images (or none).

    Args:
        model: Attached, or a PeftModel around an attached one. A plain model answers too, without anchors.
        processor: Its processor.
        prompt: The question. Images go in front of it, or where it says ``<image>``.
        images: PIL images or paths, or a single one.
        max_new_tokens: Bound of the answer's length.
        options: Further arguments of `generate`; greedy decoding unless they say otherwise.

    Raises:
        ValueError: an image cannot be read, there are not as many as the prompt has places for, or `options` make
            `generate` return anything but one sequence for each question.
    """
    return answers(model, processor, [prompt], [images], max_new_tokens=max_new_tokens, **options)[0]


@torch.no_grad()
def answers(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Picture | Sequence[Picture]],
    *,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[Answer]:
    """`answer` for a batch, padded on the left: ``images[i]`` are those of ``prompts[i]``."""
    _check_batch(prompts, images, options)
    model.eval()
    opened = [open_images(own) for own in images]
    chats = [[message("user", with_placeholders(text, len(own)))] for text, own in zip(prompts, opened, strict=True)]
    target: Any = base_of(model)
    attached = is_attached(target)
    words = target.attanchor_config.content_words if attached else False
    batch = to_model(encode_chat(processor, chats, opened, add_generation_prompt=True, content_words=words), model)
    mask = batch["anchor_mask"]
    if not any(opened) or not attached:
        del batch["anchor_mask"]  # nothing to match, or nobody to take it
    sequences = model.generate(**batch, **{"do_sample": False, **options, "max_new_tokens": max_new_tokens})
    plan = target.attanchor_plan if attached else None
    inserted = [0] * len(chats) if plan is None else plan.is_anchor.sum(-1).tolist()
    new = sequences[:, batch["input_ids"].shape[1] :]
    texts = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
    candidates = [count if own else 0 for own, count in zip(opened, mask.sum(-1).tolist(), strict=True)]
    return [Answer(text.strip(), *counts) for text, *counts in zip(texts, inserted, candidates, strict=True)]


def _check_batch(prompts: Sequence[str], images: Sequence[Any], options: dict[str, Any]) -> None:
    if isinstance(prompts, str) or len(prompts) != len(images):
        count = 1 if isinstance(prompts, str) else len(prompts)
        raise ValueError(
            f"there {'is 1 prompt' if count == 1 else f'are {count} prompts'} and images for {len(images)}; prompts "
            "should be a list, and images a list with an entry (which may be an empty list) for each of them"
        )
    for name, plain in (("num_return_sequences", 1), ("return_dict_in_generate", False)):
        if (options.get(name) or plain) != plain:
            raise ValueError(f"{name} is {options[name]}, but a question has one answer; call model.generate for that")


def with_placeholders(text: str, images: int) -> str:
    """A question with a place for each of its images: in front, unless it says where.

    Raises:
        ValueError: it says so for another number of images, or is no whole text.
    """
    check_characters("the prompt", text)
    places = text.count(PLACEHOLDER)
    if places == 0:
        return f"{PLACEHOLDER}\n" * images + text
    if places != images:
        raise ValueError(
            f"the prompt has {places} {PLACEHOLDER} placeholder{'s' * (places != 1)} for {images} "
            f"image{'s' * (images != 1)}; there should be one for each, or none, which puts images first"
        )
    return text


def open_images(images: Picture | Sequence[Picture]) -> list[Image.Image]:
    """RGB images, of one or several.

    Raises:
        DataError: see `open_image`.
    """
    return [open_image(image) for image in ([images] if isinstance(images, (Image.Image, str, PathLike)) else images)]


def open_image(image: Picture) -> Image.Image:
    """An RGB image.

    Raises:
        DataError: there is no such file, or it is no image.
    """
    return load_image(image if isinstance(image, Image.Image) else Path(image))
