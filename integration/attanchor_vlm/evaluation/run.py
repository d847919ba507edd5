"""One evaluation: a model, with or without an adapter, on LLaVA-Instruct rows and on benchmarks. `attanchor eval`."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from attanchor_vlm.constants import context_of
from attanchor_vlm.data.lengths import Growth, RowLengths, check_texts
from attanchor_vlm.data.rows import Sample, read_rows, samples, sorted_out
from attanchor_vlm.errors import SetupError
from attanchor_vlm.evaluation import answers, harness, text_metrics
from attanchor_vlm.evaluation.config import LOSS, EvalConfig
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.attach import base_of, config_of, is_attached
from attanchor_vlm.records import check_parent, write_json, write_text

# What a report says beside the metrics, for those who want to compare runs.
FIGURES = ("inserted_share", "anchor_score", "image_tokens", "seconds")


@dataclass(frozen=True)
class Report:
    """What was measured. Only what was computed is in `values`; `figures` has those of `FIGURES` that are known."""

    values: dict[str, float]
    figures: dict[str, float]
    samples: int
    predictions: tuple[tuple[str, str], ...] = ()  # (predicted, reference)
    not_finite: tuple[str, ...] = ()  # metrics that came out as NaN or infinite, and are not in `values`


def read(
    config: EvalConfig, processor: Any, context: int | None, progress: bool = True, growth: Growth | None = None
) -> list[Sample]:
    """The samples that text metrics are of: one for every answer of the rows. `growth`: what anchors add to a row."""
    assert config.data is not None
    assert config.images is not None
    rows, unreadable = read_rows(config.data, config.images, config.skip_bad, progress)
    rows, refused = check_texts(config.data, rows, RowLengths(processor), context, growth)
    rows, bad = sorted_out(config.data, rows, unreadable + refused, config.skip_bad)
    if bad:
        tqdm.write(f"{len(bad)} bad rows of {config.data} left out, the first: {bad[0]}", file=sys.stderr)
    return list(samples(rows, "each"))[: config.limit]


def processor_and_context(model: str) -> tuple[Any, int | None]:
    """The processor of a model and how many tokens its language model takes, without its weights."""
    from transformers import AutoConfig

    from attanchor_vlm.model.processors import load_processor

    with loading.source(model) as source:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        return load_processor(source), context_of(config)


def finite(values: Mapping[str, float]) -> dict[str, float]:
    """Those that are numbers: JSON has no form for the others."""
    return {name: value for name, value in values.items() if math.isfinite(value)}


def left_out(report: Report) -> str:
    """A line about metrics that came out as NaN or infinite."""
    return (
        f"left out, as NaN or infinite: {', '.join(report.not_finite)}; an overflow of float16, or a training that "
        "diverged"
    )


def evaluate(
    model: Any, processor: Any, config: EvalConfig, output: Path | None = None, progress: bool = True
) -> Report:
    """Measure what `config` asks for.

    Args:
        model: Attached, or a PeftModel around an attached model.
        output: A folder for what benchmark tasks write themselves.

    Raises:
        ValueError: as `EvalConfig.check`; and for data that cannot be used.
    """
    config.check()
    values: dict[str, float] = {}
    figures: dict[str, float] = {}
    count = 0
    pairs: tuple[tuple[str, str], ...] = ()
    if config.metrics:
        settings = config_of(model) if is_attached(model) else None
        growth = None if settings is None else Growth.of(settings, settings.pause_tokens)
        chosen = read(config, processor, context_of(base_of(model).config), progress, growth)
        count = len(chosen)
        text = [name for name in config.metrics if name != LOSS]
        forced = bool(text) and config.predictions == "teacher-forced"
        passes = []
        if LOSS in config.metrics or forced:
            scored = answers.score_answers(model, processor, chosen, config.batch_size, forced, progress)
            if LOSS in config.metrics and scored.loss is not None:
                values[LOSS] = scored.loss
            passes.append(scored)
        if text and not forced:
            limits = config.batch_size, config.max_new_tokens
            passes.append(answers.generate_answers(model, processor, chosen, *limits, progress))
        last = passes[-1]
        if text:
            references = [[one] for one in last.references]
            encoder = config.bertscore_model, config.bertscore_layer
            values |= text_metrics.compute(text, last.predictions, references, encoder)
            pairs = tuple(zip(last.predictions, last.references, strict=True))
        figures = {name: getattr(last, name) for name in FIGURES if getattr(last, name) is not None}
        figures["seconds"] = sum(one.seconds for one in passes)
    if config.tasks:
        from attanchor_vlm.evaluation.lmms_model import AttAnchorLmms

        wrapped = AttAnchorLmms.around(model, processor, config.batch_size)
        values |= harness.run_tasks(
            wrapped, config.tasks, config.task_data, config.include_path, config.limit, output, config.seed
        )
    good = finite(values)
    return Report(good, finite(figures), count, pairs, tuple(name for name in values if name not in good))


def write(report: Report, folder: Path, about: Mapping[str, Any]) -> list[Path]:
    """Write `results.json` and, if there are predictions, `predictions.jsonl`; returns their paths."""
    results = folder / "results.json"
    write_json(results, as_dict(report, about))
    if not report.predictions:
        return [results]
    rows = [{"prediction": said, "reference": given} for said, given in report.predictions]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path = folder / "predictions.jsonl"
    write_text(path, lines)
    return [results, path]


def as_dict(report: Report, about: Mapping[str, Any]) -> dict[str, Any]:
    """A report as JSON has it, behind what it is about."""
    measured = {name: getattr(report, name) for name in ("samples", "values", "figures")}
    return {**about, **measured, "not_finite": list(report.not_finite)}


def check_output(folder: Path) -> None:
    """Refuse a folder that results could not be written into."""
    if folder.exists() and not folder.is_dir():
        raise SetupError(f"output {folder} is a file; it should be a folder, or not exist")
    check_parent(folder / "results.json")


def anchors(model: Any) -> dict[str, Any]:
    """The settings of an attached model that a result depends on."""
    settings = config_of(model).to_dict()
    return {name: settings[name] for name in ("tau", "direction", "positions", "max_anchors")}


def lines(report: Report) -> list[str]:
    """A report as text."""
    found = [f"{name:>28}  {value:.4f}" for name, value in report.values.items()]
    if report.not_finite:
        found.append(left_out(report))
    if report.samples:
        found.append(
            f"{report.samples} samples, {report.figures['seconds']:.1f} s, "
            f"{report.figures['inserted_share']:.1%} of the text tokens inserted"
        )
    return found
