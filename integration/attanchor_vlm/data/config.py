"""What a run reads: its rows, what is held out of them, and how they become samples."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attanchor_vlm.settings import REQUIRED, check_values, setting


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The data of a run. Every field says what it means."""

    data: Path = setting(
        REQUIRED, "LLaVA-Instruct rows: a .json list or .jsonl; as a stream .jsonl, .parquet or a folder of such."
    )
    images: Path | None = setting(None, "Folder that the rows' images are in, unless the rows hold them.")
    output: Path = setting(REQUIRED, "Folder for adapter, checkpoints, log and the list of bad rows.", resumable=True)
    val_data: Path | None = setting(None, "Rows to validate on, instead of a part of --data.")
    val_fraction: float | None = setting(
        None,
        "Part of --data to validate on, by image: 0.02 if not said, none of a stream; 0 for none.",
        at_least=0,
        below=1,
    )
    turns: str = setting("each", "A sample for each answer, or one for all of a row.", choices=("each", "all"))
    skip_bad: bool = setting(False, "Leave bad rows out and list them, instead of stopping.")
    group_by_length: bool = setting(False, "Batches of samples of like lengths, images included.")
    stream: bool = setting(False, "Read data as training goes; it need not fit into memory.")
    shuffle_buffer: int = setting(1000, "With --stream: rows that the next one is drawn from.", above=0, needs="stream")
    workers: int = setting(0, "Processes that load and prepare data, for each GPU.", at_least=0)
    seed: int = setting(0, "For the split, the order and the adapters.", at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check_values(self)
        if self.val_data is not None and self.val_fraction:
            raise ValueError(
                f"val_fraction is {self.val_fraction} with val_data; rows to validate on come from the one or the other"
            )
        if self.stream and self.held_out:
            raise ValueError(f"val_fraction is {self.val_fraction} with stream; give val_data, a file held in memory")
        if self.stream and self.group_by_length:
            raise ValueError(
                "group_by_length is set with stream; lengths are known of rows in memory only, leave one out"
            )

    @property
    def held_out(self) -> float:
        """The part of `data` that is validated on."""
        if self.val_fraction is not None:
            return self.val_fraction
        return 0.0 if self.stream or self.val_data is not None else 0.02
