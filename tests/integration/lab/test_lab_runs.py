"""The laboratory's runs survive a kill, and its plans are looked at before anything is run."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from pathlib import Path

import forked
import pandas
import pytest
import torch
from lab_toy import TOY

from attanchor_lab import runner
from attanchor_lab.scenes.questions import Mixture
from attanchor_lab.scenes.world import World
from attanchor_lab.synthetic import laboratory, model, plans
from attanchor_lab.synthetic import plan as settings
from attanchor_lab.synthetic.arms import ARMS
from attanchor_vlm import cli
from attanchor_vlm.errors import SetupError
from attanchor_vlm.records import alone_in, append_row


@pytest.fixture
def started(monkeypatch):
    """Jobs run in this process; the names of those that were given to it."""
    names: list[str] = []
    run = runner.run

    def here(jobs, keep, workers, *arguments):
        names.extend(job.name for job in jobs)
        run(jobs, keep, 0, *arguments)

    monkeypatch.setattr(runner, "run", here)
    return names


def plan(**changed) -> settings.LabPlan:
    return settings.LabPlan(
        "toy", (dataclasses.replace(TOY, **changed),), (settings.Contrast("toy", "t2i"),), workers=1
    )


def silent(line: str) -> None:
    pass


def test_a_laboratory_is_gone_on_with_after_a_kill(tmp_path, started):
    whole = laboratory.run(plan(), tmp_path / "whole", "cpu", silent, progress=False)
    assert [row["kind"] for row in whole] == ["plan", "start", "run", "run", "run", "start", "run", "run"]
    assert not (tmp_path / "whole" / "checkpoints").exists()
    for row in whole[1:]:
        assert row["settings"] == TOY.to_dict()
        assert {"commit", "torch", "transformers", "processor", "seed", "seconds", "load_before"} <= set(row)
    assert plans.from_dict(json.loads((tmp_path / "whole" / "plan.json").read_text())) == plan()

    folder = tmp_path / "cut"
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines()
    folder.mkdir()
    (folder / "plan.json").write_text((tmp_path / "whole" / "plan.json").read_text())
    (folder / "rows.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])
    again = laboratory.run(plan(), folder, "cpu", silent, progress=False)
    assert started[7:] == [
        "toy, seed 0: weights before stage 2",
        "toy, seed 0: front",
        "toy, seed 1: weights before stage 2",
        "toy, seed 1: plain",
        "toy, seed 1: t2i",
    ]
    first, second = laboratory.latest(whole), laboratory.latest(again)
    assert set(first) == set(second)
    for key, row in first.items():
        if key[0] == "run":
            assert row["test"] == second[key]["test"]  # the same weights and data, whenever they are made
    laboratory.run(plan(), folder, "cpu", silent, progress=False)
    assert len(started) == 7 + 5  # nothing is left to do


def test_a_line_cut_short_does_not_take_the_next_row_with_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"kind": "plan"}\n{"kind": "ru')
    assert [row["kind"] for row in laboratory.read(file)] == ["plan"]
    append_row(file, {"kind": "run", "setting": "a", "arm": "b", "seed": 0, "status": "done"})
    assert [row["kind"] for row in laboratory.read(tmp_path)] == ["plan", "run"]
    file.write_text('{"kind": "plan"}\nnonsense\n')
    with pytest.raises(ValueError, match="line 2 is not a row"):
        laboratory.read(file)


@pytest.mark.parametrize("left", [None, "", '{"kind": "pl'])
def test_a_kill_right_behind_the_plan_leaves_a_folder_that_can_be_gone_on_with(tmp_path, started, left):
    late = dataclasses.replace(plan(), minutes=0.0)
    laboratory.run(late, tmp_path, "cpu", silent, progress=False)
    (tmp_path / "rows.jsonl").unlink()
    if left is not None:
        (tmp_path / "rows.jsonl").write_text(left)
    found = laboratory.run(late, tmp_path, "cpu", silent, progress=False)
    assert [row["kind"] for row in found] == ["plan"]
    assert found == [json.loads((tmp_path / "plan.json").read_text())]


def test_a_failed_run_is_kept_and_the_rest_goes_on(tmp_path, started, monkeypatch):
    run = laboratory._arm

    def sometimes(condition, arm, seed, *arguments):
        if arm == "t2i" and seed == 0:
            raise FloatingPointError("the loss became nan")
        return run(condition, arm, seed, *arguments)

    monkeypatch.setattr(laboratory, "_arm", sometimes)
    said: list[str] = []
    with pytest.raises(SetupError, match=r"4 of 5 runs done, 1 failed; .*rows\.jsonl says why"):
        laboratory.run(plan(), tmp_path / "lab", "cpu", said.append, progress=False)
    found = laboratory.read(tmp_path / "lab")
    failed = [row for row in found if row.get("status") == "failed"]
    assert [(row["arm"], row["seed"], row["error"]) for row in failed] == [
        ("t2i", 0, "FloatingPointError: the loss became nan")
    ]
    assert "4 of 5 runs done, 1 failed" in said[-1]
    assert sum(row.get("status") == "done" and row["kind"] == "run" for row in found) == 4
    monkeypatch.setattr(laboratory, "_arm", run)
    again = laboratory.run(plan(), tmp_path / "lab", "cpu", silent, progress=False)
    assert sum(row.get("status") == "failed" for row in again) == 1  # the failure stays in the rows
    assert laboratory.latest(again)["run", "toy", "t2i", 0]["status"] == "done"


def test_arms_without_weights_fail_instead_of_waiting(tmp_path, started, monkeypatch):
    def broken(*arguments):
        raise RuntimeError("no memory")

    monkeypatch.setattr(laboratory, "_start", broken)
    with pytest.raises(SetupError, match="0 of 5 runs done, 5 failed"):
        laboratory.run(plan(), tmp_path / "lab", "cpu", silent, progress=False)
    found = laboratory.read(tmp_path / "lab")
    assert all(row["status"] == "failed" for row in found[1:])
    assert len(found) == 1 + 2 + 5


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_process_costs_its_own_job_alone(workers):
    """And what comes after it is told why it is not done; what ran beside it is done."""
    kept: dict[str, dict] = {}

    def job(name, work, after=None):
        return runner.Job(name, name, work, lambda error: {"status": "failed", "error": error}, after)

    done = functools.partial(dict, status="done")
    slow = functools.partial(eval, "__import__('time').sleep(1) or {'status': 'done'}")
    killed = job("killed", functools.partial(os._exit, 1))
    jobs = [job("beside", slow), killed, job("behind", done, "killed"), job("other", done)]
    said: list[str] = []
    runner.run(jobs, lambda job, row: kept.update({job.key: row}), workers, say=said.append, progress=False)
    assert kept["beside"] == kept["other"] == {"status": "done"}
    assert "its process was killed" in kept["killed"]["error"]
    assert kept["behind"]["status"] == "failed"
    assert len(said) == 2


def test_workers_run_side_by_side(tmp_path):
    """A pipe opens when both its ends are there."""
    os.mkfifo(tmp_path / "pipe")
    ends = {mode: f"dict(status='done', end=open({str(tmp_path / 'pipe')!r}, {mode!r}).mode)" for mode in "rw"}
    jobs = [runner.Job(mode, mode, functools.partial(eval, end)) for mode, end in ends.items()]
    kept: dict[str, dict] = {}
    with forked.time_limit():
        runner.run(jobs, lambda job, row: kept.update({job.key: row}), 2, progress=False)
    assert kept == {mode: {"status": "done", "end": mode} for mode in "rw"}


def test_a_worker_ends_with_the_laboratory_that_started_it(monkeypatch):
    class Killed:
        def join(self):
            pass

    ended: list[int] = []
    monkeypatch.setattr(runner.multiprocessing, "parent_process", Killed)
    monkeypatch.setattr(runner.os, "_exit", ended.append)
    watcher = runner._end_with_parent()
    assert watcher is not None
    watcher.join(5)
    assert ended == [1]


def test_nothing_is_started_after_the_time(tmp_path, started):
    said: list[str] = []
    late = dataclasses.replace(plan(), minutes=0.0)
    found = laboratory.run(late, tmp_path / "lab", "cpu", said.append, progress=False)
    assert [row["kind"] for row in found] == ["plan"]
    assert "5 not started" in said[-1]


def test_another_plan_or_another_folder_is_refused(tmp_path, started):
    laboratory.run(dataclasses.replace(plan(), minutes=0.0), tmp_path / "lab", "cpu", silent, progress=False)
    with pytest.raises(ValueError, match="holds the plan of another laboratory"):
        laboratory.run(plan(alignment=0.0), tmp_path / "lab", "cpu", silent, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        laboratory.run(plan(), tmp_path / "file", "cpu", silent, progress=False)
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no plan\.json"):
        laboratory.run(plan(), tmp_path / "stray", "cpu", silent, progress=False)


@pytest.mark.parametrize("size", plans.SIZES)
def test_every_plan_can_be_written_and_read(size):
    made = plans.plan(size)
    assert plans.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert all("plain" in setting.arms for setting in made.settings)
    assert all(len(setting.seeds) >= 3 for setting in made.settings) or size == "smoke"


def test_the_plans_hold_every_arm_and_setting_that_is_promised():
    shorter = {name for name, arm in ARMS.items() if arm.keep is not None}
    own, _ = plans.from_file(Path(__file__).parents[3] / "docs" / "lab" / "shorter-plan.json")
    run = {arm for setting in own.settings for arm, _ in setting.runs()}
    assert run == {"plain", "t2i", *shorter} - {"keep-12-pooling"}  # which came after this plan's rows
    smoke = {arm for setting in plans.plan("smoke").settings for arm, _ in setting.runs()}
    assert smoke == set(ARMS) - shorter
    gpu = plans.plan("gpu").settings
    assert {setting.world.patches for setting in gpu} == {144, 576, 1152}
    assert {arm for setting in gpu for arm, _ in setting.runs()} == set(ARMS) - shorter - {"t2i-content", "true"}
    assert {setting.stage1.steps > 0 for setting in gpu} == {True, False}
    for of in ("alignment", "blur_train"):
        assert len({getattr(setting, of) for setting in gpu}) > 1
    for of in ("hold_share", "method", "share", "steps"):
        assert len({getattr(setting.stage2, of) for setting in gpu}) > 1
    assert len({setting.shape.layers for setting in gpu}) > 1


def test_the_cpu_size_rehearsed_and_reported(tmp_path, started, capsys):
    folder = str(tmp_path / "lab")
    assert cli.main(["lab", "--size", "cpu", "--rehearse", "--output", folder, "--no-progress"]) == 0
    assert "5 of 5 runs done" in capsys.readouterr().out
    assert cli.main(["report", folder, "--output", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "too few seeds" in text
    assert all(f"page-{kind}.png" in text for kind in ("forest", "curves", "scene"))


def test_the_smoke_size_and_a_plan_of_one_s_own_can_be_rehearsed(tmp_path, started, capsys):
    """Toy models pass no check of what they have learned, so none is made."""
    file = tmp_path / "plan.json"
    small = dataclasses.replace(TOY, arms=("plain",), more=(), stage2=dataclasses.replace(TOY.stage2, steps=10_000))
    file.write_text(json.dumps(dataclasses.replace(plan(), settings=(small,), contrasts=()).to_dict()))
    for words, runs in ((["--plan", str(file)], 1), (["--size", "smoke"], 14)):
        folder = str(tmp_path / str(runs))
        assert cli.main(["lab", *words, "--rehearse", "--output", folder, "--no-progress"]) == 0
        assert f"{runs} of {runs} runs done" in capsys.readouterr().out


def test_every_setting_of_the_gpu_size_rehearsed(tmp_path, started):
    made = plans.rehearsal(plans.plan("gpu"))
    small = [dataclasses.replace(one, arms=("plain",), more=(), test_scenes=2) for one in made.settings]
    short = dataclasses.replace(made, settings=tuple(small), contrasts=(), minutes=None)
    found = laboratory.run(short, tmp_path / "lab", "cpu", silent, progress=False)
    assert {row["setting"] for row in found if row["kind"] == "run"} == {one.name for one in made.settings}
    assert all(row.get("status", "done") == "done" for row in found)


def factors(setting: settings.Condition) -> dict:
    """What it is trained with, by dotted name."""
    tested = ("name", "title", "arms", "more", "seeds", "more_seeds", "blur_test")
    given = {name: value for name, value in setting.to_dict().items() if name not in tested}
    return pandas.json_normalize(given).to_dict("records")[0]


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("long", {"stage2.steps": [3000]}),
        ("share", {"stage2.share": [0.1, 0.5]}),
        ("placements", {"alignment": [0.0]}),
        ("again", {"alignment": [0.0], "stage2.method": ["lora"], "stage2.lr": [0.004]}),
        (
            "settings",
            {
                "shape.layers": [6],
                "stage1.steps": [0],
                "stage2.steps": [1500],
                "stage2.curriculum": [0.2],
                "stage2.method": ["lora"],
                "stage2.lr": [0.004],
                "stage2.hold_share": [False],
                "mixture.yes": [0.5],
                "mixture.negatives": [["random", "popular", "adversarial"]],
                "blur_train": [0.8],
            },
        ),
    ],
)
def test_the_plans_in_the_documentation_vary_what_it_says_of_the_cpu_size_s_main_setting(name, changed):
    made, device = plans.chosen(None, Path(__file__).parents[3] / "docs" / "lab" / f"{name}-plan.json", workers=3)
    assert (device, made.workers, made.size) == ("cpu", 3, name)
    main, found = plans.plan("cpu").settings[0], {}
    assert made.settings[0].start_key() == main.start_key()
    for setting in made.settings:
        for factor, value in factors(setting).items():
            if value != factors(main)[factor]:
                found.setdefault(factor, []).append(value)
    assert found == changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"device": "tpu"}, "device of the plan is 'tpu'"),
        ({"settings": {}}, "settings is {}: Input should be a valid array"),
        ({"settings": ["main"]}, "settings.0 is 'main': Input should be an object"),
        ({"workers": True}, "workers is True: Input should be a valid integer"),
        ({"seeds": 3}, "settings.0.seeds is 3: Input should be a valid array"),
        ({"seeds": [0.5]}, "settings.0.seeds.0 is 0.5: Input should be a valid integer"),
        ({"stage2": {"steps": "100"}}, "settings.0.stage2.steps is '100': Input should be a valid integer"),
        ({"stage2": {"hold_share": 1}}, "settings.0.stage2.hold_share is 1: Input should be a valid boolean"),
        (
            {"mixture": {"negatives": "random"}},
            "settings.0.mixture.negatives is 'random': Input should be a valid array",
        ),
        ({"world": None}, "settings.0.world is None: Input should be an object"),
        ({"world": {"noise": -1}}, "noise are 8, 4, -1"),
        ({"name": "a/b"}, "name of a setting is 'a/b'"),
    ],
)
def test_a_wrong_value_in_a_plan_file_is_named_before_anything_is_run(tmp_path, changed, message):
    values = plan().to_dict()
    for name, value in changed.items():
        where = values if name in ("device", "settings", "workers") else values["settings"][0]
        where[name] = value
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=re.escape(message)):
        plans.from_file(file)


def test_a_plan_file_that_lacks_something_says_what():
    values = plan().to_dict()
    del values["settings"][0]["arms"], values["settings"][0]["alignment"]
    with pytest.raises(ValueError, match=r"^plan: settings\.0\.arms .* Field required"):
        plans.from_dict(values)
    values["settings"][0]["arms"] = ["plain", "t2i"]
    assert plans.from_dict(values).settings[0].alignment == settings.Condition("a", "", ("plain",)).alignment


def test_a_folder_has_one_laboratory_at_a_time(tmp_path):
    """Held by another process; a kill lets it go."""
    with forked.held(tmp_path) as other, pytest.raises(SetupError, match=f"in use by process {other} on .*, since 20"):
        laboratory.run(plan(), tmp_path, "cpu", silent, progress=False)
    with alone_in(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_settings_share_their_weights_where_they_can():
    settings_ = {setting.name: setting.start_key() for setting in plans.plan("gpu").settings}
    same = {"main-144", "others-144", "short-144", "long-144", "lora-144", "fixed-tau-144", "few-anchors-144"}
    assert len({settings_[name] for name in same}) == 1
    assert len(set(settings_.values())) == 1 + len(settings_) - len(same)


@pytest.mark.parametrize(
    ("changed", "wrong", "message"),
    [
        (TOY, {"arms": ("t2i",)}, "lacks the arm 'plain'"),
        (TOY, {"arms": ("plain", "t3i")}, r"\['t3i'\]"),
        (TOY, {"more": ("plain",)}, "twice"),
        (TOY, {"seeds": ()}, "at least one of seeds"),
        (TOY, {"blur_test": ()}, "at least one of seeds and of blur_test"),
        (TOY, {"test_scenes": 0}, "test_scenes is 0; it should be at least 1"),
        (TOY, {"temperature": 0.0}, "temperature is 0.0; it should be above 0"),
        (settings.Stage1(), {"batch": 0}, "batch is 0"),
        (settings.Stage1(), {"lr": 0.0}, "lr is 0.0"),
        (settings.Stage2(), {"steps": 0}, "steps is 0"),
        (settings.Stage2(), {"method": "qlora"}, "method is 'qlora'"),
        (settings.Stage2(), {"share": 0.0}, "share is 0.0"),
        (model.Shape(), {"width": 60, "heads": 8}, "width is 60; with 8 heads"),
        (model.Shape(), {"layers": 0}, "at least 1 each"),
        (World(), {"rows": 5}, "rows is 5"),
        (World(), {"least": 9, "most": 3}, "least and most"),
        (World(), {"rows": 2, "columns": 2}, "4 patches"),
        (Mixture(), {"negatives": ()}, "negatives is"),
        (Mixture(), {"negatives": ("hard",)}, "negatives is"),
        (Mixture(), {"yes": 1.2}, "yes is"),
        (Mixture(), {"kinds": (1, 0)}, "kinds is"),
        (Mixture(), {"kinds": (0, 0, 0)}, "kinds is"),
        (plan(), {"settings": (), "contrasts": ()}, "no settings"),
        (plan(), {"workers": 0}, "workers is 0"),
    ],
)
def test_wrong_values_of_a_plan_and_its_parts_are_refused(changed, wrong, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(changed, **wrong)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --size or --plan"),
        (["--size", "cpu", "--plan", "plan.json"], "give --size or --plan"),
        (["--size", "gpu"], "there is no GPU here"),
        (["--plan", "nowhere.json"], "is no file"),
        (["--plan", "unknown.json"], "settings.0.speed is 3: Unexpected"),
        (["--plan", "broken.json"], "no JSON"),
    ],
)
def test_a_wrong_command_ends_in_one_line(tmp_path, capsys, monkeypatch, words, message):
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    setting = {**TOY.to_dict(), "speed": 3}
    (tmp_path / "unknown.json").write_text(json.dumps({"size": "x", "settings": [setting], "contrasts": []}))
    assert cli.main(["lab", "--output", "out", *words]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_smoke_size_as_printed(tmp_path, capsys, monkeypatch):
    """In a process of its own, from the command line, with its checks; three of its runs."""
    made = plans.plan("smoke")
    arms = {"smoke": ("plain", "t2i"), "lora": ("plain",)}
    few = tuple(dataclasses.replace(setting, arms=arms[setting.name], more=()) for setting in made.settings)
    monkeypatch.setattr(plans, "_smoke", lambda: dataclasses.replace(made, settings=few))
    folder = str(tmp_path / "smoke")
    assert cli.main(["lab", "--size", "smoke", "--output", folder, "--workers", "1", "--no-progress"]) == 0
    said = capsys.readouterr().out
    assert "3 of 3 runs done" in said
    for check in ("runs:", "matching:", "identity:", "placement:", "wiring:"):
        assert check in said
    found = laboratory.read(tmp_path / "smoke")
    assert all(row["training"]["log"][-1]["answer_loss"] < 4 for row in found if row["kind"] == "run")
