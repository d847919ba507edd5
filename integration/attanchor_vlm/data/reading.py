"""Files of rows, as JSON or a row a line, and how what is wrong with them is said."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import DataError


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
    except ValueError as error:
        if not isinstance(found := error.__cause__, json.JSONDecodeError):
            raise DataError(f"{file}, from line {first_line}: {error}") from error
        line = first_line + found.lineno - 1
        several = found.msg == "Extra data" and file.suffix != ".jsonl"
        hint = "; a file with a row a line should be named .jsonl" if several else ""
        raise DataError(f"{file}, line {line}, column {found.colno}: not valid JSON ({found.msg}){hint}") from error


def from_json(text: str | bytes) -> Any:
    """What JSON says, or a ValueError that says what is wrong with it."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON ({error.msg}, column {error.colno})") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 text ({error.reason})") from error
    except (RecursionError, ValueError) as error:  # nested too deep, or a number of thousands of digits
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
