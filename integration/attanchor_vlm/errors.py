"""The errors that tell a user what to change. The command line prints them as one line."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path


class SetupError(ValueError):
    """Training cannot start: the message says what to change."""


class CheckpointError(ValueError):
    """A checkpoint or an adapter could not be written or read; the message says what is left."""


class FamilyError(ValueError):
    """A model or its adapter breaks what anchors rely on; the message says which rule, and what was found."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used, counted from 1, and why."""

    file: Path
    number: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}, row {self.number}: {self.reason}"


class DataError(ValueError):
    """The data cannot be trained on as it is. `bad` lists the rows at fault."""

    def __init__(self, message: str, bad: Iterable[BadRow] = ()):
        # A DataLoader raises its workers' errors anew, with their traceback for a message.
        if message.startswith("Caught DataError in "):
            message = message.rpartition("DataError: ")[2].rstrip()
        super().__init__(message)
        self.bad = tuple(bad)


def missing(error: ImportError) -> str | None:
    """What to install for an import that failed; None where the module is this project's, which is a bug.

    transformers hides which package failed it, and a torchvision built for another PyTorch does: so that one is tried.
    """
    name = (error.name or "").partition(".")[0]
    if name.startswith("attanchor"):
        return None
    if name in ("", "torchvision") and importlib.util.find_spec("torchvision") is not None:
        try:
            importlib.import_module("torchvision")
        except Exception as reason:  # not ImportError alone: a missing operator is a RuntimeError
            return (
                f"torchvision cannot be imported ({' '.join(str(reason).split())}); install the release built for "
                f"PyTorch {importlib.metadata.version('torch')}, or uninstall it"
            )
    return f'{error}; attanchor_vlm needs `pip install "attanchor-kernels[vlm]"`'
