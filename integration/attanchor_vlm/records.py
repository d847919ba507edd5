"""Files written whole or not at all, results as JSON lines, none lost or doubled by a kill, and tables of them; and
outputs that one process at a time writes to."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import secrets
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from io import FileIO
from pathlib import Path
from typing import Any, BinaryIO

from attanchor_vlm.errors import DataError, SetupError

Row = dict[str, Any]
PART = ".attanchor-part-"  # begins the names of what is not whole yet
_locks: set[FileIO] = set()  # that this process holds


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file beside `path`, then rename it over `path`. Keeps the suffix, which tells
    matplotlib and PIL the format."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=PART, suffix=path.suffix, dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(_mode_of_new_files(path.parent))  # mkstemp makes private files
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary folder beside `path`, then rename it to `path`, which is empty or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as temporary:
        made = Path(temporary) / "made"  # its own permissions are those that a user's mkdir gives
        made.mkdir()
        write(made)
        share_files(made)
        made.replace(path)


def share_files(folder: Path) -> None:
    """Let others read what is in `folder` as far as the umask does: safetensors writes files that are private."""
    allowed = _mode_of_new_files(folder)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(path.stat().st_mode | allowed)


def check_parent(path: Path) -> None:
    """Refuse, before any work, a name that nothing could be written under."""
    folder = Path(path).absolute().parent
    while not folder.exists() and not folder.is_symlink():
        folder = folder.parent
    if not folder.is_dir():
        raise ValueError(f"{path} cannot be written: {folder} is not a folder")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise ValueError(f"{path} cannot be written: you may not write into {folder}")


@contextlib.contextmanager
def alone_in(folder: Path, name: str = "") -> Iterator[None]:
    """Hold an output for this process while the block runs; however the process ends, the output is free again. From a
    folder, what killed ones have left unfinished is removed.

    Args:
        folder: The output; made if it is not there.
        name: A file in `folder` that is the output, in place of the whole folder.
    """
    output, lock, is_new = folder / name, folder / f".{name or 'run'}.lock", not folder.exists()
    if not is_new and not folder.is_dir():
        raise SetupError(f"output {folder} is a file; it should be a folder, or not exist")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file, is_held = _open_lock(lock)
        file.seek(0)
        said = file.read().decode(errors="replace")
    except OSError as error:
        raise SetupError(f"output {output} cannot be written to: {error.strerror}") from error
    if is_held:
        file.close()
        raise SetupError(f"output {output} is in use by {said or 'another run'}; wait for it, or take another one")
    if said:
        print(f"output {output} was in use by {said}, which is gone: it is taken over", file=sys.stderr)
    _locks.add(file)
    try:
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        with contextlib.suppress(OSError):  # on a full disk, the lock holds without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}, since {now}".encode())
        for part in () if name else folder.glob(f"{PART}*"):
            shutil.rmtree(part, ignore_errors=True) if part.is_dir() else part.unlink(missing_ok=True)
        yield
    finally:
        if file in _locks:  # a forked process has none
            lock.unlink(missing_ok=True)  # first: as long as it is locked, nobody else has begun
            _locks.discard(file)
            file.close()
            if is_new:
                with contextlib.suppress(OSError):  # it holds something by now
                    folder.rmdir()


def _open_lock(path: Path) -> tuple[FileIO, bool]:
    """The lock's file, locked unless another process holds it, and whether one does."""
    while True:
        file = FileIO(path, "a+")
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return file, True
        except (ImportError, OSError):  # Windows, and file systems that have no locks
            return file, False
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file, False
        file.close()  # whoever held it has deleted it in between


def _close_locks() -> None:
    """A lock is held until every process that was forked from its holder has ended, or has closed it."""
    for file in _locks:
        file.close()
    _locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks)


def read_text(file: Path, what: str = "") -> str:
    """The text of a UTF-8 file, without the mark that some editors put in front; `what` it is begins what is wrong."""
    try:
        return file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 text ({error.reason})"
        raise DataError(f"{what}{file} cannot be read: {reason}") from error


def write_text(path: Path, text: str) -> None:
    """The whole file or nothing."""
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: object) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def markdown_table(heads: Sequence[str], lines: Sequence[Sequence[str]], words: int = 1) -> list[str]:
    """A table as lines of Markdown; the first `words` columns to the left, numbers to the right."""
    rule = [*["---"] * words, *["---:"] * (len(heads) - words)]
    return ["| " + " | ".join(line) + " |" for line in (heads, rule, *lines)]


def append_row(path: Path, row: Row) -> None:
    """Add a row; when this returns, it is on disk. A line that a kill cut short is taken out first."""
    line = json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        _mend_end(file)
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def read_rows(path: Path) -> list[Row]:
    """The rows of a file, without a last line that a kill cut short; none if there is no such file."""
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
            raise SetupError(f"{path}, line {number} is not a row (a JSON object)")
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


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that the umask leaves. To ask for the umask itself is to change it for all threads meanwhile."""
    probe = folder / f"{PART}{secrets.token_hex(8)}"
    try:
        with probe.open("xb") as file:
            return stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    finally:
        probe.unlink(missing_ok=True)
