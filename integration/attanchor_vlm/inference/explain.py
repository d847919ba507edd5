"""Ask an attached model a question, and say where the anchors went and which image tokens stayed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from attanchor_vlm.chat.videos import Video
from attanchor_vlm.data.batches import message
from attanchor_vlm.data.rows import PLACEHOLDER, VIDEO_PLACEHOLDER, parts
from attanchor_vlm.inference.ask import Picture, encode_questions, generated, open_images, with_placeholders
from attanchor_vlm.model.attach import base_of, config_of, is_attached
from attanchor_vlm.model.geometry import Box, image_slots, patch_boxes


@dataclass(frozen=True)
class Match:
    """A token of the prompt that took part: its text, its best cosine, and the image token that it was copied behind.

    `patch` counts the image tokens of the prompt, as `Anchored.boxes` does; None if the token was not inserted.
    """

    text: str
    score: float
    patch: int | None


@dataclass(frozen=True)
class Anchored:
    """A question about images, and where its anchors went.

    Attributes:
        images: Those of the question, as the user has them, and frames of its videos.
        boxes: Of every image token of the prompt, as `geometry.patch_boxes` gives them.
        matches: In the order of the prompt.
        truth: Shown where `answer` differs from it.
        dropped: The image tokens that the model was not given, counted as `boxes` are.
        frames: What those of `images` are called that are frames of videos; they are shown where they have anchors.
    """

    images: Sequence[Image.Image]
    boxes: Sequence[Box]
    question: str
    matches: Sequence[Match]
    answer: str | None = None
    truth: str | None = None
    dropped: frozenset[int] = frozenset()
    frames: Mapping[int, str] = field(default_factory=dict)

    def name(self, image: int) -> str:
        """What a picture is called where there are several."""
        return self.frames.get(image) or f"image {1 + sum(n not in self.frames for n in range(image))}"


def describe(shown: Anchored) -> dict[str, Any]:
    """What an anchor picture shows, as JSON has it: `answer`, counts (of image tokens, those `kept`), and `anchors`.

    These are the text tokens that took part, each with its `text`, `score` (null where it had no candidate) and whether
    it was `inserted`; if so, with the patch's place: in words (`where`), and `image`, `tile` (null in a view of the
    whole image), `row`, `column`, counted from 0, and `pixels` (x0, y0, x1, y1 in that image); of a video also
    `video` and `frame`, counted from 0.
    """
    anchors: list[dict[str, Any]] = []
    for match in shown.matches:
        one: dict[str, Any] = {"text": match.text, "score": match.score if math.isfinite(match.score) else None}
        one["inserted"] = match.patch is not None
        if match.patch is not None:
            box = shown.boxes[match.patch]
            one |= {"where": _where(shown, box), **box._asdict()}
            if box.video is None:
                del one["video"], one["frame"]
            one["pixels"] = None if box.pixels is None else [round(value, 2) for value in box.pixels]
        anchors.append(one)
    inserted = sum(one["inserted"] for one in anchors)
    return {
        "answer": shown.answer,
        "inserted": inserted,
        "candidates": len(anchors),
        "image_tokens": len(shown.boxes),
        "kept": len(shown.boxes) - len(shown.dropped),
        "anchors": anchors,
    }


def _where(shown: Anchored, box: Box) -> str:
    said = [shown.name(box.image)] if len(shown.images) > 1 else []
    if box.tile is not None:
        said.append(f"tile {box.tile + 1}")
    elif has_tiles(shown, box.image):
        said.append("whole view")
    return ", ".join([*said, f"row {box.row + 1}, column {box.column + 1}"])


def has_tiles(shown: Anchored, image: int) -> bool:
    """Whether a picture of a question was cut into tiles, so that its tokens without one are of the whole view."""
    return any(box.image == image and box.tile is not None for box in shown.boxes)


def explain(
    model: Any,
    processor: Any,
    images: Picture | Sequence[Picture],
    prompt: str,
    max_new_tokens: int = 64,
    videos: Sequence[Video] = (),
) -> Anchored:
    """The answer to a question about images and videos, the patch that each of its tokens was copied behind, and the
    patches that were dropped.

    Args:
        model: Attached with direction "text_into_image", and with tau < 1 or `keep`.
        images: One PIL image or path, or a list of them.
        prompt: The question. Images go in front of it, or where it says ``<image>``.
        max_new_tokens: Bound of the answer's length.
        videos: Those of the question, in front or where it says ``<video>``; frames with anchors are shown.

    Raises:
        ValueError: the model is not attached, changes no prompt, or inserts images into text; the question has places
            for another number of images; or it is not known where in an image the tokens of the model's family lie.
    """
    if not is_attached(model):
        raise ValueError("the model is not attached, so it has no anchors to explain; it should be one given to attach")
    config = config_of(model)
    if config.changes_nothing or config.direction != "text_into_image":
        raise ValueError(
            f"the model has tau {config.tau} and direction {config.direction}; only text in images can be drawn"
        )
    opened = open_images(images)
    if not opened and not videos:
        raise ValueError("there is no image, and anchors stand in images; give one or more")
    asked = with_placeholders(prompt, len(opened), len(videos))
    chat = [message("user", asked)]
    batch = encode_questions(model, processor, [chat], [opened], [videos])
    own = {"image": iter(opened), "video": iter(videos)}
    media = [next(own[part["type"]]) for part in parts(asked) if part["type"] in own]
    boxes = patch_boxes(model, processor, batch, 0, [media])
    (answer,) = generated(model, processor, batch, max_new_tokens=max_new_tokens)
    plan = base_of(model).attanchor_plan
    ids = batch["input_ids"][0]
    patch_of = {slot: patch for patch, slot in enumerate(image_slots(model, batch, 0))}
    stayed = set(plan.source[0][~plan.is_anchor[0]].tolist())
    dropped = frozenset(patch for slot, patch in patch_of.items() if slot not in stayed)
    matches = []
    for slot in batch["anchor_mask"][0].nonzero()[:, 0].tolist():
        patch = patch_of.get(int(plan.host[0, slot]))
        word = processor.tokenizer.decode([int(ids[slot])]).strip() or "␣"
        matches.append(Match(word, float(plan.score[0, slot]), patch))
    shown = _with_numbers(prompt.replace(VIDEO_PLACEHOLDER, ""))
    frames = {box.image: (box.video, box.frame or 0) for box in boxes if box.video is not None}
    still = iter(opened)
    pictures = [
        videos[frames[n][0]].frames[frames[n][1]] if n in frames else next(still)
        for n in range(1 + max(box.image for box in boxes))
    ]
    names = {n: f"video {video + 1}, frame {frame + 1}" for n, (video, frame) in frames.items()}
    return Anchored(pictures, boxes, shown, matches, answer.strip(), dropped=dropped, frames=names)


def _with_numbers(prompt: str) -> str:
    """The question as the picture has it: images by their numbers, unless all stand in front of it."""
    before, *others = prompt.split(PLACEHOLDER)
    if not any(text.strip() for text in (before, *others[:-1])):
        return prompt.replace(PLACEHOLDER, "").strip()
    return (before + "".join(f"[image {number}]{text}" for number, text in enumerate(others, start=1))).strip()
