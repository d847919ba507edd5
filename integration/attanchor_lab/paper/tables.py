"""Rows as Markdown tables: metrics down, arms across, and beside the paper's values."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from attanchor_lab.paper.values import METRICS, SHOWN, SOURCE, metric

Row = Mapping[str, Any]
_FIGURES = (("inserted_share", "inserted anchors / text tokens", 4), ("image_tokens", "image tokens", 0))


def means(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """For each arm, in the order of the rows, each metric's values over the seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in rows:
        values = found.setdefault(row["arm"], {})
        for name, value in {**row["values"], **_shown_figures(row)}.items():
            values.setdefault(name, []).append(value)
    return found


def _shown_figures(row: Row) -> dict[str, float]:
    return {name: row["figures"][name] for name, _, _ in _FIGURES if name in row["figures"]}


def metric_names(rows: Sequence[Row]) -> list[str]:
    """The metrics that the rows have, in the paper's order; those that it does not have come last."""
    there = {name for row in rows for name in row["values"]}
    known = [name for name in SHOWN if name in there]
    return known + sorted(there - set(known))


def shown(name: str, values: Sequence[float]) -> str:
    """The mean over the seeds in the metric's own form, with the standard deviation where there are several."""
    how = metric(name)
    mean = how.sign * statistics.fmean(values)
    spread = f" ± {statistics.stdev(values):.{how.decimals}f}" if len(values) > 1 else ""
    return f"{mean:.{how.decimals}f}{spread}"


def by_arm(rows: Sequence[Row]) -> list[str]:
    """Metrics down, arms across; what was not computed stays empty."""
    found = means(rows)
    lines = [[metric(name).title, *(_cell(name, values) for values in found.values())] for name in metric_names(rows)]
    for name, title, decimals in _FIGURES:
        if any(name in values for values in found.values()):
            lines.append([title, *(_number(values.get(name), decimals) for values in found.values())])
    return markdown(["", *found], lines)


def beside_paper(rows: Sequence[Row], paper: Mapping[str, Mapping[str, float] | None], baseline: str) -> list[str]:
    """Metric by metric, each arm's value and the paper's, then the change against the baseline in both.

    Args:
        paper: The paper's values for each arm (the loss negated, as there); None for arms that it does not have.
        baseline: The arm that changes are against.
    """
    found = means(rows)
    heads, lines, changes = [""], [], []
    for arm in found:
        heads += [arm, "paper"] if paper.get(arm) else [arm]
    for name in metric_names(rows):
        if name not in METRICS:
            continue
        line, change = [metric(name).title], [metric(name).title]
        for arm, values in found.items():
            theirs = paper.get(arm)
            line.append(_cell(name, values))
            change.append(_change(name, values, found.get(baseline, {})))
            if theirs:
                line.append(_paper_cell(name, theirs))
                change.append(_paper_change(name, theirs, paper.get(baseline)))
        lines.append(line)
        changes.append(change)
    return [
        *markdown(heads, lines),
        "",
        f"Change against {baseline}:",
        "",
        *markdown(heads, changes),
        "",
        f"Paper: {SOURCE}.",
    ]


def improved(rows: Sequence[Row], arm: str, baseline: str) -> tuple[int, int]:
    """In how many of the paper's metrics an arm is better than the baseline, and of how many both were measured."""
    found = means(rows)
    ours, theirs = found.get(arm, {}), found.get(baseline, {})
    shared = [name for name in METRICS if name in ours and name in theirs]
    better = [
        name
        for name in shared
        if metric(name).sign * (statistics.fmean(ours[name]) - statistics.fmean(theirs[name])) > 0
    ]
    return len(better), len(shared)


def pivot(
    rows: Sequence[Row], name: str, across: Callable[[Row], str], down: Callable[[Row], str], corner: str = ""
) -> list[str]:
    """One metric, or one of the rows' figures, in a table of two settings."""
    columns = list(dict.fromkeys(across(row) for row in rows))
    lines = []
    for label in dict.fromkeys(down(row) for row in rows):
        cells = []
        for column in columns:
            here = [row for row in rows if down(row) == label and across(row) == column]
            values = [value for row in here if (value := _value(row, name)) is not None]
            cells.append(shown(name, values) if values else "")
        lines.append([label, *cells])
    return markdown([corner, *columns], lines)


def _value(row: Row, name: str) -> float | None:
    return row["values"].get(name, row["figures"].get(name))


def markdown(heads: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A table as lines of Markdown, numbers to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return ["| " + " | ".join(line) + " |" for line in (heads, rule, *lines)]


def _cell(name: str, values: Mapping[str, Sequence[float]]) -> str:
    return shown(name, values[name]) if name in values else ""


def _number(values: Sequence[float] | None, decimals: int) -> str:
    return "" if values is None else f"{statistics.fmean(values):.{decimals}f}"


def _change(name: str, values: Mapping[str, Sequence[float]], base: Mapping[str, Sequence[float]]) -> str:
    if name not in values or name not in base:
        return ""
    how = metric(name)
    change = how.sign * (statistics.fmean(values[name]) - statistics.fmean(base[name])) + 0.0  # -0.0 becomes 0.0
    return f"{change:+.{how.decimals}f}"


def _paper_cell(name: str, theirs: Mapping[str, float]) -> str:
    return f"{theirs[name]:.{metric(name).decimals}f}" if name in theirs else ""


def _paper_change(name: str, theirs: Mapping[str, float], base: Mapping[str, float] | None) -> str:
    if not base or name not in theirs or name not in base:
        return ""
    return f"{theirs[name] - base[name]:+.{metric(name).decimals}f}"
