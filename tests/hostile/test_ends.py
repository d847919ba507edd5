"""Whatever ends a run, and whenever: what it leaves is whole, and gone on with it makes what a run makes unharmed."""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import itertools
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import forked
import pytest
import torch
from lab_toy import TOY
from safetensors.torch import load_file
from strategies import LONGER

from attanchor_lab import runner
from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_lab.synthetic import laboratory
from attanchor_lab.synthetic.plan import Contrast, LabPlan
from attanchor_vlm import cli
from attanchor_vlm.records import read_rows
from attanchor_vlm.training.checkpoints import complete_checkpoints

RUNS, ENDS = max(1, LONGER // 5), 3 if LONGER > 1 else 1  # in each, before it is let to its end
ALL_DONE = "made 3 steps, and 3 are asked for"  # of a training that was ended behind its last write
WRITES = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "shutil.rmtree"}


def _toy_plan() -> LabPlan:
    condition = dataclasses.replace(TOY, arms=("plain", "t2i"), seeds=(0,), more=())
    return LabPlan("toy", (condition,), (Contrast("toy", "t2i"),), workers=1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    scenes.write_dataset(folder, "train", 2, seed=0)
    (folder / "plan.json").write_text(json.dumps(_toy_plan().to_dict()))
    return folder


# --- Three commands, what they leave when they are done, and what has to be true of it before. -----------------------


class Train:
    def command(self, world: Path, output: Path) -> list[object]:
        options = ["--preset", "small-llava", "--tau", 0.3, "--val-fraction", 0, "--batch-size", 2, "--lora-rank", 2]
        options += ["--max-steps", 3, "--save-steps", 1, "--model", small_llava.SHIPPED, "--images", world / "images"]
        resume = ["--resume"] if complete_checkpoints(output) else []
        return ["train", "--data", world / "train.json", "--output", output, *options, *resume]

    def made(self, output: Path) -> object:
        losses = [(line["step"], line["loss"]) for line in read_rows(output / "log.jsonl") if "loss" in line]
        return losses, (output / "adapter_model.safetensors").read_bytes()

    def check(self, output: Path, whole: Path) -> None:
        for checkpoint in complete_checkpoints(output):
            load_file(checkpoint / "adapter_model.safetensors")
            torch.load(checkpoint / "optimizer.pt")
        if (output / "adapter_config.json").exists():
            assert self.made(output) == self.made(whole)


class Generate:
    def command(self, world: Path, output: Path) -> list[object]:
        file = output / "answers.jsonl"
        options = ["--model", small_llava.SHIPPED, "--tau", 0.3, "--images", world / "images", "--batch-size", 2]
        options += ["--max-new-tokens", 2, *(["--resume"] if file.exists() else [])]
        return ["generate", "--input", world / "train.json", "--output", file, *options]

    def made(self, output: Path) -> object:
        return (output / "answers.jsonl").read_text()

    def check(self, output: Path, whole: Path) -> None:
        lines = self.made(output) if (output / "answers.jsonl").exists() else ""
        assert self.made(whole).startswith(lines[: lines.rfind("\n") + 1])


class Lab:
    def command(self, world: Path, output: Path) -> list[object]:
        return ["lab", "--plan", world / "plan.json", "--output", output, "--no-progress"]

    def made(self, output: Path) -> object:
        rows = laboratory.latest(laboratory.read(output))
        return {key: (row["status"], row.get("test"), row.get("training")) for key, row in rows.items() if key[2]}

    def check(self, output: Path, whole: Path) -> None:
        done = self.made(output) if (output / "rows.jsonl").exists() else {}
        expected = self.made(whole)
        assert all(found == expected[key] for key, found in done.items() if found[0] == "done")


class Once:
    """A command that writes what it makes whole or not at all, and all of it anew."""

    words: tuple[object, ...] = ()
    file = ""

    def command(self, world: Path, output: Path) -> list[object]:
        data = ["--data", world / "train.json", "--images", world / "images"] if self.words[0] == "calibrate" else []
        return [*self.words, output / self.file, *data]

    def made(self, output: Path) -> object:
        return {path.name: path.read_bytes() for path in output.rglob("*") if path.is_file()}

    def check(self, output: Path, whole: Path) -> None:
        assert not self.made(output) or self.made(output) == self.made(whole)


MODEL = ("--model", small_llava.SHIPPED, "--tau", 0.3)


class Sample(Once):
    words = ("sample", "--output")


class Export(Once):
    words = ("export", *MODEL, "--head-dim", 32, "--output")


class ExportLM(Once):
    words = ("export-lm", *MODEL, "--output")


class Calibrate(Once):
    words = ("calibrate", *MODEL[:2], "--fraction", 0.1, "--samples", 4, "--plot")
    file = "scores.png"


class Explain(Once):
    file = "anchors.png"

    def command(self, world: Path, output: Path) -> list[object]:
        image = sorted((world / "images").iterdir())[0]
        options = ["--prompt", "Where is it?", "--image", image, "--max-new-tokens", 2]
        return ["generate", *MODEL, *options, "--explain", output / self.file]


@pytest.fixture(scope="module")
def whole(request, world, tmp_path_factory):
    """A command, what it makes if nothing stops it, and how many things it does to files for that."""
    command, output = request.param(), tmp_path_factory.mktemp("whole") / "run"
    code, said = apart(command.command(world, output), output)
    assert code == 0, said
    return command, output, int(said.split()[-1])


# --- One of them in a process of its own, which something befalls. ---------------------------------------------------


def apart(command: list[object], output: Path, event: int = 0, befall: Callable[[], object] = list) -> tuple[int, str]:
    """Run a command in a process of its own, where `befall` is called in front of the `event`-th thing that it does to
    a file of `output` or beside it. Its exit code, and what it said, with the number of such things behind it."""
    end, begin = forked.context().Pipe(duplex=False)
    process = forked.context().Process(target=_run, args=(begin, [*map(str, command)], output, event, befall))
    process.start()
    begin.close()
    with os.fdopen(os.dup(end.fileno()), errors="replace") as pipe:
        said = pipe.read()
    end.close()
    process.join()
    return 0 if ALL_DONE in said else process.exitcode, said


def _run(begin: Connection, command: list[str], output: Path, event: int, befall: Callable[[], object]) -> None:
    code, told = 3, begin.fileno()
    try:
        os.dup2(told, 1)
        os.dup2(told, 2)
        sys.stdout, sys.stderr = (os.fdopen(os.dup(told), "w", buffering=1) for _ in range(2))
        signal.signal(signal.SIGINT, signal.default_int_handler)
        torch.set_num_threads(1)
        run, count = runner.run, itertools.count(1)
        runner.run = lambda jobs, keep, workers, *more: run(jobs, keep, 0, *more)

        def hook(name: str, arguments: tuple) -> None:
            writes = name in WRITES or (name == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            if writes and str(arguments[0]).startswith(str(output.parent)) and next(count) == event:
                befall()

        sys.addaudithook(hook)
        code = cli.main(command)
        os.write(told, f"\n{next(count) - 1}".encode())
    except BaseException:
        os.write(told, traceback.format_exc().encode())
    finally:
        os._exit(code)


def sent(number: signal.Signals, delay: float) -> None:
    """A signal to this process, now or soon, wherever it is then."""
    if delay:
        timer = threading.Timer(delay, os.kill, (os.getpid(), number))
        timer.daemon = True
        timer.start()
    else:
        os.kill(os.getpid(), number)


def full(size: int) -> None:
    """From now on no file of this process grows beyond `size` bytes, as on a disk that is full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def attack(tried, whole, world, folder: Path, draw, codes: set[int], is_told: bool) -> None:
    """Runs that something ends at moments that are drawn, gone on with each time; the last time they are let alone.

    Args:
        draw: Gives what befalls a run, of a random generator.
        codes: The exit codes of such an end.
        is_told: Whether the command has the time to clean up and say why.
    """
    command, expected, events = whole
    for number in range(RUNS):
        output, chance = folder / f"{number}" / "run", random.Random(f"{type(command).__name__} {number}")
        output.parent.mkdir()
        for _ in range(ENDS):
            befall = draw(chance)
            code, said = apart(command.command(world, output), output, chance.randint(1, events), befall)
            tried(code != 0)  # or it was done before
            assert code in {*codes, 0}, said
            assert "Traceback" not in said
            assert not is_told or not code or is_said(said), said
            command.check(output, expected)
            if code == 0:
                break
        else:
            code, said = apart(command.command(world, output), output)
        assert code == 0, said
        assert command.made(output) == command.made(expected)
        assert names(output) == names(expected)


def is_said(said: str) -> bool:
    return any(line.startswith("error: ") or line == "interrupted" for line in said.splitlines())


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def commands(one: type, *more: type) -> pytest.MarkDecorator:
    """In the suite one command for each kind of end, at length all that go on where they were ended, and some more."""
    return pytest.mark.parametrize("whole", [Train, Generate, Lab, *more] if LONGER > 1 else [one], indirect=True)


@commands(Generate)
def test_kills(tried, whole, world, tmp_path):
    """Runs of train, generate and lab, killed and gone on with."""

    def draw(chance):
        return functools.partial(sent, signal.SIGKILL, chance.choice([0, chance.uniform(0, 0.1)]))

    attack(tried, whole, world, tmp_path, draw, {-signal.SIGKILL}, False)


@commands(Generate)
def test_signals(tried, whole, world, tmp_path):
    """Runs of train, generate and lab, interrupted or terminated and gone on with."""

    def draw(chance):
        number = chance.choice([signal.SIGINT, signal.SIGTERM])
        return functools.partial(sent, number, chance.choice([0, chance.uniform(0, 0.1)]))

    attack(tried, whole, world, tmp_path, draw, {130, -signal.SIGTERM}, False)


@commands(Generate, Sample, Export, ExportLM, Calibrate, Explain)
def test_full_disks(tried, whole, world, tmp_path):
    """Runs of eight commands on a disk that fills, gone on with."""

    def draw(chance):
        return functools.partial(full, int(10 ** chance.uniform(0, 5)))

    attack(tried, whole, world, tmp_path, draw, {1}, True)


def locked(output: Path) -> None:
    """From now on this process may write neither into `output` nor beside it."""
    ctypes.CDLL(None).capset(struct.pack("Ii", 0x20080522, 0), bytes(24))  # root's may, whatever the mode
    set_modes(output, 0o555)


def set_modes(output: Path, mode: int) -> None:
    for path in (output.parent, *output.parent.rglob("*")):
        if path.is_dir():
            path.chmod(mode)


def deleted(output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)


@commands(Generate)
def test_folders(tried, whole, world, tmp_path):
    """Runs of train, generate and lab whose folder is made read-only or deleted under them, and that are run again."""
    command, expected, events = whole
    for number in range(max(1, LONGER // 10)):
        output, chance = tmp_path / f"{number}" / "run", random.Random(f"{type(command).__name__} {number}")
        output.parent.mkdir()
        for befall in (locked, deleted):
            event = chance.randint(1, events)
            code, said = apart(command.command(world, output), output, event, functools.partial(befall, output))
            tried()
            set_modes(output, 0o755)
            assert code in {0, 1}, said
            assert "Traceback" not in said
            assert not code or is_said(said), said
            if befall is locked:
                command.check(output, expected)
        deleted(output)  # of what is written after the rest was deleted, nothing is promised
        code, said = apart(command.command(world, output), output)
        assert code == 0, said
        assert command.made(output) == command.made(expected)
        assert names(output) == names(expected)


# At an import of its command line, drawn, a process is doubled, and its double interrupted; only one goes on.
EARLY = """
import os, random, signal, sys
folder, tries, last = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
places, at = set(random.Random(0).sample(range(last), tries)), -1

def hook(name, arguments):
    global at
    if name != "import" or at < 0 and not arguments[0].startswith("attanchor_vlm.cli."):
        return
    at += 1
    if at in places and not os.fork():
        places.clear()
        signal.alarm(120)
        file = os.open(f"{folder}/{at}", os.O_CREAT | os.O_WRONLY)
        os.dup2(file, 1), os.dup2(file, 2)
        print("said before")
        os.kill(os.getpid(), signal.SIGINT)
    elif at in places:
        code = os.waitstatus_to_exitcode(os.wait()[1])
        with open(f"{folder}/{at}", "a") as said:
            said.write(f"{code} at {arguments[0]}")
    elif places and at > last:
        os._exit(0)

signal.signal(signal.SIGINT, signal.default_int_handler)
sys.addaudithook(hook)
from attanchor_vlm.cli import main
sys.exit(main(sys.argv[4:]))
"""


def test_signals_at_the_start(tried, tmp_path):
    """Commands interrupted while they import."""
    tries, last = (2 * LONGER, 2500) if LONGER > 1 else (8, 350)
    command = [sys.executable, "-c", EARLY, tmp_path, tries, last, "check", "--model", tmp_path, "--image", tmp_path]
    paths = {"PYTHONPATH": os.pathsep.join(map(str, sys.path)), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": ""}
    subprocess.run([*map(str, command)], env={**os.environ, **paths}, check=False, capture_output=True, timeout=3000)
    said = [file.read_text() for file in tmp_path.iterdir()]
    assert len(said) == tries
    for one in said:
        tried()
        assert "said before\n" in one, one
        assert one.replace("said before\n", "").startswith("interrupted\n130 at "), one
