"""One run of LoRA training with anchors: what `attanchor train` and the demo both call."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from attanchor_vlm import loading
from attanchor_vlm.collate import Collator, SampleDataset, check_texts
from attanchor_vlm.config import AttAnchorConfig
from attanchor_vlm.data import BadRow, DataError, Row, read_rows, samples, split_rows
from attanchor_vlm.fallback import with_tokens_of
from attanchor_vlm.files import write_json
from attanchor_vlm.guard import expect_anchors
from attanchor_vlm.loading import SetupError
from attanchor_vlm.mixin import attach, base_of
from attanchor_vlm.presets import Preset, TrainSettings
from attanchor_vlm.settings import save_settings

RUN_FILE, SKIPPED_FILE = "run.json", "skipped.json"
# A resumed run may change these; anything else would make it a different run.
_FREE_ON_RESUME = {"output", "resume", "workers", "max_steps", "eval_steps", "eval_batch_size", "epochs", "patience"}


@dataclass
class TrainResult:
    """What a run did. `log` holds Trainer's lines; losses are None without validation."""

    output: Path
    steps: int
    seconds: float
    log: list[dict[str, float]]
    val_loss: float | None
    interrupted: bool
    stopped_early: bool
    skipped: int
    model: Any = field(repr=False)
    processor: Any = field(repr=False)


def run(settings: TrainSettings, say: Callable[[str], None] = print, progress: bool = True) -> TrainResult:
    """Train LoRA adapters and save them with their AttAnchor settings to `settings.output`.

    Everything that can be wrong with the data, the model's name or the settings is found before training starts.
    Checkpoints go to ``output/checkpoint-N``, log lines to ``output/log.jsonl``; the adapter with the lowest validation
    loss (without validation: the last one) to `output` itself.

    Args:
        settings: What to train, on what, and how.
        say: Takes the lines for the user.
        progress: Show progress bars.

    Raises:
        ValueError: a setting has no meaning.
        DataError: the data has bad rows (unless `skip_bad`) or none that can be trained on.
        SetupError: the model cannot be loaded, the output folder is in use, or `resume` does not fit it.
    """
    from transformers import set_seed

    anchors = anchor_config(settings.preset)
    checkpoint = _prepare_output(settings)
    train_rows, val_rows, bad = _read(settings, progress)
    dtype = loading.choose_dtype(settings.preset.dtype, say)
    optimizer = loading.choose_optimizer(settings.preset.optimizer, say)
    model, processor = loading.load(settings.model, dtype)

    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    train_rows, train_bad = check_texts(settings.data, train_rows, processor, context)
    val_rows, val_bad = check_texts(settings.val_data or settings.data, val_rows, processor, context)
    bad += train_bad + val_bad
    _refuse_or_list(bad, train_rows, settings, say)

    train_set, val_set = (SampleDataset(samples(rows, settings.turns)) for rows in (train_rows, val_rows))
    anchors = with_tokens_of(
        anchors, processor
    )  # what to leave out in calls without a mask, as of an evaluation harness
    if not anchors.inserts_nothing and not any(sample.images for sample in train_set.samples):
        raise DataError(f"{settings.data} has no row with an image, so nothing can be inserted; train it with --tau 1")
    try:
        attach(model, anchors)
    except (ValueError, TypeError) as error:
        raise SetupError(f"AttAnchor cannot be attached to {settings.model}: {error}") from error
    set_seed(settings.seed)  # before the adapters are drawn: runs that differ in anchors alone start alike
    model = loading.add_lora(model, settings.preset)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    validation = f"{len(val_set)} to validate" if len(val_set) else "no validation, so no early stopping"
    say(f"{len(train_set)} samples to train, {validation}; {trained:,} of {total:,} parameters are trained")
    return _train(settings, model, processor, train_set, val_set, dtype, optimizer, checkpoint, len(bad), say, progress)


def anchor_config(preset: Preset) -> AttAnchorConfig:
    """The AttAnchor settings of a preset.

    Raises:
        ValueError, TypeError: one of them has no meaning.
    """
    return AttAnchorConfig(
        tau=preset.tau,
        direction=preset.direction or "text_into_image",
        positions=preset.positions,
        max_anchors=preset.max_anchors,
        route=preset.route,
    )


# --- Before training. ------------------------------------------------------------------------------------------------


def _prepare_output(settings: TrainSettings) -> Path | None:
    """Make the output folder ready; with `resume`, the checkpoint to go on from."""
    output = settings.output
    if output.exists() and not output.is_dir():
        raise SetupError(f"output {output} is a file; it should be a folder, or not exist")
    checkpoints = complete_checkpoints(output)
    if not settings.resume:
        if checkpoints or (output / "adapter_config.json").exists():
            raise SetupError(f"output {output} holds a trained run; continue it with --resume, or take another folder")
    elif not checkpoints:
        raise SetupError(f"output {output} holds no checkpoint to resume from; leave --resume out to start anew")
    else:
        _check_same_run(settings)
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not os.access(output, os.W_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        raise SetupError(f"output {output} cannot be written to: {error.strerror}") from error
    if not settings.resume:
        write_json(output / RUN_FILE, {"settings": _as_json(settings)})
    return checkpoints[-1] if settings.resume else None


def complete_checkpoints(output: Path) -> list[Path]:
    """Checkpoint folders by step; without `trainer_state.json`, which is written last, one was cut short."""
    found = [path.parent for path in output.glob("checkpoint-*/trainer_state.json")]
    return sorted(
        (p for p in found if p.name.rpartition("-")[2].isdigit()), key=lambda p: int(p.name.rpartition("-")[2])
    )


def _as_json(settings: TrainSettings) -> dict[str, object]:
    values = dataclasses.asdict(settings)
    values |= values.pop("preset")
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}


def _check_same_run(settings: TrainSettings) -> None:
    path = settings.output / RUN_FILE
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError) as error:
        raise SetupError(f"{path} cannot be read, so it is not known what to resume: {error}") from error
    now = _as_json(settings)
    different = [name for name in now if name not in _FREE_ON_RESUME and before.get(name) != now[name]]
    if different:
        changes = "; ".join(f"{name} was {before.get(name)!r} and is {now[name]!r}" for name in different)
        raise SetupError(f"the run in {settings.output} had other settings: {changes}; resume it with the same ones")


def _read(settings: TrainSettings, progress: bool) -> tuple[list[Row], list[Row], list[BadRow]]:
    rows, bad = read_rows(settings.data, settings.images, settings.skip_bad, progress)
    if settings.val_data is None:
        return *split_rows(rows, settings.val_fraction, settings.seed), bad
    val_rows, val_bad = read_rows(settings.val_data, settings.images, settings.skip_bad, progress)
    return rows, val_rows, bad + val_bad


def _refuse_or_list(bad: list[BadRow], rows: list[Row], settings: TrainSettings, say: Callable[[str], None]) -> None:
    if not bad:
        return
    if not settings.skip_bad:
        raise DataError(
            "\n".join([*map(str, bad[:10]), f"{len(bad)} bad rows: mend them, or leave them out with --skip-bad"]), bad
        )
    if not rows:
        raise DataError(f"{settings.data} has no usable row; {bad[0]}", bad)
    path = settings.output / SKIPPED_FILE
    write_json(path, [{"file": str(one.file), "row": one.number, "reason": one.reason} for one in bad])
    say(f"{len(bad)} bad rows left out, listed in {path}:")
    for one in bad[:10]:
        say(f"  {one}")
    if len(bad) > 10:
        say(f"  … and {len(bad) - 10} more")


# --- Training. -------------------------------------------------------------------------------------------------------


def _train(
    settings: TrainSettings,
    model: Any,
    processor: Any,
    train_set: SampleDataset,
    val_set: SampleDataset,
    dtype: torch.dtype,
    optimizer: str,
    checkpoint: Path | None,
    skipped: int,
    say: Callable[[str], None],
    progress: bool,
) -> TrainResult:
    # Here and not above: the import takes seconds, and mistakes in the data should show before.
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from attanchor_vlm import trainer as parts

    arguments = _arguments(settings, len(train_set), bool(len(val_set)), dtype, optimizer, progress)
    interrupt, plateau = parts.KeepOnInterrupt(), None
    callbacks = [parts.LogFile(settings.output), parts.SettingsBesideCheckpoints(), interrupt]
    if len(val_set):
        callbacks.append(parts.EvaluateLastStep())
        if settings.preset.patience is not None:
            plateau = parts.StopOnPlateau(settings.preset.patience)
            callbacks.append(plateau)
    trainer = parts.AnchorTrainer(
        model=model,
        args=arguments,
        data_collator=Collator(processor, settings.turns),
        train_dataset=train_set,
        eval_dataset=val_set if len(val_set) else None,
        callbacks=callbacks,
    )
    if checkpoint is not None:
        _check_steps_left(checkpoint, planned_steps(settings, len(train_set)))
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    if progress:
        trainer.add_callback(parts.Progress())

    started = time.perf_counter()
    try:
        with expect_anchors(base_of(model)):
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.restore()
    seconds = time.perf_counter() - started
    log = trainer.state.log_history
    losses = [line["eval_loss"] for line in log if "eval_loss" in line]
    result = TrainResult(
        output=settings.output,
        steps=trainer.state.global_step,
        seconds=seconds,
        log=log,
        val_loss=min(losses, default=None),
        interrupted=interrupt.interrupted,
        stopped_early=plateau is not None and plateau.stopped_at is not None,
        skipped=skipped,
        model=model,
        processor=processor,
    )
    _finish(settings, result, trainer, say)
    return result


def planned_steps(settings: TrainSettings, count: int) -> int:
    """Optimiser steps of a run over `count` samples."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    batches = math.ceil(count / (settings.preset.batch_size * processes))
    per_epoch = math.ceil(batches / settings.preset.accumulation)
    return settings.max_steps or math.ceil(per_epoch * settings.preset.epochs)


def _check_steps_left(checkpoint: Path, planned: int) -> None:
    """Trainer would add a step to a run that has made all of them."""
    made = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))["global_step"]
    if made >= planned:
        raise SetupError(
            f"{checkpoint.parent} holds a run that has made {made} steps, and {planned} are asked for; "
            "raise --max-steps or --epochs to go on"
        )


def _arguments(
    settings: TrainSettings, count: int, validates: bool, dtype: torch.dtype, optimizer: str, progress: bool
):
    from transformers import TrainingArguments

    preset = settings.preset
    every = settings.eval_steps or max(1, min(500, planned_steps(settings, count) // 8))
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
    checkpointing: dict[str, Any] = (
        {name: True, f"{name}_kwargs": {"use_reentrant": False}} if settings.gradient_checkpointing else {}
    )
    return TrainingArguments(
        output_dir=str(settings.output),
        per_device_train_batch_size=preset.batch_size,
        per_device_eval_batch_size=settings.eval_batch_size or preset.batch_size,
        gradient_accumulation_steps=preset.accumulation,
        num_train_epochs=preset.epochs,
        max_steps=settings.max_steps or -1,
        learning_rate=preset.lr,
        lr_scheduler_type=preset.scheduler,
        warmup_steps=preset.warmup,  # below 1 it is a share of all steps
        weight_decay=preset.weight_decay,
        optim=optimizer,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        **checkpointing,
        eval_strategy="steps" if validates else "no",
        eval_steps=every if validates else None,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        load_best_model_at_end=validates,
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False if validates else None,
        prediction_loss_only=True,  # logits have the lengthened sequence's length, labels the old one's
        remove_unused_columns=False,  # the collator, not the data set, makes the model's arguments
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not progress,
        dataloader_num_workers=settings.workers,
        dataloader_persistent_workers=settings.workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        seed=settings.seed,
        data_seed=settings.seed,
    )


def _finish(settings: TrainSettings, result: TrainResult, trainer, say: Callable[[str], None]) -> None:
    if result.interrupted:
        say(f"interrupted after step {result.steps}; continue with the same command and --resume")
        return
    if trainer.is_world_process_zero():
        model = trainer.accelerator.unwrap_model(trainer.model)
        model.save_pretrained(settings.output)
        save_settings(model, settings.output)
        result.processor.save_pretrained(settings.output)
        summary = {
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "val_loss": result.val_loss,
            "stopped_early": result.stopped_early,
            "skipped_rows": result.skipped,
        }
        write_json(settings.output / RUN_FILE, {"settings": _as_json(settings), "result": summary})
    if result.stopped_early:
        say(f"stopped at step {result.steps}: no better validation loss for {settings.preset.patience} steps")
    loss = f", validation loss {result.val_loss:.4f}" if result.val_loss is not None else ""
    say(f"{result.steps} steps in {result.seconds:.0f} s{loss}; adapter and settings in {settings.output}")
