"""The settings of an attached model."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping

from attanchor_vlm.chat.words import words_to_leave_out
from attanchor_vlm.settings import REQUIRED, check_values, setting

DIRECTIONS = ("text_into_image", "image_into_text")
POSITIONS = ("sequential", "inherit")
ROUTES = ("embeds", "ids")
BACKENDS = ("auto", "reference", "triton", "cuda")
KEEP_BY = ["cells", "salience", "relevance", "pooling"]  # and what `dropping.register_rule` adds
MOST_PAUSES = 4096  # more fit in no context with a prompt, and a damaged file's would fill the memory
PLACEMENTS = ["matched", "random", "front"]  # and what `placements.register_placement` adds


@dataclasses.dataclass(frozen=True)
class AnchorOptions:
    """What to insert, and how: what a user chooses of an `AttAnchorConfig`, and a training run of its own.

    What `keep` leaves depends on the question: a cached prefix or image serves no other one, and tokens dropped for a
    first question are not there for a second.

    Raises:
        TypeError, ValueError: a setting has the wrong type or value.
    """

    tau: float = setting(
        REQUIRED,
        "Cosine threshold: a token is inserted if its best cosine is at least tau; 1 inserts nothing and, without "
        "keep, leaves every call to the untouched model.",
    )
    direction: str = setting(
        "text_into_image",
        "Copies of the question's tokens behind the image tokens that they match, or the reverse.",
        choices=DIRECTIONS,
    )
    positions: str | None = setting(
        None,
        "0, 1, 2, … over the new sequence, or an anchor's host's and all others as before; by default the family's.",
        choices=POSITIONS,
    )
    max_anchors: int | None = setting(None, "At most so many copies a sample, the best-scoring ones.")
    max_anchors_per_frame: int | None = setting(
        None,
        "At most so many copies in, or of, each frame of a video and each image (tiles that are encoded as images of "
        "their own are meant one by one), the best-scoring ones: so that one frame does not take all.",
    )
    keep: int | float | None = setting(
        None,
        "How much of each image stays, a fraction (0.33) or a number of tokens (192); the others are dropped in the "
        "same pass, and prompts get shorter. Tiles that are encoded as images of their own are meant one by one. With "
        "a tau of 1 this is plain token dropping.",
    )
    keep_by: str = setting(
        "cells",
        "Who stays, besides the hosts of anchors. cells: the question's best match in each of as many rectangles of "
        "the image as may stay; salience: what the image encoder's class token attends to most, where it has one; "
        "relevance: the question's best matches; pooling: the mean of each of those rectangles, in place of its tokens "
        "(with a tau above 0).",
        choices=KEEP_BY,
        metavar="RULE",
    )
    placement: str = setting(
        "matched",
        "Where copies of text go. matched is the method; controls are random (behind image tokens drawn for them) and "
        "front (the whole question in front of the first image).",
        choices=PLACEMENTS,
    )
    placement_seed: int = setting(0, "Of what is random: the same prompt gets the same places in every call.")
    route: str | None = setting(
        None,
        "The model gets `inputs_embeds`, or lengthened `input_ids` and the image features; by default the family's.",
        choices=ROUTES,
    )
    backend: str = setting("auto", "Backend of attanchor_kernels.", choices=BACKENDS)
    force_inherit: bool = setting(
        False,
        "Allow positions `inherit` in a family with one position a token, where they are refused otherwise (with keep: "
        "under flash-attention alone).",
    )
    pause_tokens: int = setting(
        0,
        "Think mode of image_into_text: so many pause tokens at the end of every prompt with an image, in front of the "
        "answer; attended to, never learned, never copied.",
    )
    content_words: bool | tuple[str, ...] = setting(
        False, "Leave English function words and punctuation out of the tokens that take part, or these words instead."
    )

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, numbers.Real):
            raise TypeError(f"tau is {type(self.tau).__name__}; it should be a Python number")
        if math.isnan(self.tau):
            raise ValueError("tau is NaN; it should be a cosine threshold, or 1 for no anchors")
        if not math.isfinite(self.tau):
            # JSON has no infinity, and every cosine threshold lies in [-1, 1].
            raise ValueError(f"tau is {self.tau}; it should be finite (-1 inserts every candidate, 1 none)")
        check_values(self)
        for name in ("max_anchors", "max_anchors_per_frame"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _natural(name, getattr(self, name)))
        if self.keep is not None:
            object.__setattr__(self, "keep", _share(self.keep))
        if self.keep is not None and self.keep_by == "pooling" and not self.tau > 0:
            raise ValueError(f"keep_by is 'pooling' with tau {self.tau:g}; it needs a tau above 0")
        object.__setattr__(self, "placement_seed", _natural("placement_seed", self.placement_seed))
        if self.placement != "matched" and self.direction != "text_into_image":
            raise ValueError(
                f"placement is {self.placement!r} with direction {self.direction!r}; only copies of text can be placed"
            )
        if self.placement != "matched" and self.max_anchors_per_frame is not None:
            raise ValueError(
                f"placement is {self.placement!r} with max_anchors_per_frame {self.max_anchors_per_frame}; only copies "
                "at their matches are counted by frame"
            )
        if not isinstance(self.force_inherit, bool):
            raise TypeError(f"force_inherit is {type(self.force_inherit).__name__}; it should be a bool")
        object.__setattr__(self, "pause_tokens", _natural("pause_tokens", self.pause_tokens))
        if self.pause_tokens > MOST_PAUSES:
            raise ValueError(f"pause_tokens is {self.pause_tokens}; it should be at most {MOST_PAUSES}")
        if self.pause_tokens and self.direction != "image_into_text":
            raise ValueError(
                f"pause_tokens is {self.pause_tokens} with direction {self.direction!r}; think mode belongs to "
                "'image_into_text'"
            )
        object.__setattr__(self, "tau", float(self.tau))
        words = words_to_leave_out(self.content_words)
        if not isinstance(self.content_words, bool):
            object.__setattr__(self, "content_words", tuple(sorted(words or ())))


@dataclasses.dataclass(frozen=True)
class AttAnchorConfig(AnchorOptions):
    """What `attach` inserts, and how. Kept in ``model.config.attanchor`` and beside adapters in ``attanchor.json``.

    To the `AnchorOptions` it adds the tokens that only a model's tokenizer knows. Tell `encode_chat` the same
    `content_words`.

    Attributes:
        pause_token_id: The token that pauses, which `pause_tokens` needs; one that means nothing else, such as a
            reserved token of the vocabulary.
        special_token_ids: Tokens that never take part when a call has no `anchor_mask`, besides the BOS, EOS, padding
            and image tokens that the model's config names. `with_tokens_of(config, processor)` fills this and the next.
        generation_prompt_ids: The tokens that the chat template adds for the answer to begin, likewise left out.
        function_token_ids: Those of the words that `content_words` leaves out, for calls without an `anchor_mask`, as
            far as single tokens tell; `with_tokens_of` fills this too.

    Raises:
        TypeError, ValueError: a setting has the wrong type or value.
    """

    pause_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    generation_prompt_ids: tuple[int, ...] = ()
    function_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pause_token_id is not None:
            object.__setattr__(self, "pause_token_id", _natural("pause_token_id", self.pause_token_id))
        elif self.pause_tokens:
            raise ValueError(f"pause_tokens is {self.pause_tokens}, but pause_token_id is not set; name the token")
        for name in ("special_token_ids", "generation_prompt_ids", "function_token_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))

    @property
    def inserts_nothing(self) -> bool:
        """tau >= 1: there are no anchors."""
        return self.tau >= 1

    @property
    def changes_nothing(self) -> bool:
        """Calls are handed through as they are."""
        return self.inserts_nothing and self.keep is None

    def to_dict(self) -> dict[str, object]:
        """The settings as JSON has them."""
        return {
            key: list(value) if isinstance(value, tuple) else value for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, object]) -> AttAnchorConfig:
        """The inverse of `to_dict`.

        Raises:
            TypeError: `settings` is not a mapping.
            ValueError: a key is missing or unknown (written by a later version?), or a value is wrong.
        """
        if not isinstance(settings, Mapping):
            raise TypeError(f"the AttAnchor settings are {type(settings).__name__}; they should be a mapping")
        known = [field.name for field in dataclasses.fields(cls)]
        if unknown := sorted(set(settings) - set(known)):
            raise ValueError(f"the AttAnchor settings hold {unknown}; known are {known}")
        if "tau" not in settings:
            raise ValueError("the AttAnchor settings lack tau")
        return cls(**settings)  # type: ignore[arg-type]


def _natural(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {type(value).__name__}; it should be an int")
    if value < 0:
        raise ValueError(f"{name} is {value}; it should be at least 0")
    return int(value)


def _share(keep: object) -> float:
    """`keep` as an int or a float, which mean a number and a fraction."""
    if isinstance(keep, bool) or not isinstance(keep, numbers.Real):
        raise TypeError(f"keep is {type(keep).__name__}; it should be a fraction, a number of tokens, or None")
    if isinstance(keep, numbers.Integral):
        number = int(keep)
        if number < 1:
            raise ValueError(f"keep is {keep}; it should be a fraction, or at least 1 token of an image")
        return number
    fraction = float(keep)
    if not 0 < fraction <= 1:
        raise ValueError(f"keep is {keep}; a fraction should be above 0 and at most 1 (a number of tokens is an int)")
    return fraction


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"{name} is {type(ids).__name__}; it should be a sequence of token ids")
    ids = tuple(ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise TypeError(f"{name} holds {token!r}; it should hold token ids (int)")
    return tuple(int(token) for token in ids)
