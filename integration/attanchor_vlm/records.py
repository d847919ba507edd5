"""Files written whole or not at all, results as JSON lines, none lost or doubled by a kill, and tables of them."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it over `path`. Keeps the suffix, which tells
    matplotlib and PIL the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.stem}-", suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())  # mkstemp makes private files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def check_parent(path: Path) -> None:
    """Refuse, before any work, a name that nothing could be written under.

    Raises:
        ValueError: a part of the path in front of the last is a file, or may not be written into.
    """
    folder = Path(path).absolute().parent
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: you may not write into {folder}")


def write_json(path: Path, value: object) -> None:
    text = json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """A table as lines of Markdown; the first `words` columns to the left, numbers to the right."""
    rule = [*["---"] * words, *["---:"] * (len(heads) - words)]
    return ["| " + " | ".join(line) + " |" for line in (heads, rule, *lines)]


def append_row(path: Path, row: Row) -> None:
    """Add a row; when this returns, it is on disk. A line that a kill cut short is taken out first.

    Raises:
        ValueError: the row holds a number that JSON has no form for (NaN or infinite).
    """
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _mend_end(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, without a last line that a kill cut short; none if there is no such file.

    Raises:
        ValueError: a line is no JSON object, naming file and line.
    """
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        row = _parsed(line)
        if row is not None:
            rows.append(row)
        elif number < len(lines) or not line.startswith("{"):
            raise ValueError(f"{path}, line {number} is not a row (a JSON object)")
    return rows


def _mend_end(file: BinaryIO) -> None:
    file.seek(0)
    whole = file.read()
    last = whole[whole.rfind(b"\n") + 1 :]
    if not last:
        return
    if _parsed(last.decode(errors="replace")) is None:
        file.truncate(len(whole) - len(last))
    else:
        file.write(b"\n")


def _parsed(line: str) -> Row | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
