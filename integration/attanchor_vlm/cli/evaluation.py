"""`attanchor eval`: the paper's fifteen metrics of a model, with or without a trained adapter."""

from __future__ import annotations

import json
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import ADAPTER, MODEL, SKIP_BAD, Direction, Dtype, quiet

TEXT = ("loss", "bleu", "bertscore", "meteor", "cider", "rougeL")  # the paper's six, and its nine
TASKS = ("vqav2", "scienceqa", "gqa", "vizwiz", "mmbench", "mme", "pope", "amber", "hallusionbench")


class Predictions(str, Enum):
    generate = "generate"
    forced = "teacher-forced"


TASK_DATA = Annotated[
    list[str] | None,
    typer.Option(metavar="NAME=DIR", help="A local folder with a task's data; several times for several tasks."),
]
INCLUDE = Annotated[Path | None, typer.Option(help="A folder with more task files (.yaml) of lmms-eval.")]
BERTSCORE = Annotated[str, typer.Option(help="BERTScore's encoder: a folder, or a Hub id.")]
BERTSCORE_LAYER = Annotated[int | None, typer.Option(help="Its layer; by default the one that bert-score knows.")]


@app.command("eval")
def evaluate(
    model: MODEL,
    adapter: ADAPTER = None,
    metrics: Annotated[
        str | None,
        typer.Option(help="Of --data, with commas: loss, bleu, bertscore, meteor, cider, rougeL, exact; or all."),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="LLaVA-Instruct rows that --metrics are of.")] = None,
    images: Annotated[Path | None, typer.Option(help="Folder that the rows' images are in.")] = None,
    predictions: Annotated[
        Predictions, typer.Option(help="Answers to compare: generated, or the likeliest token after each true one.")
    ] = Predictions.generate,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="With commas: vqav2, scienceqa, gqa, vizwiz, mmbench, mme, pope, amber, hallusionbench, and other "
            "tasks of lmms-eval; or all for these nine."
        ),
    ] = None,
    task_data: TASK_DATA = None,
    include_path: INCLUDE = None,
    bertscore_model: BERTSCORE = "roberta-large",
    bertscore_layer: BERTSCORE_LAYER = None,
    tau: Annotated[
        float | None, typer.Option(help="Cosine threshold, instead of the stored one; 1 for no anchors.")
    ] = None,
    direction: Annotated[Direction | None, typer.Option(help="What is copied where, if not as stored.")] = None,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Of the weights; by default bfloat16 on a GPU, else float32.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.")] = 4,
    limit: Annotated[int | None, typer.Option(help="At most so many samples, and documents of each task.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Bound of generated answers to --data.")] = 256,
    output: Annotated[Path | None, typer.Option(help="Folder for results.json and predictions.jsonl.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the results as a JSON object.")] = False,
    skip_bad: SKIP_BAD = False,
    seed: Annotated[int, typer.Option(help="For tasks with chance in them.")] = 0,
) -> None:
    """Measure a model: loss and text metrics on your rows, benchmarks through lmms-eval (the extra `eval`)."""
    quiet()
    from attanchor_vlm.evaluation import run
    from attanchor_vlm.evaluation.text_metrics import BertScoreModel

    plan = run.Plan(
        data=data,
        images=images,
        metrics=choice(metrics, TEXT),
        tasks=choice(tasks, TASKS),
        task_data=folders(task_data),
        include=include_path,
        predictions=predictions.value,
        bertscore=BertScoreModel(bertscore_model, bertscore_layer),
        batch_size=batch_size,
        limit=limit,
        max_new_tokens=max_new_tokens,
        skip_bad=skip_bad,
        seed=seed,
    )
    plan.check()
    if output is not None:
        run.check_output(output)
    import torch

    from attanchor_vlm.provenance import environment

    loaded, processor = run.load(
        model, adapter, tau, direction and direction.value, getattr(torch, dtype.value) if dtype else None
    )
    report = run.evaluate(loaded, processor, plan, output, progress=True)
    about = {
        "model": model,
        "adapter": adapter and str(adapter),
        "anchors": run.anchors(loaded),
        "predictions": predictions.value if plan.metrics else None,
        "limit": limit,
        "seed": seed,
        **environment(),
    }
    written = run.write(report, output, about) if output is not None else []
    if as_json:
        typer.echo(json.dumps(run.as_dict(report, about), ensure_ascii=False, allow_nan=False))
        return
    for line in run.lines(report):
        typer.echo(line)
    for path in written:
        typer.echo(f"written: {path}")


def choice(given: str | None, whole: tuple[str, ...]) -> tuple[str, ...]:
    """Names from a comma-separated option; `whole` for "all", nothing for "none"."""
    if given is None or given.strip() == "none":
        return ()
    return whole if given.strip() == "all" else names(given)


def names(given: str | None) -> tuple[str, ...]:
    """Names from a comma-separated option, each once."""
    return tuple(dict.fromkeys(name.strip() for name in (given or "").split(",") if name.strip()))


def folders(given: list[str] | None) -> dict[str, Path]:
    """NAME=DIR options.

    Raises:
        BadParameter: one has no name or no folder.
    """
    found = {}
    for one in given or []:
        name, _, folder = one.partition("=")
        if not name or not folder:
            raise typer.BadParameter(f"{one!r} should be NAME=DIR, such as pope=data/POPE", param_hint="--task-data")
        found[name] = Path(folder)
    return found
