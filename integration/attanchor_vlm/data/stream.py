"""Data sets larger than memory: rows are read, shuffled and checked as training goes, by every process its own part."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from attanchor_vlm import distributed
from attanchor_vlm.data.reading import from_json
from attanchor_vlm.data.rows import Row, Sample, check_row, load_image, samples
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import BadRow, DataError, SetupError

_SUFFIXES = (".jsonl", ".parquet")
_PARQUET_ROWS = 64  # read at a time; an image may be inside each


def shards_of(data: Path) -> list[Path]:
    """The files of a data set that can be streamed: a .jsonl or .parquet file, or all of them in a folder, sorted."""
    try:
        import datasets  # noqa: F401  the import is the test
    except ImportError as error:
        raise SetupError("--stream needs the package datasets: `pip install datasets`") from error
    if data.is_dir():
        found = sorted(path for path in data.rglob("*") if path.suffix in _SUFFIXES and path.is_file())
        if not found:
            raise DataError(f"{data} holds no .jsonl or .parquet file")
        return found
    if not data.exists():
        raise DataError(f"{data} cannot be read: No such file or directory")
    if data.suffix not in _SUFFIXES:
        raise DataError(
            f"{data} cannot be read as a stream; it should be a .jsonl file (one row a line), a .parquet file, or a "
            "folder of such"
        )
    return [data]


def check_first_rows(files: Sequence[Path], images: Path | None, skip_bad: bool) -> None:
    """Look at the first row of every shard, so that a wrong format or folder shows before a model is loaded."""
    for file in files:
        _, first = next(_read([str(file)]), (None, None))
        if first is None:
            raise DataError(f"{file} has no row")
        try:
            check_row(first["row"], _parsed(first), images)
        except ValueError as error:
            if not skip_bad:
                bad = BadRow(file, first["row"], str(error))
                raise DataError(f"{bad}\nmend the row, or leave bad rows out with --skip-bad", [bad]) from error


@dataclasses.dataclass(eq=False)
class SampleStream(IterableDataset):
    """Samples of this process's part of the rows, without end: pass after pass, each in another order.

    With a number of shards that the processes divide evenly, each reads its own shards; otherwise each reads all of
    them and keeps every n-th row. Within a process the loader's workers share the shards. Bad rows are left out and
    listed in `listed`, a line each, or the first ends the run.

    The order is a function of the seed. `taken`, batches that this process has had, makes a resumed run go on behind
    them: the rows up to there are read again, but not tokenized and without their images.

    Attributes:
        files: From `shards_of`.
        images: Folder of the images, or None if they are inside the rows.
        turns: "each" or "all", as in `samples`.
        refuse: Why a row cannot be used, or None.
        skip_bad: Leave bad rows out.
        listed: The .jsonl file that they are listed in.
        seed, buffer_size: Of the shuffling: rows are drawn from a buffer of so many.
        batch_size: Of the loader.
        passes: After so many it ends.
    """

    files: Sequence[Path]
    images: Path | None
    turns: str
    refuse: Callable[[Path, Row], str | None]
    skip_bad: bool
    listed: Path
    seed: int
    buffer_size: int
    batch_size: int
    taken: int = 0
    passes: int | None = None

    def from_start(self, passes: int | None = None) -> SampleStream:
        """The same stream from its first row, for another reader; ending after some passes, if that is said."""
        return dataclasses.replace(self, taken=0, passes=passes)

    @property
    def shards_here(self) -> int:
        """Shards that this process reads: more workers than that would have nothing to do."""
        world = distributed.world_size()
        return len(self.files) // world if len(self.files) % world == 0 else len(self.files)

    def __iter__(self) -> Iterator[Sample]:
        worker = get_worker_info()
        # The loader takes a batch from each worker in turn; those of a round that was not finished it drops.
        ahead = self.taken // (1 if worker is None else worker.num_workers) * self.batch_size
        bad = {(one["file"], one["row"]) for one in read_listed(self.listed)}
        rows = self._rows()
        for epoch in itertools.count() if self.passes is None else range(self.passes):
            rows.set_epoch(epoch)
            used = False
            for entry in rows:
                where = (entry["file"], entry["row"])
                if where in bad:
                    continue
                try:
                    row = check_row(entry["row"], _parsed(entry), self.images)
                    count = sum(1 for _ in samples([row], self.turns))
                    if count <= ahead:
                        ahead, used = ahead - count, True
                        continue
                    row = self._whole(Path(entry["file"]), row)
                except ValueError as error:
                    bad.add(where)
                    self._leave_out(BadRow(Path(entry["file"]), entry["row"], str(error)))
                    continue
                used = True
                yield from itertools.islice(samples([row], self.turns), ahead, None)
                ahead = 0
            if not used:
                raise DataError(
                    f"{self.files[0].parent if len(self.files) > 1 else self.files[0]} has no usable row for process "
                    f"{distributed.rank()}" + (f"; the bad ones are listed in {self.listed}" if bad else "")
                )

    def _rows(self) -> Any:
        from datasets import IterableDataset as Rows
        from datasets.distributed import split_dataset_by_node
        from datasets.iterable_dataset import ExamplesIterable

        # What `from_generator` makes, but that locks a file in the user's cache first, for which processes and workers
        # were seen to wait for seconds, and which not every machine lets them write.
        rows = Rows(ExamplesIterable(_read, {"files": [str(file) for file in self.files]}))
        rows = rows.shuffle(seed=self.seed, buffer_size=self.buffer_size)
        return split_dataset_by_node(rows, rank=distributed.rank(), world_size=distributed.world_size())

    def _whole(self, file: Path, row: Row) -> Row:
        """The row with its images and videos decoded, or a ValueError."""
        if reason := self.refuse(file, row):
            raise ValueError(reason)
        images, videos = tuple(map(load_image, row.images)), tuple(map(load_video, row.videos))
        return dataclasses.replace(row, images=images, videos=videos)

    def _leave_out(self, bad: BadRow) -> None:
        if not self.skip_bad:
            raise DataError(f"{bad}\nmend the row, or leave bad rows out with --skip-bad", [bad])
        line = json.dumps({"file": str(bad.file), "row": bad.number, "reason": bad.reason}, ensure_ascii=False) + "\n"
        handle = os.open(self.listed, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            os.write(handle, line.encode())  # whole lines, whichever process writes
        finally:
            os.close(handle)


class StreamLoader(DataLoader):
    """A loader of a `SampleStream` that begins behind the batches that were taken."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        stream: Any = self.dataset
        return itertools.islice(super().__iter__(), stream.taken % max(self.num_workers, 1), None)


def read_listed(path: Path) -> list[dict[str, Any]]:
    """The bad rows that were listed, each once."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except FileNotFoundError:
        return []
    found = {}
    for line in lines:
        try:
            one = json.loads(line)
        except ValueError:
            continue  # cut short when the run was killed: the row is found again
        found[one["file"], one["row"]] = one
    return list(found.values())


def _parsed(entry: dict[str, Any]) -> Any:
    return entry["value"] if entry["line"] is None else from_json(entry["line"])


def _read(files: list[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The rows of shards, each with a key; not parsed yet where they are lines, whose buffer is smaller."""
    for file in files:
        rows = _read_parquet(file) if file.endswith(".parquet") else _read_lines(file)
        try:
            for number, (line, value) in enumerate(rows, start=1):
                yield f"{file}:{number}", {"file": file, "row": number, "line": line, "value": value}
        except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
            if isinstance(error, DataError):
                raise
            reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error).splitlines()[0]
            raise DataError(f"{file} cannot be read: {reason}") from error


def _read_lines(file: str) -> Iterator[tuple[bytes, None]]:
    with open(file, "rb") as lines:
        for line in lines:
            if line.strip():
                yield line, None


def _read_parquet(file: str) -> Iterator[tuple[None, Any]]:
    from pyarrow import parquet

    with parquet.ParquetFile(file) as table:
        for batch in table.iter_batches(batch_size=_PARQUET_ROWS):
            for row in batch.to_pylist():
                yield None, row
