"""Read LLaVA-Instruct rows and an image folder, and find every bad row before training starts."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from tqdm import tqdm

from attanchor_vlm.chat.videos import FPS
from attanchor_vlm.data.images import ImageSource, decoded, unreadable, why_not
from attanchor_vlm.data.reading import check_characters, lines_of, parse, parse_list
from attanchor_vlm.data.videos import VideoFiles
from attanchor_vlm.errors import BadRow, DataError
from attanchor_vlm.records import read_text

PLACEHOLDER, VIDEO_PLACEHOLDER = "<image>", "<video>"
_PLACES = re.compile(f"({PLACEHOLDER}|{VIDEO_PLACEHOLDER})")
_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_MEDIA = ("image", "images", "video", "videos")
_SHOWN = 10  # bad rows printed in an error; the others are counted


@dataclass(frozen=True)
class Row:
    """A checked conversation.

    Attributes:
        number: Counts the rows of the file from 1.
        messages: (role, text) in turn, user first (or behind a system turn), assistant last, the placeholders still in
            the user's text.
        images, videos: In the order of their placeholders.
    """

    number: int
    messages: tuple[tuple[str, str], ...]
    images: tuple[Any, ...]  # ImageSource; of read_rows, Path
    videos: tuple[Any, ...] = ()  # VideoFiles; of a stream, Video

    @property
    def media(self) -> tuple[Any, ...]:
        return self.images + self.videos


def read_rows(
    file: Path, images: Path | None, skip_bad: bool = False, progress: bool = False, decode: bool = True
) -> tuple[list[Row], list[BadRow]]:
    """Read `file` (a JSON list, or one object a line in a .jsonl) and check every row and every image it names.

    A row is ``{"image": "name.png", "conversations": [{"from": "human", "value": "<image>\n…"}, {"from": "gpt",
    "value": "…"}]}``; `image` may be a list, and is absent in rows of text alone. Rows of TRL's form are
    read as well: ``{"images": […], "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text",
    "text": "…"}]}, …]}``. Either may begin with a "system" turn. Videos stand at ``<video>``: `video` names a file, or
    is the list of the image files of its frames, `videos` is a list of such, and `fps` how many frames a second has.
    Other keys are ignored. Images and videos are looked up under `images`, and images decoded once, in threads.

    Args:
        decode: False leaves it to later to find images that cannot be decoded.

    Returns:
        The good rows, and the bad ones if `skip_bad`.

    Raises:
        DataError: the file cannot be read, or names images and `images` is None; a row is bad (unless `skip_bad`), or
            no good row is left.
    """
    check_folder(images, file)
    rows: list[Row] = []
    bad: list[BadRow] = []
    with tqdm(desc="checking rows", unit="", disable=not progress, leave=False) as bar:  # there while a file is parsed
        found = _load(file, skip_bad)
        if images is None and any(isinstance(raw, dict) and any(raw.get(key) for key in _MEDIA) for raw in found):
            raise DataError(f"{file} names images or videos, and no folder of them is given; give --images")
        bar.reset(len(found))
        for number, raw in enumerate(found, start=1):
            try:
                if isinstance(raw, DataError):
                    raise raw
                rows.append(check_row(number, raw, images))
            except ValueError as error:
                bad.append(BadRow(file, number, str(error)))
            bar.update()
    if decode:
        rows, unreadable = split_readable(file, rows, progress)
        bad += unreadable
    return sorted_out(file, rows, bad, skip_bad)


RowT = TypeVar("RowT", bound=Row)


def sorted_out(file: Path, good: list[RowT], bad: list[BadRow], skip_bad: bool) -> tuple[list[RowT], list[BadRow]]:
    """Good rows and bad ones, these by number."""
    bad = sorted(bad, key=lambda one: one.number)
    if bad and not skip_bad:
        said = f"{len(bad)} of {len(good) + len(bad)} rows are bad: mend them, or leave them out with --skip-bad"
        raise DataError("\n".join([*first_of(bad), said]), bad)
    if not good:
        raise DataError(f"{file} has no usable row" + (f"; {bad[0]}" if bad else ""), bad)
    return good, bad


def check_folder(images: Path | None, file: Path) -> None:
    """Refuse a folder of images that is none."""
    if images is not None and not images.is_dir():
        raise DataError(f"{images} is not a folder; --images should name the folder with the images of {file.name}")


def first_of(bad: list[BadRow]) -> list[str]:
    """Bad rows as lines: the first ones, and how many more there are."""
    return [*map(str, bad[:_SHOWN]), *([f"… and {len(bad) - _SHOWN} more"] if len(bad) > _SHOWN else [])]


def _load(file: Path, skip_bad: bool) -> list[object]:
    """The rows of a file; a line of a .jsonl that is not JSON is an error, or in its place if `skip_bad`."""
    if file.is_dir() or file.suffix == ".parquet":
        raise DataError(
            f"{file} is a {'folder' if file.is_dir() else 'parquet file'}, which is read as a stream; give --stream, "
            "or a .json or .jsonl file"
        )
    text = read_text(file)
    if file.suffix == ".jsonl":
        rows: list[object] = []
        for line, part in lines_of(file, text):
            try:
                rows.append(parse(file, part, line))
            except DataError as error:
                if not skip_bad:
                    raise
                rows.append(error)
        return rows
    return parse_list(file, text)


def check_row(number: int, raw: object, folder: Path | None) -> Row:
    """A row of a file as `read_rows` has it, except that its images are not decoded; they may be ``{"bytes": …}``, as
    parquet has them, and names of files are looked up in `folder`."""
    if not isinstance(raw, dict):
        raise ValueError(f"the row is a {type(raw).__name__}; it should be an object")
    turns = raw.get("conversations")
    turn = _turn
    if turns is None and isinstance(raw.get("messages"), list):
        turns, turn = raw["messages"], _message
    if not isinstance(turns, list) or not turns:
        raise ValueError('"conversations" is missing or empty; it should be a list of turns')
    messages = tuple(turn(index, one) for index, one in enumerate(turns, start=1))
    before = int(messages[0][0] == "system")
    for index, (role, text) in enumerate(messages, start=1):
        if index > before and role != ("user" if (index - before) % 2 else "assistant"):
            raise ValueError(f"turn {index} is by the {role}; turns should alternate, beginning with the user")
        check_characters(f"turn {index}", text)
        if role == "assistant" and not text.strip():
            raise ValueError(f"turn {index}, an answer, is empty")
        if role != "user" and (held := _PLACES.search(text)):
            what = "an answer" if role == "assistant" else "the system's"
            raise ValueError(f"turn {index}, {what}, holds {held.group()}; only questions may")
    if messages[-1][0] != "assistant":
        raise ValueError("the last turn is a question without an answer")
    images, videos = images_of(raw, folder), videos_of(raw, folder)
    for kind, place, own in (("image", PLACEHOLDER, images), ("video", VIDEO_PLACEHOLDER, videos)):
        places = sum(text.count(place) for _, text in messages)
        if places != len(own):
            raise ValueError(
                f"{places} {place} placeholder{'s' * (places != 1)} for {len(own)} {kind}{'s' * (len(own) != 1)}; "
                "there should be one for each"
            )
    return Row(number, messages, images, videos)


def _turn(index: int, turn: object) -> tuple[str, str]:
    if not isinstance(turn, dict) or not isinstance(turn.get("value"), str) or not isinstance(turn.get("from"), str):
        raise ValueError(f'turn {index} should be an object with "from" and "value", both text')
    if turn["from"] not in _SPEAKERS:
        raise ValueError(f'turn {index} is "from" {turn["from"]!r}; it should be "human" or "gpt"')
    return _SPEAKERS[turn["from"]], turn["value"]


def _message(index: int, turn: object) -> tuple[str, str]:
    """A turn of TRL's form; its image parts become placeholders."""
    content = turn.get("content") if isinstance(turn, dict) else None
    if not isinstance(turn, dict) or not isinstance(content, (str, list)):
        raise ValueError(f'turn {index} should be an object with "role" and "content", text or a list of parts')
    role = turn.get("role")
    if not isinstance(role, str) or role not in _SPEAKERS:
        raise ValueError(f'turn {index} has "role" {role!r}; it should be "user", "assistant" or "system"')
    if isinstance(content, str):
        return _SPEAKERS[role], content
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("image", "video"):
            texts.append(PLACEHOLDER if kind == "image" else VIDEO_PLACEHOLDER)
        elif kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        else:
            raise ValueError(f'turn {index} has a part {part!r}; it should be of "type" "text", "image" or "video"')
    return _SPEAKERS[role], "\n".join(texts)


def images_of(raw: dict[str, Any], folder: Path | None) -> tuple[ImageSource, ...]:
    """The images that a row names under `image` or `images`, one or a list."""
    named = raw["image"] if raw.get("image") is not None else raw.get("images")
    if named is None:
        return ()
    several: list[Any] = named if isinstance(named, list) else [named]
    return tuple(_image(one, folder) for one in several)


def videos_of(raw: dict[str, Any], folder: Path | None) -> tuple[VideoFiles, ...]:
    """The videos that a row names: `video`, a file or the list of its frames' image files, or `videos`, several."""
    several = raw.get("videos") if raw.get("video") is None else [raw["video"]]
    if several is None:
        return ()
    fps = FPS if raw.get("fps") is None else raw["fps"]
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < float("inf"):
        raise ValueError(f'"fps" is {fps!r}; it should be a number above 0')
    found = []
    for one in several if isinstance(several, list) else [several]:
        if not (files := one if isinstance(one, list) else [one]):
            raise ValueError('"video" is an empty list; it should be a file, or the image files of its frames')
        found.append(VideoFiles(tuple(_file(name, folder, "video") for name in files), float(fps)))
    return tuple(found)


def _image(named: Any, folder: Path | None) -> ImageSource:
    if isinstance(named, dict):  # as `datasets` writes images: the bytes, or a path, or both
        if isinstance(named.get("bytes"), bytes):
            return named["bytes"]
        named = named.get("path")
    return _file(named, folder, "image")


def _file(named: Any, folder: Path | None, kind: str) -> Path:
    if not isinstance(named, str) or not named:
        raise ValueError(f'"{kind}" is {named!r}; it should be the name of a file')
    check_characters(f'"{kind}"', named)
    if folder is None:
        raise ValueError(f"{kind} {named} is a file, and no folder of images is given (--images)")
    try:
        there = (folder / named).is_file()
    except OSError as error:  # the image itself in place of its name is a name too long
        shown = named if len(named) < 80 else f"{named[:80]}…"
        raise ValueError(f'"{kind}" is {shown!r}; it should be the name of a file ({error.strerror})') from error
    if not there:
        raise ValueError(f"{kind} {folder / named} does not exist")
    return folder / named


def split_readable(file: Path, rows: list[RowT], progress: bool) -> tuple[list[RowT], list[BadRow]]:
    """Rows whose images and videos can be decoded, and those with one that cannot. Their images are files."""
    videos = {video for row in rows for video in row.videos}
    frames = {path for video in videos for path in video.frames}
    reasons: dict[Any, str] = dict(unreadable({path for row in rows for path in row.images} | frames, progress))
    whole = [video for video in videos if not any(path in reasons for path in video.frames)]
    reasons |= {video: reason for video in whole if (reason := video.why_unreadable())}
    good: list[RowT] = []
    bad: list[BadRow] = []
    for row in rows:
        frames_of = (path for video in row.videos for path in video.frames)
        own = [reasons[one] for one in (*row.media, *frames_of) if one in reasons]
        if own:
            bad.append(BadRow(file, row.number, own[0]))
        else:
            good.append(row)
    return good, bad


def split_rows(rows: list[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Training and validation rows. An image is on one side only, so that validation sees no image of the training."""
    if fraction == 0:
        return rows, []
    groups = _rows_by_images(rows)
    keys = list(groups)
    random.Random(seed).shuffle(keys)
    validation: set[int] = set()
    for key in keys:
        if len(validation) >= fraction * len(rows):
            break
        validation.update(row.number for row in groups[key])
    train = [row for row in rows if row.number not in validation]
    if not train or not validation:
        raise DataError(
            f"val_fraction {fraction} of {len(rows)} rows about {len(keys)} images leaves "
            f"{'no row to train on' if not train else 'none to validate on'}; give --val-data or another --val-fraction"
        )
    return train, [row for row in rows if row.number in validation]


def _rows_by_images(rows: list[Row]) -> dict[object, list[Row]]:
    """Rows that share an image, also by way of others, are one group; so is every row without."""
    leader: dict[object, object] = {}

    def find(key: object) -> object:
        while leader.setdefault(key, key) != key:
            leader[key] = leader[leader[key]]
            key = leader[key]
        return key

    for row in rows:
        for one in row.media[1:]:
            leader[find(one)] = find(row.media[0])
    groups: dict[object, list[Row]] = {}
    for row in rows:
        groups.setdefault(find(row.media[0]) if row.media else row.number, []).append(row)
    return groups


class Sample(Row):
    """What the model is given at once: a row up to an answer, of which the last (or every) one is supervised."""


def samples(rows: Iterable[Row], turns: str) -> Iterator[Sample]:
    """One sample for each answer (turns="each"), or one for each row (turns="all").

    "each" is what inference does, where every token of the last question may be copied into the image. In "all", only
    the first question can be: a later one would show the earlier answers what comes next, so the operators forbid it.
    """
    for row in rows:
        first = 2 + len(row.messages) % 2  # behind a system turn
        ends = range(first, len(row.messages) + 1, 2) if turns == "each" else (len(row.messages),)
        for end in ends:
            messages = row.messages[:end]
            images, videos = (
                sum(text.count(place) for _, text in messages) for place in (PLACEHOLDER, VIDEO_PLACEHOLDER)
            )
            yield Sample(row.number, messages, row.images[:images], row.videos[:videos])


def parts(text: str) -> list[dict[str, str]]:
    """A turn's text as the content parts of a chat template: images and videos at their placeholders, stripped text
    between."""
    content: list[dict[str, str]] = []
    for piece in _PLACES.split(text):
        if _PLACES.fullmatch(piece):
            content.append({"type": piece[1:-1]})
        elif piece.strip():
            content.append({"type": "text", "text": piece.strip()})
    return content


def without_places(text: str) -> str:
    """A turn's text without its placeholders."""
    return _PLACES.sub(" ", text)


def load_image(source: ImageSource) -> Image.Image:
    """An RGB image."""
    try:
        return decoded(source)
    except Exception as error:
        name = "inside the row" if isinstance(source, bytes) else f"{source}"
        raise DataError(f"image {name} {why_not(error)}") from error
