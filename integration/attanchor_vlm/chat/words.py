"""Content words: what is left of a text without function words and punctuation.

A patch of an image can look like "dog" or "red"; it looks like nothing that "of" means. Without a restriction, function
words and punctuation may take most of the anchors, since their embeddings lie close to many features.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attanchor_vlm.records import read_text

_CLASSES = {
    "articles and determiners": """a an the this that these those each every either neither both all any some no none
        another other others such same own enough much many more most less least few several half""",
    "pronouns": """i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself
        she her hers herself it its itself they them their theirs themselves one ones oneself someone somebody something
        anyone anybody anything everyone everybody everything nobody nothing each other""",
    "question and relative words": """who whom whose which what whatever whichever whoever when whenever where wherever
        why how however whether""",
    "be, have, do and the modals": """be am is are was were been being have has had having do does did doing done can
        could may might must shall should will would ought cannot ca wo sha ai""",  # of can't, won't, shan't, ain't
    "prepositions": """about above across after against along alongside amid among amongst around as at atop before
        behind below beneath beside besides between beyond by despite down during except for from in inside into like
        near next of off on onto opposite out outside over past per since through throughout till to toward towards
        under underneath unlike until up upon via with within without""",
    "conjunctions and particles": """and but or nor so yet because although though if unless while whereas than then
        else not only also too just even still already again ever never very quite rather there here please yes""",
}
FUNCTION_WORDS: frozenset[str] = frozenset(word for words in _CLASSES.values() for word in words.split())
"""English function words, in lower case: articles and determiners, pronouns, question words, auxiliaries and modals,
prepositions, conjunctions, and adverbs that only connect or grade. Numbers, colours, "left" and "right" are not among
them."""

# Vowel signs and accents that are characters of their own, and what joins or parts letters within a word: not in \w.
_MARKS = "".join(code for code in map(chr, range(0x300, 0x1F000)) if unicodedata.category(code) in ("Mn", "Mc"))
_WORD = re.compile(rf"\w[\w{_MARKS}\u200c\u200d]*")
# n't, 's, 're, 've, 'll, 'd, 'm behind a word are function words on their own.
_CLITIC = re.compile(r"(?:(?<=n)['’]t|['’](?:s|re|ve|ll|d|m))\b", re.IGNORECASE)


def content_spans(text: str, function_words: Collection[str] = FUNCTION_WORDS) -> list[tuple[int, int]]:
    """Where the content words of a text are, as (start, end) of characters.

    Words are runs of letters and digits; punctuation, symbols and spaces are in no span. In scripts that put no space
    between words, a run is kept as a whole. `function_words`, in lower case, are left out however `text` writes them.
    """
    clitics = [match.span() for match in _CLITIC.finditer(text)]
    spans = []
    for match in _WORD.finditer(text):
        start, end = match.span()
        if any(left < end and start < right for left, right in clitics):
            continue  # the t, s, re … behind an apostrophe
        word = match.group().lower()
        if text[end : end + 2].lower() in ("'t", "’t") and word.endswith("n"):
            word = word[:-1]  # is|n't; the n goes with the word
        if word not in function_words and any(character.isalnum() for character in word):
            spans.append((start, end))
    return spans


def words_to_leave_out(content_words: bool | Collection[str]) -> frozenset[str] | None:
    """The function words that a setting `content_words` means: None for False, the English ones for True."""
    if isinstance(content_words, bool):
        return FUNCTION_WORDS if content_words else None
    if isinstance(content_words, (str, bytes)) or not isinstance(content_words, Collection):
        raise TypeError(
            f"content_words is {type(content_words).__name__}; it should be True, False, or the function words to "
            "leave out, a list of str"
        )
    words = []
    for word in content_words:
        if not isinstance(word, str):
            raise TypeError(f"content_words holds {word!r}; it should hold words (str)")
        if not _WORD.fullmatch(word):
            raise ValueError(f"content_words holds {word!r}; it should hold single words without punctuation")
        words.append(word.lower())
    return frozenset(words)


def read_words(path: Path) -> tuple[str, ...]:
    """A file of function words, one or several a line, ``#`` begins a comment; sorted, in lower case."""
    lines = read_lines(path, "function words")
    words = words_to_leave_out([word for line in lines for word in line.split()])
    if not words:
        raise ValueError(f"function words {path} holds no word; write one a line")
    return tuple(sorted(words))


def read_lines(path: Path, what: str) -> list[str]:
    """The lines of a text file without their comments, which ``#`` begins, and without empty ones."""
    lines = read_text(path, f"{what} ").splitlines()
    return [line for whole in lines if (line := whole.partition("#")[0].strip())]


def special_token_ids(tokenizer: Any) -> list[int]:
    """Ids of all special tokens, sorted: those that the tokenizer has a name for, such as EOS, and those that it only
    knows as special, such as the markers of Llama 3's chats."""
    known = getattr(tokenizer, "added_tokens_decoder", {})
    return sorted({*tokenizer.all_special_ids, *(token for token, added in known.items() if added.special)})


def function_token_ids(tokenizer: Any, function_words: Collection[str]) -> tuple[int, ...]:
    """Token ids that stand for a function word or for punctuation, for when there is no text but ids alone.

    Only what is one token can be told by its id: words of several tokens are missed, and a token that is a function
    word here and the beginning of a longer word elsewhere counts as the word.
    """
    words = sorted(function_words)
    signs = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isalnum()] + list("’‘“”–—…¿¡。，、？！：；")
    # Words behind a space, or with a capital in front; without either, "at" is more often the end of another word.
    contexts = [("x ", form) for word in words for form in (word, word.capitalize())]
    contexts += [(before, word.capitalize()) for word in words if len(word) > 1 for before in ("", "x\n")]
    contexts += [(before, sign) for sign in signs for before in ("", "x", "x ", "x\n")]
    contexts += [("x", space) for space in (" ", "\n", "\n\n", "  ")]
    texts = [f"{before}{form}" + (" x" if form.strip() else "x") for before, form in contexts]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
    found = set()
    for text, (before, form), ids, offsets in zip(
        texts, contexts, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        start, end = len(before), len(before) + len(form)
        tokens = [(token, left, right) for token, (left, right) in zip(ids, offsets, strict=True) if right > left]
        inside = [(token, left, right) for token, left, right in tokens if left < end and right > start]
        if len(inside) == 1:
            token, left, right = inside[0]
            # Nothing but the form and space around it.
            if text[left:right].strip() == form.strip() and left <= start and right >= end:
                found.add(token)
    return tuple(sorted(found - set(special_token_ids(tokenizer))))
