"""The data of a run: read, checked and cut into samples, in memory or as a stream."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from attanchor_vlm import distributed
from attanchor_vlm.constants import context_of
from attanchor_vlm.data.config import DataConfig
from attanchor_vlm.data.lengths import Growth, RowLengths, check_texts, sample_lengths
from attanchor_vlm.data.rows import Row, Sample, check_folder, first_of, load_image, read_rows, samples, split_rows
from attanchor_vlm.data.stream import SampleStream, check_first_rows, read_listed, shards_of
from attanchor_vlm.errors import BadRow, DataError
from attanchor_vlm.records import write_json

SKIPPED_FILE, STREAM_SKIPPED_FILE = "skipped.json", "skipped.jsonl"
_NO_IMAGE = "it has no image, and with fsdp every batch needs one on every GPU"


@dataclass
class Read:
    """Checked rows; of a stream, its files instead of training rows."""

    train: list[Row]
    val: list[Row]
    bad: list[BadRow]
    files: list[Path]


@dataclass
class TrainData:
    """What a run is trained and validated on; `lengths` are those of the training samples, where they are asked for."""

    train: list[Sample] | SampleStream
    val: list[Sample]
    bad: list[BadRow]
    lengths: list[int] | None = None

    @property
    def count(self) -> int:
        """Training samples; 0 of a stream, which has no length."""
        return 0 if isinstance(self.train, SampleStream) else len(self.train)

    @property
    def may_have_images(self) -> bool:
        """Whether any sample has one, as far as is known."""
        return isinstance(self.train, SampleStream) or any(sample.media for sample in self.train)

    @property
    def may_lack_images(self) -> bool:
        """Whether a batch may have no image, so that a process has nothing for the projector."""
        return isinstance(self.train, SampleStream) or not all(sample.media for sample in self.train)


def read(config: DataConfig, progress: bool) -> Read:
    """Everything about the data that can be wrong without a model. The first process reads and checks for all."""
    return distributed.on_main(lambda: _read(config, progress))


def _read(config: DataConfig, progress: bool) -> Read:
    rows: list[Row] = []
    val: list[Row] = []
    bad: list[BadRow] = []
    val_bad: list[BadRow] = []
    files: list[Path] = []
    if config.stream:
        files = shards_of(config.data)
        check_folder(config.images, config.data)
        check_first_rows(files, config.images, config.skip_bad)
    else:
        rows, bad = read_rows(config.data, config.images, config.skip_bad, progress)
    if config.val_data is not None:
        val, val_bad = read_rows(config.val_data, config.images, config.skip_bad, progress)
    elif rows:
        rows, val = split_rows(rows, config.held_out, config.seed)
    return Read(rows, val, bad + val_bad, files)


def make(
    found: Read,
    config: DataConfig,
    processor: Any,
    model: Any,
    say: Callable[[str], None],
    batch_size: int,
    needs_images: bool = False,
    growth: Growth | None = None,
) -> TrainData:
    """Samples of what was read, less the rows that this model cannot be given.

    Args:
        batch_size: Of the loader, by which a stream counts what was taken of it.
        needs_images: Whether every row needs an image.
        growth: How many tokens anchors add to a row; None for none.
    """
    row_lengths = RowLengths(processor, config.turns)
    refuse = RowFilter(row_lengths, context_of(model.config), needs_images, growth)
    train, train_bad = refuse.split(config.data, found.train)
    val, val_bad = refuse.split(config.val_data or config.data, found.val)
    bad = found.bad + train_bad + val_bad
    distributed.on_main(lambda: _refuse_or_list(bad, train, config, say))
    val_set = list(samples(val, config.turns))
    if config.stream:
        stream = SampleStream(
            found.files,
            config.images,
            config.turns,
            refuse,
            config.skip_bad,
            config.output / STREAM_SKIPPED_FILE,
            config.seed,
            config.shuffle_buffer,
            batch_size,
        )
        return TrainData(stream, val_set, bad)
    train_set = list(samples(train, config.turns))
    lengths = None
    if config.group_by_length:
        lengths = distributed.on_main(lambda: sample_lengths(train_set, row_lengths))
    return TrainData(train_set, val_set, bad, lengths)


@dataclass
class RowFilter:
    """Why a model cannot be given a row: its text, or that it has no image where every row needs one."""

    lengths: RowLengths
    context: int | None
    needs_image: bool
    growth: Growth | None = None

    def split(self, file: Path, rows: list[Row]) -> tuple[list[Row], list[BadRow]]:
        """The rows that can be used, and those that cannot."""
        good, bad = check_texts(file, rows, self.lengths, self.context, self.growth)
        if self.needs_image:
            bad += [BadRow(file, row.number, _NO_IMAGE) for row in good if not row.media]
            good = [row for row in good if row.media]
        return good, bad

    def __call__(self, file: Path, row: Row) -> str | None:
        bad = self.split(file, [row])[1]
        return bad[0].reason if bad else None


def _refuse_or_list(bad: list[BadRow], rows: list[Row], config: DataConfig, say: Callable[[str], None]) -> None:
    if not bad:
        return
    if not config.skip_bad:
        said = f"{len(bad)} bad rows: mend them, or leave them out with --skip-bad"
        raise DataError("\n".join([*first_of(bad), said]), bad)
    if not rows and not config.stream:
        raise DataError(f"{config.data} has no usable row; {bad[0]}", bad)
    path = config.output / SKIPPED_FILE
    write_json(path, [{"file": str(one.file), "row": one.number, "reason": one.reason} for one in bad])
    say(f"{len(bad)} bad rows left out, listed in {path}:")
    for line in first_of(bad):
        say(f"  {line}")


def skipped(data: TrainData, config: DataConfig) -> int:
    """Bad rows left out so far; of a stream, in the passes and parts of passes that were read."""
    listed = read_listed(config.output / STREAM_SKIPPED_FILE) if config.stream else []
    return len(data.bad) + len(listed)


def calibration_samples(data: TrainData, count: int, seed: int) -> tuple[Iterable[Sample], bool]:
    """Training samples with images to measure tau on, the same ones every time; and whether they are this process's
    own part."""
    if not isinstance(data.train, SampleStream):
        with_image = [sample for sample in data.train if sample.images]
        return random.Random(seed).sample(with_image, min(count, len(with_image))), False
    count = -(-count // distributed.world_size())
    stream = data.train.from_start()
    # Rows of text alone go by, but not without end.
    return islice((sample for sample in islice(stream, 100 * count) if sample.images), count), True


def some_samples(data: Path, images: Path | None, count: int, seed: int = 0, skip_bad: bool = False) -> list[Sample]:
    """`count` samples with images, or all if there are fewer: to measure on. Only their images are decoded.

    Args:
        data: As `DataConfig.data`; shards are read from their beginning.

    Raises:
        DataError: the data cannot be read, or (unless `skip_bad`) one of its rows is bad.
    """
    if data.is_dir() or data.suffix == ".parquet":
        check_folder(images, data)
        with tempfile.TemporaryDirectory() as folder:
            listed = Path(folder) / STREAM_SKIPPED_FILE
            stream = SampleStream(shards_of(data), images, "each", accept_all, skip_bad, listed, seed, 10 * count, 1)
            return list(islice((sample for sample in stream.from_start(passes=1) if sample.images), count))
    rows, _ = read_rows(data, images, skip_bad, decode=False)
    found = [sample for sample in samples(rows, "each") if sample.images]
    random.Random(seed).shuffle(found)
    return list(islice((sample for sample in found if not skip_bad or _can_be_read(sample)), count))


def _can_be_read(sample: Sample) -> bool:
    try:
        for image in sample.images:
            load_image(image)
    except DataError:
        return False
    return True


def accept_all(file: Path, row: Row) -> None:
    """A `RowFilter` that refuses nothing."""
