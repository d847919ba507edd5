"""The experiments: which arms each has, and what its table and picture show."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from attanchor_lab import figures, table
from attanchor_lab.paper import degrade as variants
from attanchor_lab.paper.arms import run_arms
from attanchor_lab.paper.study import Arm, Study
from attanchor_lab.paper.values import (
    BASELINE,
    FIGURES,
    IMAGE_INTO_TEXT,
    METRICS,
    SHOWN,
    SOURCE,
    TEXT_INTO_IMAGE,
    metrics_of,
    paper_values,
)
from attanchor_lab.runner import ROWS
from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import Row, write_text
from attanchor_vlm.training.config import Method

TABLE, PLOT, RADAR = "table.md", "plot.png", "radar.png"
RANDOM, FRONT = "random places", "prompt in front"


@dataclass(frozen=True)
class Result:
    """Rows of a finished experiment, and the files that it left."""

    rows: list[Row]
    files: list[Path]


def sweep(study: Study, taus: Sequence[float]) -> Result:
    """Text into image at several thresholds, 1 being the baseline."""
    return _run(study, "sweep", _tau_arms(study, taus), "Threshold")


def directions(study: Study) -> Result:
    """Baseline, text into image and image into text, at the preset's tau."""
    tau = _tau_of(study.preset)
    return _run(study, "directions", _both_ways(tau, study.preset_name), "Direction")


def paper_table(study: Study, taus: Sequence[float], controls: bool = True) -> Result:
    """The paper's TinyLLaVA table: thresholds, image into text, and two controls that it lacks.

    Image into text and the controls have the preset's tau. "random places" copies the tokens that text into image
    copies at that tau behind random image tokens; "prompt in front" copies the whole question in front of the image.
    """
    tau = _tau_of(study.preset)
    arms = [*_tau_arms(study, taus), _both_ways(tau, study.preset_name)[-1]]
    if controls:
        arms += [Arm(RANDOM, tau, placement="random"), Arm(FRONT, tau, placement="front")]
    return _run(study, "paper", arms, f"The paper's table, measured on {study.model}")


def scale(study: Study, models: Mapping[str, tuple[str, str, Method]]) -> Result:
    """Baseline against both directions for several checkpoints, each with its own preset.

    Args:
        models: By name: the model's folder or Hub id, the name of its preset, and the preset.
    """
    arms = []
    for name, (model, preset_name, preset) in models.items():
        for arm in _both_ways(_tau_of(preset), preset_name):
            own: dict[str, Any] = {"model": model, "preset": preset, "labels": {"model": name, "arm": arm.name}}
            arms.append(dataclasses.replace(arm, name=f"{name}: {arm.name}", **own))

    def report(rows: list[Row]) -> list[str]:
        parts = []
        for name in models:
            own, baseline = [row for row in rows if row["labels"]["model"] == name], f"{name}: {BASELINE}"
            if own:
                parts += [[f"## {name}"], _table(own, arms, baseline), _better(own, baseline)]
        return _apart(parts)

    def draw(rows: list[Row]) -> None:
        figures.along(study.output / PLOT, _gains(rows), "parameters", "Change against the baseline", True)

    return _run(study, "scale", arms, "Model scale", report, draw)


def _gains(rows: Sequence[Row]) -> pd.DataFrame:
    """`_points` of the arms as changes against the same model's baseline of the same seed, over parameters."""
    points, same = _points(rows, "parameters"), ["metric", "label_model", "seed"]
    is_base = points["label_arm"] == BASELINE
    gains = points[~is_base].merge(points.loc[is_base, [*same, "y"]], on=same, suffixes=("", "_base"))
    return gains.assign(x=gains["parameters"].astype(float), y=gains["y"] - gains["y_base"], series=gains["label_arm"])


def degrade(study: Study, kinds: Mapping[str, Sequence[float]], taus: Sequence[float]) -> Result:
    """Models trained on clean images, tested on blurred, noisy, down-scaled and JPEG-compressed ones, against tau.

    Args:
        kinds: For each kind of `variants.KINDS` its levels.
    """
    study.check()
    if not kinds:
        raise SetupError("every kind of degradation is left out; give at least one with its levels")
    for kind, levels in kinds.items():
        for level in levels:
            variants.check_level(kind, level)
    (data, images), how = _test_rows(study), {"progress": study.progress, "skip_bad": study.plan.skip_bad}
    arms = []
    for kind, level in [("clean", 0.0), *((kind, level) for kind, levels in kinds.items() for level in levels)]:
        name = kind if kind == "clean" else f"{kind} {level:g}"
        rows = None
        if kind != "clean":
            folder = study.output / "data" / name.replace(" ", "-")
            rows = variants.write_degraded(data, images, folder, kind, level, rows=study.plan.limit, **how)
        for tau in taus:
            run = _name_of(tau)
            labels = {"kind": kind, "level": level, "tau": tau}
            arms.append(Arm(f"{name}, {run}", tau, trained_as=run, test_rows=rows, labels=labels))

    def report(rows: list[Row]) -> list[str]:
        found, lines = table.by_seed(rows, *FIGURES), []
        found["images"] = [_degradation(row) for row in rows]
        found["run"] = [_name_of(row["labels"]["tau"]) for row in rows]
        for name, how in {**metrics_of(rows), "inserted_share": FIGURES["inserted_share"]}.items():
            if name in found:
                lines += [f"## {how.title}", "", *table.pivot(found, name, how, "run", "images", "images"), ""]
        lines += ["Levels: " + "; ".join(f"{kind}: {variants.KINDS[kind]}" for kind in kinds) + "."]
        return lines

    def draw(rows: list[Row]) -> None:
        for first, how in list(metrics_of(rows).items())[:1]:
            points = _by_level(rows, first, list(kinds))
            figures.along(study.output / PLOT, points, "level (0: clean)", f"{how.title} under degradation")

    return _run(study, "degrade", arms, "Image degradation", report, draw)


def _degradation(row: Mapping[str, Any]) -> str:
    kind, level = row["labels"]["kind"], row["labels"]["level"]
    return kind if kind == "clean" else f"{kind} {level:g}"


def _by_level(rows: Sequence[Row], metric: str, kinds: Sequence[str]) -> pd.DataFrame:
    """`_points` of one metric: a panel for each kind, a line for each tau. JPEG quality counts down from 100, as images
    get worse."""
    points = _points(rows)
    points = points[points["metric"] == metric].assign(series=points["label_tau"].map(_name_of))
    panels = []
    for kind in kinds:
        own = points[points["label_kind"].isin(("clean", kind))]
        level = own["label_level"].where(own["label_kind"] != "jpeg", 100 - own["label_level"])
        panels.append(own.assign(panel="jpeg, 100 - quality" if kind == "jpeg" else kind, x=level))
    return pd.concat(panels)


def tokens(study: Study, views: Sequence[int]) -> Result:
    """Baseline against text into image with every image given in 1, 2 or 5 views, in training as in testing."""
    study.check()
    tau_of_anchors = _tau_of(study.preset)
    for count in views:
        variants.check_views(count)
    (data, images), how = _test_rows(study), {"progress": study.progress, "skip_bad": study.plan.skip_bad}
    arms = []
    for count in views:
        test = train = None
        if count != 1:
            folder = study.output / "data" / f"{count}-views"
            test = variants.write_views(data, images, folder / "test", count, rows=study.plan.limit, **how)
            if study.train is not None:
                if study.train.images is None:
                    raise ValueError("this experiment changes the images of training rows, so it needs their folder")
                train = variants.write_views(study.train.data, study.train.images, folder / "train", count, **how)
        for tau in (1.0, tau_of_anchors):
            labels = {"views": count, "tau": tau}
            name = f"{count} view{'s' * (count > 1)}, {_name_of(tau)}"
            arms.append(Arm(name, tau, train_rows=train, test_rows=test, labels=labels))
    if study.train is not None and study.train.val_data is not None:
        # Its images are whole ones: validation would be on other prompts than training.
        study = dataclasses.replace(study, train=dataclasses.replace(study.train, val_data=None))

    def report(rows: list[Row]) -> list[str]:
        return _table(rows, arms, "")

    def draw(rows: list[Row]) -> None:
        points = _points(rows, "image_tokens")
        points = points.assign(x=points["image_tokens"], series=points["label_tau"].map(_name_of))
        figures.along(study.output / PLOT, points, "image tokens in a prompt", "Longer image sequences")

    return _run(study, "tokens", arms, "Image tokens", report, draw)


# --- What they share. ------------------------------------------------------------------------------------------------


def _points(rows: Sequence[Row], *figures: str) -> pd.DataFrame:
    """A line for each row and metric: `table.by_seed`, with `metric`, its title as `panel` and its value as `y`, of
    which more is better."""
    metrics, found = metrics_of(rows), table.by_seed(rows, *figures)
    others = [name for name in found if name not in metrics]
    lines = found.melt(others, list(metrics), "metric", "y").dropna(subset="y")
    how = [metrics[name] for name in lines["metric"]]
    return lines.assign(panel=[one.title for one in how], y=lines["y"] * [one.sign for one in how])


def _name_of(tau: float) -> str:
    return BASELINE if tau >= 1 else f"tau {tau:g}"


def _tau_of(preset: Method) -> float:
    """The threshold that is compared with the baseline.

    Raises:
        SetupError: it is the baseline itself.
    """
    if preset.tau >= 1:
        raise SetupError(f"tau is {preset.tau:g}; it should be below 1, which is the baseline that it is compared with")
    return preset.tau


def _tau_arms(study: Study, taus: Sequence[float]) -> list[Arm]:
    """Arms by threshold, the baseline first: changes are against it."""
    if not any(tau >= 1 for tau in taus):
        taus = (1.0, *taus)
    chosen = sorted(dict.fromkeys(taus), reverse=True)
    return [Arm(_name_of(tau), tau, paper=paper_values(study.preset_name, tau=tau)) for tau in chosen]


def _both_ways(tau: float, preset: str) -> list[Arm]:
    """The baseline, text into image and image into text."""
    return [
        Arm(BASELINE, 1.0, paper=paper_values(preset)),
        Arm("text into image", tau, paper=paper_values(preset, TEXT_INTO_IMAGE)),
        Arm("image into text", tau, IMAGE_INTO_TEXT, paper=paper_values(preset, IMAGE_INTO_TEXT)),
    ]


def _test_rows(study: Study) -> tuple[Path, Path]:
    if study.plan.data is None or study.plan.images is None or not study.plan.metrics:
        raise ValueError("this experiment changes the images of test rows, so it needs --test and --metrics")
    return study.plan.data, study.plan.images


def _run(
    study: Study,
    name: str,
    arms: Sequence[Arm],
    title: str,
    report: Callable[[list[Row]], list[str]] | None = None,
    draw: Callable[[list[Row]], None] | None = None,
) -> Result:
    """Run the arms; the table is written after each of them, the pictures at the end."""
    files = [study.output / ROWS, study.output / TABLE]

    def write(rows: list[Row]) -> None:
        if not rows:
            return
        lines, notes = (report(rows), []) if report else (_table(rows, arms, BASELINE), _better(rows, BASELINE))
        page = _apart([[f"# {title}"], lines, notes + _cautions(rows), [_origin(rows)]])
        write_text(study.output / TABLE, "\n".join(page) + "\n")

    rows = run_arms(study, name, arms, write)
    if draw is not None:
        draw(rows)
    else:
        found, metrics = table.by_seed(rows), metrics_of(rows)
        figures.dots(study.output / PLOT, found, metrics, title)
        figures.radar(study.output / RADAR, found, {name: how for name, how in metrics.items() if name in SHOWN}, title)
    files += [path for path in (study.output / PLOT, study.output / RADAR) if path.exists()]
    return Result(rows, files)


def _better(rows: list[Row], baseline: str) -> list[str]:
    """In how many of the paper's metrics each arm beats the baseline: what the paper counts 13, 11 and 9 of 15 of."""
    compared, found = [arm for arm in dict.fromkeys(row["arm"] for row in rows) if arm != baseline], table.by_seed(rows)
    counts = [(arm, *table.improved(found, METRICS, arm, baseline)) for arm in compared]
    return [f"- {arm}: better than {baseline} in {better} of {of} metrics." for arm, better, of in counts if of]


def _cautions(rows: list[Row]) -> list[str]:
    """What every table says of what is missing or uncertain in it."""
    lines = [
        f"- {row['arm']}, seed {row['seed']}: {', '.join(lost)} left out, as NaN or infinite."
        for row in rows
        if (lost := row.get("not_finite"))
    ]
    if len({row["seed"] for row in rows}) == 1:
        lines += ["- One seed: a difference may be chance."]
    return lines


def _apart(parts: Sequence[Sequence[str]]) -> list[str]:
    """The lines of those parts that have any, with an empty line between two parts."""
    found = [["", *part] for part in parts if part]
    return [line for part in found for line in part][1:]


def _table(rows: list[Row], arms: Sequence[Arm], baseline: str) -> list[str]:
    paper = {arm.name: arm.paper for arm in arms}
    found = table.by_seed(rows, *FIGURES)
    lines = table.by_arm(found, metrics_of(rows) | FIGURES)
    if any(paper.get(row["arm"]) for row in rows):
        lines += ["", "Beside the paper:", "", *table.beside(found, METRICS, paper, baseline, "paper")]
        lines += ["", f"Paper: {SOURCE}."]
    return lines


def _origin(rows: Sequence[Row]) -> str:
    """Where the rows came from, in a line."""

    def all_of(key: str) -> str:
        return ", ".join(dict.fromkeys(str(row[key]) for row in rows if row.get(key) is not None)) or "unknown"

    samples = sorted({row["samples"] for row in rows})
    seconds = sum(row["figures"].get("train_seconds", 0.0) for row in rows) / len(rows)
    trained = f"trained for {seconds:.0f} s on average" if seconds else "not trained"
    machine = all_of("processor" if all_of("gpu") == "none" else "gpu")
    return (
        f"{len(rows)} rows, seeds {all_of('seed')}, {' or '.join(map(str, samples))} test samples, {trained}; "
        f"{machine}, PyTorch {all_of('torch')}, commit {all_of('commit')}, {all_of('date')}."
    )
