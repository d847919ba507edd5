"""The measurement of an arm in parts, each kept when it is done: nine benchmarks take hours, and a kill costs one."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.records import append_row, read_rows

_TOGETHER = ("amber", "amber_g")  # whose figures make a score of both


def measure(
    model: Any,
    processor: Any,
    plan: evaluation.Plan,
    settings: dict[str, Any],
    kept: Path,
    output: Path,
    progress: bool,
) -> evaluation.Report:
    """What `evaluation.evaluate` reports, less its predictions; parts that are kept are not measured again.

    Args:
        settings: What the figures depend on, as JSON has it: parts of other settings do not count.
        kept: A .jsonl file, to be deleted by the caller when the report is stored.
        output: As for `evaluate`.
    """
    parts = parts_of(plan)
    if len(parts) == 1:
        return evaluation.evaluate(model, processor, plan, output, progress)
    done = {row["part"]: row for row in read_rows(kept) if row["settings"] == settings}
    whole = evaluation.Report({}, {}, 0)
    for name, part in parts.items():
        if name not in done:
            report = evaluation.evaluate(model, processor, part, output, progress)
            append_row(kept, evaluation.as_dict(report, {"part": name, "settings": settings}))
            done[name] = evaluation.as_dict(report, {})
        row = done[name]
        whole = evaluation.Report(
            {**whole.values, **row["values"]},
            {**whole.figures, **row["figures"]},
            whole.samples + row["samples"],
            not_finite=(*whole.not_finite, *row["not_finite"]),
        )
    return whole


def parts_of(plan: evaluation.Plan) -> dict[str, evaluation.Plan]:
    """The text metrics in one part, which share their passes over the data, and every task in one."""
    parts = {}
    if plan.metrics:
        parts["text"] = dataclasses.replace(plan, tasks=(), task_data={})
    for task in plan.tasks:
        name = "amber" if task in _TOGETHER else task
        tasks = tuple(one for one in plan.tasks if one == task or {one, task} <= set(_TOGETHER))
        data = {one: folder for one, folder in plan.task_data.items() if one in tasks}
        parts[f"task {name}"] = dataclasses.replace(plan, metrics=(), tasks=tasks, task_data=data)
    return parts
