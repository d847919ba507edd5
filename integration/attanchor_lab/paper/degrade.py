"""The same questions with other images: degraded ones, or several views of each, written as LLaVA-Instruct rows."""

from __future__ import annotations

import io
import json
import shutil
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageFilter
from tqdm import tqdm

from attanchor_lab.paper.study import digest
from attanchor_vlm.data.rows import PLACEHOLDER, load_image, read_rows
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.records import write_json

KINDS = {  # and what a level is
    "blur": "standard deviation of the Gaussian, in pixels of an image 336 pixels high or wide",
    "noise": "standard deviation, of pixel values up to 255",
    "downscale": "the image is made so many times smaller, then as large as before",
    "jpeg": "JPEG quality",
}
VIEWS = (1, 2, 5)
_REFERENCE_SIDE = 336  # CLIP's input in LLaVA-1.5: levels of blur mean the same for images of every size


def degrade(image: Image.Image, kind: str, level: float, seed: int = 0) -> Image.Image:
    """A worse copy of an RGB image.

    Args:
        kind: A key of `KINDS`, which says what `level` is.
        seed: Of the noise.

    Raises:
        SetupError: an unknown kind, or a level that has no meaning.
    """
    check_level(kind, level)
    if kind == "blur":
        return image.filter(ImageFilter.GaussianBlur(level * min(image.size) / _REFERENCE_SIDE))
    if kind == "noise":
        drawn = np.random.default_rng(seed).normal(0, level, (image.height, image.width, 3))
        return Image.fromarray(np.clip(np.asarray(image) + drawn, 0, 255).round().astype(np.uint8))
    if kind == "downscale":
        small = max(1, round(image.width / level)), max(1, round(image.height / level))
        return image.resize(small, Image.Resampling.BOX).resize(image.size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=int(level))
    return Image.open(buffer).convert("RGB")


def check_level(kind: str, level: float) -> None:
    """Raises: SetupError: an unknown kind, or a level that has no meaning."""
    if kind not in KINDS:
        raise SetupError(f"degradation is {kind!r}; it should be one of {', '.join(KINDS)}")
    if kind == "jpeg" and level != int(level):
        raise SetupError(f"level of jpeg is {level:g}; it should be a whole number ({KINDS[kind]})")
    least, most = {"downscale": (1, 1000), "jpeg": (1, 100)}.get(kind, (0, 1000))
    if not least <= level <= most:
        raise SetupError(f"level of {kind} is {level:g}; it should be from {least} to {most} ({KINDS[kind]})")


def views(image: Image.Image, count: int) -> list[Image.Image]:
    """An image as 1 view (the whole), 2 (and its middle, twice as large) or 5 (the whole and its quadrants).

    In LLaVA-1.5 and TinyLLaVA a view is 576 image tokens, so these are 576, 1,152 and 2,880.

    Raises:
        SetupError: another count.
    """
    check_views(count)
    width, height = image.size
    middle, half_width, half_height = (width // 4, height // 4), max(width // 2, 1), max(height // 2, 1)
    corners = {1: [], 2: [middle], 5: [(0, 0), (width - half_width, 0), (0, height - half_height)]}[count]
    if count == 5:
        corners.append((width - half_width, height - half_height))
    return [image, *(image.crop((x, y, x + half_width, y + half_height)) for x, y in corners)]


def check_views(count: int) -> None:
    """Raises: SetupError: another count than those of `VIEWS`."""
    if count not in VIEWS:
        raise SetupError(f"views is {count}; it should be one of {', '.join(map(str, VIEWS))}")


def write_degraded(data: Path, images: Path, folder: Path, kind: str, level: float, **how: Any) -> tuple[Path, Path]:
    """The rows of `data` about degraded images, as `write_changed` writes them, which says what `how` may be.

    The noise of an image depends on its name alone, so that every arm sees the same.
    """
    check_level(kind, level)

    def change(image: Image.Image, name: str) -> list[Image.Image]:
        return [degrade(image, kind, level, zlib.crc32(name.encode()))]

    return write_changed(data, images, folder, change, f"{kind} {level:g}", **how)


def write_views(data: Path, images: Path, folder: Path, count: int, **how: Any) -> tuple[Path, Path]:
    """The rows of `data` with `count` views in place of every image, as `write_changed` writes them."""
    check_views(count)
    return write_changed(data, images, folder, lambda image, _: views(image, count), f"{count} views", **how)


def write_changed(
    data: Path,
    images: Path,
    folder: Path,
    change: Callable[[Image.Image, str], list[Image.Image]],
    what: str,
    rows: int | None = None,
    progress: bool = True,
    skip_bad: bool = False,
) -> tuple[Path, Path]:
    """Write LLaVA-Instruct rows about other images to `folder`, as a whole, unless an earlier run has.

    Args:
        change: From an image and its file's name the images that stand in its place.
        what: How these differ, in a word or two.
        rows: Only so many, the first ones.
        skip_bad: Leave bad rows out.

    Returns:
        The file of rows and the folder of images.
    """
    target = folder / data.with_suffix(".json").name, folder / "images"
    if not data.is_file():
        raise DataError(f"{data} is not a file")
    source = {"source": str(data.resolve()), "sha256": digest(data), "images": str(images.resolve())}
    about = {**source, "what": what, "rows": rows}
    mark = folder / "made.json"
    if mark.is_file() and json.loads(mark.read_text(encoding="utf-8")) == about:
        return target
    checked, _ = read_rows(data, images, skip_bad, progress)
    made = folder.with_name(f".{folder.name}.part")
    try:
        if made.exists():
            shutil.rmtree(made)  # of a run that was killed
        (made / "images").mkdir(parents=True)
        names: dict[Path, list[str]] = {}
        written: list[dict[str, Any]] = []
        for row in tqdm(checked[:rows], what, unit="row", disable=not progress, leave=False):
            for path in row.images:
                if path not in names:
                    shown = change(load_image(path), path.name)
                    names[path] = [f"{len(names):06d}-{number}.png" for number in range(len(shown))]
                    for name, image in zip(names[path], shown, strict=True):
                        image.save(made / "images" / name, compress_level=1)
            written.append(_row(row.messages, [names[path] for path in row.images]))
        write_json(made / target[0].name, written)
        write_json(made / mark.name, about)
        if folder.exists():
            shutil.rmtree(folder)  # made for other rows, or cut short
        made.replace(folder)
    finally:
        shutil.rmtree(made, ignore_errors=True)
    return target


def _row(messages: Sequence[tuple[str, str]], images: list[list[str]]) -> dict[str, Any]:
    """A row with as many placeholders for each image as there are images in its place."""
    speaker = {"user": "human", "assistant": "gpt"}
    places = "\n".join([PLACEHOLDER] * len(images[0])) if images else PLACEHOLDER
    turns = [{"from": speaker[role], "value": text.replace(PLACEHOLDER, places)} for role, text in messages]
    names = [name for there in images for name in there]
    return {"image": names, "conversations": turns} if names else {"conversations": turns}
