"""One JSON line for every finished arm: what an interrupted experiment goes on from, and what tables are made of."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import Row, append_row, read_rows

NAME = "rows.jsonl"
_NEEDED = {"experiment", "arm", "seed", "settings", "values", "figures"}


class Rows:
    """The rows of one experiment in one folder.

    A row has `experiment`, `arm`, `seed`, `settings` (what the arm depends on), `values` (metrics that were computed),
    `figures` (inserted share, image tokens, seconds) and where it came from (`commit`, `version`, `device`, …).

    Args:
        folder: Holds `rows.jsonl`, or will.
        experiment: The rows' name.

    Raises:
        SetupError: the folder holds rows of another experiment, or a file that is none.
    """

    def __init__(self, folder: Path, experiment: str):
        self.path, self.experiment = Path(folder) / NAME, experiment
        self.rows = self._read()
        if strangers := {row["experiment"] for row in self.rows} - {experiment}:
            raise SetupError(
                f"output {folder} holds rows of the experiment {sorted(strangers)[0]!r}; take another folder"
            )

    def find(self, arm: str, seed: int, settings: Mapping[str, Any]) -> Row | None:
        """The finished row of an arm, None if it is still to be run.

        Raises:
            SetupError: there is one with other settings.
        """
        for row in self.rows:
            if row["arm"] != arm or row["seed"] != seed:
                continue
            wanted = json.loads(json.dumps(settings))
            names = sorted(set(wanted) | set(row["settings"]))
            different = [name for name in names if wanted.get(name) != row["settings"].get(name)]
            if different:
                changes = "; ".join(
                    f"{name} was {row['settings'].get(name)!r} and is {wanted.get(name)!r}" for name in different
                )
                raise SetupError(
                    f"{self.path} holds {arm!r} with other settings: {changes}; go on with the same ones, or take "
                    "another --output"
                )
            return row
        return None

    def add(self, row: Row) -> None:
        """Append a row; when this returns, it is on disk."""
        whole = {"experiment": self.experiment, **row}
        append_row(self.path, whole)
        self.rows.append(json.loads(json.dumps(whole)))

    def _read(self) -> list[Row]:
        try:
            rows = read_rows(self.path)
        except ValueError as error:
            raise SetupError(str(error)) from error
        for number, row in enumerate(rows, start=1):
            if not set(row) >= _NEEDED:
                raise SetupError(f"{self.path}, row {number} is not one of an experiment; take another folder")
        return rows
