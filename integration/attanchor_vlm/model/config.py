"""The settings of an attached model."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Iterable, Mapping

from attanchor_vlm.chat.words import words_to_leave_out

DIRECTIONS = ("text_into_image", "image_into_text")
POSITIONS = ("sequential", "inherit")
ROUTES = ("embeds", "ids")
BACKENDS = ("auto", "reference", "triton", "cuda")


@dataclasses.dataclass(frozen=True)
class AttAnchorConfig:
    """What `attach` inserts, and how. Kept in ``model.config.attanchor`` and beside adapters in ``attanchor.json``.

    Attributes:
        tau: Cosine threshold: a token is inserted if its best cosine is at least tau. ``tau >= 1`` inserts nothing and
            leaves every call to the untouched model.
        direction: "text_into_image" (copies of the question's tokens behind the image tokens that they match) or
            "image_into_text" (the reverse).
        positions: "sequential" (0, 1, 2, … over the new sequence), "inherit" (an anchor takes its host's position, all
            others keep theirs), or None for the family's default.
        max_anchors: At most so many copies a sample, the best-scoring ones; None for no bound.
        route: "embeds" (the model gets `inputs_embeds`), "ids" (it gets lengthened `input_ids` and the image features),
            or None for the family's default.
        backend: Backend of `attanchor_kernels`: "auto", "reference", "triton" or "cuda".
        force_inherit: Allow "inherit" in a family with one position per token, where it is refused otherwise.
        pause_tokens: Think mode of "image_into_text": so many pause tokens at the end of every prompt with an image, in
            front of the answer; attended to, never learned, never copied.
        pause_token_id: The token that pauses, which `pause_tokens` needs; one that means nothing else, such as a
            reserved token of the vocabulary.
        special_token_ids: Tokens that never take part when a call has no `anchor_mask`, besides the BOS, EOS, padding
            and image tokens that the model's config names. `with_tokens_of(config, processor)` fills this and the next.
        generation_prompt_ids: The tokens that the chat template adds for the answer to begin, likewise left out.
        content_words: True leaves English function words and punctuation out of the tokens that take part
            (`attanchor_vlm.chat.words`); a list of words leaves those out instead. Tell `encode_chat` the same.
        function_token_ids: Their tokens, for calls without an `anchor_mask`, as far as single tokens tell;
            `with_tokens_of` fills this too.

    Raises:
        TypeError, ValueError: a setting has the wrong type or value.
    """

    tau: float
    direction: str = "text_into_image"
    positions: str | None = None
    max_anchors: int | None = None
    route: str | None = None
    backend: str = "auto"
    force_inherit: bool = False
    pause_tokens: int = 0
    pause_token_id: int | None = None
    special_token_ids: tuple[int, ...] = ()
    generation_prompt_ids: tuple[int, ...] = ()
    content_words: bool | tuple[str, ...] = False
    function_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if isinstance(self.tau, bool) or not isinstance(self.tau, numbers.Real):
            raise TypeError(f"tau is {type(self.tau).__name__}; it should be a Python number")
        if math.isnan(self.tau):
            raise ValueError("tau is NaN; it should be a cosine threshold, or 1 for no anchors")
        if not math.isfinite(self.tau):
            # JSON has no infinity, and every cosine threshold lies in [-1, 1].
            raise ValueError(f"tau is {self.tau}; it should be finite (-1 inserts every candidate, 1 none)")
        _one_of("direction", self.direction, DIRECTIONS)
        _one_of("positions", self.positions, (None, *POSITIONS))
        _one_of("route", self.route, (None, *ROUTES))
        _one_of("backend", self.backend, BACKENDS)
        if self.max_anchors is not None:
            if isinstance(self.max_anchors, bool) or not isinstance(self.max_anchors, numbers.Integral):
                raise TypeError(f"max_anchors is {type(self.max_anchors).__name__}; it should be an int or None")
            if self.max_anchors < 0:
                raise ValueError(f"max_anchors is {self.max_anchors}; it should be at least 0")
            object.__setattr__(self, "max_anchors", int(self.max_anchors))
        if not isinstance(self.force_inherit, bool):
            raise TypeError(f"force_inherit is {type(self.force_inherit).__name__}; it should be a bool")
        self._check_pauses()
        object.__setattr__(self, "tau", float(self.tau))
        words = words_to_leave_out(self.content_words)
        if not isinstance(self.content_words, bool):
            object.__setattr__(self, "content_words", tuple(sorted(words or ())))
        for name in ("special_token_ids", "generation_prompt_ids", "function_token_ids"):
            object.__setattr__(self, name, _token_ids(name, getattr(self, name)))

    def _check_pauses(self) -> None:
        for name in ("pause_tokens", "pause_token_id"):
            value = getattr(self, name)
            if value is None and name == "pause_token_id":
                continue
            if isinstance(value, bool) or not isinstance(value, numbers.Integral):
                raise TypeError(f"{name} is {type(value).__name__}; it should be an int")
            if value < 0:
                raise ValueError(f"{name} is {value}; it should be at least 0")
            object.__setattr__(self, name, int(value))
        if not self.pause_tokens:
            return
        if self.pause_token_id is None:
            raise ValueError(f"pause_tokens is {self.pause_tokens}, but pause_token_id is not set; name the token")
        if self.direction != "image_into_text":
            raise ValueError(
                f"pause_tokens is {self.pause_tokens} with direction {self.direction!r}; think mode belongs to "
                "'image_into_text'"
            )

    @property
    def inserts_nothing(self) -> bool:
        """tau >= 1: calls are handed through as they are."""
        return self.tau >= 1

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


def _one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(map(repr, allowed))}")


def _token_ids(name: str, ids: object) -> tuple[int, ...]:
    if isinstance(ids, (str, bytes)) or not isinstance(ids, Iterable):
        raise TypeError(f"{name} is {type(ids).__name__}; it should be a sequence of token ids")
    ids = tuple(ids)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, numbers.Integral):
            raise TypeError(f"{name} holds {token!r}; it should hold token ids (int)")
    return tuple(int(token) for token in ids)
