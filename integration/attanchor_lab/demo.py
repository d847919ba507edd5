"""`attanchor demo`: from rendered scenes on disk to a table, a loss plot and pictures of anchors, on any machine."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from attanchor_lab.accuracy import Accuracy, accuracy
from attanchor_lab.demo_table import EXPLAINED, HEAD, IMAGE_INTO_TEXT, PLAIN, TEXT_INTO_IMAGE, lines_of, verdict
from attanchor_lab.figures import loss_plot
from attanchor_lab.photographs.stamps import shipped
from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm.analysis.calibrate import threshold_for_share
from attanchor_vlm.data.rows import Row, load_image, read_rows, samples
from attanchor_vlm.errors import SetupError
from attanchor_vlm.inference.explain import Anchored, explain
from attanchor_vlm.inference.picture import anchor_picture
from attanchor_vlm.model.attach import attach
from attanchor_vlm.model.candidates import with_tokens_of
from attanchor_vlm.model.config import AttAnchorConfig
from attanchor_vlm.model.load import load_pretrained
from attanchor_vlm.records import markdown_table, write_json
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import TrainConfig

_MOST_TOKENS = 12  # of an answer
_TYPED = (
    *("model", "data", "val_data", "images", "output", "preset", "tau", "direction", "batch_size", "max_steps"),
    *("eval_steps", "eval_batch_size", "workers", "seed"),
)
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


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """A model this small gains nothing from more, and loses much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(
    output: Path,
    model: str | None = None,
    size: Size = Size(),
    seed: int = 0,
    say: Callable[[str], None] = print,
    progress: bool = True,
) -> dict[str, Any]:
    """Write the data, fine-tune three times, and leave `results.json`, `loss.png`, `scenes.png` and `photographs.png`.

    Args:
        output: A folder that does not exist, is empty, or holds an earlier demo, which is replaced.
        model: The small LLaVA to start from; None takes the one in the package.

    Returns:
        What `results.json` holds.
    """
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

    tests: dict[str, Accuracy] = {}
    logs: dict[str, list[dict[str, float]]] = {}
    arms = []
    anchored: Any = None
    for number, (name, tau) in enumerate(taus.items(), start=3):
        settings = TrainConfig.from_preset(
            "small-llava",
            model=source,
            data=train_file,
            images=data / "images",
            output=output / "runs" / name.replace(" ", "-"),
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
        say(f"{number}. {name}: {command_line(settings)}")
        result = train.run(settings, lambda line: say(f"   {line}"), progress)
        test = tests[name] = accuracy(result.model, processor, test_rows, kinds)
        logs[name] = result.log
        if name == TEXT_INTO_IMAGE:
            anchored = result.model
        shares = [line["inserted_share"] for line in result.log if "inserted_share" in line]
        difference, error = test.minus(tests[PLAIN])
        arms.append(
            {
                "name": name,
                "tau": tau,
                "val_loss": result.val_loss,
                "accuracy": {**test.figures(), "seconds": test.seconds},
                "difference_to_plain": {"mean": difference, "standard_error": error},
                "inserted_share": {"training": sum(shares) / len(shares), "test": test.inserted_share},
                "train_seconds": result.seconds,
            }
        )

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    results: dict[str, Any] = {
        "settings": {**vars(size), "seed": seed, "device": device},
        "questions": len(kinds),
        "before": {**before.figures(), "seconds": before.seconds},
        "arms": arms,
        "verdict": verdict(arms),
    }
    shown = markdown_table(HEAD, lines_of(results), words=len(HEAD))
    for line in ("", *shown, "", EXPLAINED.format(**results), "", *results["verdict"]):
        say(line)

    loss_plot(output / "loss.png", logs, "Fine-tuning the small LLaVA on rendered scenes")
    tau = taus[TEXT_INTO_IMAGE]
    pictures = _examples(anchored, processor, test_rows, kinds)
    anchor_picture(output / "scenes.png", pictures, tau, "Anchors in rendered scenes (test set, text into image)")
    photographs = [explain(anchored, processor, image, asked, _MOST_TOKENS) for image, asked in pictured]
    title = "The same model on photographs: it knows colours and shapes, nothing else"
    anchor_picture(output / "photographs.png", photographs, tau, title)
    results["photographs"] = [
        {"question": one.question, "answer": one.answer, "tokens": [vars(match) for match in one.matches]}
        for one in photographs
    ]
    results["seconds"] = time.perf_counter() - started
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


def command_line(settings: TrainConfig) -> str:
    """What a user would type for this run."""
    words = ["attanchor", "train"]
    for name in _TYPED:
        value = getattr(settings, name)
        if value is not None and (name != "direction" or settings.tau < 1):
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def photograph(name: str) -> Image.Image:
    """One of the photographs inside scikit-image's package.

    Raises:
        SetupError: scikit-image, or this photograph of it, is not installed.
    """
    found = shipped(name)
    if not found:
        raise SetupError(f"this scikit-image does not ship the photograph {name!r}; install another version")
    return load_image(found[0])
