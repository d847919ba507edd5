"""`attanchor demo-photographs`: a language model that was never shown an image learns to name what is in it, then
answers questions with anchors and without."""

from __future__ import annotations

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback

from attanchor_lab.accuracy import Accuracy, accuracy
from attanchor_lab.demo import clear, photograph
from attanchor_lab.photographs import stamps
from attanchor_lab.photographs.config import FOLDER, PhotographConfig
from attanchor_lab.photographs.dataset import read_photographs, talk, write_photographs
from attanchor_lab.photographs.grounding import grounding
from attanchor_lab.photographs.questions import with_article
from attanchor_lab.small_vlm import build, parts
from attanchor_lab.small_vlm.config import BuildConfig
from attanchor_lab.small_vlm.readings import known_stamps, talk_about
from attanchor_vlm.data.batches import message
from attanchor_vlm.data.rows import Row, load_image, read_rows, samples
from attanchor_vlm.evaluation.answers import generate_answers
from attanchor_vlm.inference.ask import encode_questions
from attanchor_vlm.inference.explain import explain
from attanchor_vlm.inference.picture import anchor_picture
from attanchor_vlm.model.attach import prepare_inputs, tau_of
from attanchor_vlm.model.load import choose_dtype, load
from attanchor_vlm.provenance import environment
from attanchor_vlm.records import markdown_table, write_json
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import PRESETS, TrainConfig

PLAIN, ANCHORS, SHORTER = "plain concatenation", "anchors", "anchors, a third of the image tokens"
_WAYS: dict[str, dict[str, Any]] = {PLAIN: {"tau": 1.0}, ANCHORS: {}, SHORTER: {"keep": 1 / 3}}
_OURS = {"stamps", "data", "unseeing", "stage1", "model", "anchored", "results.json", "anchors.png"}
_OURS |= {"readings", "runs"}  # of earlier versions
_KINDS = ("existence", "place", "what")  # of questions
_CORNERS, _CAPTIONED = "What is in the corners?", "caption"
_TOLD = (_CAPTIONED, "place", _CAPTIONED, "existence")  # what scenes are talked of, by turns
_ANSWER, _CAPTION = 6, 40  # most tokens
_LOOKS = 3  # at what it names, while it learns to
_TITLE = "Words of the question at their patches, in photographs"
_ASKED = (("chelsea", "Is there a cat in the picture?"), ("coffee", "Is there a cup in the picture?"))


@dataclass(frozen=True)
class Size:
    """How much the demo does; the defaults are expected to take six to seven minutes on two quiet cores."""

    scenes: int = 360
    test_scenes: int = 24
    concepts: int | None = 24
    held_out: float = 0.25
    reading_steps: int = 90
    question_steps: int = 16
    questions: int = 20  # of each kind


def run(
    output: Path,
    size: Size = Size(),
    seed: int = 0,
    say: Callable[[str], None] = print,
    progress: bool = True,
    folder: Path = FOLDER,
) -> dict[str, Any]:
    """Build the model, teach it to see, then ask it in three ways; leave `results.json` and `anchors.png`.

    Args:
        output: A folder that does not exist, is empty, or holds an earlier demo, which is replaced.
        folder: Of the stamps.

    Returns:
        What `results.json` holds.

    Raises:
        SetupError: photographs or pretrained parts are not installed; the message has the command that installs them.
    """
    started = time.perf_counter()
    stamps.find_stamps(folder)  # what is missing is said before an earlier demo is removed
    parts.check_installed()
    pictured = [(photograph(name), asked) for name, asked in _ASKED]
    clear(output, _OURS)
    data = output / "data"
    images = data / "images"
    say(f"1. Photographs to {data}")
    world = PhotographConfig(
        output=data, seed=seed, scenes=size.scenes, test_scenes=size.test_scenes, concepts=size.concepts,
        held_out=size.held_out, least=4, noise=0.0, kinds=_KINDS, stamps=known_stamps(folder, output / "stamps"),
    )  # fmt: skip
    write_photographs(world, lambda line: say(f"   {line}"))
    held_out = json.loads((data / "world.json").read_text(encoding="utf-8"))["concepts"]["held_out"]

    say("2. A language model of 135 M parameters and an image encoder that never met")
    config = BuildConfig(output=output / "unseeing", seed=seed)
    build.make(config, lambda line: say(f"   {line}"))
    dtype = choose_dtype(PRESETS["small-vlm"]["dtype"], lambda line: None)
    model, processor = load(str(config.output), dtype=dtype, tau=1.0)
    matched = grounding(model, processor, read_photographs(data / "test-place-seen.json"), images)
    say(
        f"   {matched['hit']:.0%} of the words have their best patch in their thing before anything is trained, "
        f"by chance {matched['chance']:.0%}"
    )

    say(f"3. It learns to see: {size.reading_steps} steps of {config.batch_size} scenes, told what is where")
    seen, held = (_captions(data, f"test-what-{split}") for split in ("seen", "concepts"))
    named = {"before": _named(model, processor, seen, images, "before", say)}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **told: Any) -> None:
            if state.global_step % (size.reading_steps // _LOOKS) == 0:
                when = f"after {state.global_step * config.batch_size} scenes"
                named[when] = _named(told["model"], processor, seen, images, when, say)
                told["model"].train()

    teaching = dataclasses.replace(config, output=output / "model", world=data, steps=size.reading_steps)
    build.taught(teaching, _talks(data, seed), images, config.output, output, lambda line: None, [Look()]).replace(
        teaching.output
    )
    model, processor = load(str(teaching.output), dtype=dtype, tau=1.0)
    named["held out"] = _named(model, processor, held, images, "things whose names it was never told", say)

    say(f"4. It gets used to anchors: {size.question_steps} steps of questions")
    told = TrainConfig.from_preset(
        "small-vlm", model=str(teaching.output), data=data / "train-questions.json", images=images, seed=seed,
        output=output / "anchored", max_steps=size.question_steps, val_fraction=0.0, tau=None, fraction=0.5,
        content_words=True, calibration_samples=64,
    )  # fmt: skip
    train.run(told, lambda line: say(f"   {line}"), progress)
    rows, kinds = _questions(data, size.questions)
    say(f"5. {len(rows)} questions about new scenes, asked in three ways")
    arms: dict[str, tuple[Accuracy, float]] = {}
    for name, change in _WAYS.items():
        model, processor = load(str(teaching.output), told.output, dtype=dtype, **change)
        arms[name] = accuracy(model, processor, rows, kinds, 20, _ANSWER), _length(model, processor, rows[::4])
        if name == ANCHORS:
            scenes = [(row.images[0], row.messages[0][1]) for row in rows[: 2 * size.questions : size.questions]]
            shown = [explain(model, processor, image, asked, _ANSWER) for image, asked in [*scenes, *pictured]]
            anchor_picture(output / "anchors.png", shown, tau_of(model), _TITLE)
    say("")
    for line in table(arms):
        say(line)
    results = {
        "size": dataclasses.asdict(size) | {"seed": seed},
        "held_out": held_out,
        "matched": matched,
        "named": named,
        "arms": {
            name: {"accuracy": test.figures(), "inserted_share": test.inserted_share,
                   "answer_seconds": test.seconds, "tokens": tokens}
            for name, (test, tokens) in arms.items()
        },
        "seconds": time.perf_counter() - started,
        "processor_seconds": time.process_time(),
        **environment("cpu"),
    }  # fmt: skip
    write_json(output / "results.json", results)
    say("")
    say(f"{results['seconds']:.0f} s in all. In {output}: anchors.png, and all figures in results.json")
    return results


def table(arms: dict[str, tuple[Accuracy, float]]) -> list[str]:
    """Accuracies of each way to ask, tokens of a prompt, and how long all answers took, as lines of text."""
    plain, lines = arms[PLAIN][0], []
    for name, (test, tokens) in arms.items():
        difference, error = test.minus(plain)
        change = f"{100 * difference:+.1f} ± {196 * error:.1f}" if test is not plain else ""
        figures = [f"{100 * value:.0f}" for value in test.figures().values()]
        lines.append([name, *figures, change, f"{tokens:.0f}", f"{test.seconds:.1f}"])
    heads = ["", *plain.figures(), "change, 95 %", "tokens a prompt", "answer s"]
    return [
        *markdown_table(heads, lines),
        "",
        "Accuracy in %, one model that was trained with anchors, one seed: the intervals are over questions alone.",
    ]


def _scenes(data: Path, name: str) -> dict[str, list[tuple[str, str]]]:
    """Of each image of a file of questions, place and name of its things."""
    rows = read_photographs(data / f"{name}.json")
    return {row["image"]: [(thing["place"], thing["name"]) for thing in row["things"]] for row in rows}


def _caption(things: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(_CORNERS, "\n".join(f"{place}: {with_article(name)}" for place, name in things))]


def _captions(data: Path, name: str) -> Path:
    """A row for each scene of a file of questions, whose answer has a line for each corner."""
    return _write(data, f"captions-{name}", {image: _caption(things) for image, things in _scenes(data, name).items()})


def _talks(data: Path, seed: int) -> Path:
    """A row for each scene to train on: what is in each corner, where each thing is, or whether things are there."""
    wordings = json.loads((data / "world.json").read_text(encoding="utf-8"))["wordings"]["seen"]
    generator, before = np.random.default_rng(seed), list[str]()
    turns = {}
    for (image, things), kind in zip(_scenes(data, "train-questions").items(), itertools.cycle(_TOLD), strict=False):
        captioned = kind == _CAPTIONED
        turns[image] = _caption(things) if captioned else talk_about(kind, things, before, wordings[kind], generator)
        before += [name for _, name in things]
    return _write(data, "talks", turns)


def _write(data: Path, name: str, turns: dict[str, list[tuple[str, str]]]) -> Path:
    rows = [{"id": image, "image": image, "conversations": talk(asked)} for image, asked in turns.items()]
    write_json(data / f"{name}.json", rows)
    return data / f"{name}.json"


def _named(
    model: Any, processor: Any, captions: Path, images: Path, when: str, say: Callable[[str], None]
) -> dict[str, float]:
    """The share of the things of new scenes that a model names at their corners, which is also said; `unseen` is how
    much of the scene before the same captions would name."""
    rows, _ = read_rows(captions, images)
    found = generate_answers(model, processor, list(samples(rows, "all")), 24, _CAPTION, progress=False)
    told, right = ([set(text.splitlines()) for text in texts] for texts in (found.predictions, found.references))
    things = sum(map(len, right))
    named, unseen = (
        sum(len(a & b) for a, b in zip(told, those, strict=True)) / things for those in (right, right[-1:] + right[:-1])
    )
    first = found.predictions[0].replace("\n", ", ")
    say(f"   {when}: {named:.0%} named ({unseen:.0%} of another scene's). {rows[0].images[0].name}: {first}")
    return {"named": named, "unseen": unseen}


def _questions(data: Path, count: int) -> tuple[list[Row], list[str]]:
    rows, kinds = [], []
    for kind in _KINDS:
        found = read_rows(data / f"test-{kind}-seen.json", data / "images")[0][:count]
        rows += found
        kinds += [kind] * len(found)
    return rows, kinds


@torch.no_grad()
def _length(model: Any, processor: Any, rows: Sequence[Row]) -> float:
    """Mean tokens of the prompts as the language model gets them."""
    images = [[load_image(row.images[0])] for row in rows]
    batch: dict[str, Any] = encode_questions(model, processor, [[message(*row.messages[0])] for row in rows], images)
    return float(prepare_inputs(model, **batch)["attention_mask"].sum(-1).float().mean())
