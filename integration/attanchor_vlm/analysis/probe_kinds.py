"""What kind of word a token belongs to: content, function, or no word at all."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from attanchor_vlm.chat.words import FUNCTION_WORDS, content_spans

CONTENT, FUNCTION, PUNCTUATION = "content", "function", "punctuation"
KINDS = (CONTENT, FUNCTION, PUNCTUATION)


def token_kinds(
    tokenizer: Any, ids: Sequence[int], chosen: Sequence[bool], function_words: Collection[str] = FUNCTION_WORDS
) -> list[str | None]:
    """The kind of every chosen token, None for the others.

    A token of several words (a metaspace tokenizer may have them) counts as content if one of them is; a token without
    a letter or digit is punctuation. Works on decoded text, so that pieces of a word are known for what they are.

    Args:
        tokenizer: Any of transformers.
        ids: Of one sequence.
        chosen: As long as `ids`; runs of True are read as text.
        function_words: In lower case.
    """
    kinds: list[str | None] = [None] * len(ids)
    start = 0
    while start < len(ids):
        end = start
        while end < len(ids) and chosen[end]:
            end += 1
        if end > start:
            kinds[start:end] = _kinds_of_run(tokenizer, list(ids[start:end]), function_words)
        start = max(end, start + 1)
    return kinds


def _kinds_of_run(tokenizer: Any, ids: list[int], function_words: Collection[str]) -> list[str]:
    # Where every token ends in the text, from the text of ever longer beginnings: right for every tokenizer, whatever
    # it does with spaces. Half a character decodes to the replacement sign, and belongs to the token that ends it.
    text = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    ends = [
        len(tokenizer.decode(ids[: n + 1], clean_up_tokenization_spaces=False).rstrip("�")) for n in range(len(ids))
    ]
    spans = content_spans(text, function_words)
    kinds, start = [], 0
    for end in ends:
        if any(first < end and last > start for first, last in spans):
            kinds.append(CONTENT)
        else:
            kinds.append(FUNCTION if any(character.isalnum() for character in text[start:end]) else PUNCTUATION)
        start = max(end, start)
    return kinds
