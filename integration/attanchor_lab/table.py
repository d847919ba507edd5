"""Paired comparisons with a verdict, and tables as Markdown.

A seed changes weights, scenes and order, for all arms alike: the difference of two arms of one seed is one observation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import markdown_table

try:
    import pandas as pd
    from scipy import stats
    from statsmodels.stats.multitest import multipletests
except ImportError as missing:
    raise SetupError(f'{missing}: tables and intervals need `pip install ".[lab]"`') from missing

LEVEL = 0.05  # chance of any wrong verdict in a family of comparisons
LEAST = 3  # seeds without which there is no test
BETTER, WORSE, OPEN, TOO_FEW = "better", "worse", "not shown", "too few seeds"


def compare(differences: Mapping[Hashable, Sequence[float]]) -> pd.DataFrame:
    """Test paired differences that are looked at together: Student's t over seeds, corrected by Holm.

    Interval and verdict come from one test: `low` to `high` is the interval at the level that Holm's procedure tests
    this comparison at, so it leaves out 0 exactly where `p` is below `LEVEL`. Where `p` is 1, that level is the
    strictest, Bonferroni's. `low_alone` to `high_alone` is the 95 % interval of the comparison by itself.

    Args:
        differences: For every comparison its differences, one a seed, of which more is better.

    Returns:
        A line for each comparison, in the order given: seeds, mean, low_alone, high_alone, p_alone, low, high, p,
        verdict. Fewer than `LEAST` seeds get no test, and do not count in the correction; nor do differences that are
        all the same.
    """
    in_parts = bool(differences) and all(isinstance(key, tuple) for key in differences)
    index = pd.MultiIndex.from_tuples(differences) if in_parts else pd.Index(list(differences))
    table = pd.DataFrame(index=index)
    table["seeds"] = [len(values) for values in differences.values()]
    table["mean"] = [np.mean(values) if len(values) else np.nan for values in differences.values()]
    table["error"] = [_error(values) for values in differences.values()]
    tested = table["error"].notna()
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (table["mean"] / table["error"]).abs().where(table["mean"] != 0, 0.0).where(tested)
    free = (table["seeds"] - 1).clip(lower=1)
    table["p_alone"] = 2 * stats.t.sf(t, free)
    table["p"] = np.nan
    if tested.any():
        table.loc[tested, "p"] = multipletests(table.loc[tested, "p_alone"], method="holm")[1]
    holm = (table["p_alone"] / table["p"]).where((table["p"] > 0) & (table["p"] < 1), 1 / max(1, tested.sum()))
    for name, level in (("_alone", LEVEL), ("", LEVEL * holm)):
        half = stats.t.isf(level / 2, free) * table["error"]
        table[f"low{name}"], table[f"high{name}"] = table["mean"] - half, table["mean"] + half
    established = table["p"] < LEVEL
    choices = [(~tested, TOO_FEW), (established & (table["mean"] > 0), BETTER), (established, WORSE)]
    table["verdict"] = np.select([where for where, _ in choices], [word for _, word in choices], OPEN)
    return table.drop(columns="error")


def _error(values: Sequence[float]) -> float:
    """The standard error of the mean. Accuracies of few questions can differ by as much in every seed by chance: that
    tells nothing of how they spread, unless no answer differs at all."""
    if len(values) < LEAST or (np.ptp(values) < 1e-9 and np.any(values)):
        return np.nan
    return float(np.std(values, ddof=1) / len(values) ** 0.5)


def number(value: float, digits: int = 1, sign: bool = False) -> str:
    """A figure as a person reads it; a dash for what is not there."""
    if not np.isfinite(value):
        return "–"
    return (f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}").replace("-", "−")


def interval(low: float, high: float) -> str:
    return f"{number(low, 1, True)} to {number(high, 1, True)}" if np.isfinite(low) else "–"


def probability(p: float) -> str:
    if not np.isfinite(p):
        return "–"
    return "< .001" if p < 0.001 else f"{p:.3f}".removeprefix("0")


# --- Metrics by arm, of experiments. ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metric:
    """How a metric is shown. `sign` -1 shows the negative, so that higher is better everywhere."""

    title: str
    decimals: int
    sign: int = 1

    def mean(self, values: pd.Series) -> str:
        """The mean over the seeds, with the standard deviation where there are several; empty where there is none."""
        values = self.sign * values.dropna()
        spread = f" ± {values.std():.{self.decimals}f}" if len(values) > 1 else ""
        return f"{values.mean():.{self.decimals}f}{spread}" if len(values) else ""

    def change(self, values: pd.Series, base: pd.Series) -> str:
        """From one mean to another; empty where one is missing."""
        change = self.sign * (values.mean() - base.mean()) + 0.0  # -0.0 becomes 0.0
        return f"{change:+.{self.decimals}f}" if np.isfinite(change) else ""


def by_seed(rows: Sequence[Mapping[str, Any]], *figures: str) -> pd.DataFrame:
    """A line for each row: arm, seed, label_…, its values and those of its `figures` that are named."""
    return pd.DataFrame(
        [
            {"arm": row["arm"], "seed": row["seed"], **{f"label_{k}": v for k, v in row.get("labels", {}).items()},
             **row["values"], **{name: row["figures"][name] for name in figures if name in row["figures"]}}
            for row in rows
        ]
    )  # fmt: skip


def by_arm(table: pd.DataFrame, metrics: Mapping[str, Metric]) -> list[str]:
    """Metrics down, arms across; what was not computed stays empty."""
    arms = list(table["arm"].unique())
    of_arm = {arm: table[table["arm"] == arm] for arm in arms}
    lines = [
        [how.title, *(how.mean(of_arm[arm][name]) for arm in arms)] for name, how in metrics.items() if name in table
    ]
    return markdown_table(["", *arms], lines)


def beside(
    table: pd.DataFrame,
    metrics: Mapping[str, Metric],
    others: Mapping[str, Mapping[str, float] | None],
    baseline: str,
    source: str,
) -> list[str]:
    """Metric by metric each arm's value and another source's, then the change against the baseline in both.

    Args:
        others: The source's values for each arm, with their sign as shown; None for arms that it does not have.
        baseline: The arm that changes are against.
    """
    columns = [(arm, ours) for arm in table["arm"].unique() for ours in (True, False) if ours or others.get(arm)]
    heads = ["", *(arm if ours else source for arm, ours in columns)]

    def cell(name: str, arm: str, ours: bool) -> pd.Series:
        """Values of an arm, with their sign as shown."""
        if ours:
            return metrics[name].sign * table.loc[table["arm"] == arm, name]
        known = others.get(arm) or {}
        return pd.Series([known[name]] if name in known else [], dtype=float)

    lines, changes = [], []
    for name in metrics:
        if name in table:
            how = dataclasses.replace(metrics[name], sign=1)
            lines.append([how.title, *(how.mean(cell(name, *column)) for column in columns)])
            own = [how.change(cell(name, arm, ours), cell(name, baseline, ours)) for arm, ours in columns]
            changes.append([how.title, *own])
    return [*markdown_table(heads, lines), "", f"Change against {baseline}:", "", *markdown_table(heads, changes)]


def improved(table: pd.DataFrame, metrics: Mapping[str, Metric], arm: str, baseline: str) -> tuple[int, int]:
    """In how many of `metrics` an arm is better than the baseline, and of how many both were measured."""
    means = table.groupby("arm").mean(numeric_only=True)
    if not {arm, baseline} <= set(means.index):
        return 0, 0
    shared = [name for name in metrics if name in means and means.loc[[arm, baseline], name].notna().all()]
    better = [name for name in shared if metrics[name].sign * (means.loc[arm, name] - means.loc[baseline, name]) > 0]
    return len(better), len(shared)


def pivot(table: pd.DataFrame, name: str, how: Metric, across: str, down: str, corner: str = "") -> list[str]:
    """One metric in a table of two columns of `table`, in the order of the rows."""
    columns, rows = table[across].unique(), table[down].unique()
    cells = [
        [how.mean(table.loc[(table[down] == row) & (table[across] == column), name]) for column in columns]
        for row in rows
    ]
    return markdown_table([corner, *columns], [[row, *line] for row, line in zip(rows, cells, strict=True)])
