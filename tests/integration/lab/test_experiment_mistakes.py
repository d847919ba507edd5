"""Mistakes in an experiment are said before anything runs, and cost no other row."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess

import pandas as pd
import pytest
from experiment_toy import study

from attanchor_lab import figures, table
from attanchor_lab.paper import arms, studies
from attanchor_lab.paper import degrade as variants
from attanchor_lab.paper.study import Arm
from attanchor_vlm import cli, provenance
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.evaluation import answers
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.training import run as train

SWEEP = ["sweep", "--model", "./gone"]
TEST = ["--test", "{world}/test.json", "--metrics", "loss"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ([*SWEEP], "give --data to train on, or --no-train"),
        ([*SWEEP, "--no-train", "--metrics", "loss"], "metrics of text need --data and --images"),
        ([*SWEEP, "--no-train", "--test", "gone.json", "--metrics", "loss"], "test gone.json is not a file"),
        ([*SWEEP, "--no-train", "--metrics", "none"], "nothing is asked for"),
        ([*SWEEP, "--no-train", "--taus", "low"], "'low' should be numbers with commas between"),
        ([*SWEEP, "--no-train", "--preset", "tiny"], "preset is 'tiny'"),
        ([*SWEEP, "--no-train", "--seeds", "0.5", *TEST], "'0.5' should be whole numbers"),
        (["tokens", "--model", "m", "--no-train", "--views", "1.5", *TEST], "'1.5' should be whole numbers"),
        (["tokens", "--model", "m", "--no-train", "--views", "inf", *TEST], "'inf' should be whole numbers"),
        (["tokens", "--model", "m", "--no-train", "--views", "3", *TEST], "views is 3"),
        (["tokens", "--model", "m", "--no-train", "--tau", "1", "--views", "2", *TEST], "tau is 1; it should be below"),
        (["scale", "--no-train", "--models", "a=m", "--models", "a=n", *TEST], "a stands for two checkpoints"),
        (["scale", "--no-train", "--models", "a_b=m", "--models", "a-b=n", *TEST], "would have one folder"),
        (
            ["degrade", "--model", "m", "--no-train", "--jpeg", "30.5", *TEST],
            "level of jpeg is 30.5; it should be a whole number",
        ),
        (
            ["degrade", "--model", "m", "--no-train", *(f"--{kind}=none" for kind in variants.KINDS), *TEST],
            "every kind of degradation is left out",
        ),
        (["directions", "--model", "m", "--no-train", "--tau", "1", *TEST], "tau is 1; it should be below 1"),
        (["paper", "--model", "m", "--no-train", "--tau", "2", *TEST], "tau is 2; it should be below 1"),
    ],
)
def test_mistakes_are_said_before_anything_runs(world, tmp_path, capsys, command, message):
    places = ["--images", str(world / "images"), "--output", str(tmp_path / "o")]
    assert cli.main(["experiment", *(word.format(world=world) for word in command), *places]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


@pytest.fixture
def no_training(monkeypatch):
    def run(*_):
        raise AssertionError("trained before the mistake was said")

    monkeypatch.setattr(train, "run", run)


def measured_on(world, output, data, images=None, **plan):
    one = study(world, output, **plan)
    return dataclasses.replace(one, plan=dataclasses.replace(one.plan, data=data, images=images or world / "images"))


@pytest.fixture(scope="module")
def bad_rows(world):
    rows = json.loads((world / "test.json").read_text())
    rows[-1]["image"] = "gone.png"
    (world / "bad.json").write_text(json.dumps(rows))
    return world / "bad.json"


def test_bad_test_rows_are_said_before_training(world, tmp_path, bad_rows, no_training):
    with pytest.raises(DataError, match=r"gone\.png does not exist"):
        studies.sweep(measured_on(world, tmp_path, bad_rows), [1.0])
    with pytest.raises(DataError, match="nowhere is not a folder"):
        studies.sweep(measured_on(world, tmp_path, world / "test.json", world / "nowhere"), [1.0])


def test_every_threshold_is_checked_before_training(world, tmp_path, no_training):
    with pytest.raises(ValueError, match="tau"):
        studies.sweep(study(world, tmp_path), [1.0, float("nan")])


def test_views_that_a_context_does_not_hold_are_said_before_training(world, tmp_path, no_training):
    short = tmp_path / "short"
    shutil.copytree(world / "model", short)
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300  # five views are 320 tokens
    (short / "config.json").write_text(json.dumps(config))
    one = dataclasses.replace(study(world, tmp_path / "o"), model=str(short))
    with pytest.raises(DataError, match="more than the model's context, 300"):
        studies.tokens(one, [1, 5])


def test_an_adapter_of_other_settings_is_not_measured(world, tmp_path, monkeypatch):
    """Killed between training and measurement, and then called with another learning rate."""
    one = study(world, tmp_path, limit=4)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            arms.run_arms(one, "x", [Arm("a", 0.5, placement="random")])
    other = dataclasses.replace(one, preset=dataclasses.replace(one.preset, lr=1e-5))
    with pytest.raises(SetupError, match=r"lr was 0\.01 and is 1e-05"):
        arms.run_arms(other, "x", [Arm("a", 0.5, placement="random")])
    longer = dataclasses.replace(one, train=dataclasses.replace(one.train, max_steps=2))
    with pytest.raises(SetupError, match="max_steps was 1 and is 2"):
        arms.run_arms(longer, "x", [Arm("a", 0.5, placement="random")])
    arms.run_arms(one, "x", [Arm("a", 0.5, placement="random")])


def test_a_loss_that_is_no_number_costs_neither_the_row_nor_the_others(world, tmp_path, monkeypatch):
    score = answers.score_answers

    def overflows(*arguments, **options):
        return dataclasses.replace(score(*arguments, **options), loss=float("nan"))

    monkeypatch.setattr(answers, "score_answers", overflows)
    said = []
    one = dataclasses.replace(study(world, tmp_path, trains=False, limit=2), say=said.append)
    row = studies.sweep(one, [1.0]).rows[0]
    assert set(row["values"]) == {"exact"}
    assert row["not_finite"] == ["loss"]
    assert any("left out, as NaN or infinite: loss" in line for line in said)
    assert "- baseline, seed 0: loss left out, as NaN or infinite." in (tmp_path / "table.md").read_text()
    # Without any number there is a table that says why, and no picture.
    nothing = study(world, tmp_path / "nothing", trains=False, limit=1, metrics=("loss",))
    files = studies.degrade(nothing, {"blur": [9]}, [1.0]).files
    assert [path.name for path in files] == ["rows.jsonl", "table.md"]
    assert "- blur 9, baseline, seed 0: loss left out" in (tmp_path / "nothing" / "table.md").read_text()
    figures.dots(tmp_path / "none.png", table.by_seed([{"arm": "a", "seed": 0, "values": {}, "figures": {}}]), {}, "")
    figures.along(tmp_path / "none.png", pd.DataFrame(columns=["panel"]), "", "")
    assert not (tmp_path / "none.png").exists()


def test_bad_rows_are_left_out_of_changed_images_too(world, tmp_path, bad_rows):
    one = measured_on(world, tmp_path, bad_rows, trains=False, limit=2, skip_bad=True)
    assert len(studies.degrade(one, {"blur": [9]}, [1.0]).rows) == 2
    other = measured_on(world, tmp_path, world / "test.json", world / "images", trains=False, limit=2)
    with pytest.raises(SetupError, match="with other settings"):
        studies.degrade(other, {"blur": [9]}, [1.0])


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    """Not that of a working tree which its environment happens to lie in."""
    folder = tmp_path / ".venv" / "attanchor_vlm"
    folder.mkdir(parents=True)
    shutil.copy(provenance.__file__, folder)
    for words in (
        ["init", "-q"],
        ["-c", "user.name=a", "-c", "user.email=a", "commit", "-q", "--allow-empty", "-m", "a"],
    ):
        subprocess.run(["git", "-C", str(tmp_path), *words], check=True)
    monkeypatch.setattr(provenance, "__file__", str(folder / "provenance.py"))
    monkeypatch.delenv("GIT_COMMIT", raising=False)
    assert provenance.commit.__wrapped__() is None
    subprocess.run(["git", "-C", str(tmp_path), "add", "."], check=True)
    found = provenance.commit.__wrapped__()
    assert found.endswith("+changes")
    assert provenance.commit.__wrapped__(".venv") == found.removesuffix("+changes")


def test_arms_with_one_name_are_refused(world, tmp_path):
    with pytest.raises(ValueError, match="two arms have one name: a"):
        arms.run_arms(study(world, tmp_path, trains=False), "x", [Arm("a", 1.0), Arm("a", 0.5)])
