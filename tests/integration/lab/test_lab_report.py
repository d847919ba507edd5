"""The laboratory's statistics and page: interval and verdict agree, and no failure is hidden."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from attanchor_lab import figures
from attanchor_lab.synthetic import report
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.synthetic.plan import Condition, Contrast, LabPlan
from attanchor_lab.table import BETTER, OPEN, TOO_FEW, WORSE, compare
from attanchor_vlm import cli
from attanchor_vlm.records import read_rows

PAGES = Path(__file__).parents[3] / "docs" / "lab"

# --- Statistics. -----------------------------------------------------------------------------------------------------


def test_one_comparison_is_a_t_test():
    values = [1.0, 2.5, 0.5, 3.0]
    (line,) = compare({"a": values}).to_dict("records")
    theirs = stats.ttest_1samp(values, 0)
    assert (line["p"], line["p_alone"]) == (pytest.approx(theirs.pvalue), pytest.approx(theirs.pvalue))
    assert (line["low"], line["high"]) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert (line["low_alone"], line["high_alone"]) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert (line["seeds"], line["mean"], line["verdict"]) == (4, 1.75, OPEN)


def test_p_values_are_holm_s_and_intervals_at_his_levels():
    """By hand: the smaller p times 2, the larger as it is; their intervals at 97.5 and 95 %."""
    strong, weak = [1.0, 1.2, 0.9, 1.1], [0.1, -0.2, 0.3, 0.4]
    table = compare({"weak": weak, "strong": strong})
    p = {name: stats.ttest_1samp(values, 0).pvalue for name, values in (("strong", strong), ("weak", weak))}
    assert list(table["p"]) == pytest.approx([p["weak"], 2 * p["strong"]])
    for name, values, level in (("strong", strong, 0.975), ("weak", weak, 0.95)):
        wanted = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert (table.loc[name, "low"], table.loc[name, "high"]) == pytest.approx(tuple(wanted))


def test_an_interval_leaves_out_0_exactly_where_the_verdict_is_not_open():
    rng = np.random.default_rng(0)
    said = dict.fromkeys((BETTER, WORSE, OPEN), 0)
    for among in (1, 2, 8, 30, 60):
        for _ in range(2):
            effects = rng.choice([0.0, 1.5, -1.5], among)
            values = rng.normal(effects[:, None], 1, (among, 6))
            for _, line in compare({number: one.tolist() for number, one in enumerate(values)}).iterrows():
                verdict = BETTER if line["low"] > 0 else WORSE if line["high"] < 0 else OPEN
                assert line["verdict"] == verdict
                assert line["low"] <= line["low_alone"] <= line["mean"] <= line["high_alone"] <= line["high"]
                said[verdict] += 1
    assert min(said.values()) > 8


def test_fewer_than_three_seeds_give_no_test_and_do_not_count():
    alone = compare({"a": [1.0, 2.0, 3.0]}).loc["a"]
    table = compare({"few": [1.0, 2.0], "a": [1.0, 2.0, 3.0], "none": []})
    assert table.loc["a"].equals(alone)
    assert list(table["verdict"]) == [TOO_FEW, alone["verdict"], TOO_FEW]
    assert table.loc[["few", "none"], ["low", "high", "p"]].isna().all(axis=None)
    assert compare({}).empty


def test_differences_without_spread():
    """No answer differs: no difference. As many in every seed, as few questions can by chance: no test."""
    table = compare({"nothing": [0.0] * 3, "something": [2.0] * 3})
    assert table.loc["nothing", "p"] == 1
    assert list(table["verdict"]) == [OPEN, TOO_FEW]
    assert table.loc["something", ["low", "high", "p"]].isna().all()


# --- Rows made up, so that what should be shown is known. -------------------------------------------------------------

ENVIRONMENT = {
    "commit": "abc", "device": "cpu", "gpu": "none", "torch": "2", "transformers": "5", "processor": "a processor",
}  # fmt: skip


def answers(mean: float) -> dict:
    matching = {"hit": 0.97, "chance": 0.05, "hit_referred": 0.6, "precision": 0.8, "recall": None, "share": 0.25}
    return {
        "existence": mean, "colour": mean, "place": mean, "mean": mean, "present": 0.9,
        "negatives": {"random": 0.5, "popular": 0.5, "adversarial": None}, "yes_share": 0.7,
        "answer_loss": 1 - mean, "questions": 100, "matching": matching,
    }  # fmt: skip


def rows_of(folder: Path, effects: dict[str, float], spread: float = 0.004, seeds: int = 5, named: int = 9, **changed):
    """A folder with rows in which every arm's mean accuracy is plain's and its effect, with a little noise."""
    condition = Condition("main", "a made-up condition", arms=tuple(effects), seeds=tuple(range(seeds)), **changed)
    contrasts = tuple(Contrast("main", arm, asks=f"Does {arm} help?") for arm in effects if arm != "plain")[:named]
    plan = LabPlan("made up", (condition,), contrasts)
    found = [{"kind": "plan", "written": "2026-01-01T00:00:00Z", **plan.to_dict(), **ENVIRONMENT}]
    rng = np.random.default_rng(0)
    for seed in condition.seeds:
        base = rng.uniform(0.5, 0.7)
        for arm, effect in effects.items():
            mean = base + effect + (0 if arm == "plain" else rng.normal(0, spread))
            found.append({
                "kind": "run", "setting": "main", "seed": seed, "arm": arm, "status": "done", "seconds": 10.0,
                "started": f"2026-01-01T00:0{seed}:00Z", "cpu_seconds": 9.0,
                "training": {"log": [{"step": n, "answer_loss": 1.0 - effect / n} for n in (1, 2)], "tau": 0.3},
                "test": {f"{blur:g}": answers(mean - blur / 10) for blur in condition.blur_test},
                "attention": {"with_copies": {"patch": 0.05 + effect, "copies": 0.02}},
                "settings": condition.to_dict(), **ENVIRONMENT,
            })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not written, which is what takes the time."""
    monkeypatch.setattr(figures, "save", lambda figure, path: figures.plt.close(figure))


def verdicts(table) -> dict[str, str]:
    return dict(zip(table.index.get_level_values("arm"), table["verdict"], strict=True))


def test_what_helps_harms_and_does_neither_is_told_apart(tmp_path):
    folder = rows_of(tmp_path, {"plain": 0, "t2i": 0.08, "front": -0.06, "end": 0.0}, named=2)
    found = report.Laboratory(folder)
    assert verdicts(found.named()) == {"t2i": BETTER, "front": WORSE}
    assert found.named()["mean"].tolist() == pytest.approx([8, -6], abs=0.8)
    assert found.differences("main", "t2i", "plain", "loss").mean() == pytest.approx(-0.08, abs=0.01)


def test_the_page_shows_everything_and_hides_no_failure(tmp_path):
    folder = rows_of(tmp_path / "rows", {"plain": 0, "t2i": 0.05, "front": 0.02}, blur_test=(0.0, 0.8))
    file = folder / "rows.jsonl"
    found = read_rows(file)
    failed = {**found[-1], "status": "failed", "error": "FloatingPointError: the loss became nan"}
    for name in ("test", "attention", "training"):
        del failed[name]
    found[-1] = failed
    del found[-2]  # never started
    file.write_text("".join(json.dumps(row) + "\n" for row in found) + '{"kind": "ru')  # cut short by a kill
    page = tmp_path / "page" / "report.md"
    written = report.write([file], page)
    text = page.read_text()
    assert "| 15 | 13 | 1 | 1 |" in text
    assert "- made up, main, whole question before the image, seed 4 failed: FloatingPointError: the loss" in text
    assert "| made up, main | Does t2i help? | text into image − plain | 4 | +5." in text
    assert re.search(r"\| < \.001 \| better \|", text)
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert {page.parent / name for name in linked} | {page} == set(written)
    assert len(written) == 3  # no run kept a picture
    assert all(path.stat().st_size > 1000 for path in written)
    # Tables are whole: every line of one has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


@pytest.mark.parametrize("lost", ["plain", "t2i"])
def test_a_page_can_be_made_when_an_arm_is_not_there_at_all(tmp_path, undrawn, lost):
    """As after a kill, or when a run failed."""
    file = rows_of(tmp_path, {"plain": 0, "t2i": 0.05, "front": 0.02}, seeds=3) / "rows.jsonl"
    found = [row for row in read_rows(file) if row.get("arm") != lost]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    report.write([file], tmp_path / "page.md")
    assert "| 9 | 6 | 0 | 3 |" in (tmp_path / "page.md").read_text()


def test_two_folders_of_one_plan_are_told_apart(tmp_path, undrawn):
    folders = [rows_of(tmp_path / name, {"plain": 0, "t2i": effect}) for name, effect in (("a", 0.1), ("b", -0.1))]
    report.write(folders, tmp_path / "page.md")
    lines = re.findall(r"^\| (made up.*), main \| Does t2i.*\| (\w+) \|$", (tmp_path / "page.md").read_text(), re.M)
    assert lines == [("made up", "better"), ("made up (2)", "worse")]


def test_the_page_in_the_repository_is_what_its_rows_give(tmp_path, undrawn):
    """Plans in the order of the page; its pictures are there, and no other."""
    folders = [
        PAGES / plan
        for plan in (
            "photographs",
            "photographs-placements",
            "photographs-again",
            "cpu",
            "again",
            "shorter",
            "placements",
            "long",
            "share",
            "settings",
        )
    ]
    written = report.write(folders, tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (PAGES / "report.md").read_text()
    assert {path.name for path in PAGES.glob("*.png")} == {path.name for path in written[1:]}


def test_without_its_packages_the_report_says_what_to_install(tmp_path, capsys, monkeypatch):
    folder = rows_of(tmp_path, {"plain": 0, "t2i": 0.05})
    for name in ("attanchor_lab.table", "attanchor_lab.synthetic.report", "attanchor_lab.figures"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "page.md")]) == 1
    assert 'need `pip install ".[lab]"`' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_rows_of_another_experiment_are_shown_by_their_own_names(tmp_path, undrawn):
    """Kinds of questions, tests and arms that the laboratory does not know; a comparison on held-out concepts; a margin
    fixed beforehand; a picture of its own."""
    folder = rows_of(tmp_path / "photographs", {"plain": 0, "t2i": 0.05, "end": 0.0}, seeds=6, spread=0.002)
    found = json.loads(json.dumps(read_rows(folder / "rows.jsonl")).replace('"end"', '"third"'))
    plan, *runs = found
    plan |= {"size": "photographs", "titles": {"third": "a third of the image tokens"}}
    plan["contrasts"] = [
        {"setting": "main", "arm": "t2i", "against": "plain", "asks": "On concepts never seen?", "test": "concepts"},
        {"setting": "main", "arm": "third", "against": "plain", "asks": "As good with a third?", "margin": 1.0},
        {"setting": "main", "arm": "third", "against": "plain", "asks": "And there?", "test": "concepts"},
    ]
    for row in runs:
        mean = row["test"]["0"]["mean"]
        row["test"] = {
            "seen": {"mean": mean, "left": mean - 0.1, "count": mean + 0.1, "questions": 60},
            "concepts": {"mean": mean - (0.2 if row["arm"] == "t2i" else 0.1)},
        }
        del row["attention"]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    (folder / "picture.png").write_bytes(b"a picture")
    written = report.write([folder, PAGES / "cpu"], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert re.search(r"\| photographs, main, concepts \| On concepts never seen\? \|.*\| −[45]\..*\| worse \|", text)
    third = "a third of the image tokens − plain"
    assert re.search(rf"\| photographs, main \| As good with a third\? \| {third} \|.*\| no worse \|", text)
    assert re.search(rf"\| photographs, main, concepts \| And there\? \| {third} \|.*\| not shown \|", text)
    assert "## What was measured: photographs\n\nMeans over seeds, in % but for the loss" in text
    assert "|  | plain | text into image | a third of the image tokens |\n" in text
    assert re.findall(r"^\| (mean accuracy, %|left|count|mean, concepts) \|", text, re.M) == [
        "mean accuracy, %", "left", "count", "mean, concepts",
    ]  # fmt: skip
    assert "| cpu, main | Do anchors as published" in text
    assert written[-1].name == "page-scene.png"
    assert written[-1].read_bytes() == b"a picture"


def test_rows_of_the_experiment_on_photographs(tmp_path, undrawn):
    """Its plan has a question; its rows are one for each measurement of an arm."""
    folder = tmp_path / "photographs"
    folder.mkdir()
    plan = {"question": "Do anchors help?", "contrasts": [["t2i", "plain"]], "margin": 0.03, "seeds": [0, 1, 2],
            "arms": {"plain": {}, "t2i": {}}, "more": {"i2t": {}}, "more_seeds": 2,
            "splits": ["seen", "concepts"]}  # fmt: skip
    rows = []
    for seed in plan["seeds"]:
        for arm, gain in (("plain", 0.0), ("t2i", 0.1)):
            common = {"arm": arm, "seed": seed, "date": "2026-01-01T00:00:00Z", **ENVIRONMENT}
            values = {
                "seen": 0.5 + gain * (1 + (seed - 1) / 99) + seed / 100,
                "concepts": 0.3,
                "seen/what": 0.2 + gain,
                "concepts/what": 0.1,
            }
            values["concepts"] += gain * (-1, 0, 1)[seed]
            rows.append(common | {"test": "as trained", "values": values, "figures": {"losses": [2.0, 1.0 - gain]}})
            kept = {"seen": 0.4 + gain, "seen/what": 0.2}
            if arm == "t2i" or seed == 0:
                rows.append(common | {"test": "keep 1/3 cells", "values": kept, "figures": {}})
    (folder / "plan.json").write_text(json.dumps(plan))
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write([folder], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    line = r"\| photographs \| Do anchors help\? \| text into image − plain \| 3 \| \+10\.0 .* \| better \|"
    assert re.search(line, text)
    line = r"\| photographs, concepts \| The same on concepts held out\? \| .* \| 3 \| \+?0\.0 .* \| not shown \|"
    assert re.search(line, text)
    measures = {"mean accuracy, %": (51.0, 61.0), "what": (20.0, 30.0), "mean, concepts": (30.0, 30.0)}
    for measure, (plain, anchors) in (measures | {"mean, keep 1/3 cells": ("40.0 (1)", 50.0)}).items():
        assert f"| {measure} | {plain} | {anchors} |" in text
    assert re.search(r"\| photographs \| 2026.*\| – \| 8 \| 6 \| 0 \| 2 \|", text)  # image into text was not run
    panel = report._curves([report.Laboratory(folder)])["photographs"]["text into image"]
    assert panel.loc[2].tolist() == pytest.approx([-0.1] * 3)


def test_every_arm_has_a_title_of_its_own():
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (None, "page.md", "is no file"),
        ("", "page.md", "lacks the row of its plan"),
        ('{"kind": "other"}\n', "page.md", "row 1 is no row"),
        ('{"kind": "plan", "settings": [], "contrasts": []}\n', "page.md", "holds no finished run"),
        ("", "page.html", "should be a .md file"),
        ("", "rows.jsonl/page.md", "rows.jsonl is not a folder"),
    ],
)
def test_wrong_rows_end_in_one_line(tmp_path, capsys, content, output, message):
    file = tmp_path / "rows.jsonl"
    if content is not None:
        file.write_text(content)
    assert cli.main(["report", str(file), "--output", str(tmp_path / output)]) == 1
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / output).exists()
