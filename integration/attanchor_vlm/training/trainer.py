"""transformers' Trainer with anchors: their share, score and tau in every log line, and a run that loses nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_pt_utils import get_length_grouped_indices
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from attanchor_vlm import distributed
from attanchor_vlm.data.stream import SampleStream, StreamLoader
from attanchor_vlm.model.adapter_files import load_settings, save_settings
from attanchor_vlm.model.attach import anchor_counts, base_of, set_tau, tau_of
from attanchor_vlm.training import checkpoints
from attanchor_vlm.training.tau import TauKeeper

KEPT_CHECKPOINTS = 2  # and the best one

# (the model itself, the batch, the model's output) -> a scalar, the mean over this batch, with its weight in it.
ExtraLoss = Callable[[Any, dict[str, Any], Any], Tensor]
EXTRA_INPUTS = ("alignment",)  # what collators put into a batch for an extra loss, and the model is not given


class AnchorTrainer(Trainer):
    """Logs what was inserted since the last line: a threshold is fixed while the projector trains, so both may drift.

    `inserted_share` is inserted anchors over the text tokens that take part (image-into-text: it may exceed 1),
    `anchor_score` the mean cosine of the inserted, left out where there are none, and `tau` the threshold of the step.

    Args:
        keeper: Chooses tau; without one it stays what the model was attached with.
        extra_losses: By the name that their values are logged under, what is added to the loss of the answers.
        lengths: Of the training samples, in tokens: batches are then made of samples of like lengths.

    Raises:
        ValueError: label smoothing is asked for: Trainer would take the labels away before the model lengthens them.
    """

    def __init__(
        self,
        *args,
        keeper: TauKeeper | None = None,
        extra_losses: Mapping[str, ExtraLoss] | None = None,
        lengths: Sequence[int] | None = None,
        **kwargs,
    ):
        super().__init__(*args, **kwargs)
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}; it should be 0: the inserted anchors "
                "lengthen the labels inside the model, and Trainer's label smoothing keeps the short ones"
            )
        self.keeper, self.extra_losses, self.lengths = keeper, dict(extra_losses or {}), lengths
        if keeper is not None:
            self.add_callback(keeper)
        # Inserted, taking part, sum of scores, then the extra losses: on the device, read when logged.
        self._counts: Tensor | None = None
        self._batches = 0
        self._tau = tau_of(self.model)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        own = {name: value for name, value in inputs.items() if name not in EXTRA_INPUTS}
        loss, outputs = super().compute_loss(model, own, return_outputs=True, num_items_in_batch=num_items_in_batch)
        if model.training:
            inner = self.accelerator.unwrap_model(model)
            counts, plan = anchor_counts(inner, inputs), base_of(inner).attanchor_plan
            if self.keeper is not None and plan is not None and "anchor_mask" in inputs:
                self.keeper.observe(plan, inputs["anchor_mask"])
            # Further losses come in here. The answers' loss is a mean over the tokens of a whole optimiser step, on
            # all devices; these are means over a batch, so they are divided by the step's batches (and DDP averages).
            for extra in self.extra_losses.values():
                value = extra(inner, inputs, outputs)
                loss = loss + value / self.current_gradient_accumulation_steps
                counts = torch.cat([counts, value.detach().float()[None].to(counts.device)])
            self._counts = counts if self._counts is None else self._counts + counts
            self._batches += 1
            self._tau = tau_of(inner)
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        if "loss" in logs and self._counts is not None:
            totals = distributed.add_up(torch.cat([self._counts.double().cpu(), torch.tensor([float(self._batches)])]))
            inserted, candidates, score, *extras, batches = totals.tolist()
            logs["inserted_share"] = inserted / candidates if candidates else 0.0
            if inserted:
                logs["anchor_score"] = score / inserted
            logs["tau"] = self._tau
            logs.update({name: value / batches for name, value in zip(self.extra_losses, extras, strict=True)})
            self._counts, self._batches = None, 0
        super().log(logs, *args, **kwargs)

    # --- Batches. ----------------------------------------------------------------------------------------------------

    def get_train_dataloader(self) -> DataLoader:
        """As Trainer's; a stream is divided among the processes already."""
        stream = self.train_dataset
        if not isinstance(stream, SampleStream):
            return self._with_own_seeds(super().get_train_dataloader())
        workers = self.args.dataloader_num_workers
        return StreamLoader(
            stream,
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(self.args.seed),  # not the global one, which a resumed run restores
        )

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        return self._with_own_seeds(super().get_eval_dataloader(eval_dataset))

    def _with_own_seeds(self, loader: DataLoader) -> DataLoader:
        """`loader`, its workers' seeds no longer drawn from the global generator: that happens whenever workers start,
        which in a resumed run is at other steps, and dropout would differ from then on."""
        inner = getattr(loader, "base_dataloader", loader)  # of accelerate's
        inner.generator = torch.Generator().manual_seed(self.args.seed)
        return loader

    def _get_train_sampler(self, train_dataset=None):
        if self.lengths is None:
            return super()._get_train_sampler(train_dataset)
        batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * distributed.world_size()
        return LengthGroupedSampler(self.lengths, batch, self.args.seed)

    def _run_epoch(self, *args, **kwargs):
        """As Trainer's, which would make one step more when it is resumed behind the last, or told to stop before."""
        if self.control.should_training_stop or self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    # --- Checkpoints. ------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial):
        """As Trainer's, and the AttAnchor settings and tau's state with it; whole when every process is through."""
        folder = Path(self.args.output_dir or ".") / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        with checkpoints.writing(folder):
            if self.is_world_process_zero():
                (folder / checkpoints.STATE_FILE).unlink(missing_ok=True)
            super()._save_checkpoint(model, trial)
            distributed.wait_for_all()
            if self.is_world_process_zero():
                inner = self.accelerator.unwrap_model(self.model)
                save_settings(inner, folder)
                kept = self.keeper.state() if self.keeper is not None else None
                checkpoints.mark_complete(folder, {"tau": tau_of(inner), "keeper": kept})
        if self.is_world_process_zero():
            best = self.state.best_model_checkpoint
            checkpoints.delete_old(folder.parent, KEPT_CHECKPOINTS, best)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        with checkpoints.reading(Path(resume_from_checkpoint)):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is not None:
            with checkpoints.reading(Path(checkpoint)):
                super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint):
        if checkpoint is not None:
            with checkpoints.reading(Path(checkpoint)):
                super()._load_rng_state(checkpoint)

    def _load_best_model(self):
        """The best weights, and the tau that they were validated with."""
        super()._load_best_model()
        best = self.state.best_model_checkpoint
        if best is not None:
            set_tau(self.accelerator.unwrap_model(self.model), load_settings(best).tau)


class LengthGroupedSampler(torch.utils.data.Sampler[int]):
    """Indices in an order that puts samples of like lengths into a batch, shuffled anew in every epoch.

    transformers' sampler of that name draws from the global generator, which differs among processes and in a resumed
    run; this one's order is a function of seed and epoch. `batch` samples make an optimiser step, on all devices.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int):
        self.lengths, self.batch, self.seed, self.epoch = list(lengths), batch, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self):
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return iter(get_length_grouped_indices(self.lengths, self.batch, generator=generator))
