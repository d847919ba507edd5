"""`attanchor experiment …`: the paper's experiments, each leaving rows, a table and a picture in its output folder."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Annotated, Any

import typer
from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.evaluation import (
    BERTSCORE,
    BERTSCORE_LAYER,
    INCLUDE,
    TASK_DATA,
    TASKS,
    TEXT,
    Predictions,
    choice,
    folders,
)
from attanchor_vlm.cli.options import MODEL, SKIP_BAD, Turns, quiet

if TYPE_CHECKING:
    from attanchor_vlm.training.config import Preset

    from attanchor_lab.paper.study import Study

experiment = typer.Typer(
    help="The paper's experiments: rows, a table and a picture. Interrupted ones go on with the same command.",
    rich_markup_mode=None,
)
app.add_typer(experiment, name="experiment")

TAUS = Annotated[str, typer.Option(help="Thresholds, with commas; 1 is the baseline.")]


def _shared(
    images: Annotated[Path, typer.Option(help="Folder with the images of --data and --test.")],
    output: Annotated[Path, typer.Option(help="Folder for rows, table, picture and trained adapters.")],
    data: Annotated[Path | None, typer.Option(help="LLaVA-Instruct rows to train every arm on.")] = None,
    no_train: Annotated[
        bool, typer.Option("--no-train", help="Measure the model as it is, with anchors switched on, without --data.")
    ] = False,
    test: Annotated[Path | None, typer.Option(help="LLaVA-Instruct rows that --metrics are of.")] = None,
    val_data: Annotated[Path | None, typer.Option(help="Rows for early stopping, instead of a part of --data.")] = None,
    metrics: Annotated[
        str,
        typer.Option(help="Of --test, with commas: loss, bleu, bertscore, meteor, cider, rougeL, exact; or all, none."),
    ] = "loss,bleu,rougeL",
    tasks: Annotated[
        str, typer.Option(help="Benchmarks and other tasks of lmms-eval, with commas; or all (nine), none.")
    ] = "none",
    task_data: TASK_DATA = None,
    include_path: INCLUDE = None,
    predictions: Annotated[
        Predictions, typer.Option(help="Answers to compare: generated, or the likeliest token after each true one.")
    ] = Predictions.generate,
    bertscore_model: BERTSCORE = "roberta-large",
    bertscore_layer: BERTSCORE_LAYER = None,
    preset: Annotated[str, typer.Option(help="tinyllava-1b, llava-7b, qwen2.5-vl-3b or small-llava.")] = "tinyllava-1b",
    tau: Annotated[float | None, typer.Option(help="Instead of the preset's.")] = None,
    turns: Annotated[
        Turns, typer.Option(help="A training sample for each answer, or one for all of a row.")
    ] = Turns.each,
    epochs: Annotated[float | None, typer.Option(help="Passes over --data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    train_batch_size: Annotated[
        int | None, typer.Option(help="Samples per device and forward pass of training.")
    ] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes per optimiser step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Validate and save every so many steps of training.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory in training, slower.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that load and prepare training data.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time in testing.")] = 4,
    limit: Annotated[int | None, typer.Option(help="Test on so many samples, and documents of each task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Bound of generated answers to --test.")] = 256,
    skip_bad: SKIP_BAD = False,
    seeds: Annotated[str, typer.Option(help="With commas: every arm is trained and measured for each.")] = "0",
) -> None:
    """Options of every experiment; what they mean together is in `_study`."""


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function(shared, …)` a command with the shared options and its own keyword ones."""
    common = inspect.signature(_shared, eval_str=True).parameters
    own = dict(list(inspect.signature(function, eval_str=True).parameters.items())[1:])

    @functools.wraps(function)
    def run(**given: Any) -> None:
        mine = {name: given.pop(name) for name in own}
        function(SimpleNamespace(**given), **mine)

    parameters = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in (*own.values(), *common.values())]
    parameters.sort(key=lambda parameter: parameter.default is not inspect.Parameter.empty)
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    del run.__wrapped__  # type: ignore[attr-defined]
    return experiment.command()(run)


@command
def sweep(shared: SimpleNamespace, *, model: MODEL, taus: TAUS = "1.0,0.16,0.14,0.12,0.10,0.08") -> None:
    """Text into image at several thresholds against the baseline, beside the paper where it has such a model."""
    chosen = numbers(taus, "--taus")
    study = _study(shared, model)
    from attanchor_lab.paper import studies

    _finish(lambda: studies.sweep(study, chosen, typer.echo))


@command
def directions(shared: SimpleNamespace, *, model: MODEL) -> None:
    """Baseline, text into image and image into text."""
    study = _study(shared, model)
    from attanchor_lab.paper import studies

    _finish(lambda: studies.directions(study, typer.echo))


@command
def scale(
    shared: SimpleNamespace,
    *,
    models: Annotated[
        list[str],
        typer.Option(
            metavar="NAME=MODEL",
            help="A checkpoint by name, several times; a preset's name brings its settings, others get --preset's.",
        ),
    ],
) -> None:
    """Baseline and both directions for several checkpoints."""
    chosen = _models(models, shared)
    study = _study(shared, next(iter(chosen.values()))[0])
    from attanchor_lab.paper import studies

    _finish(lambda: studies.scale(study, chosen, typer.echo))


@command
def degrade(
    shared: SimpleNamespace,
    *,
    model: MODEL,
    taus: Annotated[str | None, typer.Option(help="Thresholds, with commas; by default 1 and the preset's.")] = None,
    blur: Annotated[str, typer.Option(help="Standard deviations, in pixels of an image of 336.")] = "2,4,8",
    noise: Annotated[str, typer.Option(help="Standard deviations, of pixel values up to 255.")] = "16,32,64",
    downscale: Annotated[str, typer.Option(help="How many times smaller, and back.")] = "2,4,8",
    jpeg: Annotated[str, typer.Option(help="Qualities.")] = "30,10,5",
) -> None:
    """Test models trained on clean images on worse ones. Levels with commas; none leaves a kind out."""
    given = {"blur": blur, "noise": noise, "downscale": downscale, "jpeg": jpeg}
    levels = {kind: numbers(text, f"--{kind}") for kind, text in given.items() if text.strip() != "none"}
    study = _study(shared, model)
    chosen = (1.0, study.preset.tau) if taus is None else numbers(taus, "--taus")
    from attanchor_lab.paper import studies

    _finish(lambda: studies.degrade(study, levels, chosen, typer.echo))


@command
def tokens(
    shared: SimpleNamespace,
    *,
    model: MODEL,
    views: Annotated[
        str, typer.Option(help="Views of every image, 1, 2 or 5: 576, 1,152 and 2,880 tokens in LLaVA-1.5.")
    ] = "1,2,5",
) -> None:
    """Longer image sequences: every image in several views, baseline against text into image."""
    counts = integers(views, "--views")
    study = _study(shared, model)
    from attanchor_lab.paper import studies

    _finish(lambda: studies.tokens(study, counts, typer.echo))


@command
def paper(
    shared: SimpleNamespace,
    *,
    model: MODEL,
    taus: TAUS = "1.0,0.16,0.14,0.12,0.10,0.08",
    no_controls: Annotated[bool, typer.Option("--no-controls", help="Leave the two controls out.")] = False,
) -> None:
    """The paper's TinyLLaVA table beside the paper's own values, with two controls that it lacks.

    With --metrics all --tasks all it has all fifteen metrics.
    """
    chosen = numbers(taus, "--taus")
    study = _study(shared, model)
    from attanchor_lab.paper import studies

    _finish(lambda: studies.paper_table(study, chosen, not no_controls, typer.echo))


def numbers(text: str, option: str) -> list[float]:
    """Numbers from a comma-separated option.

    Raises:
        BadParameter: one is none, or there is none.
    """
    try:
        found = [float(part) for part in text.split(",") if part.strip()]
    except ValueError as error:
        raise typer.BadParameter(f"{text!r} should be numbers with commas between", param_hint=option) from error
    if not found:
        raise typer.BadParameter("it should hold at least one number", param_hint=option)
    return found


def integers(text: str, option: str) -> list[int]:
    """Whole numbers from a comma-separated option.

    Raises:
        BadParameter: as `numbers`, and for a fraction.
    """
    found = numbers(text, option)
    if not all(number.is_integer() for number in found):
        raise typer.BadParameter(f"{text!r} should be whole numbers with commas between", param_hint=option)
    return [int(number) for number in found]


def _study(shared: SimpleNamespace, model: str) -> Study:
    """What the shared options mean, checked as far as it can be before anything heavy is loaded."""
    if (shared.data is None) != shared.no_train:
        raise typer.BadParameter("give --data to train on, or --no-train", param_hint="--data")
    quiet()
    from attanchor_vlm.evaluation.run import Plan
    from attanchor_vlm.evaluation.text_metrics import BertScoreModel

    from attanchor_lab.paper.study import Study, TrainRows

    metrics = choice(shared.metrics, TEXT)
    plan = Plan(
        data=shared.test,
        images=shared.images if shared.test is not None else None,
        metrics=metrics,
        tasks=choice(shared.tasks, TASKS),
        task_data=folders(shared.task_data),
        include=shared.include_path,
        predictions=shared.predictions.value,
        bertscore=BertScoreModel(shared.bertscore_model, shared.bertscore_layer) if "bertscore" in metrics else None,
        batch_size=shared.batch_size,
        limit=shared.limit,
        max_new_tokens=shared.max_new_tokens,
        skip_bad=shared.skip_bad,
    )
    rows = None
    if shared.data is not None:
        rows = TrainRows(
            data=shared.data,
            images=shared.images,
            val_data=shared.val_data,
            turns=shared.turns.value,
            max_steps=shared.max_steps,
            eval_steps=shared.eval_steps,
            gradient_checkpointing=shared.gradient_checkpointing,
            workers=shared.workers,
        )
    study = Study(
        model=model,
        output=shared.output,
        plan=plan,
        preset=_preset(shared.preset, shared),
        preset_name=shared.preset,
        train=rows,
        seeds=tuple(dict.fromkeys(integers(shared.seeds, "--seeds"))),
    )
    study.check()
    return study


def _preset(name: str, shared: SimpleNamespace) -> Preset:
    from attanchor_vlm.training import config as presets

    return presets.preset(
        name,
        tau=shared.tau,
        epochs=shared.epochs,
        batch_size=shared.train_batch_size,
        accumulation=shared.accumulation,
        lr=shared.lr,
    )


def _models(given: list[str], shared: SimpleNamespace) -> dict[str, tuple[str, str, Preset]]:
    from attanchor_vlm.training.config import PRESETS

    found = {}
    for one in given:
        name, _, model = one.partition("=")
        if not name or not model:
            raise typer.BadParameter(f"{one!r} should be NAME=MODEL, such as llava-7b=PATH", param_hint="--models")
        if name in found:
            raise typer.BadParameter(f"the name {name} stands for two checkpoints", param_hint="--models")
        preset = name if name in PRESETS else shared.preset
        found[name] = model, preset, _preset(preset, shared)
    return found


def _finish(run: Callable[[], Any]) -> None:
    from attanchor_lab.paper.arms import InterruptedStudyError

    try:
        result = run()
    except InterruptedStudyError as error:
        typer.echo(str(error))
        raise typer.Exit(130) from None
    typer.echo("")
    typer.echo((result.files[1]).read_text(encoding="utf-8").rstrip())
    typer.echo("")
    for path in result.files:
        typer.echo(f"written: {path}")
