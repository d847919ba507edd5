"""One run of LoRA training with anchors: what `attanchor train` and the demo both call."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from attanchor_vlm import distributed
from attanchor_vlm.analysis.calibrate import HIGHEST_TAU, measure_scores
from attanchor_vlm.data import dataset as train_data
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.dataset import STREAM_SKIPPED_FILE, TrainData
from attanchor_vlm.data.lengths import Growth
from attanchor_vlm.data.stream import SampleStream
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.adapter_files import save_settings
from attanchor_vlm.model.attach import attach, base_of, tau_of
from attanchor_vlm.model.candidates import with_tokens_of
from attanchor_vlm.model.guard import expect_anchors
from attanchor_vlm.model.pauses import with_pauses
from attanchor_vlm.records import alone_in, write_json
from attanchor_vlm.training import checkpoints
from attanchor_vlm.training.alignment import AlignedCollator, aligner_for
from attanchor_vlm.training.checkpoints import RUN_FILE, complete_checkpoints
from attanchor_vlm.training.config import TrainConfig
from attanchor_vlm.training.lora import add_lora, choose_optimizer, layer_classes

__all__ = ["TrainResult", "complete_checkpoints", "planned_steps", "run"]

_CARD = """---
base_model: {model}
library_name: peft
tags: [lora, attanchor]
---
# LoRA adapter of {model}, trained with AttAnchor

{anchors}. `run.json` holds all settings, `attanchor.json` those of the anchors, which belong to the adapter.

```python
from attanchor_vlm import answer, load

model, processor = load("{model}", "{output}")
print(answer(model, processor, "What is in the picture?", ["picture.png"]).text)
```
"""


@dataclass
class TrainResult:
    """What a run did. `log` holds Trainer's lines; `val_loss` is the lowest, None without validation or if none of its
    losses is a number."""

    output: Path
    steps: int
    seconds: float
    log: list[dict[str, float]]
    val_loss: float | None
    interrupted: bool
    stopped_early: bool
    skipped: int
    tau: float  # of the adapter
    model: Any = field(repr=False)
    processor: Any = field(repr=False)


def run(
    config: TrainConfig, say: Callable[[str], None] = print, progress: bool = True, callbacks: Sequence[Any] = ()
) -> TrainResult:
    """Train LoRA adapters and save them with their AttAnchor settings to `config.output`.

    Everything that can be wrong with the data, the model's name or the settings is found before training starts.
    Checkpoints go to ``output/checkpoint-N``, log lines to ``output/log.jsonl``; the adapter with the lowest validation
    loss (without validation: the last one) to `output` itself. In every process that torchrun started, the same call.

    Args:
        config: What to train, on what, and how.
        say: Takes the lines for the user, in the first process.
        progress: Show progress bars.
        callbacks: Further `TrainerCallback`s of transformers.

    Raises:
        ValueError: a setting has no meaning.
        DataError: the data has bad rows (unless `skip_bad`) or none that can be trained on.
        SetupError: the model cannot be loaded, the output folder is another run's or is in use by one, `resume` does
            not fit it, or the GPU's memory is too small.
        CheckpointError: a file cannot be written or read, or a process that loads data was killed.
    """
    with distributed.session(), ExitStack() as held:
        if not distributed.is_main():
            say, progress = (lambda line: None), False
        _check_sharding(config)
        loading.source_of(config.model)  # that there is no such model is said before images are checked
        distributed.on_main(lambda: held.enter_context(alone_in(config.output)))
        return _run(config, say, progress, callbacks)


def _run(config: TrainConfig, say: Callable[[str], None], progress: bool, callbacks: Sequence[Any]) -> TrainResult:
    from transformers import set_seed

    anchors = config.anchors()
    if config.fraction is not None:
        anchors = dataclasses.replace(anchors, tau=HIGHEST_TAU)  # until it is measured

    checkpoint = checkpoints.prepare_output(config)
    found = train_data.read(config, progress)
    dtype = loading.choose_dtype(config.dtype, say)
    optimizer = choose_optimizer(config.optimizer, say, config.fsdp)
    model, processor = loading.load_pretrained(config.model, dtype)
    growth = Growth.of(anchors, config.pause_tokens)
    data = train_data.make(found, config, processor, model, say, config.batch_size, config.fsdp, growth)

    # What to leave out in calls without a mask, as of an evaluation harness.
    anchors = with_tokens_of(anchors, processor)
    if not anchors.inserts_nothing and not data.may_have_images:
        raise DataError(f"{config.data} has no row with an image, so nothing can be inserted; train it with --tau 1")
    anchors = with_pauses(anchors, processor, config.pause_tokens, config.pause_token)
    try:
        attach(model, anchors)
    except (ValueError, TypeError) as error:
        raise SetupError(f"AttAnchor cannot be attached to {config.model}: {error}") from error
    set_seed(config.seed)  # before the adapters are drawn: runs that differ in anchors alone start alike
    model = add_lora(model, config.lora_rank, config.lora_alpha, config.lora_dropout)

    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    validation = f"{len(data.val)} to validate" if len(data.val) else "no validation, so no early stopping"
    samples = f"{data.count} samples" if data.count else "A stream of samples"
    say(f"{samples} to train, {validation}; {trained:,} of {total:,} parameters are trained")
    say(_described(config, dtype))
    return _train(config, model, processor, data, dtype, optimizer, checkpoint, say, progress, callbacks)


def _described(config: TrainConfig, dtype: torch.dtype) -> str:
    """What a reader wants to know first of a run's settings."""
    tau = f"tau {config.tau:g}" if config.fraction is None else f"tau for a fraction of {config.fraction:g}"
    length = f"{config.epochs:g} epochs" if config.max_steps is None else f"{config.max_steps} steps"
    preset = "" if config.preset is None else f"; preset {config.preset}"
    return (
        f"{tau}, {config.direction}; learning rate {config.lr:g}, batch {config.batch_size} x {config.accumulation}, "
        f"{length}, LoRA rank {config.lora_rank}, {str(dtype).removeprefix('torch.')}{preset}"
    )


def _check_sharding(config: TrainConfig) -> None:
    if config.fsdp and distributed.world_size() == 1:
        raise SetupError("fsdp shards a model over several processes, and this is one; start them with torchrun")
    if config.fsdp and not distributed.can_shard():
        raise SetupError("fsdp needs GPUs, and there is none; leave it out")


def _train(
    config: TrainConfig,
    model: Any,
    processor: Any,
    data: TrainData,
    dtype: torch.dtype,
    optimizer: str,
    checkpoint: Path | None,
    say: Callable[[str], None],
    progress: bool,
    callbacks: Sequence[Any],
) -> TrainResult:
    # Here and not above: the import takes seconds, and mistakes in the data should show before.
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    from attanchor_vlm.training import callbacks as calls
    from attanchor_vlm.training.trainer import AnchorTrainer

    planned = planned_steps(config, data.count)
    steps_left = checkpoint is None or checkpoints.check_steps_left(checkpoint, planned, config.patience)
    collate = Collator(processor, config.turns, config.content_words)
    known = [] if isinstance(data.train, SampleStream) else data.train
    aligner = aligner_for(config, model, processor, known, progress)
    interrupt, plateau = calls.KeepOnInterrupt(), None
    listeners = [calls.LogFile(config.output), calls.SameOrderOnResume(), interrupt, *callbacks]
    if len(data.val) and config.patience:
        plateau = calls.StopOnPlateau(config.patience)
        listeners.append(plateau)
    listeners.append(calls.SaveOften(config.save_steps, validate=bool(len(data.val))))
    arguments = _arguments(config, model, data, dtype, optimizer, progress)
    _check_optimizer(arguments, model)
    trainer = AnchorTrainer(
        model=model,
        args=arguments,
        data_collator=collate if aligner is None else AlignedCollator(collate, aligner.labels),
        train_dataset=data.train,
        eval_dataset=data.val if len(data.val) else None,
        callbacks=listeners,
        keeper=_keeper(config, data, collate, checkpoint, say, progress),
        lengths=data.lengths,
        extra_losses={} if aligner is None else {"align_loss": aligner},
    )
    if isinstance(data.train, SampleStream) and checkpoint is not None:
        data.train.taken = checkpoints.step_of(checkpoint) * config.accumulation
    trainer.remove_callback(ProgressCallback if progress else PrinterCallback)
    if progress:
        trainer.add_callback(calls.Progress())

    started = time.perf_counter()
    # A short run may draw no image at all, if some rows have none.
    guard = nullcontext() if data.may_lack_images or not steps_left else expect_anchors(base_of(model))
    watch = nullcontext() if aligner is None else aligner.watching(model)
    try:
        with checkpoints.explain_failures(config), guard, watch:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    finally:
        interrupt.restore()
    seconds = time.perf_counter() - started
    log = trainer.state.log_history
    losses = [line["eval_loss"] for line in log if math.isfinite(line.get("eval_loss", math.nan))]
    result = TrainResult(
        output=config.output,
        steps=trainer.state.global_step,
        seconds=seconds,
        log=log,
        val_loss=min(losses, default=None),
        interrupted=interrupt.interrupted,
        stopped_early=plateau is not None and plateau.stopped_at is not None,
        skipped=train_data.skipped(data, config),
        tau=tau_of(trainer.accelerator.unwrap_model(trainer.model)),
        model=model,
        processor=processor,
    )
    _finish(config, result, trainer, say)
    return result


def _check_optimizer(arguments: Any, model: Any) -> None:
    """Trainer would find out when it takes its first step."""
    from transformers import Trainer

    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    except (ImportError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].rstrip(".")
        raise SetupError(f"optimizer {arguments.optim.value} cannot be used here: {reason}") from error


def _keeper(
    config: TrainConfig,
    data: TrainData,
    collate: Collator,
    checkpoint: Path | None,
    say: Callable[[str], None],
    progress: bool,
):
    from attanchor_vlm.training.tau import TauKeeper

    if config.fraction is None:
        return None

    def measure(model):
        samples, own_part = train_data.calibration_samples(data, config.calibration_samples, config.seed)
        return measure_scores(model, collate, samples, config.batch_size, progress, own_part)

    keeper = TauKeeper(config.fraction, config.hold_fraction, measure, say)
    state = checkpoints.read_state(checkpoint) if checkpoint is not None else None
    if state is not None:
        keeper.restore(state["keeper"])
    return keeper


def planned_steps(config: TrainConfig, count: int) -> int:
    """Optimiser steps of a run over `count` samples."""
    batches = math.ceil(count / (config.batch_size * distributed.world_size()))
    per_epoch = math.ceil(batches / config.accumulation)
    return config.max_steps or math.ceil(per_epoch * config.epochs)


def _arguments(config: TrainConfig, model: Any, data: TrainData, dtype: torch.dtype, optimizer: str, progress: bool):
    from transformers import TrainingArguments

    validates = bool(len(data.val))
    every = config.eval_steps or max(1, min(500, planned_steps(config, data.count) // 8))
    streams = isinstance(data.train, SampleStream)
    workers = min(config.workers, data.train.shards_here) if isinstance(data.train, SampleStream) else config.workers
    return TrainingArguments(
        output_dir=str(config.output),
        per_device_train_batch_size=config.batch_size,
        per_device_eval_batch_size=config.eval_batch_size or config.batch_size,
        gradient_accumulation_steps=config.accumulation,
        num_train_epochs=config.epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.lr,
        lr_scheduler_type=config.scheduler,
        warmup_steps=config.warmup,  # below 1 it is a share of all steps
        weight_decay=config.weight_decay,
        optim=optimizer,
        fp16=dtype == torch.float16,
        bf16=dtype == torch.bfloat16,
        use_cpu=distributed.on_cpu() or (dtype == torch.bfloat16 and not torch.cuda.is_available()),
        **_memory(config, model),
        # A process whose batch has no image has no gradient for the projector, and DDP would wait for it.
        ddp_find_unused_parameters=data.may_lack_images,
        average_tokens_across_devices=True,  # the loss is a mean over all tokens, however they fall to the processes
        eval_strategy="steps" if validates else "no",
        eval_steps=every if validates else None,
        save_strategy="steps",
        save_steps=every,
        load_best_model_at_end=validates,  # AnchorTrainer deletes old checkpoints, not Trainer
        metric_for_best_model="eval_loss" if validates else None,
        greater_is_better=False if validates else None,
        prediction_loss_only=True,  # logits have the lengthened sequence's length, labels the old one's
        remove_unused_columns=False,  # the collator, not the data set, makes the model's arguments
        label_names=["labels"],
        logging_steps=1,
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=not progress,
        dataloader_num_workers=workers,
        dataloader_persistent_workers=workers > 0,
        dataloader_pin_memory=torch.cuda.is_available(),
        ignore_data_skip=streams,  # the stream itself goes on where it was
        seed=config.seed,
        data_seed=config.seed,
    )


def _memory(config: TrainConfig, model: torch.nn.Module) -> dict[str, Any]:
    """Sharding and gradient checkpointing."""
    from transformers import TrainingArguments

    chosen: dict[str, Any] = {}
    if config.fsdp:
        # Adapters are saved whole, by one process; the rest of a checkpoint is what accelerate makes of it.
        layers = layer_classes(model)
        sharding = {"version": 2, "state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": layers}
        chosen |= {"fsdp": True, "fsdp_config": sharding}
    if config.gradient_checkpointing:
        # transformers' own, for FSDP too: accelerate's leaves the KV cache on, which a layer run twice fills twice, and
        # draws other dropout masks the second time.
        known = {field.name for field in dataclasses.fields(TrainingArguments)}
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        chosen |= {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    return chosen


def _finish(config: TrainConfig, result: TrainResult, trainer, say: Callable[[str], None]) -> None:
    if result.interrupted:
        say(f"interrupted after step {result.steps}; continue with the same command and --resume")
        return
    is_writer = trainer.is_world_process_zero()
    write = partial(_write_adapter, config=config, result=result, trainer=trainer, is_writer=is_writer)
    checkpoints.replace_files(config.output, write, is_writer)
    if is_writer:
        summary = {
            "steps": result.steps,
            "seconds": round(result.seconds, 2),
            "val_loss": result.val_loss,
            "tau": result.tau,
            "stopped_early": result.stopped_early,
            "skipped_rows": result.skipped,
        }
        settings = {**checkpoints.as_json(config), "tau": result.tau}
        write_json(config.output / RUN_FILE, {"settings": settings, "result": summary})
    if result.stopped_early:
        say(f"stopped at step {result.steps}: no better validation loss for {config.patience} steps")
    if config.stream and result.skipped:
        say(f"{result.skipped} bad rows left out, listed in {config.output / STREAM_SKIPPED_FILE}")
    loss = f", validation loss {result.val_loss:.4f}" if result.val_loss is not None else ""
    say(f"{result.steps} steps in {result.seconds:.0f} s{loss}; adapter and settings in {config.output}")


def _write_adapter(folder: Path, config: TrainConfig, result: TrainResult, trainer, is_writer: bool) -> None:
    trainer.save_model(str(folder), _internal_call=True)  # of a sharded model, all processes gather it
    if is_writer:
        (folder / "training_args.bin").unlink(missing_ok=True)
        save_settings(trainer.accelerator.unwrap_model(trainer.model), folder)
        result.processor.save_pretrained(folder)
        loss = "" if result.val_loss is None else f", validation loss {result.val_loss:.4f}"
        anchors = f"tau {result.tau:g}, {config.direction}; {result.steps} steps{loss}"
        card = _CARD.format(model=config.model, output=config.output, anchors=anchors)
        (folder / "README.md").write_text(card, encoding="utf-8")  # in place of peft's empty template
