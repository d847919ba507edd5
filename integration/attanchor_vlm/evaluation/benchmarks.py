"""The paper's nine benchmarks: which task of lmms-eval each one is, and which of its figures the paper's table has."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import DataError
from attanchor_vlm.evaluation import amber

Scores = Mapping[str, float]  # of one task: lmms-eval's metric, its value


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        title: As the paper names it.
        task: Of lmms-eval 0.7.
        values: What is reported from the task's scores; the first has the benchmark's own name and is the paper's row.
            In percent, but for MME.
        overrides: Of the task's configuration; called when lmms-eval can be imported.
    """

    title: str
    task: str
    values: Mapping[str, Callable[[Scores], float]]
    overrides: Callable[[], dict[str, Any]] = field(default=dict)


def _percent(metric: str) -> Callable[[Scores], float]:
    return lambda scores: 100 * scores[metric]


def _as_is(metric: str) -> Callable[[Scores], float]:
    return lambda scores: scores[metric]


def _hallusion_by_rule() -> dict[str, Any]:
    """Answers read as yes or no, by lmms-eval's rule; its default asks GPT-4, and without it counts answers wrong."""
    from lmms_eval.tasks.hallusion_bench import evaluate_hb

    names = ("aAcc", "qAcc", "fAcc")
    rules = [getattr(evaluate_hb, f"hb_aggregation_result_{name}_intern") for name in names]
    return {"metric_list": [_metric(*one) for one in zip(names, rules, strict=True)]}


def _mmbench_without_submission() -> dict[str, Any]:
    """The score alone: the task would also write a spreadsheet for MMBench's server."""
    from lmms_eval.tasks.mmbench import en_utils

    return {"metric_list": [_metric("gpt_eval_score", en_utils.mmbench_aggregate_dev_results_static)]}


def _metric(name: str, aggregation: Callable[..., float]) -> dict[str, Any]:
    return {"metric": name, "aggregation": aggregation, "higher_is_better": True}


# Behind each, what its figure is of; the paper does not name its splits.
BENCHMARKS: dict[str, Benchmark] = {
    "vqav2": Benchmark("VQAv2", "vqav2_val", {"vqav2": _percent("exact_match")}),  # validation
    "scienceqa": Benchmark("ScienceQA", "scienceqa_img", {"scienceqa": _percent("exact_match")}),  # test, with images
    "gqa": Benchmark("GQA", "gqa", {"gqa": _percent("exact_match")}),  # testdev, balanced
    "vizwiz": Benchmark("VizWiz", "vizwiz_vqa_val", {"vizwiz": _percent("exact_match")}),  # validation
    "mmbench": Benchmark(  # dev, English, options matched without GPT
        "MMBench", "mmbench_en_dev_static", {"mmbench": _as_is("gpt_eval_score")}, _mmbench_without_submission
    ),
    "mme": Benchmark(  # perception and cognition together, of 2800
        "MME",
        "mme",
        {
            "mme": lambda scores: scores["mme_perception_score"] + scores["mme_cognition_score"],
            "mme_perception": _as_is("mme_perception_score"),
        },
    ),
    "pope": Benchmark(  # accuracy over random, popular and adversarial
        "POPE", "pope", {"pope": _percent("pope_accuracy"), "pope_f1": _percent("pope_f1_score")}
    ),
    "amber": Benchmark(  # F1 of the yes-or-no questions
        "AMBER",
        amber.TASK,
        {"amber": _as_is("amber_f1")}
        | {f"amber_{name}": _as_is(f"amber_{name}") for name in ("accuracy", "precision", "recall")},
    ),
    "hallusionbench": Benchmark(  # questions with images, accuracy over all, answers read as yes or no by rule
        "HallusionBench",
        "hallusion_bench_image",
        {
            "hallusionbench": _percent("aAcc"),
            "hallusionbench_question_pairs": _percent("qAcc"),
            "hallusionbench_figures": _percent("fAcc"),
        },
        _hallusion_by_rule,
    ),
}


def task_config(name: str, data: Path | None, work: Path) -> dict[str, Any]:
    """What lmms-eval is given for a benchmark, or for another of its tasks.

    Args:
        name: A key of `BENCHMARKS`, or a task that lmms-eval knows.
        data: A folder in place of the task's data set on the Hub: a clone of its repository, a folder of .parquet files
            named after their splits (test.parquet, test-00000-of-00002.parquet), or what `save_to_disk` wrote. AMBER's
            own folder for "amber", which needs one.
        work: A folder for files that the task needs.
    """
    if name == "amber":
        assert data is not None  # or `harness.check_tasks` has refused it
        return amber.task_config(data, work / "amber_d.jsonl")
    known = BENCHMARKS.get(name)
    config: dict[str, Any] = {"task": known.task if known else name}
    if known:
        config |= known.overrides()
    if data is not None:
        config |= _from_folder(data)
        if name == "gqa":
            config["process_docs"] = _gqa_images_from(data)
    return config


def _from_folder(folder: Path) -> dict[str, Any]:
    """Where a task's rows are: a saved data set, a clone of the Hub's (whose README lists its parts), or .parquet."""
    folder = folder.resolve()
    if (folder / "dataset_dict.json").is_file():
        return {"dataset_path": str(folder), "dataset_kwargs": {"load_from_disk": True}, "dataset_name": None}
    if (folder / "README.md").is_file():
        return {"dataset_path": str(folder), "dataset_kwargs": {}}
    files: dict[str, list[str]] = {}
    for file in sorted(folder.glob("*.parquet")):
        files.setdefault(file.stem.partition("-")[0], []).append(str(file))
    if not files:
        raise DataError(f"task data {folder} holds no README.md, dataset_dict.json or .parquet file")
    return {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": files}}


def _gqa_images_from(folder: Path) -> Callable[[Any], Any]:
    """GQA keeps questions and images apart, and lmms-eval's task fetches the images from the Hub."""

    def add_images(questions: Any) -> Any:
        if "image" in questions.column_names:
            return questions
        import datasets

        table = datasets.load_dataset(str(folder.resolve()), "testdev_balanced_images", split="testdev")
        row_of = {key: row for row, key in enumerate(table["id"])}
        return questions.map(lambda doc: {"image": table[row_of[doc["imageId"]]]["image"]})

    return add_images
