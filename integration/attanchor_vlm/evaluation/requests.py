"""From lmms-eval's requests to what `encode_chat` and `generate` take, and from texts to answers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attanchor_vlm.data.rows import load_image

_SAMPLING = ("temperature", "top_p", "top_k")
_PASSED_ON = ("num_beams", "repetition_penalty", "length_penalty", "no_repeat_ngram_size")


def as_chat(messages: Any, task: str) -> tuple[list[dict[str, Any]], list[Any]]:
    """A conversation (lmms-eval's ChatMessages) as `encode_chat` takes it, and its images in order.

    Raises:
        ValueError: it holds video or sound.
    """
    chat: list[dict[str, Any]] = []
    images: list[Any] = []
    for one in messages.messages:
        content: list[dict[str, str]] = []
        for part in one.content:
            if part.type == "text":
                content.append({"type": "text", "text": part.text})
            elif part.type == "image":
                image = part.url
                images.append(load_image(Path(image) if isinstance(image, str) else image))
                content.append({"type": "image"})
            else:
                raise ValueError(f"task {task} has {part.type}; anchors are inserted in images only")
        chat.append({"role": one.role, "content": content})
    return chat, images


def generation_options(settings: Mapping[str, Any], max_new_tokens: int) -> dict[str, Any]:
    """Arguments of `generate` from a task's `generation_kwargs`; greedy unless they ask for sampling."""
    options: dict[str, Any] = {"max_new_tokens": int(settings.get("max_new_tokens") or max_new_tokens)}
    options |= {name: settings[name] for name in _PASSED_ON if settings.get(name) is not None}
    temperature = settings.get("temperature") or 0
    options["do_sample"] = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    if options["do_sample"]:
        options |= {name: settings[name] for name in _SAMPLING if settings.get(name) is not None}
    return options


def cut(text: str, until: Iterable[str] | str | None) -> str:
    """`text` up to the first of the stop strings."""
    for stop in [until] if isinstance(until, str) else until or ():
        if stop:
            text = text.partition(stop)[0]
    return text
