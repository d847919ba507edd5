"""Ask an attached model a question, and say where the anchors went and which image tokens stayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attanchor_vlm.chat.videos import Video
from attanchor_vlm.data.batches import message
from attanchor_vlm.data.rows import PLACEHOLDER, VIDEO_PLACEHOLDER, parts
from attanchor_vlm.inference.ask import Picture, encode_questions, generated, open_images, with_placeholders
from attanchor_vlm.inference.picture import Anchored, Match
from attanchor_vlm.model.attach import base_of, is_attached
from attanchor_vlm.model.geometry import image_slots, patch_boxes


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
    target: Any = base_of(model)
    config = target.attanchor_config
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
    plan = target.attanchor_plan
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
