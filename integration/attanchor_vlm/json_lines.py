"""Results as JSON lines: one object a line, each on disk when `append` returns, none lost or doubled by a kill."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO

Row = dict[str, Any]


def append(path: Path, row: Row) -> None:
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


def read(path: Path) -> list[Row]:
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
