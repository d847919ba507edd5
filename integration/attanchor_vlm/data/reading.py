"""Files of rows, as JSON or a row a line, and how what is wrong with them is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import DataError


def read_text(file: Path) -> str:
    """The text of a UTF-8 file, without the mark that some editors put in front."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise DataError(f"{file} cannot be read: {reason}") from error


def lines_of(file: Path, text: str) -> Iterator[tuple[int, str]]:
    """Number and text of every line of a .jsonl that is not empty."""
    if text.lstrip().startswith("[") and text.rstrip().endswith("]"):
        raise DataError(f"{file} holds a JSON list; a file of that name should hold a row a line, a .json holds a list")
    lines = enumerate(text.split("\n"), start=1)  # splitlines also cuts inside of texts, at U+2028
    return ((number, line) for number, line in lines if line.strip())


def parse_list(file: Path, text: str) -> list[Any]:
    """The rows of a .json file."""
    whole = parse(file, text, 1)
    if not isinstance(whole, list):
        raise DataError(f"{file} holds a JSON {type(whole).__name__}; it should hold a list of rows")
    return whole


def parse(file: Path, text: str, first_line: int) -> Any:
    """The JSON that a text is, a line of `file` or all of it."""
    try:
        return from_json(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        several = error.msg == "Extra data" and file.suffix != ".jsonl"
        hint = "; a file with a row a line should be named .jsonl" if several else ""
        raise DataError(f"{file}, line {line}, column {error.colno}: not valid JSON ({error.msg}){hint}") from error
    except ValueError as error:
        raise DataError(f"{file}, from line {first_line}: {error}") from error


def from_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        json.JSONDecodeError, UnicodeDecodeError: it is none.
        ValueError: it is nested too deep, or holds a number of thousands of digits.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise
    except (RecursionError, ValueError) as error:
        raise ValueError(f"no JSON that can be read ({error})") from None


def check_characters(name: str, text: str) -> None:
    """Refuse text with half a character in it, as is left where a text was cut: no tokenizer takes it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(
            f"{name} holds half a character, {half!r}, at {error.start}; it should be whole text"
        ) from error
