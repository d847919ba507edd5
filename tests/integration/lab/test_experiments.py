"""Experiments end to end on small stand-ins: what is killed goes on, what is printed was measured."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
from experiment_toy import same, study

from attanchor_lab.paper import arms, studies
from attanchor_lab.paper.arms import find
from attanchor_lab.paper.study import Arm, Study, settings_of
from attanchor_lab.runner import Rows
from attanchor_vlm import cli
from attanchor_vlm.errors import SetupError
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.inference.ask import answer
from attanchor_vlm.model.adapter_files import load_settings
from attanchor_vlm.model.load import load
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import Method

# --- Rows. -----------------------------------------------------------------------------------------------------------


def row(arm, **settings):
    return {"experiment": "sweep", "arm": arm, "seed": 0, "settings": settings, "values": {}, "figures": {}}


def rows_in(folder):
    return Rows(folder, arms._NEEDED, "an experiment")


def test_a_row_cut_short_by_a_kill_is_run_again(tmp_path):
    rows = rows_in(tmp_path)
    rows.add(row("a", tau=1))
    rows.add(row("b", tau=0.5))
    whole = rows.path.read_text()
    rows.path.write_text(whole[:-20])
    again = rows_in(tmp_path)
    assert find(again, "a", 0, {"tau": 1}) is not None
    assert find(again, "b", 0, {"tau": 0.5}) is None
    again.add(row("b", tau=0.5))
    assert rows.path.read_text() == whole


def test_rows_of_other_settings_or_experiments_are_not_mixed(world, tmp_path):
    rows_in(tmp_path).add(row("a", tau=1, lr=0.1))
    with pytest.raises(SetupError, match=r"holds 'a' with other settings: lr was 0\.1 and is 0\.2"):
        find(rows_in(tmp_path), "a", 0, {"tau": 1, "lr": 0.2})
    with pytest.raises(SetupError, match="rows of the experiment 'sweep'"):
        arms.run_arms(study(world, tmp_path, trains=False), "degrade", [Arm("a", 0.5)])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no row\n{}\n", "line 1 is not a row"),
        ("notes of mine", "line 1 is not a row"),  # not taken for a row that was cut short
        ('{"kind": "plan"}\n', "row 1 is no row of an experiment"),
        ("[1]\n", "line 1 is not a row"),
    ],
)
def test_files_that_hold_no_rows_are_left_alone(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SetupError, match=message):
        rows_in(tmp_path)
    assert (tmp_path / "rows.jsonl").read_text() == text


def test_settings_tell_whatever_figures_depend_on(world, tmp_path):
    """Other task data, images, batches of the loss, weights' dtype, and other rows in a file of the same name."""
    data = tmp_path / "test.json"
    shutil.copy(world / "test.json", data)
    plain = study(world, tmp_path, trains=False, tasks=("pope",), task_data={"pope": world})
    plain = dataclasses.replace(plain, plan=dataclasses.replace(plain.plan, data=data))
    arm = Arm("a", 0.5)
    first = settings_of(plain, arm)
    assert settings_of(plain, arm) == first
    for change in (
        {"task_data": {"pope": tmp_path}},
        {"images": tmp_path},
        {"batch_size": 1},
        {"include_path": tmp_path},
    ):
        assert settings_of(dataclasses.replace(plain, plan=dataclasses.replace(plain.plan, **change)), arm) != first
    half = dataclasses.replace(plain, preset=dataclasses.replace(plain.preset, dtype="float16"))
    assert settings_of(half, arm) != first
    rows = json.loads(data.read_text())
    data.write_text(json.dumps(rows[1:]))
    assert settings_of(plain, arm) != first


# --- Whole experiments. ----------------------------------------------------------------------------------------------


def test_a_killed_sweep_goes_on_where_it_was(world, tmp_path, monkeypatch):
    """Killed in the measurement of the second arm, when it is trained: nothing is trained or measured twice, and the
    rows are those of a sweep that was left alone."""
    whole = studies.sweep(study(world, tmp_path / "whole"), [1.0, 0.5]).rows
    trained, measured = [], []
    run, evaluate = train.run, evaluation.evaluate

    def training(settings, *arguments):
        trained.append(settings.output.name)
        return run(settings, *arguments)

    def measuring(*arguments):
        measured.append(1)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return evaluate(*arguments)

    monkeypatch.setattr(train, "run", training)
    monkeypatch.setattr(evaluation, "evaluate", measuring)
    with pytest.raises(KeyboardInterrupt):
        studies.sweep(study(world, tmp_path / "killed"), [1.0, 0.5])
    assert "baseline" in (tmp_path / "killed" / "table.md").read_text()  # what there is, is shown
    result = studies.sweep(study(world, tmp_path / "killed"), [1.0, 0.5])
    assert trained == ["baseline-seed0", "tau-0.5-seed0"]
    assert len(measured) == 3
    assert same(result.rows) == same(whole)
    assert load_settings(tmp_path / "killed" / "runs" / "tau-0.5-seed0").tau == 0.5
    assert {path.name for path in result.files} == {"rows.jsonl", "table.md", "plot.png"}
    studies.sweep(study(world, tmp_path / "killed"), [1.0, 0.5])
    assert len(measured) == 3  # all done before
    untrained = study(world, tmp_path / "untrained", trains=False, metrics=("loss",))
    for before, after in zip(studies.sweep(untrained, [1.0, 0.5]).rows, whole, strict=True):
        assert abs(after["values"]["loss"] - before["values"]["loss"]) > 0.01  # what is measured is what was trained


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_killed_before_its_result_was_written_goes_on(world, tmp_path, steps):
    """All steps made, the last checkpoint whole, no result: no step is made again, and the row is the same."""
    one = study(world, tmp_path, limit=4)
    one = dataclasses.replace(one, train=dataclasses.replace(one.train, max_steps=steps))
    before = arms.run_arms(one, "x", [Arm("a", 0.5)])
    folder = tmp_path / "runs" / "a-seed0"
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({"settings": run["settings"]}))
    (tmp_path / "rows.jsonl").unlink()
    assert same(arms.run_arms(one, "x", [Arm("a", 0.5)])) == same(before)


def test_a_killed_measurement_goes_on_behind_its_last_benchmark(world, tmp_path, monkeypatch):
    """Killed in the third of three parts; the row is that of all of them, and nothing is left of the parts."""
    found = {"loss": 1.5, "a": 1.0, "amber": 2.0, "amber_g/amber_chair": 3.0, "b": float("nan")}
    asked, kill = [], ["b"]

    def evaluate(model, processor, plan, output, progress):
        names = (*plan.metrics, *plan.tasks)
        asked.append((names, tuple(plan.task_data), output.name))
        if set(names) & set(kill):
            raise KeyboardInterrupt
        values = {name: value for name, value in found.items() if set(names) & {name, name.partition("/")[0]}}
        good = evaluation.finite(values)
        lost = tuple(set(values) - set(good))
        return evaluation.Report(good, {"seconds": 1.0} if plan.metrics else {}, len(plan.metrics), not_finite=lost)

    monkeypatch.setattr(evaluation, "evaluate", evaluate)
    monkeypatch.setattr(Study, "check", lambda self: None)
    monkeypatch.setattr(arms, "check_pending", lambda *_: None)
    tasks, data = ("a", "amber", "b", "amber_g"), {"amber": world, "b": world}
    one = study(world, tmp_path, trains=False, metrics=("loss",), tasks=tasks, task_data=data)
    with pytest.raises(KeyboardInterrupt):
        arms.run_arms(one, "x", [Arm("an arm", 0.5)])
    parts = [(("loss",), ()), (("a",), ()), (("amber", "amber_g"), ("amber",)), (("b",), ("b",))]
    assert asked == [(*part, "an-arm-seed0") for part in parts]
    other = dataclasses.replace(one, plan=dataclasses.replace(one.plan, max_new_tokens=9))
    with pytest.raises(KeyboardInterrupt):
        arms.run_arms(other, "x", [Arm("an arm", 0.5)])
    assert len(asked) == 8  # parts of other settings are not taken
    kill.clear()
    (row,) = arms.run_arms(one, "x", [Arm("an arm", 0.5)])
    assert asked[8:] == [(*parts[-1], "an-arm-seed0")]
    assert row["values"] == {name: value for name, value in found.items() if name != "b"}
    assert (row["figures"]["seconds"], row["samples"], row["not_finite"]) == (1.0, 1, ["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_say_what_they_came_from(world, tmp_path):
    result = studies.directions(study(world, tmp_path, trains=False, limit=4))
    assert [one["arm"] for one in result.rows] == ["baseline", "text into image", "image into text"]
    stored = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert stored == result.rows
    for one in stored:
        assert {"commit", "version", "torch", "transformers", "device", "date", "seed", "settings"} <= set(one)
        assert set(one["values"]) == {"loss", "exact"}
        assert one["samples"] == 4
    shares = {one["arm"]: one["figures"]["inserted_share"] for one in stored}
    assert shares["baseline"] == 0
    assert shares["text into image"] > 0
    assert shares["image into text"] > 0
    table = (tmp_path / "table.md").read_text()
    assert "seeds 0, 4 test samples, not trained" in table
    assert "One seed: a difference may be chance." in table


def test_the_papers_table_with_its_controls(world, tmp_path, capsys):
    """As a user runs it, trained, with columns that the paper lacks."""
    output = tmp_path / "paper"
    options = {
        "--model": world / "model", "--data": world / "train.json", "--test": world / "test.json",
        "--images": world / "images", "--output": output, "--preset": "small-llava", "--taus": "1,0.12", "--tau": 0.12,
        "--max-steps": 2, "--train-batch-size": 8, "--eval-steps": 1, "--metrics": "loss,exact", "--limit": 6,
        "--max-new-tokens": 4, "--batch-size": 6,
    }  # fmt: skip
    command = ["experiment", "paper", *(str(word) for option in options.items() for word in option)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    heads = "|  | baseline | tau 0.12 | image into text | random places | prompt in front |"
    assert heads in printed
    assert printed.count("[5/5]") == 1
    rows = {one["arm"]: one for one in map(json.loads, (output / "rows.jsonl").read_text().splitlines())}
    shares = {arm: one["figures"]["inserted_share"] for arm, one in rows.items()}
    assert shares["baseline"] == 0
    assert shares["tau 0.12"] == shares["random places"] > 0
    assert shares["prompt in front"] == 1
    assert (
        len({rows[arm]["values"]["loss"] for arm in ("baseline", "tau 0.12", "random places", "prompt in front")}) == 4
    )
    assert load_settings(output / "runs" / "random-places-seed0").placement == "random"
    assert [rows[arm]["settings"]["placement"] for arm in rows] == ["matched"] * 3 + ["random", "front"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 5
    model, processor = load(str(world / "model"), output / "runs" / "prompt-in-front-seed0")
    found = answer(model, processor, "Where?", world / "images" / "test-00000.png", max_new_tokens=1)
    assert found.inserted == found.candidates > 0  # its adapter is used as it was trained


def test_the_papers_columns_stand_beside_where_it_has_them(world, tmp_path, monkeypatch):
    two = study(world, tmp_path, trains=False, limit=2, seeds=(0, 1))
    evaluate, folders = evaluation.evaluate, []

    def measuring(*arguments):
        folders.append(arguments[3].name)
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", measuring)
    rows = studies.sweep(dataclasses.replace(two, preset_name="tinyllava-1b"), [1.0, 0.12]).rows
    assert [(one["seed"], one["arm"]) for one in rows] == [(s, a) for s in (0, 1) for a in ("baseline", "tau 0.12")]
    assert folders == ["baseline-seed0", "tau-0.12-seed0", "baseline-seed1", "tau-0.12-seed1"]  # of what tasks write
    table = (tmp_path / "table.md").read_text()
    assert "|  | baseline | paper | tau 0.12 | paper |" in table
    assert "| -1.0716 |" in table
    assert "±" in table  # over seeds
    assert "One seed" not in table
    assert "POPE" not in table  # not measured here, so not in our table, though the paper has it


def test_degraded_images_against_tau(world, tmp_path):
    kinds = {"blur": [60]}
    result = studies.degrade(study(world, tmp_path, trains=False, limit=6), kinds, [1.0, 0.5])
    by_name = {one["arm"]: one for one in result.rows}
    assert len(by_name) == 4
    assert by_name["blur 60, baseline"]["values"]["loss"] > 1.5 * by_name["clean, baseline"]["values"]["loss"]
    shares = [by_name[f"{kind}, tau 0.5"]["figures"]["inserted_share"] for kind in ("clean", "blur 60")]
    assert shares[1] < shares[0]  # what is blurred looks like no word
    table = (tmp_path / "table.md").read_text()
    assert "| blur 60 |" in table
    assert "## inserted anchors / text tokens" in table
    assert "\n\n- One seed: a difference may be chance.\n\n" in table
    assert (tmp_path / "plot.png").exists()


def test_longer_image_sequences_are_trained_and_tested(world, tmp_path):
    result = studies.tokens(study(world, tmp_path, limit=4), [2])
    tokens = {one["arm"]: one["figures"]["image_tokens"] for one in result.rows}
    assert tokens == {"2 views, baseline": 128, "2 views, tau 0.5": 128}
    assert "views/train/train.json" in result.rows[0]["settings"]["train"]["train_rows"]


def test_model_scale_changes_are_against_the_same_models_baseline(world, tmp_path):
    preset = Method.from_preset("small-llava", tau=0.5)
    models = {name: (str(world / "model"), "small-llava", preset) for name in ("one", "two")}
    result = studies.scale(study(world, tmp_path, trains=False, limit=4), models)
    rows = {one["arm"]: one for one in result.rows}
    assert len(rows) == 6
    gains = studies._gains(result.rows).query("panel == 'exact match' and series == 'text into image'")
    change = rows["one: text into image"]["values"]["exact"] - rows["one: baseline"]["values"]["exact"]
    assert gains["x"].tolist() == [rows["one: baseline"]["figures"]["parameters"]] * 2
    assert gains["y"].tolist() == pytest.approx([change] * 2)
    table = (tmp_path / "table.md").read_text()
    loss = {arm: one["values"]["loss"] for arm, one in rows.items()}  # the only metric of the paper among them
    better = int(loss["two: text into image"] < loss["two: baseline"])
    assert (
        f"- two: text into image: better than two: baseline in {better} of 1 metrics." in table.partition("## two")[2]
    )
    assert "- One seed: a difference may be chance." in table
