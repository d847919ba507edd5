"""Which tokens of a chat are the user's text, and which the assistant's: from the chat template, by sentinels.

The template is rendered twice, plainly and with private-use characters around the texts of the conversation. What is
between two of them is that text, wherever the template puts it; the tokenizer's offsets turn characters into tokens. No
token is counted and no marker is searched for, so it holds for every template that leaves texts as they are; one that
does not is refused.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from jinja2 import TemplateError
from torch import Tensor

from attanchor_vlm.chat import paligemma
from attanchor_vlm.chat.conversation import Message, batched, checked, media_of, texts_of, with_texts
from attanchor_vlm.chat.videos import processor_arguments
from attanchor_vlm.chat.words import content_spans, special_token_ids, words_to_leave_out
from attanchor_vlm.constants import IGNORE_INDEX
from attanchor_vlm.settings import check_one_of

_PRIVATE_USE = range(0xE000, 0xF900)


class _Span(NamedTuple):
    """Characters start to end of a rendering, the text of message `message`."""

    message: int
    role: str
    start: int
    end: int


def split_turns(messages: Sequence[Message]) -> list[list[Message]]:
    """One training sample for each assistant message: everything up to and including it.

    Train them with ``encode_chat(…, supervise="last")``: every turn then gets its anchors in the images, as when the
    model is asked, and no answer sees a later question.
    """
    return [list(messages[: end + 1]) for end, message in enumerate(messages) if message["role"] == "assistant"]


def encode_chat(
    processor: Any,
    conversations: Sequence[Message] | Sequence[Sequence[Message]],
    images: Sequence[Any] | None = None,
    *,
    videos: Sequence[Any] | None = None,
    add_generation_prompt: bool = False,
    supervise: str = "all",
    anchors: str = "all",
    content_words: bool | Collection[str] = False,
    padding_side: str | None = None,
    template_options: Mapping[str, Any] | None = None,
) -> dict[str, Tensor]:
    """Tokenize conversations with their images, and mark the tokens that may be copied and those that are learned.

    PaliGemma has no chats: there, a conversation is one question and its answer, put together as it was trained.

    Args:
        processor: A processor, or a tokenizer if there are no images; with a chat template and a fast tokenizer.
        conversations: A list of messages ``{"role": …, "content": …}`` or a list of such lists. Content is a string or
            a list of ``{"type": "text", "text": …}``, ``{"type": "image"}`` and ``{"type": "video"}``.
        images: A list of each conversation's images in order; of one conversation also its images themselves. None
            takes them from the image parts, ``{"type": "image", "image": …}``.
        videos: The same of videos, each a `Video`; the times of frames that a processor writes are no user's text.
        add_generation_prompt: For inference: end with what makes the assistant answer; no labels.
        supervise: The assistant messages that are learned, "all" or "last".
        anchors: The user messages whose text may be copied, "all" or "last".
        content_words: True leaves English function words and punctuation out of what may be copied; a collection of
            words leaves those and punctuation out instead. Give what `AttAnchorConfig.content_words` has.
        padding_side: Default: left with `add_generation_prompt`, otherwise right.
        template_options: Further variables for the template.

    Returns:
        What the processor returns, `input_ids` (B, S), `attention_mask` (B, S) … and the images' tensors, without a
        limit of length; with `anchor_mask`, (B, S) bool, the user's text less special tokens, or the tokens that hold a
        part of its content words; and `labels`, (B, S) int64, -100 except at the answers and what ends them. A template
        that ends an answer with nothing gets the EOS token there, as a model must learn to stop.

    Raises:
        TypeError, ValueError: naming the conversation and the message; also a template that changes texts or is
            missing, and a tokenizer without offsets.
    """
    check_one_of("supervise", supervise, ("all", "last"))
    check_one_of("anchors", anchors, ("all", "last"))
    check_one_of("padding_side", padding_side, (None, "left", "right"))
    left_out = words_to_leave_out(content_words)
    check_processor(processor)
    tokenizer = getattr(processor, "tokenizer", processor)
    batch, *media = batched(conversations, images, videos)
    batch = [checked(messages, index, processor) for index, messages in enumerate(batch)]
    images, videos = (media_of(kind, batch, own) for kind, own in zip(("image", "video"), media, strict=True))

    side = padding_side or ("left" if add_generation_prompt else "right")

    def spans_of(text: str) -> list[tuple[int, int]]:
        return [(0, len(text))] if left_out is None else content_spans(text, left_out)

    if paligemma.is_paligemma(processor):
        return paligemma.encode(processor, batch, images, spans_of, add_generation_prompt, side)

    options = {**(template_options or {}), "add_generation_prompt": add_generation_prompt}
    texts, spans = [], []
    for index, messages in enumerate(batch):
        template = _Template(processor, options, index)
        messages = _as_the_template_has_them(template, messages)
        if not add_generation_prompt:
            messages = _with_end_of_turn(template, tokenizer, messages, supervise)
        text, found = template.locate(messages)
        texts.append(text)
        spans.append((template, messages, found))

    encoded, offsets, replacements = _tokenize(processor, tokenizer, texts, images, videos, side)
    anchor_mask = torch.zeros(encoded["input_ids"].shape, dtype=torch.bool)
    answer_mask = torch.zeros_like(anchor_mask)
    for row, (template, messages, found) in enumerate(spans):
        users = [span for span in found if span.role == "user"]
        answers = [span for span in found if span.role == "assistant"]
        last_user = max((span.message for span in users), default=None)
        last_answer = max((span.message for span in answers), default=None)
        for span in users:
            if anchors == "all" or span.message == last_user:
                for start, end in spans_of(texts[row][span.start : span.end]):
                    part = span._replace(start=span.start + start, end=span.start + end)
                    anchor_mask[row] |= _tokens_in(part, offsets[row], replacements[row])
        # An answer that is not learned is still no user's text: a token that reaches into it is no anchor.
        whole_offsets = _with_spaces(offsets[row])
        for span in answers:
            tokens = _tokens_in(span, whole_offsets, replacements[row])
            anchor_mask[row] &= ~tokens
            if add_generation_prompt or (supervise == "last" and span.message != last_answer):
                continue
            whole = span
            if span is answers[-1] or span.message != answers[answers.index(span) + 1].message:  # its last part
                tail = _end_of_turn(template, messages, span.message, texts[row][span.end :])
                whole = span._replace(end=span.end + len(tail.rstrip()))
            tokens = _tokens_in(whole, whole_offsets, replacements[row])
            if whole.end > whole.start and not tokens.any():
                raise ValueError(f"conversation {row}, message {span.message}: the answer has no token of its own")
            answer_mask[row] |= tokens
    special = torch.tensor(special_token_ids(tokenizer), dtype=torch.int64)
    encoded["anchor_mask"] = anchor_mask & ~answer_mask & ~torch.isin(encoded["input_ids"], special)
    if not add_generation_prompt:
        encoded["labels"] = encoded["input_ids"].masked_fill(~answer_mask, IGNORE_INDEX)
    return encoded


def check_processor(processor: Any) -> None:
    """Refuse what `encode_chat` cannot do anything with, before there is a conversation."""
    tokenizer = getattr(processor, "tokenizer", processor)
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"{type(tokenizer).__name__} has no offsets; encode_chat needs a fast tokenizer")
    has_template = getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
    if not has_template and not paligemma.is_paligemma(processor):
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so it is not known how this model is asked; take the "
            "instruction-tuned checkpoint, or put its template into the model's folder as chat_template.jinja"
        )


# --- The template. ---------------------------------------------------------------------------------------------------


class _Template:
    """The chat template over one conversation. What is asked of the same texts again is known: rendering is slow."""

    def __init__(self, processor: Any, options: Mapping[str, Any], index: int) -> None:
        self._processor, self._options, self._index = processor, options, index
        self._located: dict[Any, tuple[str, list[_Span]]] = {}

    def render(self, messages: Sequence[Message]) -> str:
        try:
            return self._processor.apply_chat_template(list(messages), tokenize=False, **self._options)
        except TemplateError as error:  # also what a template's sandbox forbids
            name = type(self._processor).__name__
            raise ValueError(f"the chat template of {name} cannot be rendered: {error}") from error

    def locate(self, messages: Sequence[Message]) -> tuple[str, list[_Span]]:
        """The rendering, and where in it the texts of users and assistants are."""
        key = tuple(tuple(texts_of(message["content"])) for message in messages)
        if key not in self._located:
            self._located[key] = self._locate(messages)
        return self._located[key]

    def _locate(self, messages: Sequence[Message]) -> tuple[str, list[_Span]]:
        plain = self.render(messages)
        said = plain + "".join(text for message in messages for text in texts_of(message["content"]))
        signs = list(itertools.islice((sign for sign in map(chr, _PRIVATE_USE) if sign not in said), 2))
        if len(signs) < 2:
            raise ValueError(
                f"conversation {self._index}: its texts hold every private-use character; leave two of them out"
            )
        opening, closing = signs
        order: list[tuple[int, str]] = []

        def mark(number: int, role: str, text: str) -> str:
            if role not in ("user", "assistant"):
                return text
            order.append((number, role))
            return f"{opening}{text}{closing}"

        marked = self.render(with_texts(messages, mark))
        found = list(re.finditer(f"{opening}[^{opening}{closing}]*{closing}", marked))
        spans = [  # less the sentinels in front, and its own
            _Span(number, role, match.start() - 2 * before, match.end() - 2 * before - 2)
            for before, ((number, role), match) in enumerate(zip(order, found, strict=False))
        ]
        texts = [text for m in messages if m["role"] in ("user", "assistant") for text in texts_of(m["content"])]
        unchanged = marked.replace(opening, "").replace(closing, "") == plain and marked.count(opening) == len(order)
        if not unchanged or [plain[span.start : span.end] for span in spans] != texts:
            raise ValueError(
                f"conversation {self._index}: the chat template changes the texts of messages, so they cannot be found "
                "again in its output; strip spaces around texts, or use another template"
            )
        return plain, spans


def _as_the_template_has_them(template: _Template, messages: list[Message]) -> list[Message]:
    """The messages without the space around their texts, where the template (Gemma's, Llama 3's) takes it away."""
    if all(text == text.strip() for message in messages for text in texts_of(message["content"])):
        return messages
    stripped = with_texts(messages, lambda number, role, text: text.strip())
    return stripped if template.render(stripped) == template.render(messages) else messages


def _end_of_turn(template: _Template, messages: Sequence[Message], number: int, following: str) -> str:
    """What the template itself puts behind the text of message `number`, as far as the whole rendering has it too."""
    until, spans = template.locate(messages[: number + 1])
    both = zip(until[spans[-1].end :], following, strict=False)
    return "".join(own for own, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], both))


def _with_end_of_turn(template: _Template, tokenizer: Any, messages: list[Message], supervise: str) -> list[Message]:
    """Append the EOS token to the answers that are learned, where the template ends them with nothing but spaces."""
    if tokenizer.eos_token is None:
        return messages
    text, spans = template.locate(messages)
    ends = {span.message: span.end for span in spans if span.role == "assistant"}
    learned = list(ends) if supervise == "all" else list(ends)[-1:]
    bare = {n for n in learned if not _end_of_turn(template, messages, n, text[ends[n] :]).strip()}

    last_part = {n: len(texts_of(messages[n]["content"])) for n in bare}
    seen: dict[int, int] = {}

    def end(number: int, role: str, text: str) -> str:
        seen[number] = seen.get(number, 0) + 1
        if number in bare and seen[number] == last_part[number] and not text.endswith(tokenizer.eos_token):
            return text + tokenizer.eos_token
        return text

    return with_texts(messages, end) if bare else messages


# --- The tokenizer. --------------------------------------------------------------------------------------------------


def _tokenize(
    processor: Any,
    tokenizer: Any,
    texts: list[str],
    images: list[list[Any]],
    videos: list[list[Any]],
    padding_side: str,
) -> tuple[dict[str, Tensor], Tensor, list[list[Mapping[str, Any]]]]:
    """The processor's tensors, (B, S, 2) character offsets, and for each text how image placeholders grew in it."""
    options: dict[str, Any] = {
        "return_offsets_mapping": True,
        "return_tensors": "pt",
        "padding": True,
        "padding_side": padding_side,
        "truncation": False,
    }
    if tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token):
        options["add_special_tokens"] = False
    if processor is tokenizer:
        if any(images) or any(videos):
            raise ValueError("the conversations have images, but processor is a tokenizer; it should be a processor")
        encoded = dict(tokenizer(texts, **options))
        return _without_extras(encoded), encoded["offset_mapping"], [[] for _ in texts]

    given = images if any(images) else None
    options |= processor_arguments([video for own in videos for video in own])
    try:
        encoded = dict(processor(text=texts, images=given, return_text_replacement_offsets=True, **options))
    except ValueError as error:  # such as Qwen's for images that are too narrow
        raise ValueError(f"{type(processor).__name__} does not take these images or texts: {error}") from error
    replacements = encoded.get("text_replacement_offsets")
    if replacements is None and not any(images) and not any(videos):
        replacements = []  # Idefics3's processor says nothing where nothing grows
    if replacements is None:
        raise ValueError(
            f"{type(processor).__name__} does not say how image placeholders grow (return_text_replacement_offsets): "
            "characters cannot be mapped to tokens"
        )
    return _without_extras(encoded), encoded["offset_mapping"], list(replacements) or [[] for _ in texts]


def _without_extras(encoded: Mapping[str, Any]) -> dict[str, Tensor]:
    extras = ("offset_mapping", "text_replacement_offsets", "video_metadata")
    return {name: value for name, value in encoded.items() if name not in extras}


def _with_spaces(offsets: Tensor) -> Tensor:
    """(S, 2) offsets in which a token of space alone has its space again: from the end of the token before it.

    Byte-level tokenizers that trim offsets give it no width (it ends where its space ends), and an answer would be
    learned with holes. Padding and special tokens that were added keep theirs, 0 to 0.
    """
    begin, end = offsets.unbind(-1)
    before = torch.cat([end.new_zeros(1), end.cummax(0).values[:-1]])
    return torch.stack([torch.where((begin == end) & (end > 0), before, begin), end], dim=-1)


def _tokens_in(span: _Span, offsets: Tensor, replacements: list[Mapping[str, Any]]) -> Tensor:
    """(S,) bool: the tokens that overlap a span. Tokens of no width (padding, BOS) never do."""
    ends = [replacement["span"][1] for replacement in replacements]
    grown = [0, *(replacement["new_span"][1] - replacement["span"][1] for replacement in replacements)]
    start, end = (place + grown[bisect.bisect_right(ends, place)] for place in (span.start, span.end))
    return (offsets[:, 0] < end) & (offsets[:, 1] > start) & (offsets[:, 0] < offsets[:, 1])
