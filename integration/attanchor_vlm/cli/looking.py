"""`attanchor generate`: ask a model about images, one question or a file of them, and see where the anchors went."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import (
    ADAPTER,
    DTYPE,
    FUNCTION_WORDS,
    IN_USE,
    MODEL,
    SKIP_BAD,
    Options,
    check_picture,
    note,
    quiet,
    takes,
)
from attanchor_vlm.model.config import AnchorOptions


@app.command()
@takes(Options(AnchorOptions, IN_USE, unsaid="as stored"))
def generate(
    changes: dict[str, Any],
    *,
    model: MODEL,
    prompt: Annotated[
        str | None, typer.Option(help="The question; images go in front, or where it says <image>.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option(metavar="<path>", help="A picture that the question is about; several times for several."),
    ] = None,
    video: Annotated[
        list[Path] | None,
        typer.Option(metavar="<path>", help="A video: a file that PyAV reads, or a folder of its frames."),
    ] = None,
    explain: Annotated[
        Path | None, typer.Option(help="Draw each anchor at its patch, with its score: a .png, .pdf or .svg.")
    ] = None,
    input: Annotated[
        Path | None, typer.Option(help="Instead of --prompt, many: a .jsonl of rows with id, image and prompt.")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="With --input: the .jsonl that answers are written to.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="With --input: folder of the rows' images; by default the input's own.")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="With --input: questions at a time, 8 by default.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="With --input: go on with an --output that is there.")
    ] = False,
    skip_bad: SKIP_BAD = False,
    adapter: ADAPTER = None,
    function_words: FUNCTION_WORDS = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Bound of an answer's length.")] = 64,
    dtype: DTYPE = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print what came out as a JSON object.")] = False,
) -> None:
    """Ask about images, and draw where the anchors went.

    One question: its answer, and with --explain a picture of its anchors. With --input a file of questions: an answer
    a line, written as they come, so that --resume goes on after a kill.
    """
    if (prompt is None) == (input is None):
        raise typer.BadParameter(
            "give one of the two: a question as --prompt, or a file of questions as --input", param_hint="--prompt"
        )
    if prompt is not None and not prompt.strip():
        raise typer.BadParameter("is empty; it should be the question", param_hint="--prompt")
    alone = {"--output": output, "--images": images, "--batch-size": batch_size, "--resume": resume or None}
    alone["--skip-bad"] = skip_bad or None
    many = {"--image": image or None, "--video": video or None, "--explain": explain}
    for name, given in (alone if input is None else many).items():
        if given is not None:
            owner = "--input, a file of questions" if input is None else "--prompt, a single question"
            raise typer.BadParameter(f"belongs to {owner}", param_hint=name)
    if explain is not None:
        if not image and not video:
            raise typer.BadParameter("needs an --image or a --video to draw on", param_hint="--explain")
        check_picture(explain, "--explain")
    if input is not None and output is None:
        raise typer.BadParameter("is missing: the .jsonl that answers are written to", param_hint="--output")
    if input is not None and output is not None and input.resolve() == output.resolve():
        raise typer.BadParameter("is the --input; give another name", param_hint="--output")

    quiet()
    from attanchor_vlm.model import load as loading

    settings = loading.settings_for(model, adapter, **changes)
    if explain is not None and settings is not None:
        if settings.changes_nothing:
            raise typer.BadParameter(
                f"tau is {settings.tau:g}, which inserts no anchors to draw", param_hint="--explain"
            )
        if settings.direction != "text_into_image":
            raise typer.BadParameter(
                f"direction is {settings.direction}, and only text in images can be drawn", param_hint="--explain"
            )

    loading.source_of(model)  # that there is no such model is said before images are checked

    def load() -> tuple[Any, Any]:
        chosen = None if dtype is None else loading.choose_dtype(dtype, note)
        return loading.load(model, adapter, dtype=chosen, **changes)

    if prompt is not None:
        said = _answer(load, prompt, image or [], video or [], explain, max_new_tokens)
    else:
        assert input is not None
        assert output is not None
        made_with = {"model": model, "adapter": None if adapter is None else str(adapter)}
        made_with["function_words"] = None if function_words is None else str(function_words)
        said = _answer_file(load, input, output, images, made_with, batch_size or 8, max_new_tokens, resume, skip_bad)
    if as_json:
        typer.echo(json.dumps(said, ensure_ascii=False))
        return
    for line in _lines(said):
        typer.echo(line)


def _answer(
    load: Callable[[], tuple[Any, Any]],
    prompt: str,
    images: list[Path],
    videos: list[Path],
    explain: Path | None,
    max_new_tokens: int,
) -> dict[str, Any]:
    from attanchor_vlm.inference import ask
    from attanchor_vlm.inference import explain as explaining
    from attanchor_vlm.model.attach import config_of

    ask.with_placeholders(prompt, len(images), len(videos))
    opened = [ask.open_image(image) for image in images]
    films = [ask.open_video(video) for video in videos]
    model, processor = load()
    settings = config_of(model)
    said: dict[str, Any] = {"prompt": prompt, "tau": settings.tau, "direction": settings.direction}
    if explain is None:
        text, inserted, candidates = ask.answer(
            model, processor, prompt, opened, videos=films, max_new_tokens=max_new_tokens
        )
        return {**said, "answer": text, "inserted": inserted, "candidates": candidates}
    from attanchor_vlm.inference.picture import anchor_picture

    shown = explaining.explain(model, processor, opened, prompt, max_new_tokens, films)
    anchor_picture(explain, [shown], settings.tau, "Anchors in " + ", ".join(path.name for path in [*images, *videos]))
    return {**said, **explaining.describe(shown), "picture": str(explain)}


def _answer_file(
    load: Callable[[], tuple[Any, Any]],
    input: Path,
    output: Path,
    images: Path | None,
    made_with: dict[str, Any],
    batch_size: int,
    max_new_tokens: int,
    resume: bool,
    skip_bad: bool,
) -> dict[str, Any]:
    from attanchor_vlm.inference import ask_file
    from attanchor_vlm.model.attach import base_of

    ask_file.check_output(output, resume)
    rows, bad = ask_file.read_questions(input, images, skip_bad, progress=True)
    model, processor = load()
    target = base_of(model)
    rows, further = ask_file.check_for_model(input, rows, target, processor, skip_bad)
    bad += further
    for one in bad:
        note(f"left out: {one}")
    config = target.attanchor_config
    made_with |= {"tau": config.tau, "content_words": bool(config.content_words)}
    made_with |= {"keep": config.keep, "keep_by": None if config.keep is None else config.keep_by}
    made_with |= {"max_new_tokens": max_new_tokens, "dtype": str(target.dtype).removeprefix("torch.")}
    result = ask_file.answer_all(
        model,
        processor,
        rows,
        output,
        made_with,
        batch_size=batch_size,
        max_new_tokens=max_new_tokens,
        resume=resume,
        skip_bad=skip_bad,
        progress=True,
    )
    left_out = [{"row": one.number, "reason": one.reason} for one in bad]
    left_out += [{"row": number, "reason": reason} for number, reason in result.left_out.items()]
    counts = {"answered": result.answered, "earlier": result.earlier, "left_out": left_out}
    return {"output": str(output), **counts, **made_with}


def _lines(said: dict[str, Any]) -> list[str]:
    """What a person reads of it."""
    if "output" in said:
        parts = [f"{said['answered']} answers"]
        parts += [f"{said['earlier']} from before"] if said["earlier"] else []
        parts += [f"{len(said['left_out'])} bad rows left out"] if said["left_out"] else []
        return [f"{', '.join(parts)}: {said['output']}"]
    lines = [said["answer"]]
    for one in said.get("anchors", []):
        score = "     -" if one["score"] is None else f"{one['score']:6.3f}"
        lines.append(f"{one['text']:>16}  {score}  {one.get('where', 'not inserted')}")
    return lines + ([f"picture: {said['picture']}"] if "picture" in said else [])
