"""Experiments end to end on small stand-ins: what is killed goes on, what is printed was measured."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess

import numpy as np
import pytest
from PIL import Image

from attanchor_vlm import cli, presets, provenance, scenes, small_llava, train
from attanchor_vlm.data import DataError, read_rows
from attanchor_vlm.evaluation import answers
from attanchor_vlm.evaluation import run as evaluation
from attanchor_vlm.experiments import arms, figures, metrics, studies, tables, variants
from attanchor_vlm.experiments.rows import Rows
from attanchor_vlm.experiments.study import Arm, Study, TrainRows, settings_of
from attanchor_vlm.loading import SetupError
from attanchor_vlm.settings import load_settings


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    shutil.copytree(small_llava.SHIPPED, folder / "model")
    scenes.write_dataset(folder, "train", 8, seed=0)
    scenes.write_dataset(folder, "test", 2, seed=1)
    return folder


def study(world, output, trains=True, seeds=(0,), **plan):
    rows = TrainRows(world / "train.json", world / "images", max_steps=1, eval_steps=1)
    plan = {"metrics": ("loss", "exact"), "batch_size": 16, "max_new_tokens": 4, **plan}
    return Study(
        model=str(world / "model"),
        output=output,
        plan=evaluation.Plan(data=world / "test.json", images=world / "images", **plan),
        # Without warm-up, whose first step has a learning rate of 0.
        preset=presets.preset("small-llava", tau=0.5, batch_size=8, lr=1e-2, warmup=0.0),
        train=rows if trains else None,
        seeds=seeds,
    )


def quietly(function, *arguments, **options):
    return function(*arguments, **options, say=lambda line: None, progress=False)


def same(rows):
    """Rows less what differs from one run to the next."""
    dropped = ("seconds", "train_seconds")
    return [
        {**row, "commit": "", "date": "", "figures": {k: v for k, v in row["figures"].items() if k not in dropped}}
        for row in rows
    ]


# --- The paper's figures. --------------------------------------------------------------------------------------------


def paper_rows(model):
    found = []
    for direction in (metrics.BASELINE, metrics.TEXT_INTO_IMAGE):
        values = metrics.paper_values(model, direction)
        found.append({"arm": direction, "seed": 0, "values": {**values, "loss": -values["loss"]}, "figures": {}})
    return found


@pytest.mark.parametrize(("model", "better"), [("tinyllava-1b", 13), ("llava-7b", 11), ("qwen2.5-vl-3b", 9)])
def test_the_papers_values_give_the_papers_claims(model, better):
    """ "Improves 13, 11 and 9 of 15 metrics", counted from the stored values by what counts ours."""
    rows = paper_rows(model)
    assert tables.improved(rows, metrics.TEXT_INTO_IMAGE, metrics.BASELINE) == (better, 15)


def test_the_papers_two_tables_agree_where_they_overlap():
    by_model = metrics.paper_values("tinyllava-1b", metrics.TEXT_INTO_IMAGE)
    by_tau = metrics.paper_values("tinyllava-1b", tau=0.12)
    assert {**by_tau, "pope": 84.83} == by_model  # printed with one decimal in the one, two in the other
    assert metrics.paper_values("tinyllava-1b", tau=1.0) == metrics.paper_values("tinyllava-1b")
    assert metrics.paper_values("tinyllava-1b", tau=0.5) is None
    assert metrics.paper_values("small-llava") is None


def test_beside_the_paper_by_hand():
    rows = [
        {"arm": "baseline", "seed": 0, "values": {"loss": 1.1, "pope": 70.0}, "figures": {}},
        {"arm": "baseline", "seed": 1, "values": {"loss": 1.3, "pope": 74.0}, "figures": {}},
        {"arm": "tau 0.12", "seed": 0, "values": {"loss": 1.0}, "figures": {"inserted_share": 0.1}},
    ]
    paper = {
        name: metrics.paper_values("tinyllava-1b", tau=tau) for name, tau in (("baseline", 1.0), ("tau 0.12", 0.12))
    }
    lines = tables.beside_paper(rows, paper, "baseline")
    assert lines[0] == "|  | baseline | paper | tau 0.12 | paper |"
    assert lines[2] == "| validation loss (negated) | -1.2000 ± 0.1414 | -1.0716 | -1.0000 | -1.0712 |"
    assert lines[3] == "| POPE | 72.00 ± 2.83 | 75.06 |  | 84.80 |"  # not measured: left empty
    assert lines[9] == "| validation loss (negated) | +0.0000 | +0.0000 | +0.2000 | +0.0004 |"
    assert lines[10] == "| POPE | +0.00 | +0.00 |  | +9.74 |"
    assert "2509.23109" in lines[-1]
    assert tables.by_arm(rows)[-1] == "| inserted anchors / text tokens |  | 0.1000 |"


# --- Pictures. -------------------------------------------------------------------------------------------------------


def test_radii_run_from_the_worst_arm_to_the_best():
    radii = figures.scaled(np.array([[1.0, 5.0, 2.0], [3.0, 4.0, 2.0], [2.0, 4.5, 2.0]]))
    assert radii == pytest.approx(np.array([[0.15, 1.0, 1.0], [1.0, 0.15, 1.0], [0.575, 0.575, 1.0]]))


def test_the_radar_of_the_papers_values(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures, "scaled", lambda values, scaled=figures.scaled: drawn.append(values) or scaled(values))
    assert figures.radar(tmp_path / "radar.png", paper_rows("tinyllava-1b"), "TinyLLaVA")
    assert min(Image.open(tmp_path / "radar.png").size) > 600
    assert drawn[0].shape == (2, 15)
    assert drawn[0][:, 0] == pytest.approx([-1.0716, -1.0712])  # the lower loss is the better one, and further out
    few = [{**row, "values": {"loss": 1.0, "pope": 2.0}} for row in paper_rows("llava-7b")]
    # Of CHAIR, hallucinated objects, less is better: nothing here knows that, so it is no axis.
    for row in few:
        row["values"]["amber_g/amber_chair"] = 7.8
    assert not figures.radar(tmp_path / "none.png", few, "two metrics")
    assert not (tmp_path / "none.png").exists()


# --- Other images. ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photograph():
    return Image.fromarray(np.random.default_rng(0).integers(90, 160, (60, 90, 3), dtype=np.uint8))


def detail(image):
    """Mean difference of neighbouring pixels."""
    return float(np.abs(np.diff(np.asarray(image, dtype=float), axis=1)).mean())


@pytest.mark.parametrize(("kind", "levels"), [("blur", (0, 2, 8)), ("downscale", (1, 2, 4))])
def test_worse_images_have_less_detail(photograph, kind, levels):
    found = [variants.degrade(photograph, kind, level) for level in levels]
    assert all(image.size == photograph.size for image in found)
    details = [detail(photograph), *map(detail, found)]
    assert details[0] == pytest.approx(details[1], rel=0.1)
    assert details[1] > 1.2 * details[2] > 1.4 * details[3]


def test_jpeg_is_further_from_the_image_the_lower_its_quality(photograph):
    def distance(level):
        changed = np.asarray(variants.degrade(photograph, "jpeg", level), dtype=float)
        return float(np.abs(changed - np.asarray(photograph)).mean())

    assert distance(5) > distance(50) + 1 > distance(95) + 2


def test_noise_has_its_standard_deviation(photograph):
    changed = np.asarray(variants.degrade(photograph, "noise", 16, seed=1), dtype=float) - np.asarray(photograph)
    assert changed.std() == pytest.approx(16, rel=0.03)
    assert changed.mean() == pytest.approx(0, abs=0.5)


@pytest.mark.parametrize(("kind", "level"), [("fog", 1), ("jpeg", 0), ("downscale", 0.5), ("blur", -1)])
def test_levels_without_meaning_are_refused(kind, level):
    with pytest.raises(SetupError, match=kind):
        variants.check_level(kind, level)


def test_views_are_the_whole_and_its_parts():
    image = Image.fromarray(np.arange(8 * 6 * 3, dtype=np.uint8).reshape(6, 8, 3))
    pixels = np.asarray(image)
    middle = variants.views(image, 2)[1]
    assert np.array_equal(np.asarray(middle), pixels[1:4, 2:6])
    quarters = [np.asarray(one) for one in variants.views(image, 5)[1:]]
    assert np.array_equal(np.block([[[quarters[0]], [quarters[1]]], [[quarters[2]], [quarters[3]]]]), pixels)
    assert variants.views(image, 1) == [image]
    with pytest.raises(SetupError, match="views is 3"):
        variants.views(image, 3)


def test_rows_of_views_have_a_placeholder_for_each(world, tmp_path):
    data, images = variants.write_views(world / "test.json", world / "images", tmp_path / "v", 2, 3, progress=False)
    rows, _ = read_rows(data, images)
    assert [len(row.images) for row in rows] == [2, 2, 2]
    assert rows[0].messages[0][1].count("<image>") == 2
    before = data.stat().st_mtime_ns
    variants.write_views(world / "test.json", world / "images", tmp_path / "v", 2, 3, progress=False)
    assert data.stat().st_mtime_ns == before  # made before
    (tmp_path / ".v.part" / "images").mkdir(parents=True)  # what a kill leaves
    variants.write_views(world / "test.json", world / "images", tmp_path / "v", 2, 4, progress=False)
    assert len(read_rows(data, images)[0]) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["v"]


# --- Rows. -----------------------------------------------------------------------------------------------------------


def row(arm, **settings):
    return {"arm": arm, "seed": 0, "settings": settings, "values": {}, "figures": {}}


def test_a_row_cut_short_by_a_kill_is_run_again(tmp_path):
    rows = Rows(tmp_path, "sweep")
    rows.add(row("a", tau=1))
    rows.add(row("b", tau=0.5))
    whole = rows.path.read_text()
    rows.path.write_text(whole[:-20])
    again = Rows(tmp_path, "sweep")
    assert again.find("a", 0, {"tau": 1}) is not None
    assert again.find("b", 0, {"tau": 0.5}) is None
    again.add(row("b", tau=0.5))
    assert rows.path.read_text() == whole


def test_rows_of_other_settings_or_experiments_are_not_mixed(tmp_path):
    Rows(tmp_path, "sweep").add(row("a", tau=1, lr=0.1))
    with pytest.raises(SetupError, match=r"holds 'a' with other settings: lr was 0\.1 and is 0\.2"):
        Rows(tmp_path, "sweep").find("a", 0, {"tau": 1, "lr": 0.2})
    with pytest.raises(SetupError, match="rows of the experiment 'sweep'"):
        Rows(tmp_path, "degrade")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no row\n{}\n", "line 1 is not a row"),
        ("notes of mine", "line 1 is not a row"),  # not taken for a row that was cut short
        ('{"kind": "plan"}\n', "row 1 is not one of an experiment"),
        ("[1]\n", "line 1 is not a row"),
    ],
)
def test_files_that_hold_no_rows_are_left_alone(tmp_path, text, message):
    (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(SetupError, match=message):
        Rows(tmp_path, "sweep")
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
    for change in ({"task_data": {"pope": tmp_path}}, {"images": tmp_path}, {"batch_size": 1}, {"include": tmp_path}):
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
    whole = quietly(studies.sweep, study(world, tmp_path / "whole"), [1.0, 0.5]).rows
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
        quietly(studies.sweep, study(world, tmp_path / "killed"), [1.0, 0.5])
    assert "baseline" in (tmp_path / "killed" / "table.md").read_text()  # what there is, is shown
    result = quietly(studies.sweep, study(world, tmp_path / "killed"), [1.0, 0.5])
    assert trained == ["baseline-seed0", "tau-0.5-seed0"]
    assert len(measured) == 3
    assert same(result.rows) == same(whole)
    assert load_settings(tmp_path / "killed" / "runs" / "tau-0.5-seed0").tau == 0.5
    assert {path.name for path in result.files} == {"rows.jsonl", "table.md", "plot.png"}
    quietly(studies.sweep, study(world, tmp_path / "killed"), [1.0, 0.5])
    assert len(measured) == 3  # all done before
    untrained = study(world, tmp_path / "untrained", trains=False, metrics=("loss",))
    for before, after in zip(quietly(studies.sweep, untrained, [1.0, 0.5]).rows, whole, strict=True):
        assert abs(after["values"]["loss"] - before["values"]["loss"]) > 0.01  # what is measured is what was trained


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_killed_before_its_result_was_written_goes_on(world, tmp_path, steps):
    """All steps made, the last checkpoint whole, no result: the one before is gone on from, if there is one, and the
    row is the same."""
    one = study(world, tmp_path, limit=4)
    one = dataclasses.replace(one, train=dataclasses.replace(one.train, max_steps=steps))
    before = quietly(arms.run_arms, one, "x", [Arm("a", 0.5)])
    folder = tmp_path / "runs" / "a-seed0"
    run = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({"settings": run["settings"]}))
    (tmp_path / "rows.jsonl").unlink()
    assert same(quietly(arms.run_arms, one, "x", [Arm("a", 0.5)])) == same(before)


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
    monkeypatch.setattr("attanchor_vlm.experiments.checks.check_pending", lambda *_: None)
    tasks, data = ("a", "amber", "b", "amber_g"), {"amber": world, "b": world}
    one = study(world, tmp_path, trains=False, metrics=("loss",), tasks=tasks, task_data=data)
    with pytest.raises(KeyboardInterrupt):
        quietly(arms.run_arms, one, "x", [Arm("an arm", 0.5)])
    parts = [(("loss",), ()), (("a",), ()), (("amber", "amber_g"), ("amber",)), (("b",), ("b",))]
    assert asked == [(*part, "an-arm-seed0") for part in parts]
    other = dataclasses.replace(one, plan=dataclasses.replace(one.plan, max_new_tokens=9))
    with pytest.raises(KeyboardInterrupt):
        quietly(arms.run_arms, other, "x", [Arm("an arm", 0.5)])
    assert len(asked) == 8  # parts of other settings are not taken
    kill.clear()
    (row,) = quietly(arms.run_arms, one, "x", [Arm("an arm", 0.5)])
    assert asked[8:] == [(*parts[-1], "an-arm-seed0")]
    assert row["values"] == {name: value for name, value in found.items() if name != "b"}
    assert (row["figures"]["seconds"], row["samples"], row["not_finite"]) == (1.0, 1, ["b"])
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_say_what_they_came_from(world, tmp_path):
    result = quietly(studies.directions, study(world, tmp_path, trains=False, limit=4))
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
    assert json.loads((output / "runs" / "random-places-seed0" / "placement.json").read_text())["placement"] == "random"
    assert [rows[arm]["settings"]["placement"] for arm in rows] == ["matched"] * 3 + ["random", "front"]
    assert cli.main(command) == 0
    assert capsys.readouterr().out.count("done before") == 5
    rows_of_it = ["--data", world / "test.json", "--images", world / "images"]
    for use in (
        ["eval", *rows_of_it, "--metrics", "loss"],
        ["calibrate", *rows_of_it],
        ["generate", "--prompt", "Where?"],
        ["export-lm", "--output", tmp_path / "lm"],
    ):
        adapter = ["--model", world / "model", "--adapter", output / "runs" / "prompt-in-front-seed0"]
        assert cli.main([str(word) for word in [*use, *adapter]]) == 1
        assert "was trained as the control 'front'" in capsys.readouterr().err


def test_the_papers_columns_stand_beside_where_it_has_them(world, tmp_path, monkeypatch):
    two = study(world, tmp_path, trains=False, limit=2, seeds=(0, 1))
    evaluate, folders = evaluation.evaluate, []

    def measuring(*arguments):
        folders.append(arguments[3].name)
        return evaluate(*arguments)

    monkeypatch.setattr(evaluation, "evaluate", measuring)
    rows = quietly(studies.sweep, dataclasses.replace(two, preset_name="tinyllava-1b"), [1.0, 0.12]).rows
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
    result = quietly(studies.degrade, study(world, tmp_path, trains=False, limit=6), kinds, [1.0, 0.5])
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
    result = quietly(studies.tokens, study(world, tmp_path, limit=4), [2])
    tokens = {one["arm"]: one["figures"]["image_tokens"] for one in result.rows}
    assert tokens == {"2 views, baseline": 128, "2 views, tau 0.5": 128}
    assert "views/train/train.json" in result.rows[0]["settings"]["train"]["train_rows"]


def test_model_scale_changes_are_against_the_same_models_baseline(world, tmp_path):
    preset = presets.preset("small-llava", tau=0.5)
    models = {name: (str(world / "model"), "small-llava", preset) for name in ("one", "two")}
    result = quietly(studies.scale, study(world, tmp_path, trains=False, limit=4), models)
    rows = {one["arm"]: one for one in result.rows}
    assert len(rows) == 6
    gains = studies._gains(result.rows)["exact match"]["text into image"]
    change = rows["one: text into image"]["values"]["exact"] - rows["one: baseline"]["values"]["exact"]
    assert gains == [(rows["one: baseline"]["figures"]["parameters"], pytest.approx(change))] * 2
    table = (tmp_path / "table.md").read_text()
    loss = {arm: one["values"]["loss"] for arm, one in rows.items()}  # the only metric of the paper among them
    better = int(loss["two: text into image"] < loss["two: baseline"])
    assert (
        f"- two: text into image: better than two: baseline in {better} of 1 metrics." in table.partition("## two")[2]
    )
    assert "- One seed: a difference may be chance." in table


# --- Mistakes. -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --data to train on, or --no-train"),
        (["--no-train", "--metrics", "loss"], "metrics of text need --data and --images"),
        (["--no-train", "--test", "gone.json", "--metrics", "loss"], "test gone.json is not a file"),
        (["--no-train", "--metrics", "none"], "nothing is asked for"),
        (["--no-train", "--taus", "low"], "'low' should be numbers with commas between"),
        (["--no-train", "--preset", "tiny"], "preset is 'tiny'"),
    ],
)
def test_mistakes_are_said_before_anything_runs(world, tmp_path, capsys, arguments, message):
    command = ["experiment", "sweep", "--model", "./gone", "--images", world / "images", "--output", tmp_path / "o"]
    assert cli.main([str(word) for word in [*command, *arguments]]) in (1, 2)
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
        quietly(studies.sweep, measured_on(world, tmp_path, bad_rows), [1.0])
    with pytest.raises(DataError, match="nowhere is not a folder"):
        quietly(studies.sweep, measured_on(world, tmp_path, world / "test.json", world / "nowhere"), [1.0])


def test_every_threshold_is_checked_before_training(world, tmp_path, no_training):
    with pytest.raises(ValueError, match="tau"):
        quietly(studies.sweep, study(world, tmp_path), [1.0, float("nan")])


def test_views_that_a_context_does_not_hold_are_said_before_training(world, tmp_path, no_training):
    short = tmp_path / "short"
    shutil.copytree(world / "model", short)
    config = json.loads((short / "config.json").read_text())
    config["text_config"]["max_position_embeddings"] = 300  # five views are 320 tokens
    (short / "config.json").write_text(json.dumps(config))
    one = dataclasses.replace(study(world, tmp_path / "o"), model=str(short))
    with pytest.raises(DataError, match="more than the model's context, 300"):
        quietly(studies.tokens, one, [1, 5])


def test_an_adapter_of_other_settings_is_not_measured(world, tmp_path, monkeypatch):
    """Killed between training and measurement, and then called with another learning rate."""
    one = study(world, tmp_path, limit=4)

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", killed)
        with pytest.raises(KeyboardInterrupt):
            quietly(arms.run_arms, one, "x", [Arm("a", 0.5, placement="random")])
    (tmp_path / "runs" / "a-seed0" / "placement.json").unlink()  # as if killed in front of it
    other = dataclasses.replace(one, preset=dataclasses.replace(one.preset, lr=1e-5))
    with pytest.raises(SetupError, match=r"lr was 0\.01 and is 1e-05"):
        quietly(arms.run_arms, other, "x", [Arm("a", 0.5, placement="random")])
    longer = dataclasses.replace(one, train=dataclasses.replace(one.train, max_steps=2))
    with pytest.raises(SetupError, match="max_steps was 1 and is 2"):
        quietly(arms.run_arms, longer, "x", [Arm("a", 0.5, placement="random")])
    quietly(arms.run_arms, one, "x", [Arm("a", 0.5, placement="random")])
    assert (tmp_path / "runs" / "a-seed0" / "placement.json").is_file()


def test_a_loss_that_is_no_number_costs_neither_the_row_nor_the_others(world, tmp_path, monkeypatch):
    score = answers.score_answers

    def overflows(*arguments, **options):
        return dataclasses.replace(score(*arguments, **options), loss=float("nan"))

    monkeypatch.setattr(answers, "score_answers", overflows)
    said = []
    one = study(world, tmp_path, trains=False, limit=2)
    row = studies.sweep(one, [1.0], say=said.append, progress=False).rows[0]
    assert set(row["values"]) == {"exact"}
    assert row["not_finite"] == ["loss"]
    assert any("left out, as NaN or infinite: loss" in line for line in said)
    assert "- baseline, seed 0: loss left out, as NaN or infinite." in (tmp_path / "table.md").read_text()
    # Without any number there is a table that says why, and no picture.
    nothing = study(world, tmp_path / "nothing", trains=False, limit=1, metrics=("loss",))
    files = quietly(studies.degrade, nothing, {"blur": [9]}, [1.0]).files
    assert [path.name for path in files] == ["rows.jsonl", "table.md"]
    assert "- blur 9, baseline, seed 0: loss left out" in (tmp_path / "nothing" / "table.md").read_text()
    figures.dots(tmp_path / "none.png", [{"arm": "a", "seed": 0, "values": {}, "figures": {}}], "")
    figures.along(tmp_path / "none.png", {}, "", "")
    assert not (tmp_path / "none.png").exists()


def test_bad_rows_are_left_out_of_changed_images_too(world, tmp_path, bad_rows):
    one = measured_on(world, tmp_path, bad_rows, trains=False, limit=2, skip_bad=True)
    assert len(quietly(studies.degrade, one, {"blur": [9]}, [1.0]).rows) == 2
    other = measured_on(world, tmp_path, world / "test.json", world / "images", trains=False, limit=2)
    with pytest.raises(SetupError, match="with other settings"):
        quietly(studies.degrade, other, {"blur": [9]}, [1.0])


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["tokens", "--model", "m", "--views", "1.5"], "'1.5' should be whole numbers"),
        (["sweep", "--model", "m", "--seeds", "0.5"], "'0.5' should be whole numbers"),
        (["tokens", "--model", "m", "--views", "inf"], "'inf' should be whole numbers"),
        (["scale", "--models", "a=m", "--models", "a=n"], "the name a stands for two checkpoints"),
        (["tokens", "--model", "m", "--views", "3"], "views is 3"),
        (["degrade", "--model", "m", "--jpeg", "30.5"], "level of jpeg is 30.5; it should be a whole number"),
        (["scale", "--models", "a_b=m", "--models", "a-b=n"], "would have one folder"),
        (
            ["degrade", "--model", "m", *(f"--{kind}=none" for kind in variants.KINDS)],
            "every kind of degradation is left out",
        ),
        (["directions", "--model", "m", "--tau", "1"], "tau is 1; it should be below 1"),
        (["paper", "--model", "m", "--tau", "2"], "tau is 2; it should be below 1"),
        (["tokens", "--model", "m", "--tau", "1", "--views", "2"], "tau is 1; it should be below 1"),
    ],
)
def test_more_mistakes_are_said_before_anything_runs(world, tmp_path, capsys, command, message):
    shared = ["--no-train", "--images", world / "images", "--test", world / "test.json", "--output", tmp_path / "o"]
    assert cli.main([str(word) for word in ["experiment", *command, *shared, "--metrics", "loss"]]) in (1, 2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_an_installed_package_has_no_commit(tmp_path, monkeypatch):
    """Not that of a working tree which its environment happens to lie in."""
    folder = tmp_path / ".venv" / "attanchor_vlm"
    folder.mkdir(parents=True)
    shutil.copy(provenance.__file__, folder)
    (folder / "mixin.py").touch()
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
        quietly(arms.run_arms, study(world, tmp_path, trains=False), "x", [Arm("a", 1.0), Arm("a", 0.5)])
