"""`attanchor train` and `calibrate`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import Options, check_picture, quiet, takes
from attanchor_vlm.model.config import AnchorOptions
from attanchor_vlm.training.config import PRESETS, TrainConfig

TRAINING = Options(TrainConfig, presets={name: changed for name, changed in PRESETS.items() if changed})


@app.command()
@takes(TRAINING)
def train(given: dict[str, Any]) -> None:
    """Fine-tune a model's language model and projector with LoRA, with anchors in its sequences.

    On several GPUs: torchrun --nproc-per-node 8 -m attanchor_vlm.cli train, with the same options.
    """
    if "tau" in given and "fraction" in given:
        raise typer.BadParameter("give one of --tau and --fraction", param_hint="--fraction")
    if _train(_stored(given) | given):
        raise typer.Exit(130)


def _train(given: dict[str, Any]) -> bool:
    """Whether the run was interrupted."""
    quiet()
    preset = given.pop("preset", None)
    config = TrainConfig.from_preset(preset, **given)
    from attanchor_vlm import distributed
    from attanchor_vlm.training import run as training

    if preset is None and distributed.is_main():
        foreign = (
            "" if {"tau", "fraction"} & set(given) else "; its tau may not be this model's: --fraction measures one"
        )
        typer.echo(f"preset {config.preset}, by the model's family{foreign}")
    return training.run(config, typer.echo).interrupted


def _stored(given: dict[str, Any]) -> dict[str, Any]:
    """What `calibrate --save` left beside the model, where neither tau nor fraction is given; if a direction or words
    are, only a tau that was measured with the same."""
    path = Path(given["model"]).expanduser() / "attanchor.json"
    if "tau" in given or "fraction" in given or not path.is_file():
        return {}
    from attanchor_vlm import distributed, load_settings

    stored = load_settings(path)
    measured = {"direction": given.get("direction", AnchorOptions.direction)}
    measured |= {"content_words": given["content_words"]} if "content_words" in given else {}
    if any(getattr(stored, name) != value for name, value in measured.items()):
        return {}
    bounds = {name: getattr(stored, name) for name in ("max_anchors", "keep")}
    bound = "".join(f" and {name} {value}" for name, value in bounds.items() if value is not None)
    bound += ", of content words" if stored.content_words else ""
    if distributed.is_main():
        typer.echo(f"tau {stored.tau:g}{bound}, from {path}")
    found = {name: getattr(stored, name) for name in ("tau", "max_anchors", "keep", "keep_by", "content_words")}
    return {name: value for name, value in found.items() if value is not None}


@app.command()
@takes(
    Options(TrainConfig, ("model", "data", "images", "skip_bad")),
    Options(AnchorOptions, ("max_anchors", "direction", "keep", "keep_by", "content_words"), unsaid="as stored"),
)
def calibrate(
    source: dict[str, Any],
    changes: dict[str, Any],
    *,
    fraction: Annotated[float, typer.Option(help="Wanted anchors per text token that takes part.")] = 0.1,
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of a trained adapter, to measure the model with.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the distribution of the scores: .png, .pdf or .svg.")] = None,
    save: Annotated[
        Path | None, typer.Option(help="Store tau in attanchor.json in this folder of an adapter or a model.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Samples to measure on.")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="Samples per forward pass.")] = 4,
    seed: Annotated[int, typer.Option(help="For the choice of samples.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as a JSON object.")] = False,
) -> None:
    """Measure the threshold that inserts a wanted fraction of the text tokens. The paper's rule is about a tenth."""
    if plot is not None:
        check_picture(plot, "--plot")
    quiet()
    from attanchor_vlm import save_settings
    from attanchor_vlm.analysis import calibrate as calibration
    from attanchor_vlm.data.batches import Collator
    from attanchor_vlm.data.dataset import some_samples
    from attanchor_vlm.model.attach import config_of
    from attanchor_vlm.model.load import load
    from attanchor_vlm.records import check_parent
    from attanchor_vlm.settings import check_fraction

    check_fraction(fraction, changes.get("direction"))
    if save is not None and not save.is_dir():
        raise ValueError(f"{save} is not a folder; --save should name that of an adapter or of a model")
    if save is not None:
        check_parent(save / "attanchor.json")
    chosen = some_samples(source["data"], source.get("images"), samples, seed, source.get("skip_bad", False))
    loaded, processor = load(source["model"], adapter, tau=calibration.HIGHEST_TAU, **changes)
    config = config_of(loaded)
    check_fraction(fraction, config.direction)
    if save is not None:
        calibration.check_storable(save, config)
    collate = Collator(processor, "each", config.content_words)
    scores = calibration.measure_scores(loaded, collate, chosen, batch_size, progress=not as_json)
    tau = scores.threshold(fraction)
    found = calibration.summary(scores, tau, fraction, config.max_anchors)
    if plot is not None:
        title = f"{source['model']}: {config.direction.replace('_', ' ')}"
        calibration.score_plot(plot, scores, tau, config.max_anchors, title)
    if save is not None:
        save_settings(dataclasses.replace(config, tau=tau), save)
    if as_json:
        typer.echo(json.dumps(found))
        return
    typer.echo(
        f"--tau {tau:.4f} inserts {found['fraction']:.1%} of the text tokens, measured on {found['samples']} samples"
    )
    counts = found["anchors_per_sample"]
    bound = "" if config.max_anchors is None else f", bounded by --max-anchors {config.max_anchors}"
    typer.echo(f"anchors a sample: {counts['mean']:.1f} in the mean, at most {counts['max']}{bound}")
    quantiles = ", ".join(f"{share} {score:.3f}" for share, score in found["quantiles"].items())
    typer.echo(f"best cosines, quantiles: {quantiles}")
    for what, path in (("plot", plot), ("settings", save and save / "attanchor.json")):
        if path is not None:
            typer.echo(f"{what}: {path}")
