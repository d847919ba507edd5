"""How often a word of the question has its best patch in the thing that it names."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from attanchor_vlm.data.batches import message
from attanchor_vlm.data.rows import load_image
from attanchor_vlm.inference.ask import encode_questions
from attanchor_vlm.model.attach import attach, base_of, prepare_inputs
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.geometry import image_slots, patch_boxes


@torch.no_grad()
def grounding(model: Any, processor: Any, rows: Sequence[Mapping[str, Any]], images: Path) -> dict[str, float]:
    """Match the concepts that questions name, whatever tau is; nothing is answered.

    Args:
        model: Attached; its settings are as before afterwards.
        rows: As `write_photographs` writes them; those whose question names nothing that is there are left out.
        images: Their folder.

    Returns:
        hit: The share of words whose best patch has its middle in the box of a thing of that name. chance: what a patch
        drawn at random would give. words: how many there were.

    Raises:
        ValueError: no question names a thing that is there.
    """
    target: Any = base_of(model)
    before = target.attanchor_config
    attach(model, AttAnchorConfig(tau=-1.0, special_token_ids=before.special_token_ids))
    try:
        found = [one for row in rows for one in _of_row(model, processor, row, images)]
    finally:
        attach(model, dataclasses.replace(before))
    if not found:
        raise ValueError("no question names a thing that is there; give rows such as those of test-place-seen.json")
    hits, chances = zip(*found, strict=True)
    return {"hit": sum(hits) / len(hits), "chance": sum(chances) / len(chances), "words": len(hits)}


def _of_row(model: Any, processor: Any, row: Mapping[str, Any], folder: Path) -> list[tuple[bool, float]]:
    """For each concept that the question names and the picture shows: whether its patch is right, and chance."""
    there: dict[str, list[list[float]]] = {}
    for thing in row["things"]:
        there.setdefault(thing["name"], []).append(thing["box"])
    asked = [name for name in row["asked"] if name in there]
    if not asked:
        return []
    image = load_image(folder / row["image"])
    asks = message("user", row["conversations"][0]["value"])
    batch: dict[str, Any] = encode_questions(model, processor, [[asks]], [[image]])
    prepare_inputs(model, **batch)
    target: Any = base_of(model)
    plan = target.attanchor_plan
    boxes = [box.pixels for box in patch_boxes(model, processor, batch, 0, [[image]])]
    patch_of = {slot: patch for patch, slot in enumerate(image_slots(model, batch, 0))}
    slots = batch["anchor_mask"][0].nonzero()[:, 0].tolist()
    words = [processor.tokenizer.decode([int(batch["input_ids"][0, slot])]).strip() for slot in slots]
    found = []
    for name in asked:
        own = _tokens_of(name, words)
        if not own:
            continue
        best = max(own, key=lambda number: float(plan.score[0, slots[number]]))
        inside = [box is not None and any(_holds(thing, box) for thing in there[name]) for box in boxes]
        host = patch_of.get(int(plan.host[0, slots[best]]))
        found.append((host is not None and inside[host], sum(inside) / len(inside)))
    return found


def _tokens_of(name: str, words: Sequence[str]) -> range | None:
    """The tokens that make up a word."""
    for start in range(len(words)):
        for stop in range(start + 1, len(words) + 1):
            if (made := "".join(words[start:stop])) == name:
                return range(start, stop)
            if not name.startswith(made):
                break
    return None


def _holds(box: Sequence[float], patch: Sequence[float]) -> bool:
    x, y = (patch[0] + patch[2]) / 2, (patch[1] + patch[3]) / 2
    return box[0] <= x <= box[2] and box[1] <= y <= box[3]
