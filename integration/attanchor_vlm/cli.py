"""The command `attanchor`. A user's mistake ends in one line that says what to do.

Exit code 2 is for the command line itself, 1 for what it names, 130 for a run that was interrupted.
"""

from __future__ import annotations

import os
import sys
import warnings
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from attanchor_vlm.presets import TrainSettings

# Heavy imports stand inside the commands: `--help` and mistakes in the options should answer at once.

app = typer.Typer(
    help="AttAnchor in vision-language models: train, calibrate, look.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Direction(str, Enum):
    text_into_image = "text_into_image"
    image_into_text = "image_into_text"


class Positions(str, Enum):
    sequential = "sequential"
    inherit = "inherit"


class Route(str, Enum):
    embeds = "embeds"
    ids = "ids"


class Dtype(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Turns(str, Enum):
    each = "each"
    all = "all"


_MODEL = Annotated[str, typer.Option(help="Folder of a saved model, or a Hugging Face Hub id.")]
_DATA = Annotated[Path, typer.Option(help="LLaVA-Instruct rows: a .json list, or .jsonl.")]
_IMAGES = Annotated[Path, typer.Option(help="Folder that the rows' images are in.")]
_SKIP = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and list them, instead of stopping.")]


@app.command()
def train(
    model: _MODEL,
    data: _DATA,
    images: _IMAGES,
    output: Annotated[Path, typer.Option(help="Folder for adapter, checkpoints and log.")],
    preset: Annotated[str, typer.Option(help="tinyllava-1b, llava-7b, qwen2.5-vl-3b or small-llava.")] = "tinyllava-1b",
    val_data: Annotated[Path | None, typer.Option(help="Rows to validate on, instead of a part of --data.")] = None,
    val_fraction: Annotated[float, typer.Option(help="Part of --data to validate on, by image; 0 for none.")] = 0.02,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --output.")] = False,
    skip_bad: _SKIP = False,
    turns: Annotated[Turns, typer.Option(help="A sample for each answer, or one for all of a row.")] = Turns.each,
    tau: Annotated[float | None, typer.Option(help="Cosine threshold; 1 trains by plain concatenation.")] = None,
    direction: Annotated[Direction | None, typer.Option(help="What is copied where.")] = None,
    positions: Annotated[Positions | None, typer.Option(help="Positions of the new sequence.")] = None,
    max_anchors: Annotated[int | None, typer.Option(help="At most so many anchors a sample.")] = None,
    route: Annotated[Route | None, typer.Option(help="How the model is given the new sequence.")] = None,
    epochs: Annotated[float | None, typer.Option(help="Passes over the data.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Optimiser steps, instead of epochs.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per device and forward pass.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Forward passes per optimiser step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Learning rate.")] = None,
    scheduler: Annotated[
        str | None, typer.Option(help="Learning-rate schedule of transformers, such as cosine.")
    ] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps that warm up.")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Weight decay.")] = None,
    optimizer: Annotated[str | None, typer.Option(help="Optimizer of transformers, such as adamw_torch.")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Of the frozen weights; float32 where the device cannot.")] = None,
    lora_rank: Annotated[int | None, typer.Option(help="Rank of the adapters.")] = None,
    lora_alpha: Annotated[int | None, typer.Option(help="Their scale.")] = None,
    lora_dropout: Annotated[float | None, typer.Option(help="Their dropout.")] = None,
    patience: Annotated[
        int | None, typer.Option(help="Stop after so many steps without a better validation loss; 0 never.")
    ] = None,
    eval_steps: Annotated[int | None, typer.Option(help="Validate and save every so many steps.")] = None,
    eval_batch_size: Annotated[int | None, typer.Option(help="Samples per device in validation.")] = None,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, slower.")
    ] = False,
    workers: Annotated[int, typer.Option(help="Processes that load and prepare data.")] = 0,
    seed: Annotated[int, typer.Option(help="For the split, the order and the adapters.")] = 0,
) -> None:
    """Fine-tune a model's language model and projector with LoRA, with anchors in its sequences."""
    import dataclasses

    from attanchor_vlm import presets

    chosen = presets.preset(
        preset,
        tau=tau,
        direction=direction and direction.value,
        positions=positions and positions.value,
        max_anchors=max_anchors,
        route=route and route.value,
        epochs=epochs,
        batch_size=batch_size,
        accumulation=accumulation,
        lr=lr,
        scheduler=scheduler,
        warmup=warmup,
        weight_decay=weight_decay,
        optimizer=optimizer,
        dtype=dtype and dtype.value,
        lora_rank=lora_rank,
        lora_alpha=lora_alpha,
        lora_dropout=lora_dropout,
        patience=patience or None,
    )
    if patience == 0:
        chosen = dataclasses.replace(chosen, patience=None)
    settings = presets.TrainSettings(
        model=model,
        data=data,
        images=images,
        output=output,
        preset=chosen,
        val_data=val_data,
        val_fraction=val_fraction,
        turns=turns.value,
        skip_bad=skip_bad,
        max_steps=max_steps,
        eval_steps=eval_steps,
        eval_batch_size=eval_batch_size,
        gradient_checkpointing=gradient_checkpointing,
        workers=workers,
        seed=seed,
        resume=resume,
    )
    if _train(settings):
        raise typer.Exit(130)


def _train(settings: TrainSettings) -> bool:
    """Whether the run was interrupted."""
    _quiet()
    from attanchor_vlm import train as training

    return training.run(settings, typer.echo).interrupted


@app.command()
def calibrate(
    model: _MODEL,
    data: _DATA,
    images: _IMAGES,
    share: Annotated[float, typer.Option(help="Wanted anchors per text token that takes part.")] = 0.1,
    samples: Annotated[int, typer.Option(help="Samples to measure on.")] = 256,
    direction: Annotated[Direction, typer.Option(help="What is copied where.")] = Direction.text_into_image,
    batch_size: Annotated[int, typer.Option(help="Samples per forward pass.")] = 4,
    skip_bad: _SKIP = False,
    seed: Annotated[int, typer.Option(help="For the choice of samples.")] = 0,
) -> None:
    """Measure the threshold that inserts a wanted share of the text tokens. The paper's rule is about a tenth."""
    _quiet()
    import random

    from attanchor_vlm import AttAnchorConfig, loading, with_tokens_of
    from attanchor_vlm.data import read_rows
    from attanchor_vlm.data import samples as make_samples
    from attanchor_vlm.evaluate import threshold_for_share

    rows, bad = read_rows(data, images, skip_bad, progress=True)
    loaded, processor = loading.load(model, loading.choose_dtype("bfloat16" if _has_gpu() else "float32", typer.echo))
    chosen = [sample for sample in make_samples(rows, "each") if sample.images]
    chosen = random.Random(seed).sample(chosen, min(samples, len(chosen)))
    config = with_tokens_of(AttAnchorConfig(tau=1.0, direction=direction.value), processor)
    tau, scores = threshold_for_share(_to_gpu(loaded), processor, chosen, share, config, batch_size)
    typer.echo(f"--tau {tau:.4f} inserts {share:.1%} of the text tokens, measured on {len(chosen)} samples")
    quantiles = ", ".join(
        f"{q:.0%} {scores[min(int((1 - q) * len(scores)), len(scores) - 1)]:.3f}" for q in (0.05, 0.5, 0.95)
    )
    typer.echo(f"best cosines, quantiles: {quantiles}" + (f"; {len(bad)} bad rows left out" if bad else ""))


@app.command()
def show(
    model: _MODEL,
    image: Annotated[Path, typer.Option(help="A picture.")],
    question: Annotated[str, typer.Option(help="What to ask about it.")],
    output: Annotated[Path, typer.Option(help="The picture with its anchors, .png or .pdf.")],
    adapter: Annotated[Path | None, typer.Option(help="Folder of a trained adapter; brings its own tau.")] = None,
    tau: Annotated[float | None, typer.Option(help="Cosine threshold.")] = None,
) -> None:
    """Ask about an image, and draw each anchor at the patch that it was copied behind."""
    _quiet()
    from attanchor_vlm import AttAnchorConfig, attach, load_adapter, loading, with_tokens_of
    from attanchor_vlm.data import load_image
    from attanchor_vlm.evaluate import explain
    from attanchor_vlm.mixin import base_of, is_attached

    if adapter is None and tau is None:
        raise typer.BadParameter("give --tau, or an --adapter that was trained with one", param_hint="--tau")
    if output.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{output} should end in .png, .pdf or .svg", param_hint="--output")
    if adapter is not None and not (adapter / "adapter_config.json").is_file():
        raise ValueError(f"adapter {adapter} holds no adapter_config.json; give the folder that train wrote to")
    picture = load_image(image)
    loaded, processor = loading.load(model, loading.choose_dtype("bfloat16" if _has_gpu() else "float32", typer.echo))
    if adapter is not None:
        loaded = load_adapter(loaded, adapter)
    if tau is not None:
        import dataclasses

        config: Any = base_of(loaded).attanchor_config if is_attached(loaded) else AttAnchorConfig(tau=tau)
        attach(loaded, with_tokens_of(dataclasses.replace(config, tau=tau), processor))
    elif not is_attached(loaded):
        raise ValueError(f"adapter {adapter} has no attanchor.json, so it was trained without anchors; give --tau")
    result = explain(_to_gpu(loaded), processor, picture, question)
    from attanchor_vlm.plots import anchor_picture

    used: Any = base_of(loaded).attanchor_config
    anchor_picture(output, [result], used.tau, f"Anchors in {image.name}")
    for match in result.matches:
        where = (
            "not inserted"
            if match.patch is None
            else "behind patch row {}, column {}".format(*divmod(match.patch, result.grid[1]))
        )
        typer.echo(f"{match.text:>16}  {match.score:6.3f}  {where}")
    typer.echo(f"answer: {result.answer}")
    typer.echo(f"picture: {output}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="Folder for data, runs and pictures; replaces an earlier demo.")],
    model: Annotated[Path | None, typer.Option(help="A small LLaVA made by demo-stage1.")] = None,
    steps: Annotated[int, typer.Option(min=4, help="Optimiser steps of each of the three runs.")] = 200,
    seed: Annotated[int, typer.Option(help="For data, order and adapters.")] = 0,
) -> None:
    """Fine-tune a small LLaVA on rendered scenes with and without anchors, and show what came out: a few minutes."""
    _quiet()
    from attanchor_vlm import demo as demonstration

    demonstration.run(output, str(model) if model else None, demonstration.Size(steps=steps), seed, typer.echo)


@app.command("demo-stage1")
def demo_stage1(
    output: Annotated[Path, typer.Option(help="Folder for model and processor; should not exist.")],
    seed: Annotated[int, typer.Option(help="For weights and scenes.")] = 0,
) -> None:
    """Make the small LLaVA's weights anew, as those in the package were made: some minutes on one core."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ValueError(f"output {output} exists; take another folder")
    _quiet()
    import torch

    from attanchor_vlm import stage1

    torch.set_num_threads(1)  # as fast as two for a model this small, and the same figures everywhere
    stage1.make(output, stage1.Recipe(seed=seed), typer.echo)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _to_gpu(model):
    return model.to("cuda") if _has_gpu() else model


def _quiet() -> None:
    """Keep transformers' own chatter out of the output; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # What one library of Hugging Face says to another about its names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. `setup.py` makes it the console command `attanchor`."""
    try:
        code = app(args=arguments, prog_name="attanchor", standalone_mode=False)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Told apart by what they can do: newer typers carry a click of their own.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            print(f"error: {_usage_message(error)}", file=sys.stderr)
            return error.exit_code
        if type(error).__name__ == "Abort":
            print("interrupted", file=sys.stderr)
            return 130
        if os.environ.get("ATTANCHOR_TRACEBACK") == "1" or not _is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def _usage_message(error) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "attanchor"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message or 'no command given'} (see {command} --help)"


def _is_users(error: BaseException) -> bool:
    """Whether the error was raised by this project, whose messages are written for the user; others are bugs, and keep
    their traceback."""
    if not isinstance(error, (ValueError, TypeError, OSError)):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.partition(".")[0] in ("attanchor_vlm", "attanchor_kernels")


if __name__ == "__main__":
    sys.exit(main())
