"""`attanchor experiment …`: the paper's experiments, each leaving rows, a table and a picture in its output folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import MODEL, Options, quiet, takes
from attanchor_vlm.errors import SetupError
from attanchor_vlm.evaluation.config import EvalConfig
from attanchor_vlm.settings import REQUIRED, redefined, setting
from attanchor_vlm.training.config import PRESETS, Method, TrainConfig, preset_for

if TYPE_CHECKING:
    from attanchor_lab.paper.study import Study

experiment = typer.Typer(
    help="The paper's experiments: rows, a table and a picture. Interrupted ones go on with the same command.",
    rich_markup_mode=None,
)
app.add_typer(experiment, name="experiment")

Given = dict[str, Any]
PAPER_TAUS = "1.0,0.16,0.14,0.12,0.10,0.08"
TAUS = Annotated[str, typer.Option(help="Thresholds, with commas; 1 is the baseline.")]


@dataclass(frozen=True, kw_only=True)
class _Tested(EvalConfig):
    """What every experiment is told, besides the settings of training."""

    images: Path = setting(REQUIRED, "Folder with the images of --data and --test.")
    output: Path = setting(REQUIRED, "Folder for rows, table, picture and trained adapters.")
    test: Path | None = setting(None, "LLaVA-Instruct rows that --metrics are of.")
    metrics: tuple[str, ...] = redefined(EvalConfig, "metrics", ("loss", "bleu", "rougeL"))
    data: Path | None = setting(None, "LLaVA-Instruct rows to train every arm on.")
    no_train: bool = setting(False, "Measure the model as it is, with anchors switched on, without --data.")
    seeds: str = setting("0", "With commas: every arm is trained and measured for each.")


_TRAINED = (
    *("preset", "tau", "val_data", "turns", "epochs", "max_steps", "batch_size", "accumulation", "lr"),
    *("eval_steps", "gradient_checkpointing", "workers"),
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make `function(tested, trained, …)` a command with the options of every experiment and its own."""
    trained = Options(TrainConfig, _TRAINED, renamed={"batch_size": "train_batch_size"}, presets=PRESETS)
    return experiment.command()(takes(Options(_Tested, leave_out=("seed",)), trained)(function))


@command
def sweep(tested: Given, trained: Given, *, model: MODEL, taus: TAUS = PAPER_TAUS) -> None:
    """Text into image at several thresholds against the baseline, beside the paper where it has such a model."""
    chosen = numbers(taus, "--taus")
    _run("sweep", _study(tested, trained, model), chosen)


@command
def directions(tested: Given, trained: Given, *, model: MODEL) -> None:
    """Baseline, text into image and image into text."""
    _run("directions", _study(tested, trained, model))


@command
def scale(
    tested: Given,
    trained: Given,
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
    chosen = _models(models, trained)
    _run("scale", _study(tested, trained, next(iter(chosen.values()))[0]), chosen)


@command
def degrade(
    tested: Given,
    trained: Given,
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
    study = _study(tested, trained, model)
    chosen = (1.0, study.preset.tau) if taus is None else numbers(taus, "--taus")
    _run("degrade", study, levels, chosen)


@command
def tokens(
    tested: Given,
    trained: Given,
    *,
    model: MODEL,
    views: Annotated[
        str, typer.Option(help="Views of every image, 1, 2 or 5: 576, 1,152 and 2,880 tokens in LLaVA-1.5.")
    ] = "1,2,5",
) -> None:
    """Longer image sequences: every image in several views, baseline against text into image."""
    counts = integers(views, "--views")
    _run("tokens", _study(tested, trained, model), counts)


@command
def paper(
    tested: Given,
    trained: Given,
    *,
    model: MODEL,
    taus: TAUS = PAPER_TAUS,
    no_controls: Annotated[bool, typer.Option("--no-controls", help="Leave the two controls out.")] = False,
) -> None:
    """The paper's TinyLLaVA table beside the paper's own values, with two controls that it lacks.

    With --metrics all --tasks all it has all fifteen metrics.
    """
    chosen = numbers(taus, "--taus")
    _run("paper_table", _study(tested, trained, model), chosen, not no_controls)


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


def _study(tested: Given, trained: Given, model: str) -> Study:
    """What the options mean together, checked as far as it can be before anything heavy is loaded."""
    if ("data" in tested) == ("no_train" in tested):
        raise typer.BadParameter("give --data to train on, or --no-train", param_hint="--data")
    quiet()
    from attanchor_lab.paper.study import Study

    names = {field.name for field in dataclasses.fields(EvalConfig)} - {"data", "images"}
    measured = {"metrics": _Tested.metrics} | {name: value for name, value in tested.items() if name in names}
    if "test" in tested:
        measured |= {"data": tested["test"], "images": tested["images"]}
    preset_name, preset = _preset(trained, model)
    train = None
    if "data" in tested:
        places = {"model": model, **{name: tested[name] for name in ("data", "images", "output")}}
        train = TrainConfig.from_preset(preset_name, **places, **{k: v for k, v in trained.items() if k != "preset"})
    study = Study(
        model=model,
        output=tested["output"],
        plan=EvalConfig(**measured),
        preset=preset,
        preset_name=preset_name,
        train=train,
        seeds=tuple(dict.fromkeys(integers(tested.get("seeds", "0"), "--seeds"))),
        say=typer.echo,
    )
    study.check()
    return study


def _preset(trained: Given, model: str, name: str | None = None) -> tuple[str, Method]:
    """A preset's name, by default that of the model's family, and its settings with those that are given."""
    names = {field.name for field in dataclasses.fields(Method)}
    name = name or trained.get("preset")
    if name is None:
        try:
            name = preset_for(model)
        except SetupError:  # said when the model is needed; what is wrong with the options comes first
            name = "tinyllava-1b"
    return name, Method.from_preset(name, **{key: value for key, value in trained.items() if key in names})


def _models(given: list[str], trained: Given) -> dict[str, tuple[str, str, Method]]:
    found = {}
    for one in given:
        name, _, model = one.partition("=")
        if not name or not model:
            raise typer.BadParameter(f"{one!r} should be NAME=MODEL, such as llava-7b=PATH", param_hint="--models")
        if name in found:
            raise typer.BadParameter(f"the name {name} stands for two checkpoints", param_hint="--models")
        found[name] = model, *_preset(trained, model, name if name in PRESETS else None)
    return found


def _run(experiment: str, study: Study, *chosen: Any) -> None:
    """Run an experiment of `studies`, and show its table and the files that it left."""
    from attanchor_lab.paper import studies

    result = getattr(studies, experiment)(study, *chosen)
    typer.echo("")
    typer.echo((result.files[1]).read_text(encoding="utf-8").rstrip())
    typer.echo("")
    for path in result.files:
        typer.echo(f"written: {path}")
