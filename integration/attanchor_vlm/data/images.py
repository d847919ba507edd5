"""Images of every kind that PIL reads, as RGB and upright; and why one cannot be read."""

from __future__ import annotations

import contextlib
import errno
import io
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

# A file, the bytes of one (parquet keeps images inside), or an image decoded already.
ImageSource: TypeAlias = Path | bytes | Image.Image

Image.init()
# What photographs and drawings come in. Pillow knows more, and some of it (EPS, PDF) starts other programs.
FORMATS = tuple(
    sorted({"AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP"} & Image.OPEN.keys())
)


def decoded(source: ImageSource) -> Image.Image:
    """An RGB image: a photograph in a file turned as its camera was held, 16 bits a pixel scaled to 8. One that is
    damaged raises nearly any kind of error."""
    if isinstance(source, Image.Image):
        return _rgb(source)
    with open_file(source) as image:
        image.load()
        upright = image
        with contextlib.suppress(Exception):  # damaged notes are no damaged image
            upright = ImageOps.exif_transpose(image)
        return _rgb(upright)


def open_file(source: Path | bytes) -> Image.Image:
    """The image in a file or in the bytes of one, not decoded yet. What is no regular file is refused, as a pipe would
    be waited for without end."""
    if isinstance(source, bytes):
        return Image.open(io.BytesIO(source), formats=FORMATS)
    if source.exists() and not source.is_file():
        raise OSError(errno.EINVAL, "it is not a file")
    return Image.open(source, formats=FORMATS)


def open_no_others() -> None:
    """From now on, code of this process that names no formats, such as vLLM, opens `FORMATS` alone."""
    Image.ID[:] = FORMATS


def size_of(source: ImageSource) -> tuple[int, int]:
    """(height, width) of an image as `decoded` gives it, by the head of its file alone."""
    if isinstance(source, Image.Image):
        return source.height, source.width
    try:
        with open_file(source) as image:
            lies = image.getexif().get(ExifTags.Base.Orientation, 1) >= 5
            return (image.width, image.height) if lies else (image.height, image.width)
    except Exception as error:
        name = source if isinstance(source, Path) else "inside the row"
        raise ValueError(f"image {name} {why_not(error)}") from error


def unreadable(paths: Collection[Path], progress: bool) -> dict[Path, str]:
    """Decode every image once and say which cannot be, and why."""

    def check(path: Path) -> str | None:
        try:
            with open_file(path) as image:
                # A JPEG is read whole but decoded at an eighth of its size: quick, and truncation shows.
                image.draft("RGB", (max(image.width // 8, 1), max(image.height // 8, 1)))
                image.load()
        except Exception as error:
            return f"image {path} {why_not(error)}"
        return None

    ordered = sorted(paths)
    with ThreadPoolExecutor() as pool:
        reasons = tqdm(
            pool.map(check, ordered), "checking images", len(ordered), unit="", disable=not progress, leave=False
        )
        return {path: reason for path, reason in zip(ordered, reasons, strict=True) if reason is not None}


def why_not(error: Exception) -> str:
    """What is wrong with an image, of what PIL raised: "cannot be read: …"."""
    if isinstance(error, UnidentifiedImageError):
        return "is not an image that can be read"
    if isinstance(error, OSError) and error.strerror:
        return f"cannot be read: {error.strerror}"
    return f"cannot be read: {error}"


def _rgb(image: Image.Image) -> Image.Image:
    # Of integers of 16 bits, PIL would cut off whatever is above 255.
    if image.mode.startswith("I;16") or (image.mode == "I" and np.asarray(image).max() > 255):
        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype(np.uint8))
    elif image.mode == "F" and np.asarray(image).max() <= 1:  # of floats, 0 to 1 is black to white
        image = Image.fromarray((np.asarray(image).clip(0, 1) * 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
