"""Whatever ends a run, a whole checkpoint is left and goes on to the same losses; errors are one line each."""

from __future__ import annotations

import contextlib
import errno
import functools
import json
import os
import shutil
import signal
from pathlib import Path

import forked
import pytest
import torch
import training_toy
from forked import at_most
from training_toy import at_the_end_of, before_every_loss, lines, logged

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import cli, distributed, load_settings
from attanchor_vlm.data.dataset import SKIPPED_FILE, STREAM_SKIPPED_FILE
from attanchor_vlm.errors import CheckpointError, DataError, SetupError
from attanchor_vlm.records import alone_in
from attanchor_vlm.training import callbacks, checkpoints
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import TrainConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return training_toy.write_world(tmp_path_factory, train=(8, 0), val=(2, 1))


settings = functools.partial(training_toy.settings, tau=0.3)
run = functools.partial(training_toy.run, tau=0.3)


@pytest.fixture(scope="module")
def stopped(world, tmp_path_factory):
    """A run that has made three of six steps, with checkpoints of the second and the third."""
    output = tmp_path_factory.mktemp("stopped") / "run"
    run(world, output, max_steps=3, save_steps=2)
    return output


@pytest.fixture
def output(stopped, tmp_path):
    return Path(shutil.copytree(stopped, tmp_path / "run"))


def losses(log):
    return logged(log, "loss", "eval_loss", "tau")


def die_in_step(chosen: TrainConfig, step: int) -> None:
    at_the_end_of(step, lambda: os.kill(os.getpid(), signal.SIGKILL))
    train.run(chosen, say=lambda line: None, progress=False)


def test_a_killed_run_loses_the_steps_since_its_checkpoint_and_no_more(world, tmp_path):
    options = {"save_steps": 2, "fraction": 0.2, "hold_fraction": "quantile", "calibration_samples": 16}
    process = forked.start(die_in_step, settings(world, tmp_path / "parts", **options), 6)
    assert forked.finish(process) == -signal.SIGKILL
    assert [path.name for path in train.complete_checkpoints(tmp_path / "parts")][-1] == "checkpoint-4"
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    state = checkpoints.read_state(tmp_path / "parts" / "checkpoint-4")
    assert load_settings(tmp_path / "parts" / "checkpoint-4").tau == state["tau"] == state["keeper"]["tau"]

    parts = run(world, tmp_path / "parts", resume=True, **options)
    whole = run(world, tmp_path / "whole", **options)
    assert parts.steps == 6
    assert losses(parts.log) == pytest.approx(losses(whole.log), rel=1e-6)
    assert losses(lines(tmp_path / "parts")) == losses(parts.log)
    assert len({line["tau"] for line in whole.log if "loss" in line}) > 3  # it follows the scores


@pytest.mark.parametrize(
    ("options", "refusal"),
    [
        ({"max_steps": 3, "save_steps": 2}, r"made 3 steps, and 3 are asked for; raise --max-steps"),
        ({"lr": 1e-12, "eval_steps": 1, "patience": 2}, r"stopped at step 3, with no .* for 2 steps; raise --patience"),
    ],
)
def test_a_run_that_ended_in_front_of_its_adapter_still_gets_it(world, output, options, refusal):
    if "patience" in options:
        output = output.parent / "stalled"
        assert run(world, output, **options).stopped_early
    made = {name: (output / name).read_bytes() for name in ("adapter_config.json", "adapter_model.safetensors")}
    for name in made:
        (output / name).unlink()
    record = json.loads((output / "run.json").read_text())
    del record["result"]
    (output / "run.json").write_text(json.dumps(record))
    (output / ".attanchor-part-1.json").touch()  # of a kill
    result = run(world, output, resume=True, **options)
    assert (result.steps, result.stopped_early) == (3, "patience" in options)
    with pytest.raises(SetupError, match=refusal):
        run(world, output, resume=True, **options)
    assert {name: (output / name).read_bytes() for name in made} == made
    assert not list(output.glob(".*"))


def test_workers_that_start_anew_do_not_change_what_follows(world, tmp_path):
    """In the epoch behind a resume, and for its first validation: their seeds come from a generator of their own."""
    few = tmp_path / "few.json"
    few.write_text(json.dumps(json.loads((world / "train.json").read_text())[:12]))  # three steps an epoch
    options = {"data": few, "workers": 1, "eval_steps": 2, "scheduler": "constant", "eval_batch_size": 16}
    whole = run(world, tmp_path / "whole", max_steps=5, **options)
    run(world, tmp_path / "parts", max_steps=2, **options)
    parts = run(world, tmp_path / "parts", max_steps=5, resume=True, **options)
    assert losses(parts.log) == pytest.approx(losses(whole.log), rel=1e-6)


@pytest.mark.parametrize("resume", [True, False])
def test_a_folder_in_use_is_refused_and_one_that_a_kill_left_is_taken_over(world, output, resume, capsys):
    chosen = {"output": output if resume else output.parent / "new", "resume": resume}
    with forked.held(chosen["output"]) as other:
        before = contents(output.parent)
        message = rf"^output \S+ is in use by process {other} on \S+, since 20[-\d]+ [:\d]+\S*; wait for it"
        with pytest.raises(SetupError, match=message):
            run(world, **chosen)
        assert contents(output.parent) == before
    assert capsys.readouterr().err == ""
    assert run(world, **chosen).steps == 6
    told = [line for line in capsys.readouterr().err.splitlines() if "in use" in line]
    assert len(told) == 1
    assert f"was in use by process {other} on " in told[0]
    assert told[0].endswith("which is gone: it is taken over")
    assert not list(chosen["output"].glob(".*"))


def test_a_folder_that_cannot_be_one_is_refused(world, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SetupError, match=r"notes.txt is a file; it should be a folder, or not exist"):
        run(world, tmp_path / "notes.txt")
    with pytest.raises(SetupError, match=r"^output \S+notes.txt/run cannot be written to: Not a directory"):
        run(world, tmp_path / "notes.txt" / "run")


def test_a_folder_is_free_behind_a_refusal_and_in_what_it_forks(world, tmp_path):
    with pytest.raises(SetupError, match="holds no checkpoint to resume from"):
        run(world, tmp_path / "run", resume=True)
    assert not (tmp_path / "run").exists()
    with alone_in(tmp_path):
        process = os.fork()
        if not process:
            with contextlib.suppress(SetupError), alone_in(tmp_path):
                os._exit(1)
            os._exit(0)
        assert os.waitpid(process, 0)[1] == 0
        assert (tmp_path / ".run.lock").exists()


def test_a_run_that_starts_anew_forgets_the_bad_rows_of_the_one_before(world, output):
    chosen = settings(world, output.parent / "anew")
    chosen.output.mkdir()
    for name in (SKIPPED_FILE, STREAM_SKIPPED_FILE):
        (chosen.output / name).write_text('{"file": "a.jsonl", "row": 1}\n')
        (output / name).write_text("kept")
    checkpoints.prepare_output(chosen)
    assert [path.name for path in chosen.output.iterdir()] == ["run.json"]
    checkpoints.prepare_output(settings(world, output, resume=True))
    assert (output / STREAM_SKIPPED_FILE).read_text() == "kept"


class FullDisk:
    def __init__(self, *arguments):
        pass

    def __call__(self, samples):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_under_a_worker_is_one_line(world, tmp_path, monkeypatch, workers):
    monkeypatch.setattr(train, "Collator", FullDisk)
    with pytest.raises(CheckpointError, match=r"^training stopped: .*No space left on device$"):
        run(world, tmp_path / "run", workers=workers)


class Killed(FullDisk):
    def __call__(self, samples):
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_line(world, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "Collator", Killed)
    with pytest.raises(CheckpointError, match=r"^training stopped: one of the --workers was killed, .*; give fewer$"):
        run(world, tmp_path / "run", workers=1)


def test_a_checkpoint_that_a_kill_tore_is_removed_and_made_anew(world, output):
    torn = output / "checkpoint-5"
    torn.mkdir()
    (torn / "optimizer.pt").write_bytes(b"half")
    result = run(world, output, resume=True, save_steps=5)
    assert result.steps == 6
    assert checkpoints.read_state(torn)["step"] == 5
    assert torch.load(torn / "optimizer.pt")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    "size", [300_000, 500_000]
)  # in the adapter's weights, and behind them in the optimiser's state
def test_a_full_disk_leaves_the_last_checkpoint_and_one_line(world, output, size, monkeypatch):
    assert (output / "checkpoint-3" / "adapter_model.safetensors").stat().st_size in range(300_001, 400_000)
    before = {name: text for name, text in contents(output).items() if name.startswith("checkpoint-3")}
    original = train.checkpoints.writing
    monkeypatch.setattr(checkpoints, "writing", lambda folder: _nested(original(folder), at_most(size)), raising=True)
    with pytest.raises(CheckpointError) as caught:
        run(world, output, resume=True)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert message.startswith(f"checkpoint {output / 'checkpoint-6'} cannot be written: ")
    assert "File too large" in message or "is the disk full?" in message
    assert message.endswith("checkpoint-3 is whole: make room, and go on from it with --resume")
    assert {path.name for path in output.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-3"}
    assert {name: text for name, text in contents(output).items() if name.startswith("checkpoint-3")} == before


@contextlib.contextmanager
def _nested(outer, inner):
    with outer, inner:
        yield


def test_a_full_disk_at_the_end_leaves_no_half_adapter(world, tmp_path, monkeypatch):
    output = tmp_path / "run"

    def full(folder, **made):
        (folder / "adapter_model.safetensors").write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(train, "_write_adapter", full)
    with pytest.raises(CheckpointError, match=r"adapter cannot be written to .*No space left.*; checkpoint-2 in it is"):
        run(world, output, max_steps=2, eval_steps=1)
    left = {path.name for path in output.iterdir()}
    assert left == {"run.json", "log.jsonl", "checkpoint-1", "checkpoint-2"}


def test_a_full_disk_leaves_no_half_log_line(world, tmp_path, monkeypatch):
    original = callbacks.LogFile.on_log

    def full(self, args, state, control, **kwargs):
        limit = self.path.stat().st_size + 10 if state.global_step == 5 else 1 << 40
        with at_most(limit):
            original(self, args, state, control, **kwargs)

    monkeypatch.setattr(callbacks.LogFile, "on_log", full)
    with pytest.raises(CheckpointError, match=r"training stopped: File too large; checkpoint-3 is whole"):
        run(world, tmp_path / "run")
    assert lines(tmp_path / "run")[-1]["step"] == 4


@pytest.mark.parametrize("text", ["", "[]", "{}"])
def test_a_damaged_note_of_the_settings_is_one_line(world, output, text):
    (output / "run.json").write_text(text)
    with pytest.raises(SetupError, match=r"run\.json cannot be read, so it is not known what to resume: ") as caught:
        run(world, output, resume=True)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["optimizer.pt", "adapter_model.safetensors", "rng_state.pth", "trainer_state.json"])
def test_a_damaged_checkpoint_is_one_line_that_names_the_one_before(world, output, name):
    file = output / "checkpoint-3" / name
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(CheckpointError, match=r"checkpoint-3 cannot be read: .*; delete that folder") as caught:
        run(world, output, resume=True)
    assert "--resume goes on from checkpoint-2" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_an_image_that_vanishes_is_one_line_and_leaves_the_checkpoint(tmp_path, capsys):
    folder = tmp_path / "data"
    scenes.write_dataset(folder, "train", 8, seed=0)
    options = ["--model", small_llava.SHIPPED, "--data", folder / "train.json", "--images", folder / "images"]
    options += ["--output", tmp_path / "run", "--preset", "small-llava", "--tau", 0.3, "--val-fraction", 0]
    options += ["--batch-size", 4, "--eval-steps", 2]
    assert cli.main(["train", *map(str, options), "--max-steps", "2"]) == 0
    capsys.readouterr()

    class Vanishing(callbacks.SameOrderOnResume):
        def on_train_begin(self, *args, **kwargs):
            for image in (folder / "images").iterdir():
                image.unlink()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callbacks, "SameOrderOnResume", Vanishing)
        code = cli.main(["train", *map(str, options), "--max-steps", "4", "--resume", "--workers", "1"])
    assert code == 1
    error = capsys.readouterr().err.split("\n")
    assert "0/4" in "".join(error[:-2])  # the progress bar, which is not on the error's line
    assert error[-2].startswith("error: ")
    assert error[-1] == ""
    assert ".png cannot be read: No such file or directory; checkpoint-2 is whole" in error[-2]
    assert [path.name for path in train.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]


def test_a_terminated_run_saves_before_it_ends(world, tmp_path, monkeypatch):
    """As torchrun and batch systems announce it."""
    at_the_end_of(2, lambda: signal.raise_signal(signal.SIGTERM), monkeypatch)
    before = signal.getsignal(signal.SIGTERM)
    result = run(world, tmp_path / "run")
    assert result.interrupted
    assert result.steps == 2
    assert [path.name for path in train.complete_checkpoints(tmp_path / "run")] == ["checkpoint-2"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_what_other_programs_left_in_a_folder_is_not_touched(world, tmp_path):
    """A checkpoint of transformers' own Trainer looks like one that a kill tore."""
    theirs = tmp_path / "theirs" / "checkpoint-500"
    theirs.mkdir(parents=True)
    (theirs / "model.safetensors").write_text("weeks of work")
    with pytest.raises(SetupError, match="theirs holds checkpoint-500, which is not of this command; take another"):
        run(world, theirs.parent)
    assert contents(tmp_path) == {"theirs/checkpoint-500/model.safetensors": b"weeks of work"}
    model = tmp_path / "model"
    shutil.copytree(small_llava.SHIPPED, model)
    before = contents(model)
    with pytest.raises(SetupError, match="model holds a model; take another folder"):
        run(world, model)
    assert contents(model) == before


@pytest.mark.parametrize("steps", [0, 3])
def test_a_gpu_that_is_too_small_is_one_line_that_says_what_to_do(world, tmp_path, monkeypatch, steps):
    def full(trainer, inputs):
        if trainer.state.global_step == steps:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    with monkeypatch.context() as patch:
        before_every_loss(full, patch)
        with pytest.raises(SetupError, match=r"^the GPU's memory does not hold a batch of 4 samples; give ") as caught:
            run(world, tmp_path / "run")
    message = str(caught.value)
    assert "--gradient-checkpointing, or a smaller --batch-size and as much more --accumulation" in message
    assert ("checkpoint-3 is whole, and --resume goes on from it with --grad" in message) == bool(steps)
    if steps:
        assert run(world, tmp_path / "run", resume=True, gradient_checkpointing=True).steps == 6


def test_another_number_of_processes_is_another_run(world, output, monkeypatch):
    chosen = settings(world, output, resume=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SetupError, match="processes was 1 and is 2"):
        checkpoints.prepare_output(chosen)


def test_an_output_that_not_all_machines_see_is_refused(world, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "on_main", lambda work: None)  # another machine has made it
    with pytest.raises(SetupError, match="not on a file system that all machines of this run share"):
        checkpoints.prepare_output(settings(world, tmp_path / "run"))


def test_a_worker_s_error_keeps_its_one_line():
    text = "Caught DataError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  File …\n"
    assert str(DataError(f"{text}attanchor_vlm.data.rows.DataError: image a.png is gone\n")) == "image a.png is gone"


def test_a_run_of_an_earlier_version_is_gone_on_with(world, tmp_path):
    """Its run.json has other names, None for what nobody decided, and the preset's tau, not the measured one."""
    made_with = {"fraction": 0.2, "hold_fraction": "quantile", "calibration_samples": 8, "val_data": None}
    made_with |= {"val_fraction": 0, "lora_rank": 1, "lora_alpha": 2, "lora_dropout": 0, "lr": 2e-3}
    made_with |= {"tau": None, "eval_steps": None, "output": tmp_path / "run"}
    first = run(world, max_steps=1, **made_with)
    record = tmp_path / "run" / "run.json"
    assert json.loads(record.read_text())["settings"]["tau"] == first.tau != TrainConfig.tau  # what really ran

    earlier = json.loads((Path(__file__).parent / "run-of-earlier-version.json").read_text())
    files = {"model": str(small_llava.SHIPPED), "data": str(world / "train.json"), "images": str(world / "images")}
    earlier["settings"] |= files
    record.write_text(json.dumps(earlier))
    with pytest.raises(SetupError, match=r"had other settings: lr was 0\.002 and is 0\.1; resume"):
        run(world, max_steps=2, resume=True, **{**made_with, "lr": 0.1})
    assert run(world, max_steps=2, resume=True, **made_with).steps == 2
