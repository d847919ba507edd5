"""`attanchor demo`: from rendered scenes on disk to a table, a loss plot and pictures of anchors, on any machine."""

from __future__ import annotations

import dataclasses
import math
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm.analysis.calibrate import threshold_for_share
from attanchor_vlm.data.batches import question, to_model
from attanchor_vlm.data.rows import Row, load_image, read_rows, samples
from attanchor_vlm.errors import SetupError
from attanchor_vlm.figures import loss_plot
from attanchor_vlm.inference.explain import Anchored, explain
from attanchor_vlm.inference.picture import anchor_picture
from attanchor_vlm.model.attach import anchor_counts, attach, base_of, is_attached
from attanchor_vlm.model.candidates import with_tokens_of
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.load import load_pretrained
from attanchor_vlm.records import markdown_table, write_json
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import TrainConfig

PLAIN, TEXT_INTO_IMAGE, IMAGE_INTO_TEXT = "plain concatenation", "text into image", "image into text"
_MOST_TOKENS = 12  # of an answer
_DIRECTIONS = {TEXT_INTO_IMAGE: "text_into_image", IMAGE_INTO_TEXT: "image_into_text"}

# Photographs inside scikit-image's package, and what is asked about them. The model has seen rendered shapes alone, so
# the questions use its words; a word such as "suit" falls apart into pieces that it has never learnt.
PHOTOGRAPHS = (
    ("astronaut", "Is there an orange suit in the picture?"),
    ("coffee", "Where is the red circle?"),
    ("motorcycle_left", "Is there a red circle in the picture?"),
)


@dataclass(frozen=True)
class Size:
    """How much the demo does; the defaults take about four minutes on two cores."""

    train_images: int = 600
    val_images: int = 40
    test_images: int = 150
    steps: int = 200
    batch_size: int = 32
    share: float = 0.1  # the paper's: about 10 % of the text tokens


@dataclass
class Arm:
    """One fine-tuned model and what was measured of it. `tau` 1 is plain concatenation."""

    name: str
    tau: float
    val_loss: float | None
    test: Accuracy
    trained_share: float
    train_seconds: float
    log: list[dict[str, float]]
    model: Any


def run(
    output: Path,
    model: str | None = None,
    size: Size = Size(),
    seed: int = 0,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, object]:
    """Write the data, fine-tune three times, and leave `results.json`, `loss.png`, `scenes.png` and `photographs.png`.

    Args:
        output: A folder that does not exist, is empty, or holds an earlier demo, which is replaced.
        model: The small LLaVA to start from; None takes the one in the package.

    Returns:
        What `results.json` holds.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a model this small gains nothing from more, and loses much where cores are shared
    try:
        return _run(output, model, size, seed, say, progress)
    finally:
        torch.set_num_threads(threads)


def _run(
    output: Path, model: str | None, size: Size, seed: int, say: Callable[[str], None], progress: bool
) -> dict[str, object]:
    started = time.perf_counter()
    source = model or str(small_llava.SHIPPED)
    # What is missing is said before an earlier demo is removed.
    base, processor = load_pretrained(source)
    pictured = [(photograph(name), asked) for name, asked in PHOTOGRAPHS]
    clear(output, {"data", "runs", "results.json", "loss.png", "scenes.png", "photographs.png"})
    data = output / "data"
    say(f"1. Scenes to {data}")
    train_file = scenes.write_dataset(data, "train", size.train_images, seed, each=2)
    val_file = scenes.write_dataset(data, "val", size.val_images, seed + 1, each=1)
    test_file = scenes.write_dataset(data, "test", size.test_images, seed + 2, each=2)
    test_rows, _ = read_rows(test_file, data / "images")
    kinds = scenes.read_kinds(test_file)

    say(f"2. Thresholds that insert about {size.share:.0%} of the text tokens, measured on 256 training samples")
    first = list(samples(read_rows(train_file, data / "images")[0][:256], "each"))
    taus = {PLAIN: 1.0}
    for name, direction in _DIRECTIONS.items():
        config = with_tokens_of(AttAnchorConfig(tau=1.0, direction=direction), processor)
        taus[name], _ = threshold_for_share(base, processor, first, size.share, config)
        say(f"   {name}: tau {taus[name]:.4f}")
    before = accuracy(attach(base, AttAnchorConfig(tau=1.0)), processor, test_rows, kinds)

    arms = []
    for number, (name, tau) in enumerate(taus.items(), start=3):
        settings = _settings(
            source, data, train_file, val_file, output / "runs" / name.replace(" ", "-"), name, tau, size, seed
        )
        say(f"{number}. {name}: {command_line(settings)}")
        result = train.run(settings, lambda line: say(f"   {line}"), progress)
        test = accuracy(result.model, processor, test_rows, kinds)
        shares = [line["inserted_share"] for line in result.log if "inserted_share" in line]
        trained_share = sum(shares) / len(shares)
        arms.append(Arm(name, tau, result.val_loss, test, trained_share, result.seconds, result.log, result.model))

    say("")
    for line in table(before, arms):
        say(line)
    say("")
    words = verdict(arms)
    for line in words:
        say(line)

    anchored = next(arm for arm in arms if arm.name == TEXT_INTO_IMAGE)
    loss_plot(
        output / "loss.png", {arm.name: arm.log for arm in arms}, "Fine-tuning the small LLaVA on rendered scenes"
    )
    pictures = _examples(anchored.model, processor, test_rows, kinds)
    anchor_picture(
        output / "scenes.png", pictures, anchored.tau, "Anchors in rendered scenes (test set, text into image)"
    )
    photographs = [explain(anchored.model, processor, image, asked, _MOST_TOKENS) for image, asked in pictured]
    anchor_picture(
        output / "photographs.png",
        photographs,
        anchored.tau,
        "The same model on photographs: it knows colours and shapes, nothing else",
    )
    results = _results(before, arms, words, photographs, size, seed, time.perf_counter() - started)
    write_json(output / "results.json", results)
    say("")
    say(
        f"{results['seconds']:.0f} s in all. In {output}: loss.png, scenes.png, photographs.png, and all figures in "
        "results.json"
    )
    return results


def _examples(model: Any, processor: Any, rows: list[Row], kinds: list[str], among: int = 12) -> list[Anchored]:
    """Of the first questions of each kind, the one with the most anchors; every time another image."""
    used, chosen = set(), []
    for kind in scenes.KINDS:
        candidates = [row for row, asked in zip(rows, kinds, strict=True) if asked == kind and row.images not in used]
        shown = [
            explain(model, processor, row.images[0], row.messages[0][1], _MOST_TOKENS) for row in candidates[:among]
        ]
        counts = [sum(match.patch is not None for match in one.matches) for one in shown]
        best = counts.index(max(counts))
        used.add(candidates[best].images)
        chosen.append(dataclasses.replace(shown[best], truth=candidates[best].messages[1][1]))
    return chosen


def clear(output: Path, ours: set[str]) -> None:
    """Make room for a demo, without ever deleting what is not `ours`."""
    if output.exists() and not output.is_dir():
        raise SetupError(f"output {output} is a file; it should be a folder, or not exist")
    there = {path.name for path in output.iterdir()} if output.exists() else set()
    if there - ours:
        raise SetupError(
            f"output {output} holds {sorted(there - ours)[0]}, which is no part of a demo; take another folder"
        )
    for path in (output / name for name in there):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _settings(source, data, train_file, val_file, output, name, tau, size: Size, seed: int) -> TrainConfig:
    return TrainConfig.from_preset(
        "small-llava",
        model=source,
        data=train_file,
        images=data / "images",
        output=output,
        tau=tau,
        direction=_DIRECTIONS.get(name),
        batch_size=size.batch_size,
        val_data=val_file,
        max_steps=size.steps,
        eval_steps=max(1, size.steps // 4),
        eval_batch_size=2 * size.batch_size,
        workers=min(1, (os.cpu_count() or 1) - 1),  # batches are made on the second core
        seed=seed,
    )


def command_line(settings: TrainConfig) -> str:
    """What a user would type for this run."""
    options = {
        "model": settings.model,
        "data": settings.data,
        "val-data": settings.val_data,
        "images": settings.images,
        "output": settings.output,
        "preset": settings.preset,
        "tau": settings.tau,
        "direction": settings.direction if settings.tau < 1 else None,
        "batch-size": settings.batch_size,
        "max-steps": settings.max_steps,
        "eval-steps": settings.eval_steps,
        "eval-batch-size": settings.eval_batch_size,
        "workers": settings.workers,
        "seed": settings.seed,
    }
    words = ["attanchor", "train"]
    for name, value in options.items():
        if value is not None:
            words += [f"--{name}", str(value)]
    return shlex.join(words)


# --- The report. -----------------------------------------------------------------------------------------------------


def table(before: Accuracy, arms: list[Arm]) -> list[str]:
    """The figures as lines of text."""
    heads = ["", "tau", "val. loss", *scenes.KINDS, "mean", "inserted", "train s", "answer s"]
    lines = [["before fine-tuning", "1", "", *_accuracies(before), "0.0 %", "", f"{before.seconds:.1f}"]]
    for arm in arms:
        inserted, seconds = (
            f"{100 * arm.test.inserted_share:.1f} %",
            [f"{arm.train_seconds:.0f}", f"{arm.test.seconds:.1f}"],
        )
        lines.append([arm.name, f"{arm.tau:g}", f"{arm.val_loss:.4f}", *_accuracies(arm.test), inserted, *seconds])
    counts = ", ".join(f"{before.kinds.count(kind)} {kind}" for kind in scenes.KINDS)
    return [
        *markdown_table(heads, lines),
        "",
        f"Accuracy in % on {len(before.kinds)} test questions ({counts}): generated answers, exact matches.",
        "Inserted: anchors over the text tokens that take part, on the test questions.",
    ]


def _accuracies(test: Accuracy) -> list[str]:
    return [f"{100 * test.of(kind):.1f}" for kind in scenes.KINDS] + [f"{100 * test.mean:.1f}"]


def verdict(arms: list[Arm]) -> list[str]:
    """Each arm against plain concatenation, with the interval that the number of questions gives."""
    plain = next(arm for arm in arms if arm.name == PLAIN)
    lines = []
    for arm in arms:
        if arm is plain:
            continue
        difference, error = arm.test.minus(plain.test)
        low, high = 100 * difference - 196 * error, 100 * difference + 196 * error
        said = "better" if low > 0 else "worse" if high < 0 else "no difference shown"
        lines.append(f"{arm.name} − {PLAIN}: {100 * difference:+.1f} points, 95 % {low:+.1f} to {high:+.1f}: {said}")
    return [*lines, "One seed, 0.4 M parameters: the method runs; what it is worth in a large model is not shown here."]


def _results(before, arms: list[Arm], words, photographs, size: Size, seed: int, seconds: float) -> dict[str, object]:
    def figures(test: Accuracy) -> dict[str, object]:
        return {**{kind: test.of(kind) for kind in scenes.KINDS}, "mean": test.mean, "seconds": test.seconds}

    plain = next(arm for arm in arms if arm.name == PLAIN)
    rows = []
    for arm in arms:
        difference, error = arm.test.minus(plain.test)
        rows.append(
            {
                "name": arm.name,
                "tau": arm.tau,
                "val_loss": arm.val_loss,
                "accuracy": figures(arm.test),
                "difference_to_plain": {"mean": difference, "standard_error": error},
                "inserted_share": {"training": arm.trained_share, "test": arm.test.inserted_share},
                "train_seconds": arm.train_seconds,
            }
        )
    return {
        "settings": {**vars(size), "seed": seed, "device": _device()},
        "questions": len(before.kinds),
        "before": figures(before),
        "arms": rows,
        "verdict": words,
        "photographs": [
            {"question": one.question, "answer": one.answer, "tokens": [vars(match) for match in one.matches]}
            for one in photographs
        ],
        "seconds": seconds,
    }


def _device() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"


def _open(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


def photograph(name: str) -> Image.Image:
    """One of the photographs inside scikit-image's package; nothing is downloaded.

    Raises:
        SetupError: scikit-image, or this photograph of it, is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise SetupError("the demo's photographs come with scikit-image: `pip install scikit-image`") from error
    found = list((Path(skimage.__file__).parent / "data").glob(f"{name}.*"))
    if not found:
        raise SetupError(f"this scikit-image does not ship the photograph {name!r}; install another version")
    return _open(found[0])


@dataclass(frozen=True)
class Accuracy:
    """Exact matches of generated answers. `inserted_share` is inserted anchors over text tokens taking part."""

    kinds: tuple[str, ...]  # of every question
    right: tuple[bool, ...]
    inserted_share: float
    seconds: float

    def of(self, kind: str) -> float:
        marks = [right for right, asked in zip(self.right, self.kinds, strict=True) if asked == kind]
        return sum(marks) / len(marks)

    @property
    def mean(self) -> float:
        """The unweighted mean over the kinds of question."""
        kinds = set(self.kinds)
        return sum(self.of(kind) for kind in kinds) / len(kinds)

    def minus(self, other: Accuracy) -> tuple[float, float]:
        """Difference of the means and its standard error, paired by question: how sure this set of questions makes it,
        not how much another seed of the training would change it."""
        difference, variance = 0.0, 0.0
        kinds = set(self.kinds)
        for kind in kinds:
            pairs = [a - b for a, b, asked in zip(self.right, other.right, self.kinds, strict=True) if asked == kind]
            mean = sum(pairs) / len(pairs)
            difference += mean / len(kinds)
            variance += sum((d - mean) ** 2 for d in pairs) / len(pairs) ** 2 / len(kinds) ** 2
        return difference, math.sqrt(variance)


@torch.no_grad()
def accuracy(
    model: Any,
    processor: Any,
    rows: Sequence[Row],
    kinds: Sequence[str],
    batch_size: int = 64,
    most_tokens: int = 6,
) -> Accuracy:
    """Generate an answer to the first question of every row (one image each) and compare it with the row's.

    Args:
        model: Attached, or a PeftModel around an attached one; left in evaluation mode.
        kinds: What each row asks for; accuracies are kept apart by it.
    """
    started = time.perf_counter()
    model.eval()
    right: list[bool] = []
    counts = torch.zeros(3)
    for part in _chunks(rows, batch_size):
        images = [load_image(row.images[0]) for row in part]
        attached: Any = base_of(model)
        words = attached.attanchor_config.content_words if is_attached(model) else False
        batch = to_model(question(processor, [row.messages[0][1] for row in part], images, words), model)
        sequences = model.generate(**batch, max_new_tokens=most_tokens, do_sample=False)
        counts += anchor_counts(model, batch).cpu()
        new = sequences[:, batch["input_ids"].shape[1] :]
        answers = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        right += [answer.strip() == row.messages[1][1].strip() for row, answer in zip(part, answers, strict=True)]
    share = float(counts[0] / counts[1]) if counts[1] else 0.0
    return Accuracy(tuple(kinds), tuple(right), share, time.perf_counter() - started)


def _chunks(items: Sequence, size: int) -> Iterator[list]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
