"""A file of questions, answered row by row into another file: whatever stops the run, it goes on where it was."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from attanchor_vlm.constants import context_of
from attanchor_vlm.data.lengths import Growth, RowLengths, check_texts
from attanchor_vlm.data.reading import check_characters, from_json, lines_of, parse_list
from attanchor_vlm.data.rows import (
    PLACEHOLDER,
    VIDEO_PLACEHOLDER,
    Row,
    check_folder,
    images_of,
    sorted_out,
    split_readable,
    videos_of,
)
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import BadRow, DataError
from attanchor_vlm.inference.ask import Answer, answers, with_placeholders
from attanchor_vlm.records import alone_in, check_parent, read_text


@dataclass(frozen=True)
class Question(Row):
    """A checked row of a question file; `id` is the row's own, or its number."""

    id: str | int = 0

    @property
    def prompt(self) -> str:
        return self.messages[0][1]


@dataclass(frozen=True)
class Result:
    answered: int  # in this run
    earlier: int  # answers that were there already
    left_out: Mapping[int, str]  # the numbers of rows that could not be answered, and why


def read_questions(
    file: Path, images: Path | None = None, skip_bad: bool = False, progress: bool = False
) -> tuple[list[Question], list[BadRow]]:
    """Read a file of questions and check every row and every image it names.

    Rows of a .jsonl are objects, one a line: ``{"id": "a1", "image": "a.png", "prompt": "What is this?"}``. `image` (or
    `images`) may be a list, or be left out; `id` is text or a whole number, by default the row's number, and no two may
    be equal. A row with LLaVA-Instruct's ``conversations`` in place of `prompt` asks its first question; as the ids of
    such files repeat (they are those of images), a later one gets the row's number behind it, ``a1#7``. A .json file
    holds a list of rows.

    Args:
        images: The folder that images are looked up in; None for that of `file`.

    Returns:
        The good rows, and the bad ones if `skip_bad`.
    """
    folder = file.parent if images is None else images
    check_folder(folder, file)
    good: list[Question] = []
    bad: list[BadRow] = []
    seen: dict[str | int, int] = {}
    for number, raw in _rows(file):
        try:
            question = _check(number, raw, folder, seen)
            if question.id in seen:
                raise ValueError(f"its id {question.id!r} is that of row {seen[question.id]} too")
            seen[question.id] = number
            good.append(question)
        except ValueError as error:
            bad.append(BadRow(file, number, str(error)))
    good, unreadable = split_readable(file, good, progress)
    return sorted_out(file, good, bad + unreadable, skip_bad)


def check_for_model(
    file: Path, questions: list[Question], model: Any, processor: Any, skip_bad: bool = False
) -> tuple[list[Question], list[BadRow]]:
    """The questions that a model can be given: within its context, if no anchor is inserted and what `keep` says is
    dropped, and without its own image token in the text."""
    anchors = getattr(model, "attanchor_config", None)
    growth = None if anchors is None else Growth.of(dataclasses.replace(anchors, max_anchors=0), anchors.pause_tokens)
    good, bad = check_texts(file, questions, RowLengths(processor), context_of(model.config), growth)
    return sorted_out(file, good, bad, skip_bad)


def answer_all(
    model: Any,
    processor: Any,
    questions: Sequence[Question],
    output: Path,
    settings: Mapping[str, object],
    *,
    batch_size: int = 8,
    max_new_tokens: int = 64,
    resume: bool = False,
    skip_bad: bool = False,
    progress: bool = False,
) -> Result:
    """Append an answer for each question to `output`, a line each, in the order of the questions.

    A line is ``{"id": …, "answer": …, "inserted": …, "candidates": …}`` with `settings` behind it. Lines are on disk
    after every batch, so a run that is killed loses one batch.

    Args:
        model, processor: As for `ask.answers`.
        settings: What the answers are made with, for the record: a run that resumes must have the same.
        batch_size: Questions per call of `generate`.
        resume: Go on with an `output` that is there; see `open_answers`.
        skip_bad: Leave out a question that cannot be answered, such as one that does not fit into the model's context
            with its anchors, and go on behind it.
    """
    with alone_in(output.parent, output.name):
        done = open_answers(output, [one.id for one in questions], settings, resume)
        waiting = [one for one in questions if one.id not in done]
        left_out: dict[int, str] = {}
        with tqdm(total=len(questions), initial=len(done), desc="answers", unit="", disable=not progress) as bar:
            for part in _batches(waiting, batch_size):
                given, reasons = _answers(model, processor, part, max_new_tokens, skip_bad)
                left_out |= reasons
                rows = [
                    {"id": name, "answer": text, "inserted": inserted, "candidates": candidates, **settings}
                    for name, (text, inserted, candidates) in given
                ]
                _append(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
                bar.update(len(part))
    return Result(len(waiting) - len(left_out), len(done), left_out)


def _answers(
    model: Any, processor: Any, part: Sequence[Question], max_new_tokens: int, skip_bad: bool
) -> tuple[list[tuple[str | int, Answer]], dict[int, str]]:
    """Answers by their questions' ids; with `skip_bad` also, by its number, why a question has none."""
    try:
        images = [one.images for one in part]
        videos = [[load_video(video) for video in one.videos] for one in part]
        prompts = [one.prompt for one in part]
        given = answers(model, processor, prompts, images, videos, max_new_tokens=max_new_tokens)
        return list(zip([one.id for one in part], given, strict=True)), {}
    except torch.OutOfMemoryError as error:
        raise DataError(
            f"the GPU's memory does not hold a batch of {len(part)} questions; give a smaller --batch-size, and "
            "--resume to go on"
        ) from error
    except ValueError as error:
        reason = f"no answer to rows {', '.join(str(one.number) for one in part)}: {error}"
        if not skip_bad:
            raise DataError(reason) from error
        if len(part) == 1:
            return [], {part[0].number: reason}
    found = [_answers(model, processor, [one], max_new_tokens, skip_bad) for one in part]
    return [one for own, _ in found for one in own], {number: why for _, own in found for number, why in own.items()}


def _append(output: Path, lines: str) -> None:
    """On disk when it returns."""
    try:
        with output.open("ab") as file:
            file.write(lines.encode())
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise DataError(
            f"{output} cannot be written: {error.strerror}; what it holds is kept, and --resume goes on"
        ) from error


def open_answers(
    output: Path, ids: Sequence[str | int], settings: Mapping[str, object], resume: bool
) -> set[str | int]:
    """The ids that `output` already answers; an end that was half written is cut off."""
    _check_output(output, resume)
    output.parent.mkdir(parents=True, exist_ok=True)
    if not output.exists():
        return set()
    known, done, whole = set(ids), set(), 0
    with output.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break  # what a kill left
            try:
                row = json.loads(line)
                found, _ = row["id"], row["answer"]
                # What is not in use now may be missing: earlier versions did not have the setting.
                made_with = {name: row.get(name) if value is None else row[name] for name, value in settings.items()}
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{output}, row {number}: not an answer as this command writes it; give another --output"
                ) from error
            if found not in known:
                raise DataError(
                    f"{output}, row {number}: answers {found!r}, which is not among the questions; give another "
                    "--output"
                )
            if made_with != dict(settings):
                differs = next(name for name in settings if made_with[name] != settings[name])
                raise DataError(
                    f"{output}, row {number}: was made with {differs} {made_with[differs]!r}, not "
                    f"{settings[differs]!r}; give the same settings, or another --output"
                )
            done.add(found)
            whole += len(line)
    os.truncate(output, whole)
    return done


def check_output(output: Path, resume: bool) -> None:
    """Refuse an `output` that is there, unless it is to be resumed, or that cannot be."""
    _check_output(output, resume)
    if output.parent.is_dir():
        with alone_in(output.parent, output.name):
            pass


def _check_output(output: Path, resume: bool) -> None:
    if output.is_dir():
        raise DataError(f"output {output} is a folder; give the name of a .jsonl file")
    if output.exists() and not resume:
        raise DataError(f"output {output} exists; go on with it by --resume, or give another name")
    check_parent(output)


def _batches(questions: Sequence[Question], size: int) -> Iterator[list[Question]]:
    """In order; questions without images, whose calls have other arguments, are batches of their own."""
    for _, alike in groupby(questions, key=lambda one: bool(one.media)):
        while part := list(islice(alike, size)):
            yield part


# --- Rows. -----------------------------------------------------------------------------------------------------------


def _rows(file: Path) -> Iterator[tuple[int, Any]]:
    """Number and content of every row; of a line that is not JSON, the error."""
    text = read_text(file)
    if file.suffix == ".json":
        yield from enumerate(parse_list(file, text), start=1)
        return
    for number, line in lines_of(file, text):
        try:
            yield number, from_json(line)
        except ValueError as error:
            yield number, error


def _check(number: int, raw: Any, folder: Path, seen: Collection[str | int]) -> Question:
    """A question, or a ValueError that says what is wrong with the row."""
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError(f"the row is a {type(raw).__name__}; it should be an object")
    name = raw.get("id", number)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f'"id" is {name!r}; it should be text or a whole number')
    check_characters('"id"', str(name))
    of_training = raw.get("prompt") is None
    if of_training and name in seen:
        name = f"{name}#{number}"
    prompt, images, videos = _prompt(raw), images_of(raw, folder), videos_of(raw, folder)
    if of_training and PLACEHOLDER in str(raw["conversations"]):
        images = images[: prompt.count(PLACEHOLDER)]  # the others are those of later turns
    if of_training and VIDEO_PLACEHOLDER in str(raw["conversations"]):
        videos = videos[: prompt.count(VIDEO_PLACEHOLDER)]
    text = with_placeholders(prompt, len(images), len(videos))
    return Question(number, (("user", text),), images, videos, name)


def _prompt(raw: dict[str, Any]) -> str:
    prompt, turns = raw.get("prompt"), raw.get("conversations")
    if prompt is None and isinstance(turns, list) and turns and isinstance(turns[0], dict):
        prompt = turns[0].get("value")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError('"prompt" is missing or empty; it should be the question, as text')
    return prompt
