"""The fifteen metrics as tables and pictures show them, and the paper's values of them: values.json."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from attanchor_lab.table import Metric

_STORED = json.loads(Path(__file__).with_name("values.json").read_text(encoding="utf-8"))
SOURCE: str = _STORED["source"]
# In the paper's order; the loss is shown negated, as there.
METRICS: dict[str, Metric] = {name: Metric(**how) for name, how in _STORED["metrics"].items()}
# And one that is not of the paper: short answers that are right to the letter.
SHOWN = {**METRICS, "exact": Metric("exact match", 4)}

FIGURES = {
    "inserted_share": Metric("inserted anchors / text tokens", 4),
    "image_tokens": Metric("image tokens", 0),
}

BASELINE, TEXT_INTO_IMAGE, IMAGE_INTO_TEXT = "baseline", "text_into_image", "image_into_text"
_DIRECTIONS = (BASELINE, TEXT_INTO_IMAGE, IMAGE_INTO_TEXT)


def paper_values(model: str, direction: str = BASELINE, tau: float | None = None) -> dict[str, float] | None:
    """What the paper has for a model and an arm, with the loss negated as it prints it; None if it has no such column.

    Args:
        model: A preset's name, such as "tinyllava-1b".
        direction: "baseline", "text_into_image" or "image_into_text".
        tau: Of "text_into_image"; None for the one of the paper's table by model.
    """
    if tau is not None and tau >= 1:
        direction = BASELINE
    if model == "tinyllava-1b" and direction != IMAGE_INTO_TEXT and tau is not None:
        table = _STORED["by_tau"]
        column = table["taus"].index(round(tau, 4)) if round(tau, 4) in table["taus"] else None
    else:
        table, column = _STORED["by_model"].get(model), _DIRECTIONS.index(direction)
    return None if table is None or column is None else {name: table[name][column] for name in METRICS}


def metrics_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, Metric]:
    """The metrics that the rows have, in the paper's order; those that it does not have come last, as they are."""
    there = {name for row in rows for name in row["values"]}
    known = {name: how for name, how in SHOWN.items() if name in there}
    return known | {name: Metric(name, 4) for name in sorted(there - set(known))}
