"""Ask a model about images, with its anchors: one question, or a batch.

model, processor = load("llava-hf/llava-1.5-7b-hf", adapter="runs/anchors")
answer(model, processor, "Where is the dog?", ["photo.jpg"]).text
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor

from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.chat.videos import Video
from attanchor_vlm.data.batches import message, to_model
from attanchor_vlm.data.reading import check_characters
from attanchor_vlm.data.rows import PLACEHOLDER, VIDEO_PLACEHOLDER, load_image
from attanchor_vlm.data.videos import VideoFiles, load_video
from attanchor_vlm.errors import DataError
from attanchor_vlm.model.attach import base_of, config_of, is_attached

Picture = Image.Image | str | PathLike[str]


class Answer(NamedTuple):
    """What the model said, and how many of the question's `candidates` (text tokens that take part) were `inserted`.
    With direction "image_into_text", `inserted` counts copies of image tokens."""

    text: str
    inserted: int
    candidates: int


def answer(
    model: Any,
    processor: Any,
    prompt: str,
    images: Picture | Sequence[Picture] = (),
    *,
    videos: Sequence[Video] = (),
    max_new_tokens: int = 64,
    **options: Any,
) -> Answer:
    """Ask one question about one or several images (or none).

    Args:
        model: Attached, or a PeftModel around an attached one. A plain model answers too, without anchors.
        processor: Its processor.
        prompt: The question. Images go in front of it, or where it says ``<image>``.
        images: PIL images or paths, or a single one.
        videos: Those that it is about, in front of the images or where it says ``<video>``.
        max_new_tokens: Bound of the answer's length.
        options: Further arguments of `generate`; greedy decoding unless they say otherwise.

    Raises:
        ValueError: an image cannot be read, there are not as many as the prompt has places for, or `options` make
            `generate` return anything but one sequence for each question.
    """
    return answers(model, processor, [prompt], [images], [videos], max_new_tokens=max_new_tokens, **options)[0]


def answers(
    model: Any,
    processor: Any,
    prompts: Sequence[str],
    images: Sequence[Picture | Sequence[Picture]],
    videos: Sequence[Sequence[Video]] | None = None,
    *,
    max_new_tokens: int = 64,
    **options: Any,
) -> list[Answer]:
    """`answer` for a batch, padded on the left: ``images[i]`` and ``videos[i]`` are those of ``prompts[i]``."""
    _check_batch(prompts, images, options)
    opened = [open_images(own) for own in images]
    films = [()] * len(prompts) if videos is None else [tuple(own) for own in videos]
    media = list(zip(opened, films, strict=True))
    chats = [
        [message("user", with_placeholders(text, *map(len, own)))] for text, own in zip(prompts, media, strict=True)
    ]
    batch = encode_questions(model, processor, chats, opened, films)
    texts = generated(model, processor, batch, **{**options, "max_new_tokens": max_new_tokens})
    plan = getattr(base_of(model), "attanchor_plan", None)
    inserted = [0] * len(chats) if plan is None else plan.is_anchor.sum(-1).tolist()
    words = batch["anchor_mask"].sum(-1).tolist() if "anchor_mask" in batch else [0] * len(chats)
    candidates = [count if any(own) else 0 for own, count in zip(media, words, strict=True)]
    return [Answer(text.strip(), *counts) for text, *counts in zip(texts, inserted, candidates, strict=True)]


def encode_questions(
    model: Any,
    processor: Any,
    chats: Sequence[Sequence[Mapping[str, Any]]],
    images: Sequence[Sequence[Any]],
    videos: Sequence[Sequence[Video]] = (),
) -> dict[str, Tensor]:
    """Conversations that `model` is to answer, as `encode_chat` returns them, on the model's device.

    With `anchor_mask` if one of them has an image or a video: of content words alone where the model's settings say so.
    """
    words = config_of(model).content_words if is_attached(model) else False
    films = list(videos) or None
    batch = encode_chat(processor, chats, images, videos=films, add_generation_prompt=True, content_words=words)
    if not any(images) and not any(videos):
        del batch["anchor_mask"]  # there is nothing to match
    return to_model(batch, model)


@torch.no_grad()
def generated(model: Any, processor: Any, batch: dict[str, Tensor], **options: Any) -> list[str]:
    """What `model` answers to each conversation of `encode_questions`: greedily, unless `options` say otherwise."""
    model.eval()
    taken = {name: value for name, value in batch.items() if name != "anchor_mask" or is_attached(model)}
    sequences = model.generate(**taken, **{"do_sample": False, **options})
    return processor.tokenizer.batch_decode(sequences[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


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


def with_placeholders(text: str, images: int, videos: int = 0) -> str:
    """A question with a place for each of its images and videos: in front, unless it says where."""
    check_characters("the prompt", text)
    return _with_places(_with_places(text, VIDEO_PLACEHOLDER, videos, "video"), PLACEHOLDER, images, "image")


def _with_places(text: str, place: str, count: int, kind: str) -> str:
    places = text.count(place)
    if places == 0:
        return f"{place}\n" * count + text
    if places != count:
        raise ValueError(
            f"the prompt has {places} {place} placeholder{'s' * (places != 1)} for {count} {kind}{'s' * (count != 1)}; "
            f"there should be one for each, or none, which puts {kind}s first"
        )
    return text


def open_images(images: Picture | Sequence[Picture]) -> list[Image.Image]:
    """RGB images, of one or several."""
    return [open_image(image) for image in ([images] if isinstance(images, (Image.Image, str, PathLike)) else images)]


def open_image(image: Picture) -> Image.Image:
    """An RGB image."""
    return load_image(image if isinstance(image, Image.Image) else Path(image))


def open_video(path: str | PathLike[str]) -> Video:
    """The frames of a video in a file, or in a folder of pictures, in the order of their names."""
    path = Path(path)
    files = sorted(one for one in path.iterdir() if one.is_file()) if path.is_dir() else [path]
    if not files or not files[0].is_file():
        raise DataError(f"video {path} {'holds no picture' if path.is_dir() else 'does not exist'}")
    return load_video(VideoFiles(tuple(files)))
