"""Run tasks of lmms-eval on a model, quietly, and give back the figures that were computed."""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from attanchor_vlm.errors import DataError
from attanchor_vlm.evaluation import amber, benchmarks
from attanchor_vlm.evaluation.extras import require

_WHAT = "a benchmark task"


def check_tasks(
    names: Sequence[str], data: Mapping[str, Path], include: Path | None = None, limit: int | None = None
) -> None:
    """Refuse tasks that do not exist and data that is not there, before a model is loaded."""
    require("lmms_eval.evaluator", "lmms-eval", _WHAT)
    if include is not None and not include.is_dir():
        raise DataError(f"include path {include} is not a folder; it should hold task files of lmms-eval (.yaml)")
    if strangers := sorted(set(data) - set(names)):
        raise ValueError(f"task data is given for {', '.join(strangers)}, which is not among the tasks")
    if "mme" in names and limit is not None and limit % 2:
        raise ValueError(f"limit is {limit}; with task mme it should be even: its questions come in pairs")
    for name, folder in data.items():
        if not folder.is_dir():
            raise DataError(f"task data {folder} for {name} is not a folder")
    if "amber" in names:
        if "amber" not in data:
            raise DataError("task amber needs its data: give --task-data amber=DIR with AMBER's folder")
        amber.questions(data["amber"])
    remote = [name for name in names if name in benchmarks.BENCHMARKS and name not in data]
    from attanchor_vlm.model.load import hub_unreachable

    if remote and (reason := hub_unreachable()):
        raise DataError(
            f"the data of task {remote[0]} come from the Hugging Face Hub, which cannot be reached ({reason}); give "
            f"--task-data {remote[0]}=DIR, or set HF_HUB_OFFLINE=1 if they are in its cache"
        )
    own = [name for name in names if name not in benchmarks.BENCHMARKS]
    if own:
        known = set(_manager(include).all_tasks)
        if unknown := [name for name in own if name not in known]:
            raise ValueError(
                f"task is {unknown[0]!r}; it should be one of {', '.join(benchmarks.BENCHMARKS)}, or a task that "
                "lmms-eval or --include-path has"
            )


def check_data(names: Sequence[str], data: Mapping[str, Path], include: Path | None = None) -> None:
    """Load the data of tasks, which the runs that follow take from the cache."""
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        for name in names:
            _task(name, benchmarks.task_config(name, data.get(name), Path(temporary)), include)


def run_tasks(
    model: Any,
    names: Sequence[str],
    data: Mapping[str, Path] | None = None,
    include: Path | None = None,
    limit: int | None = None,
    output: Path | None = None,
    seed: int = 0,
) -> dict[str, float]:
    """Values by name: a benchmark's own (`BENCHMARKS[name].values`), for other tasks "task/metric".

    Args:
        model: An lmms of lmms-eval, such as `AttAnchorLmms`.
        names: Benchmarks, or other tasks of lmms-eval.
        data: Local folders by name, see `benchmarks.task_config`.
        include: A folder with task files (.yaml) of your own.
        limit: So many documents of each task, for trials. Figures that these are not enough for are left out.
        output: A folder for what tasks write themselves, such as submissions; None for nowhere.
    """
    require("lmms_eval.evaluator", "lmms-eval", _WHAT)
    from lmms_eval import evaluator

    data = data or {}
    with tempfile.TemporaryDirectory() as temporary, _quiet():
        work = Path(temporary)
        if "amber_g" in names and "amber" in data:
            amber.lend_metadata(data["amber"], work)
        configs = {name: benchmarks.task_config(name, data.get(name), work) for name in names}
        tasks = {name: str(config["task"]) for name, config in configs.items()}
        # The nine score an answer without its image, which would be decoded a second time; other tasks may need it.
        look_again = any(name not in benchmarks.BENCHMARKS for name in names)
        results = evaluator.simple_evaluate(
            model,
            tasks=[_task(name, config, include) for name, config in configs.items()],
            task_manager=_manager(include),
            limit=limit,
            bootstrap_iters=0,
            log_samples=False,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            cli_args=Namespace(output_path=str(output or work), process_with_media=look_again),
            process_docs_parallel=1,
        )
    if results is None:  # not rank 0
        return {}
    found: dict[str, float] = {}
    for name, task in tasks.items():
        scores = _figures(results["results"].get(task, {}))
        known = benchmarks.BENCHMARKS.get(name)
        if known is None:
            found |= {f"{name}/{metric}": value for metric, value in scores.items()}
            continue
        for key, compute in known.values.items():
            try:
                found[key] = compute(scores)
            except KeyError as error:
                if limit is not None:
                    continue  # MME's first documents are all of one half
                raise ValueError(
                    f"task {task} gave {sorted(scores) or 'no figure'}; {known.title} needs {error.args[0]}"
                ) from error
    if "amber_f1" in found and "amber_g/amber_chair" in found:
        found["amber_score"] = amber.combined(found["amber_g/amber_chair"], found["amber_f1"])
    return found


def _figures(results: Mapping[str, Any]) -> dict[str, float]:
    """Numbers of a task's results, keyed by metric alone: lmms-eval has "metric,filter", and texts among them."""
    figures = {}
    for key, value in results.items():
        metric, _, rule = key.partition(",")
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if rule and number and "_stderr" not in metric:
            figures[metric if rule == "none" else f"{metric}/{rule}"] = float(value)
    return figures


def _task(name: str, config: dict[str, Any], include: Path | None) -> Any:
    """A task made of a configuration, or the name of one that is no benchmark of the paper's.

    lmms-eval's own way with configurations forgets that the model takes chats.
    """
    from tenacity import RetryError  # what lmms-eval tries downloads again with

    if name not in benchmarks.BENCHMARKS and set(config) == {"task"}:
        return config["task"]
    try:
        if config["task"] == amber.TASK:
            from lmms_eval.api.task import ConfigurableMessagesTask

            return ConfigurableMessagesTask(config=config)
        return next(iter(_manager(include).load_task_or_group([config], "chat").values()))
    except (OSError, KeyError, RetryError) as error:
        cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
        reason = str(cause).strip().partition("\n")[0]
        raise DataError(
            f"the data of task {name} cannot be loaded: {reason}; give their folder as --task-data {name}=DIR"
        ) from error


@functools.lru_cache(maxsize=4)
def _manager(include: Path | None) -> Any:
    """lmms-eval reads some two thousand task files for it: a few seconds, once."""
    from lmms_eval.tasks import TaskManager

    with _quiet():
        return TaskManager("ERROR", include_path=None if include is None else str(include))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """lmms-eval's log is left out, and what its tasks print goes to stderr: stdout is for results."""
    from loguru import logger

    logger.disable("lmms_eval")
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        logger.enable("lmms_eval")
