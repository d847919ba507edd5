"""The laboratory's statistics and report: every sentence follows from the rows, negative results included."""

from __future__ import annotations

import copy
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from attanchor_lab import lab_figures as figures
from attanchor_lab import lab_rows as rows
from attanchor_lab import statistics
from attanchor_lab import table as records
from attanchor_lab.synthetic import advice, plans, report, sections, summary, wording
from attanchor_lab.synthetic.arms import ARMS
from attanchor_lab.synthetic.plan import Contrast, Plan, Setting, Stage2
from attanchor_lab.table import Comparison
from attanchor_vlm import cli
from scipy import stats

PAGES = Path(__file__).parents[3] / "docs" / "lab"

# --- Statistics. -----------------------------------------------------------------------------------------------------


def test_holm_is_holm():
    assert statistics.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert statistics.holm([0.9, 0.8]) == pytest.approx([1.0, 1.0])
    assert statistics.holm([]) == []


def test_p_values_and_intervals_are_student_s():
    values = [1.0, 2.5, 0.5, 3.0]
    found, other = statistics.family([values, [0.1, -0.2, 0.3]])
    theirs = stats.ttest_1samp(values, 0)
    assert found.p == pytest.approx(theirs.pvalue)
    low, high = theirs.confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((low, high))
    low, high = theirs.confidence_interval(0.975)  # Bonferroni: two comparisons
    assert (found.wide_low, found.wide_high) == pytest.approx((low, high))
    assert found.adjusted_p == pytest.approx(min(1, 2 * found.p))
    assert other.adjusted_p >= other.p


def test_fewer_than_three_seeds_give_no_interval_and_do_not_count():
    alone = statistics.family([[1.0, 2.0, 3.0]])[0]
    few, same = statistics.family([[1.0, 2.0], [1.0, 2.0, 3.0]])
    assert few is None
    assert same == alone


def test_differences_without_spread():
    nothing, something = statistics.family([[0.0] * 3, [2.0] * 3])
    assert (nothing.p, nothing.adjusted_p) == (1, 1)
    assert something.p == 0
    assert (something.low, something.high) == (2, 2)


def test_chance_alone_is_rarely_established():
    """In families of eight comparisons of nothing, at most about one in twenty makes any claim."""
    noise = np.random.default_rng(0).normal(size=(200, 8, 5))
    claims = sum(any(found.is_established for found in statistics.family(one.tolist())) for one in noise)
    assert claims < 200 * 0.05 * 2
    alone = sum(found.p < 0.05 for one in noise for found in statistics.family(one.tolist()))
    assert alone == pytest.approx(200 * 8 * 0.05, rel=0.4)


# --- Rows made up, so that what should be said is known. -------------------------------------------------------------

ENVIRONMENT = {
    "commit": "abc", "device": "cpu", "gpu": "none", "torch": "2", "transformers": "5", "processor": "a processor",
    "cores": 2,
}  # fmt: skip


def answers(mean: float, absent: float = 0.5) -> dict:
    matching = {"hit": 0.97, "chance": 0.05, "hit_referred": 0.6, "precision": 0.8, "recall": 0.7, "share": 0.25}
    return {
        "existence": mean, "colour": mean, "place": mean, "mean": mean, "present": 0.9,
        "negatives": {"random": absent, "popular": absent, "adversarial": absent / 2}, "yes_share": 0.7,
        "answer_loss": 1 - mean, "questions": 100, "matching": matching,
    }  # fmt: skip


def attended(patch: float) -> dict:
    keys = ("patch_from_question", "patch_best_head", "copies", "image", "even")
    return {"patch": patch, **dict.fromkeys(keys, 0.02)}


def laboratory(folder: Path, effects: dict[str, float], spread: float = 0.004, seeds: int = 5, **changed) -> Path:
    """Rows in which every arm's mean accuracy is plain's and its effect, with a little noise."""
    setting = Setting("main", "a made-up setting", arms=tuple(effects), seeds=tuple(range(seeds)), **changed)
    contrasts = tuple(Contrast("main", arm, asks=f"Does {arm} help?") for arm in effects if arm != "plain")
    plan = Plan("made up", (setting,), contrasts)
    found = [{"kind": "plan", "written": "2026-01-01T00:00:00Z", **plan.to_dict(), **ENVIRONMENT}]
    rng = np.random.default_rng(0)
    for seed in setting.seeds:
        base = rng.uniform(0.5, 0.7)
        for arm, effect in effects.items():
            mean = base + effect + (0 if arm == "plain" else rng.normal(0, spread))
            attention = {"with_copies": attended(0.05 + effect)}
            row = {
                "kind": "run", "setting": "main", "seed": seed, "arm": arm, "status": "done",
                "started": f"2026-01-01T00:0{seed}:00Z", "load_before": 2.0, "seconds": 10.0, "cpu_seconds": 9.0,
                "training": {"log": [{"step": 1, "answer_loss": 1.0, "tau": 0.3, "share": 0.2}], "tau": 0.3},
                "test": {f"{blur:g}": answers(mean - blur / 10) for blur in setting.blur_test},
                "attention": attention, "settings": setting.to_dict(), **ENVIRONMENT,
            }  # fmt: skip
            if arm != "plain":
                row["without_copies"] = answers(mean - 0.1)
                attention["without_copies"] = attended(0.05)
            found.append(row)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    return file


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made and not written, which is what takes the time."""
    monkeypatch.setattr(figures, "save", lambda figure, path: figures.plt.close(figure))


def short(file: Path) -> str:
    return " ".join(summary.in_short(records.load([file])))


def test_anchors_that_help_are_said_to_help(tmp_path):
    said = short(laboratory(tmp_path, {"plain": 0, "t2i": 0.08, "front": 0.0}))
    assert "Anchors at the matched patches improved mean accuracy over plain: text into image" in said
    assert "In no setting" not in said
    assert "No other placement improved" in said


def test_anchors_that_do_not_help_are_said_not_to_and_what_did_is_named(tmp_path):
    said = short(laboratory(tmp_path, {"plain": 0, "t2i": 0.0, "t2i-inherit": -0.06, "front": 0.09}))
    assert "In no setting run here did anchors" in said
    assert "They made it worse: text into image, inherited positions" in said
    assert "What did improve on plain: whole question before the image" in said


def test_arms_that_know_the_answer_are_no_methods(tmp_path):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.0, "true": 0.2})
    said = short(file)
    assert "No other placement improved" in said
    assert "Told where the object is, which no method is: anchors at the true patch" in said
    best = advice.for_users(records.load([file])[0])[0]
    assert "anchors at the true patch" not in best.lower()


def test_a_comparison_has_the_same_answer_everywhere_on_the_page(tmp_path):
    """Those that the plan names are corrected for the plan's number, wherever they are told."""
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.03, "front": 0.01, "end": 0.0, "i2t": 0.0}, spread=0.01)
    found = rows.read(file)
    found[0]["contrasts"] = found[0]["contrasts"][:1]
    made = records.Laboratory(found)
    (planned,) = made.primary().values()
    told = {comparison.arm: difference for comparison, difference in made.all_against_plain().items()}
    assert told["t2i"] == planned
    assert planned.wide_high == pytest.approx(planned.high)  # one comparison
    alone = statistics.family([made.differences(Comparison("main", arm)) for arm in ("front", "end", "i2t")])
    assert [told[arm] for arm in ("front", "end", "i2t")] == alone
    cells = made.against_plain("main", records.ACCURACIES)
    assert {arm: cells.pop((arm, "mean")) for arm in told} == told
    assert {difference.among for difference in cells.values()} == {4 * (len(records.ACCURACIES) - 1)}


def test_where_anchors_showed_nothing_is_told_beside_where_they_helped(tmp_path):
    said = short(laboratory(tmp_path, {"plain": 0, "t2i": 0.08, "t2i-content": 0.0}))
    assert "improved mean accuracy over plain: text into image (" in said
    assert "showed no gain that holds after correction: text into image, function words left out (" in said


def test_many_comparisons_that_show_nothing_are_told_by_their_range(tmp_path):
    folders = [tmp_path / str(number) for number in range(7)]
    effects = [0.1, *(0.001 * number for number in range(6))]
    files = []
    for folder, effect in zip(folders, effects, strict=True):
        folder.mkdir()
        files.append(
            laboratory(folder, {"plain": 0, "t2i": effect, "i2t": 0.0}, spread=0.02 if effect < 0.1 else 0.004)
        )
    found = records.load(files)
    said = " ".join(summary.in_short(found))
    means = [statistics.family([one.differences(Comparison("main", "t2i"))])[0].mean for one in found[1:]]
    assert "showed no gain that holds after correction: text into image (made up, main" in said  # six are listed
    assert said.count("text into image (") == 7
    extra = tmp_path / "extra"
    extra.mkdir()
    found += records.load([laboratory(extra, {"plain": 0, "t2i": -0.02, "i2t": 0.0}, spread=0.03, seeds=3)])
    said = " ".join(summary.in_short(found))
    assert "in 7 comparisons of 3 to 5 seeds, from text into image (made up, main: −" in said
    assert f" to text into image (made up, main: +{max(means):.1f} points" in said
    assert said.count("text into image (") == 3
    assert re.search(r"Plain concatenation itself reached a mean accuracy of \d\d % \(made up, main\) to \d\d % ", said)


@pytest.mark.parametrize(("level", "learned"), [(0.0, False), (0.35, True)])
def test_a_plain_arm_that_has_not_learned_the_task_is_told(tmp_path, level, learned):
    file = laboratory(tmp_path, {"plain": level, "t2i": level})
    found = records.load([file])[0]
    plain = list(found.values("main", "plain", records.MEAN).values())
    said = short(file)
    assert f"reached a mean accuracy of {sum(plain) / len(plain):.0f} % (made up, main)" in said
    assert ("it has not learned the task to its end" in said) != learned


def test_noise_is_no_finding(tmp_path):
    said = short(laboratory(tmp_path, {"plain": 0, "t2i": 0.02, "front": 0.02}, spread=0.2))
    assert "In no setting" in said
    assert "No other placement improved" in said


def test_two_seeds_say_nothing(tmp_path):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.5}, seeds=2)
    assert "nothing can be said about any difference" in short(file)
    assert "2 seeds, fewer than the 3" in summary.primary(records.load([file])[0])[0]


@pytest.mark.parametrize(("effect", "word"), [(0.08, "better than plain"), (-0.08, "worse than plain")])
def test_primary_answers_have_sign_amount_and_doubt(tmp_path, effect, word):
    file = laboratory(tmp_path, {"plain": 0, "t2i": effect})
    found = records.load([file])[0]
    said = summary.primary(found)[0]
    assert said.startswith("**Does t2i help?** Text into image: ")
    assert word in said
    (difference,) = found.primary().values()
    for amount in (difference.mean, difference.wide_low, difference.wide_high):
        assert wording.number(amount) in said


def test_a_lower_loss_is_better(tmp_path):
    found = records.load([laboratory(tmp_path, {"plain": 0, "t2i": 0.08})])[0]
    difference = found.against_plain("main", records.ACCURACIES)["t2i", "answer_loss"]
    assert difference.mean < 0
    said = wording.verdict("A", "B", difference, records.ACCURACIES["answer_loss"], 5)
    assert "A: better than B" in said


def test_users_are_told_which_side_did_best_and_what_was_not_varied(tmp_path):
    found = records.load([laboratory(tmp_path, {"plain": 0, "t2i": 0.0, "t2i-inherit": 0.07})])[0]
    said = advice.for_users(found)
    positions = next(line for line in said if line.startswith("**Positions**"))
    assert "Text into image, inherited positions did best here, by" in positions
    assert "holds after correction" in positions
    assert said[-1] == "Not varied at this size: mask, share, alignment."
    swapped = records.load([laboratory(tmp_path / "b", {"plain": 0, "t2i": 0.07, "t2i-inherit": 0.0})])[0]
    positions = next(line for line in advice.for_users(swapped) if line.startswith("**Positions**"))
    assert "Text into image did best here, by" in positions
    assert re.search(r"inherited positions minus text into image: −\d", positions)


def test_settings_that_differ_are_compared_by_what_they_differ_in(tmp_path):
    setting = Setting("a", "", arms=("plain",)).to_dict()
    other = Setting("b", "", arms=("plain", "t2i"), alignment=0.0, stage2=Stage2(share=0.5)).to_dict()
    assert advice.factors(setting, other) == {"alignment": (0.5, 0.0), "stage2.share": (0.25, 0.5)}
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.05})
    found = rows.read(file)
    plan = copy.deepcopy(found[0])
    more = [copy.deepcopy(row) for row in found[1:]]
    plan["settings"].append({**plan["settings"][0], "name": "without", "alignment": 0.0})
    for row in more:
        row["setting"] = "without"
        if row["arm"] == "t2i":
            row["test"]["0"] = answers(row["test"]["0"]["mean"] - 0.2)
    said = advice.for_users(records.Laboratory([plan, *found[1:], *more]))
    plain, worth = (line for line in said if line.startswith("**Alignment**"))
    assert "alignment 0.5 to 0.0" in plain
    assert "plain concatenation changes: +0.0 points" in plain
    assert "text into image minus plain changes: −20.0 points" in worth
    assert "this holds" in worth


def test_settings_of_the_gpu_size_are_compared_by_one_thing_where_they_can_be(tmp_path):
    """Each with the earlier one that it differs least from, under the topic that it is there for."""
    plan = plans.plan("gpu")
    template = rows.read(laboratory(tmp_path, {"plain": 0, "t2i-inherit": 0.05}, seeds=3))
    found = [{**template[0], **plan.to_dict()}]
    found += [{**row, "setting": setting.name} for setting in plan.settings for row in template[1:]]
    changes = advice.across(records.Laboratory(found))
    told = {change.words.partition(" to ")[2].partition(" (")[0]: change for change in changes}
    topics = {
        "short-144": "Length of stage 2", "no-alignment-144": "Alignment", "few-anchors-144": "Share",
        "fixed-tau-144": "Share", "lora-144": "Way to train", "shallow-144": "Depth", "blur-144": "Blur in training",
        "balanced-144": "Training questions", "main-576": "Number of patches", "first-step-144": "Length of stage 1",
    }  # fmt: skip
    assert {name: told[name].topic for name in topics} == topics
    assert "From short-144 to no-alignment-144 (alignment 0.5 to 0.0), " in told["no-alignment-144"].words
    for name in ("no-alignment-144", "few-anchors-144", "fixed-tau-144", "shallow-144", "blur-144", "long-144"):
        assert told[name].words.count(" to ") == 2, name  # the settings, and one thing that changes
    missing = advice.for_users(records.Laboratory(found))[-1]
    assert missing == "Not varied at this size: positions, mask."  # the arms that tell are not among these rows


def test_hallucination_matching_attention_and_blur_are_told_from_their_rows(tmp_path):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.03}, blur_test=(0.0, 0.8))
    found = records.load([file])[0]
    said = " ".join(sections.hallucination(found, "main"))
    assert "affirms 50 % of the absent objects drawn at random, 50 % of the popular ones and 75 % of the adv" in said
    assert "it overlooks 10 % of those that are there. Its yes-share is 70 %" in said
    assert "holds a colour or shape of the scene in 97 % of the cases" in sections.matching(found, "main")[0]
    said = " ".join(sections.attention(found, "main"))
    assert "Text into image: to the true patch +3.00 points" in said
    assert "give the true patch itself 3.00 % of all attention more than without them" in said
    assert "is +10.0 points better with its copies" in " ".join(sections.without_copies(found, "main"))
    assert "changes plain's mean accuracy by −8.0 points" in sections.blur(found, "main")[0]


def test_what_a_place_adds_is_told_from_the_control(tmp_path):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.09, "random": 0.05, "t2i-inherit": 0.02})
    found = records.load([file])[0]
    differences = found.against_random("main")
    assert {arm for arm, _ in differences} == {"t2i"}  # the other one's control was not run
    assert differences["t2i", "place"].mean == pytest.approx(4, abs=0.6)
    said = " ".join(sections.placement(found, "main"))
    assert "Text into image: place +" in said
    assert "against the same tokens at random patches" in said


def test_a_p_below_a_thousandth_is_told_as_such(tmp_path, undrawn):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.3}, spread=0.001)
    report.write([file], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "| < .001 | < .001 |" in text
    assert "p < .001)" in text


def test_the_encoder_s_limits_are_those_of_the_rows(tmp_path, undrawn):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.0})
    starts = [
        {"kind": "start", "setting": "key", "seed": seed, "status": "done", "started": "2026-01-01T00:00:00Z",
         "encoder": {"colour": colour, "shape": 0.8}, **ENVIRONMENT}
        for seed, colour in enumerate((0.999, 0.95))
    ]  # fmt: skip
    with file.open("a") as rows_:
        rows_.write("".join(json.dumps(row) + "\n" for row in starts))
    report.write([file], tmp_path / "page.md")
    said = "names the colour of 95.0 to 99.9 % and the shape of 80.0 % of the objects."
    assert said in (tmp_path / "page.md").read_text()


@pytest.mark.parametrize("lost", ["plain", "t2i"])
def test_a_page_can_be_made_when_an_arm_is_not_there_at_all(tmp_path, undrawn, lost):
    """As after a kill, or when a run failed."""
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.05, "front": 0.02}, seeds=3, blur_test=(0.0, 0.8))
    found = [row for row in rows.read(file) if row.get("arm") != lost]
    file.write_text("".join(json.dumps(row) + "\n" for row in found))
    report.write([file], tmp_path / "page.md")
    text = (tmp_path / "page.md").read_text()
    assert "Done: 6; failed: 0; not started: 3" in text


def test_the_page_shows_everything_and_hides_no_failure(tmp_path):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.05, "front": 0.02})
    found = rows.read(file)
    failed = {**found[-1], "status": "failed", "error": "FloatingPointError: the loss became nan | here"}
    for name in ("test", "attention", "training"):
        del failed[name]
    found[-1] = failed
    del found[-2]  # never started
    file.write_text("".join(json.dumps(row) + "\n" for row in found) + '{"kind": "ru')  # cut short by a kill
    page = tmp_path / "page" / "report.md"
    written = report.write([file], page)
    text = page.read_text()
    assert "Done: 13; failed: 1; not started: 1" in text
    assert "failed: FloatingPointError: the loss became nan / here" in text
    linked = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert linked
    assert {page.parent / name for name in linked} | {page} == set(written)
    assert all(path.stat().st_size > 1000 for path in written)
    for heading in ("## In short", "## What follows for users", "## What this does not show", "### Every run"):
        assert heading in text
    # Tables are whole: every line of one has as many cells as its head.
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({line.count("|") for line in table.splitlines()}) == 1, table


def test_the_report_is_the_same_each_time(tmp_path, undrawn):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.05})
    pages = [tmp_path / name / "report.md" for name in "ab"]
    for page in pages:
        report.write([file], page)
    assert pages[0].read_text() == pages[1].read_text()


def test_the_page_in_the_repository_is_what_its_rows_give(tmp_path, undrawn):
    """Sizes in the order of the page; its pictures are there."""
    sizes = ("cpu", "placements", "again", "long", "share", "settings", "gpu")
    folders = [PAGES / size for size in sizes if (PAGES / size).exists()]
    written = report.write(folders, tmp_path / "report.md")
    assert (tmp_path / "report.md").read_text() == (PAGES / "report.md").read_text()
    assert all((PAGES / path.name).exists() for path in written)
    assert "failed: 0; not started: 0" in (PAGES / "report.md").read_text()


def test_without_scipy_the_report_says_what_to_install(tmp_path, capsys, monkeypatch):
    file = laboratory(tmp_path, {"plain": 0, "t2i": 0.05})
    monkeypatch.setitem(sys.modules, "scipy", None)
    assert cli.main(["report", str(file), "--output", str(tmp_path / "page.md")]) == 1
    assert capsys.readouterr().err == "error: the report's intervals need scipy: `pip install scipy`\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]


def test_every_arm_has_a_title_of_its_own():
    assert len({arm.title for arm in ARMS.values()}) == len(ARMS)


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        (None, "page.md", "is no file"),
        ("", "page.md", "lack that of their plan"),
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
