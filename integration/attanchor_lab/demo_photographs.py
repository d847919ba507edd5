"""`attanchor demo-photographs`: a language model that was never shown an image learns to see, then answers questions
with anchors and without."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from attanchor_lab.accuracy import Accuracy, accuracy
from attanchor_lab.demo import clear, photograph
from attanchor_lab.photographs import stamps
from attanchor_lab.photographs.config import FOLDER, PhotographConfig
from attanchor_lab.photographs.dataset import read_photographs, write_photographs
from attanchor_lab.photographs.grounding import grounding
from attanchor_lab.photographs.wordings import KINDS
from attanchor_lab.small_vlm import build, parts
from attanchor_lab.small_vlm.config import BuildConfig
from attanchor_lab.small_vlm.readings import known_stamps
from attanchor_vlm.data.batches import message
from attanchor_vlm.data.rows import Row, load_image, read_rows
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
_ARMS: dict[str, dict[str, Any]] = {
    PLAIN: {"tau": 1.0},
    ANCHORS: {"fraction": 0.5, "content_words": True},
    SHORTER: {"fraction": 0.5, "content_words": True, "keep": 1 / 3},
}
_OURS = {"stamps", "data", "unseeing", "readings", "stage1", "model", "runs", "results.json", "anchors.png"}
_ANSWER = 6  # most tokens
_TITLE = "Words of the question at their patches, in photographs"
_ASKED = (("chelsea", "Is there a cat in the picture?"), ("coffee", "Is there a cup in the picture?"))


@dataclass(frozen=True)
class Size:
    """How much the demo does; the defaults take a quarter of an hour on two quiet cores."""

    scenes: int = 320
    test_scenes: int = 40
    concepts: int | None = 30
    held_out: float = 0.2
    reading_steps: int = 60
    question_steps: int = 12
    names: int = 24  # asked for, of each split
    questions: int = 12  # of each kind


def run(
    output: Path,
    size: Size = Size(),
    seed: int = 0,
    say: Callable[[str], None] = print,
    progress: bool = True,
    folder: Path = FOLDER,
) -> dict[str, Any]:
    """Build the model, teach it to read, then questions in three arms; leave `results.json` and `anchors.png`.

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
    known = known_stamps(folder, output / "stamps")
    world = PhotographConfig(
        output=data, seed=seed, scenes=size.scenes, test_scenes=size.test_scenes, concepts=size.concepts,
        held_out=size.held_out, stamps=known,
    )  # fmt: skip
    write_photographs(world, lambda line: say(f"   {line}"))
    held_out = json.loads((data / "world.json").read_text(encoding="utf-8"))["concepts"]["held_out"]

    say("2. A language model of 135 M parameters and an image encoder that never met")
    config = BuildConfig(
        output=output / "model", world=data, stamps=folder, steps=size.reading_steps, seed=seed,
    )  # fmt: skip
    unseeing = BuildConfig(output=output / "unseeing", seed=seed)
    build.make(unseeing, lambda line: say(f"   {line}"))
    dtype = choose_dtype(PRESETS["small-vlm"]["dtype"], lambda line: None)
    before = _sight(unseeing.output, dtype, data, size.names)
    said = "   {0:.0%} of the things named at their corner ({1:.0%} of kinds held out of training)"
    said += "; {2:.0%} ({3:.0%}) of the words have their best patch in their thing, by chance {4:.0%}"
    say(said.format(*before.values()))

    say(f"3. It learns to see: {size.reading_steps} steps of {config.batch_size} scenes")
    build.stage1(config, data, unseeing.output, output, lambda line: say(f"   {line}")).replace(config.output)
    after = _sight(config.output, dtype, data, size.names)
    say(said.format(*after.values()))

    rows, kinds = _questions(data, size.questions)
    arms: dict[str, tuple[Accuracy, float, float]] = {}
    for number, (name, chosen) in enumerate(_ARMS.items(), start=4):
        say(f"{number}. {name}: {size.question_steps} steps of questions, then {len(rows)} that it has not seen")
        told = TrainConfig.from_preset(
            "small-vlm", model=str(config.output), data=data / "train-questions.json", images=images, seed=seed,
            output=output / "runs" / name.replace(", ", "-").replace(" ", "-"), max_steps=size.question_steps,
            val_fraction=0.0, **{"tau": None, **chosen},
        )  # fmt: skip
        trained = train.run(told, lambda line: say(f"   {line}"), progress)
        model, processor = load(str(config.output), told.output, dtype=dtype)
        arms[name] = (
            accuracy(model, processor, rows, kinds, 16, _ANSWER),
            trained.seconds,
            _length(model, processor, rows),
        )
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
        "sight": {"before": before, "after": after},
        "arms": {
            name: {"accuracy": test.figures(), "inserted_share": test.inserted_share, "train_seconds": seconds,
                   "answer_seconds": test.seconds, "tokens": tokens}
            for name, (test, seconds, tokens) in arms.items()
        },
        "seconds": time.perf_counter() - started,
        **environment("cpu"),
    }  # fmt: skip
    write_json(output / "results.json", results)
    say("")
    say(f"{results['seconds']:.0f} s in all. In {output}: anchors.png, and all figures in results.json")
    return results


def table(arms: dict[str, tuple[Accuracy, float, float]]) -> list[str]:
    """Accuracies of the arms, and how long each took, as lines of text."""
    plain, lines = arms[PLAIN][0], []
    for name, (test, seconds, tokens) in arms.items():
        difference, error = test.minus(plain)
        change = f"{100 * difference:+.1f} ± {196 * error:.1f}" if test is not plain else ""
        figures = [f"{100 * value:.0f}" for value in test.figures().values()]
        lines.append([name, *figures, change, f"{tokens:.0f}", f"{seconds:.0f}", f"{test.seconds:.1f}"])
    heads = ["", *plain.figures(), "change, 95 %", "tokens a prompt", "train s", "answer s"]
    return [*markdown_table(heads, lines), "", "Accuracy in %, one seed: the intervals are over questions alone."]


def _sight(folder: Path, dtype: torch.dtype, data: Path, count: int) -> dict[str, float]:
    """How many things of new scenes it names, of known concepts and of held-out ones, then the same of `grounding`, and
    its chance."""
    model, processor = load(str(folder), dtype=dtype, tau=1.0)
    named, found, chance = {}, {}, 0.0
    for split in ("seen", "concepts"):
        rows, _ = read_rows(data / f"test-what-{split}.json", data / "images")
        chosen = rows[:count]
        answered = accuracy(model, processor, chosen, ["what"] * len(chosen), 8, _ANSWER)
        named[f"named {split}"] = answered.figures()["mean"]
        asked = read_photographs(data / f"test-place-{split}.json")[:count]
        matched = grounding(model, processor, asked, data / "images")
        found[f"matched {split}"], chance = matched["hit"], matched["chance"]
    return named | found | {"chance": chance}


def _questions(data: Path, count: int) -> tuple[list[Row], list[str]]:
    rows, kinds = [], []
    for kind in KINDS:
        if (path := data / f"test-{kind}-seen.json").is_file():
            found = read_rows(path, data / "images")[0][:count]
            rows += found
            kinds += [kind] * len(found)
    return rows, kinds


@torch.no_grad()
def _length(model: Any, processor: Any, rows: Sequence[Row]) -> float:
    """Mean tokens of the prompts as the language model gets them."""
    images = [[load_image(row.images[0])] for row in rows]
    batch: dict[str, Any] = encode_questions(model, processor, [[message(*row.messages[0])] for row in rows], images)
    return float(prepare_inputs(model, **batch)["attention_mask"].sum(-1).float().mean())
