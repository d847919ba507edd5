"""What one evaluation measures, on what: the options of `attanchor eval`, and the Python API."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from attanchor_vlm.evaluation.text_metrics import TEXT_METRICS
from attanchor_vlm.evaluation.text_metrics import check as check_metrics
from attanchor_vlm.settings import check_values, setting

LOSS = "loss"
TEXT = (LOSS, "bleu", "bertscore", "meteor", "cider", "rougeL")  # the paper's six, and its nine
TASKS = ("vqav2", "scienceqa", "gqa", "vizwiz", "mmbench", "mme", "pope", "amber", "hallusionbench")
PREDICTIONS = ("generate", "teacher-forced")


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What is measured, on what. Every field says what it means."""

    data: Path | None = setting(None, "LLaVA-Instruct rows that --metrics are of.")
    images: Path | None = setting(None, "Folder that the rows' images are in.")
    metrics: tuple[str, ...] = setting(
        (), f"Of --data, with commas: {', '.join((LOSS, *TEXT_METRICS))}; or all, none.", all_of=TEXT
    )
    tasks: tuple[str, ...] = setting(
        (), f"With commas: {', '.join(TASKS)}, and other tasks of lmms-eval; or all (nine), none.", all_of=TASKS
    )
    task_data: Mapping[str, Path] = setting(
        dict, "A local folder with a task's data; several times for several tasks.", metavar="NAME=DIR"
    )
    include_path: Path | None = setting(None, "A folder with more task files (.yaml) of lmms-eval.")
    predictions: str = setting(
        "generate", "Answers to compare: generated, or the likeliest token after each true one.", choices=PREDICTIONS
    )
    bertscore_model: str = setting("roberta-large", "BERTScore's encoder: a folder, or a Hub id.")
    bertscore_layer: int | None = setting(None, "Its layer; by default the one that bert-score knows.")
    batch_size: int = setting(4, "Prompts at a time.", at_least=1)
    limit: int | None = setting(None, "At most so many samples, and documents of each task.", at_least=1)
    max_new_tokens: int = setting(256, "Bound of generated answers to --data.", at_least=1)
    skip_bad: bool = setting(False, "Leave bad rows out and list them, instead of stopping.")
    seed: int = setting(0, "For tasks with chance in them.")

    def check(self) -> None:
        """Refuse what cannot be measured here, before a model is loaded.

        Raises:
            ValueError: naming what is wrong; a `MissingExtraError` for packages that are not installed.
        """
        from attanchor_vlm.evaluation import harness

        if not self.metrics and not self.tasks:
            raise ValueError("nothing is asked for; give --metrics with --data and --images, or --tasks")
        if self.metrics and (self.data is None or self.images is None):
            raise ValueError("metrics of text need --data and --images")
        check_values(self)
        check_metrics([name for name in self.metrics if name != LOSS], self.bertscore_model)
        if self.tasks or self.task_data:
            harness.check_tasks(self.tasks, self.task_data, self.include_path, self.limit)
