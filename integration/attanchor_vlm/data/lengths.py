"""How long rows are, without an image being decoded, and which are too long for a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from attanchor_vlm.chat.conversation import placeholder_tokens
from attanchor_vlm.chat.encode import encode_chat
from attanchor_vlm.chat.videos import Video
from attanchor_vlm.data.batches import message
from attanchor_vlm.data.images import size_of
from attanchor_vlm.data.rows import Row, RowT, Sample, without_places
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import BadRow


@dataclass(frozen=True)
class Growth:
    """How many tokens a row gets at the most, whatever matches, by anchors and pauses, less those that are dropped:
    nearly so in families that drop from tiles one by one, or keep newlines.

    Attributes:
        budget: Of copies, which are no more than there are movers.
        of_images: Whether image tokens are copied.
        pauses: Pause tokens of a prompt with an image.
        keep: As in `AttAnchorConfig`.
        in_place: Whether tokens keep the positions of the plain prompt, which then has to fit as well.
    """

    budget: int | None = None
    of_images: bool = False
    pauses: int = 0
    keep: int | float | None = None
    in_place: bool = False

    @classmethod
    def of(cls, anchors: Any, pauses: int) -> Growth | None:
        """By an AttAnchorConfig, with so many pause tokens; None for calls that are handed on."""
        if anchors.changes_nothing:
            return None
        budget = anchors.max_anchors if anchors.placement != "front" else None  # the whole question, whatever matches
        if anchors.inserts_nothing:
            budget = 0
        of_images = anchors.direction == "image_into_text"
        return cls(budget, of_images, pauses, anchors.keep, anchors.positions == "inherit")

    def __call__(self, asked: int, media: Sequence[int]) -> int:
        """Of a row with so many tokens of text that take part, and so many in each image and video."""
        every = left = sum(media)
        if not every:
            return 0
        copies = every if self.of_images else asked
        copies = copies if self.budget is None else min(copies, self.budget)
        if self.keep is not None:
            left = sum(
                min(size, self.keep if isinstance(self.keep, int) else round(self.keep * size)) for size in media
            )
            copies = copies if self.of_images else min(copies, left)
        return max(copies + left - every, 0 if self.in_place else -every) + self.pauses


@dataclass(frozen=True)
class Tokens:
    """Of a row: all of them, those of its questions, those of each image and video, and how many more there may be."""

    length: int
    asked: int
    media: list[int]
    slack: int = 0


class RowLengths:
    """Counts the tokens of rows as `encode_chat` makes them, of blank images in the sizes of theirs.

    Args:
        processor: The model's own.
        turns: As `DataConfig.turns`: where a template ends answers with nothing, all that are learned get a token.
    """

    def __init__(self, processor: Any, turns: str = "each"):
        self.processor, self.supervise = processor, "last" if turns == "each" else "all"
        self._alone: dict[tuple[int, ...], int] = {}  # by (height, width), or with the number of frames in front
        self._around: dict[tuple[Any, ...], int] = {}  # the template's own, by roles and numbers of images and videos
        # Only where sizes matter is every file opened for its own.
        self._fixed: int | None = None
        with contextlib.suppress(ValueError):  # a processor that does not take the narrow one has to see every size
            small, *others = [self._of_image((side, width)) for side, width in ((336, 336), (672, 672), (1, 4000))]
            self._fixed = small if others == [small, small] else None

    def near(self, rows: Sequence[Row]) -> Iterator[Tokens | ValueError]:
        """The tokens of each row, without encoding it; or why it is not taken. Too few by no more than `slack`: where
        texts meet the template, and in what is written between frames."""
        texts = (
            [without_places("\n".join(text for role, text in row.messages if role in roles)) for row in rows]
            for roles in (("system", "user", "assistant"), ("user",))
        )
        counts = [
            [len(ids) for ids in self.processor.tokenizer(some, add_special_tokens=False).input_ids] for some in texts
        ]
        for row, length, asked in zip(rows, *counts, strict=True):
            try:
                media = [self._fixed or self._of_image(size_of(image)) for image in row.images]
                videos = [load_video(video, blank=True) for video in row.videos]
                media += [self._of_video(video) for video in videos]
                length += sum(media)
                kind = (*(role for role, _ in row.messages), len(row.images), len(row.videos))
                if kind not in self._around:
                    # Below 0 where a processor takes several images otherwise than each alone.
                    self._around[kind] = max(0, self.exact(row).length - length)
                slack = 4 * (len(row.messages) + len(media) + sum(len(video.frames) for video in videos))
                yield Tokens(length + self._around[kind], asked, media, slack)
            except ValueError as error:
                yield error

    def exact(self, row: Row) -> Tokens:
        """The tokens of a row to the last, but for `media`, which are not told apart."""
        blank = [Image.new("RGB", size_of(image)[::-1]) for image in row.images]
        batch = self._encoded(row.messages, blank, [load_video(video, blank=True) for video in row.videos])
        return Tokens(batch["input_ids"].shape[1], int(batch["anchor_mask"].sum()), [])

    def _of_image(self, size: tuple[int, int]) -> int:
        """Raises a ValueError if the processor does not take an image of this (height, width)."""
        try:
            return int(self.processor._get_num_multimodal_tokens(image_sizes=[list(size)])["num_image_tokens"][0])
        except ValueError as error:  # such as Qwen's for images that are too narrow
            height, width = size
            raise ValueError(f"an image of {width} x {height} pixels is not taken: {error}") from error
        except (AttributeError, KeyError, TypeError):
            if size not in self._alone:
                self._alone[size] = self._added("<image>", [Image.new("RGB", size[::-1])], [])
            return self._alone[size]

    def _of_video(self, blank: Video) -> int:
        size = (len(blank.frames), *blank.frames[0].size)
        if size not in self._alone:
            self._alone[size] = self._added("<video>", [], [blank])
        return self._alone[size]

    def _added(self, place: str, images: list[Any], videos: list[Video]) -> int:
        """Tokens that a question gets by an image or a video."""
        lengths = [
            self._encoded([("user", text)], *media)["input_ids"].shape[1]
            for text, media in ((f"{place}\n?", (images, videos)), ("?", ([], [])))
        ]
        return lengths[0] - lengths[1]

    def _encoded(self, messages: Sequence[tuple[str, str]], images: list[Any], videos: list[Video]) -> dict[str, Any]:
        chat = [message(role, text) for role, text in messages]
        asks = messages[-1][0] == "user"
        return encode_chat(
            self.processor, chat, [images], videos=[videos], supervise=self.supervise, add_generation_prompt=asks
        )


def check_texts(
    file: Path, rows: Sequence[RowT], lengths: RowLengths, context: int | None, growth: Growth | None = None
) -> tuple[list[RowT], list[BadRow]]:
    """Rows that this model can be given, and those that it cannot: with a placeholder of its own in the text, with an
    image or in a form that its processor does not take, or too long for its context.

    What counts is the longest sequence that the language model may be given: all that `encode_chat` makes of a row,
    with every anchor that `growth` allows and without what is dropped. Rows are encoded only where it is close.
    """
    own = placeholder_tokens(lengths.processor)
    good, bad = [], []
    starts, hidden = range(0, len(rows), 1000), True if len(rows) <= 1000 else None  # also where there is no terminal
    for start in tqdm(starts, "checking texts", unit="thousand", delay=2, disable=hidden, leave=False):
        part = rows[start : start + 1000]
        for row, tokens in zip(part, lengths.near(part), strict=True):
            try:
                text = without_places("\n".join(text for _, text in row.messages))
                if held := [token for token in own if token in text]:
                    raise ValueError(f"its text holds {held[0]}, which is a placeholder of this model")
                if isinstance(tokens, ValueError):
                    raise tokens
                if context is not None:
                    _check_length(row, tokens, lengths, context, growth)
                good.append(row)
            except ValueError as error:
                bad.append(BadRow(file, row.number, str(error)))
    return good, bad


def _check_length(row: Row, near: Tokens, lengths: RowLengths, context: int, growth: Growth | None) -> None:
    def grown(tokens: Tokens) -> int:
        return 0 if growth is None else growth(tokens.asked, near.media)

    if near.length + grown(near) + near.slack <= context:
        return
    exact = lengths.exact(row)
    more = grown(exact)
    if exact.length + more <= context:
        return
    of_anchors = f" and up to {more} anchors" if more > 0 and exact.length <= context else ""
    shorter = f", {exact.length + more} of which may be left by keep" if more < 0 else ""
    hint = "; max_anchors bounds them" if of_anchors else ""
    raise ValueError(
        f"{exact.length} tokens with its images{of_anchors}{shorter}, more than the model's context, {context}{hint}"
    )


def sample_lengths(samples: Sequence[Sample], lengths: RowLengths) -> list[int]:
    """Tokens of each sample: near enough to group samples by."""
    found = []
    for start in range(0, len(samples), 1000):
        for tokens in lengths.near(samples[start : start + 1000]):
            if isinstance(tokens, ValueError):
                raise tokens
            found.append(tokens.length)
    return found
