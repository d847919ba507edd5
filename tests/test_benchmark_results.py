"""What is made of stored rows: comparison, targets, the README's tables and plots."""

import json
import os
from pathlib import Path

import pytest

from attanchor_lab import demo_table
from benchmarks import plots, report, rows, same_tokens, store_demo, targets
from benchmarks.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
GPU = {"gpu": "Test GPU", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3", "processor": "cpu"}
GPU |= {"commit": "abc", "date": "2026-01-01"}


# --- Comparison ------------------------------------------------------------------------------------------------------


@pytest.fixture
def before(tmp_path):
    """Rows on disk."""
    (tmp_path / "before").mkdir()
    rows.write(tmp_path / "before" / "rows.jsonl", gpu_rows())
    return tmp_path / "before" / "rows.jsonl"


def planted(path, factor):
    """The same rows with the forward of the reference slower by a factor."""
    changed = gpu_rows()
    for row in changed:
        if row.get("operation") == "forward" and row["backend"] == "reference":
            row["us"] *= factor
    rows.write(path, changed)
    return path


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.04, 0), (1.2, 1), (0.5, 0)])
def test_compare_fails_on_a_planted_regression(tmp_path, before, capsys, factor, status):
    after = planted(tmp_path / "after.jsonl", factor)
    assert main(["compare", str(before), str(after)]) == status
    printed = capsys.readouterr().out
    assert ("worse: us" in printed) == bool(status)
    assert ("better: us" in printed) == (factor < 1)


def test_compare_takes_a_threshold_and_folders(tmp_path, before):
    after = planted(tmp_path / "after.jsonl", 1.2)
    assert main(["compare", str(before.parent), str(after), "--threshold", "30"]) == 0


def test_compare_sees_memory_where_there_was_none(tmp_path, capsys):
    """From nothing, no percentage is large enough."""
    row = {"run": "roofline", "measure": "memory", "operation": "backward", "backend": "triton"}
    for name, size in (("before", 0), ("after", 10_000_000)):
        rows.write(tmp_path / f"{name}.jsonl", [{**row, "peak_bytes": size}])
    before, after = (str(tmp_path / f"{name}.jsonl") for name in ("before", "after"))
    assert main(["compare", before, after]) == 1
    assert "worse: peak_bytes 0 -> 1e+07" in capsys.readouterr().out
    assert main(["compare", before, before]) == 0


def test_compare_of_nothing_and_of_less(tmp_path, before, capsys):
    (tmp_path / "nothing").mkdir()
    assert main(["compare", str(before), str(tmp_path / "nothing")]) == 2
    rows.write(tmp_path / "less.jsonl", gpu_rows()[:-1])
    assert main(["compare", str(before), str(tmp_path / "less.jsonl")]) == 1
    assert "missing: run=training model=tinyllava-1b" in capsys.readouterr().out

    assert main(["compare", str(before), str(tmp_path / "nowhere.jsonl")]) == 2
    assert "nowhere.jsonl is not there" in capsys.readouterr().err


def test_a_broken_file_is_named(tmp_path, capsys):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        rows.read(tmp_path)
    assert main(["targets", "--results", str(tmp_path)]) == 2
    assert "rows.jsonl, line 2" in capsys.readouterr().err


# --- Targets and report ----------------------------------------------------------------------------------------------


def _ratio(part, ratio):
    quartiles = {f"{part}_ratio_q1": ratio - 0.01, f"{part}_ratio": ratio, f"{part}_ratio_q3": ratio + 0.01}
    return {**quartiles, f"{part}_within_spread": ratio == 1}


def gpu_rows():
    """A few rows as a GPU would leave them."""

    def kernel(operation, batch, backend, us, **more):
        described = {"run": "roofline", "operation": operation, "shape": "llava-7b", "batch": batch, "backend": backend}
        return {**described, "us": us, **more, **GPU}

    overhead = {"run": "overhead", "model": "llava-7b", "batch": 8, "dtype": "bfloat16", "method": "graph", **GPU}
    overhead["image"] = 576
    anchors = {**overhead, "side": "anchors", "length": 631, "kv_bytes": 2600, "peak_bytes": 5000}
    anchors["device_construction_us"] = 60.0
    for part, plain, ratio in (("construction", 50.0, 1.6), ("prefill", 90000.0, 1.02), ("step", 9000.0, 1.0)):
        anchors |= {f"plain_{part}_us": plain, f"{part}_us": plain * ratio, **_ratio(part, ratio)}
    third = {**anchors, "side": "keep 1/3", "length": 247, "prefill_ratio": 0.46, "prefill_ratio_q1": 0.45}
    step = {"plain_train_step_us": 9e5, "peak_bytes": 2**31, "plain_peak_bytes": 2**30, **_ratio("train_step", 1.1)}
    return [
        kernel("forward", 8, "triton", 27.0, ratio=1.35, floor_us=20.0, auto=False),
        kernel("forward", 8, "cuda", 24.0, ratio=1.2, floor_us=20.0, auto=True),
        kernel("forward", 32, "cuda", 96.0, ratio=1.2, floor_us=80.0, auto=True),
        kernel("forward", 1, "cuda", 9.0, ratio=2.0, floor_us=4.5, us_less_empty=7.5, auto=True),
        kernel("forward", 8, "reference", 240.0),
        kernel("forward", 8, "cuda, eager", 60.0),
        kernel("forward", 8, "reference, eager", 300.0),
        kernel("merge", 8, "cuda", 25.0, auto=True),
        kernel("merge", 8, "cuda, trimmed", 100.0),
        kernel("merge", 8, "masked_scatter, eager", 50.0),
        kernel("forward", 8, "triton", 0.0, measure="memory", peak_bytes=500_000),
        {**overhead, "side": "plain", "length": 626, "kv_bytes": 2580, "peak_bytes": None},
        anchors,
        third,
        *({**third, "measure": f"attached {part}", **_ratio(part, 0.5)} for part in ("forward", "generate")),
        {"run": "training", "model": "tinyllava-1b", "batch": 4, "dtype": "bfloat16", **step, **GPU},
    ]


def outcome(verdicts, target, where):
    (found,) = [one for one in verdicts if one.target.startswith(target) and one.where == where]
    return found.outcome


def test_targets_are_met_missed_by_how_much_or_not_measured():
    verdicts = targets.judge(gpu_rows())
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=32") == "missed by 4.3 %"
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=1") == "met"
    assert outcome(verdicts, "forward, Triton", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "against the eager reference, device", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "against the eager reference, launches included", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "merge_sequence as attach runs it", "llava-7b, B=8") == "missed by 50.0 %"
    assert outcome(verdicts, "merge_sequence against", "llava-7b, B=8") == "not measured"
    assert outcome(verdicts, "construction over prefill", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "memory beside outputs, triton", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "prefill with anchors and a third", "llava-7b, bfloat16, B=8, Test GPU") == "met"
    assert outcome(verdicts, "prefill with anchors and a third", "tinyllava-1b") == "not measured"
    assert outcome(verdicts, "backward, fastest", "llava-7b, B=8") == "not measured"
    assert "missed by 4.3 %" in targets.table_of(verdicts)


def test_the_fastest_is_the_backend_that_auto_picks():
    """A user does not get the faster one of two; the targets are about what a user gets."""
    changed = [{**row, "auto": row.get("backend") == "triton"} for row in gpu_rows()]
    verdicts = targets.judge(changed)
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=8") == "missed by 8.0 %"
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=32") == "not measured"


def test_a_prefill_that_waits_for_its_launches_judges_no_construction():
    """It takes longer than one under a graph, so that a construction would seem small beside it."""
    changed = [{**row, "method": "events"} if row["run"] == "overhead" else row for row in gpu_rows()]
    verdicts = targets.judge(changed)
    assert outcome(verdicts, "construction over prefill", "llava-7b, B=8") == "not measured"
    assert "could not be captured" in targets.table_of(verdicts)


def test_figures_of_two_gpus_are_not_mixed():
    """The newest row says which is judged, tabled and drawn."""
    older = [{**row, "gpu": "Old GPU", "date": "2025-12-31", "us": 1e4} for row in gpu_rows() if "us" in row]
    both = [*gpu_rows(), *older]
    assert targets.judge(both) == targets.judge(gpu_rows())
    for name in ("roofline", "overhead", "short-overhead", "training"):
        assert report.BLOCKS[name](both, "images") == report.BLOCKS[name](gpu_rows(), "images")
    assert plots.wanted(both) == plots.wanted(gpu_rows())
    assert set(plots.wanted(both)) == {"roofline.png", "overhead.png"}


def test_the_headline_is_of_large_prompts():
    """Of a model with few image tokens most of the prompt is text, which nothing shortens."""
    small = [{**row, "model": "small", "image": 49, "prefill_ratio": 0.8} for row in gpu_rows() if "side" in row]
    assert report.BLOCKS["headline"]([*gpu_rows(), *small], "") == report.BLOCKS["headline"](gpu_rows(), "")
    assert "takes 0.46 of the plain prompt's time" in report.BLOCKS["headline"](gpu_rows(), "")


def test_a_block_names_every_commit_that_its_rows_are_of():
    changed = gpu_rows()
    changed[1] |= {"commit": "def"}
    assert "commit abc, def" in report.BLOCKS["roofline"](changed, "images")


def test_a_cpu_is_judged_by_its_own_targets():
    """The last row counts; one of two threads is another thing."""
    row = {"run": "cpu-reference", "shape": "llava-7b", "dtype": "float32", "batch": 4, "of_unavoidable": 1.8}
    rows = [{**row, "of_unavoidable": 1.6, "merge_of_build": 1.1}, {**row, "on_threads": 2, "of_unavoidable": 9.0}]
    verdicts = targets.judge([row, *rows])
    assert outcome(verdicts, "CPU, of its unavoidable work", "llava-7b, float32, B=4") == "missed by 6.7 %"
    assert outcome(verdicts, "CPU, merge of build", "llava-7b, float32, B=4") == "met"


def test_what_is_predicted_stands_where_nothing_is_measured():
    """Of the schedule that the kernel has; a figure of a GPU takes its place, and no backward is predicted."""
    row = {"run": "schedule-model", "shape": "llava-7b", "batch": 8, "schedule": "now", "us": 37.9, "ratio": 1.77}
    rows = [row, {**row, "schedule": "72 rows", "ratio": 1.59}, {**row, "batch": 1, "us": 10.6}]
    verdicts = targets.judge(rows)
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=8") == "predicted 1.77 x floor, not measured"
    assert outcome(verdicts, "forward, fastest", "llava-7b, B=1") == "predicted 10.6 us, not measured"
    assert outcome(verdicts, "backward, fastest", "llava-7b, B=8") == "not measured"
    assert "; predicted 1.77 x floor; predicted 10.6 us |" in targets.summary(verdicts)
    assert outcome(targets.judge([*gpu_rows(), *rows]), "forward, fastest", "llava-7b, B=8") == "met"


README = "".join(f"# {name}\n<!-- generated: {name} -->\nSTALE\n<!-- /generated -->\n\n" for name in report.BLOCKS)


def report_arguments(folder, *more):
    places = ["--results", str(folder), "--pages", str(folder / "README.md"), "--images", str(folder / "images")]
    return ["report", *places, *more]


@pytest.mark.parametrize("stored", [True, False], ids=["rows", "no rows"])
def test_report_writes_blocks_that_check_then_finds_current(tmp_path, stored):
    (tmp_path / "README.md").write_text(README)
    if stored:
        rows.write(tmp_path / "rows.jsonl", gpu_rows())
    assert main(report_arguments(tmp_path, "--check")) == 1
    assert (tmp_path / "README.md").read_text() == README
    assert main(report_arguments(tmp_path)) == 0
    assert main(report_arguments(tmp_path, "--check")) == 0
    text = (tmp_path / "README.md").read_text()
    assert "STALE" not in text
    assert ("Test GPU" in text) == stored
    assert ("| 0.5 x [0.49, 0.51] |" in text) == stored
    assert ("0.46 x [0.45" in text) == ("1 x [0.99, 1.01], within the spread" in text) == stored

    assert (tmp_path / "images" / "roofline.png").is_file() == stored
    if stored:
        changed = gpu_rows()
        changed[0]["us"] = 30.0
        rows.write(tmp_path / "rows.jsonl", changed)
        assert main(report_arguments(tmp_path, "--check")) == 1


def test_a_demonstration_is_stored_whole_or_not_at_all(tmp_path, monkeypatch, capsys):
    """Row and pictures of a folder as `make demo` writes it; one that lacks a picture changes nothing."""
    demo, stored = tmp_path / "demo", tmp_path / "results"
    demo.mkdir()
    monkeypatch.setattr(store_demo, "RESULTS", stored)
    (demo / "results.json").write_text(json.dumps(rows.read(ROOT / "benchmarks" / "results" / "demo.jsonl")[-1]))
    arguments = ["store-demo", str(demo), "--images", str(tmp_path / "images")]
    assert main(arguments) == 2
    assert "lacks loss.png" in capsys.readouterr().err
    assert not stored.exists()
    for name in store_demo.PICTURES:
        (demo / name).write_bytes(b"picture")
    assert main(arguments) == 0
    (row,) = rows.read(stored)
    assert row["run"] == "demo"
    assert len(demo_table.lines_of(row)[1]) == len(demo_table.HEAD)
    assert sorted(os.listdir(tmp_path / "images")) == ["demo-loss.png", "demo-photographs.png", "demo-scenes.png"]


def test_models_that_were_only_run_whole_have_no_table_of_parts():
    whole = [row for row in gpu_rows() if str(row.get("measure")).startswith("attached")]
    assert report.BLOCKS["overhead"](whole, "images") == ""


def test_rows_of_servers_are_shown_without_those_of_before():
    """Which were of one engine, by pairs; without rows of servers there is no table, memory or not."""
    stored = rows.read(ROOT / "benchmarks" / "results" / "serve-cpu.jsonl")
    (memory,) = (row for row in stored if "measure" in row)
    before = {"run": "serve", "side": "anchors", "clients": 1, "length": 296, "pairs": 7, "requests_ratio": 1.02}
    write = report.BLOCKS["serve"]
    assert write([before, *stored], "images") == write(stored, "images") != ""
    assert write([before, memory], "images") == ""


def test_a_prompt_with_other_tokens_is_counted_out_in_its_turn():
    """As tests/serve/same_tokens.py prints them: the second answers come from the prefix cache."""
    printed = {"expected": [[1, 2], [3], [4]], "first": [[1, 2], [3], [5]], "second": [[1, 2], [4], [5]]}
    counted = same_tokens._equal(printed)
    assert counted == {"equal": 2, "equal_from_cache": 1}
    one = {"setting": {"tau": 0.1, "keep": 0.34}, "inserted": 7, "compared": 3, **counted}
    older, newer = {"family": "llava", "settings": []}, {"family": "llava", "settings": [one]}
    head, lines = same_tokens.table_of([older, {"family": "aria", "settings": [{**one, "setting": {"tau": 1}}]}, newer])
    assert head == ["family", "equal, first and again", "anchors at tau 0.1, keep 0.34", "anchors at tau 1"]
    assert lines == [["aria", "2 and 1 of 3", "–", "7"], ["llava", "2 and 1 of 3", "7", "–"]]


def test_check_misses_a_plot_and_sees_an_old_one(tmp_path):
    """A picture says which rows it was drawn from; the table beside it may not have changed with them."""
    (tmp_path / "README.md").write_text(README)
    rows.write(tmp_path / "rows.jsonl", gpu_rows())
    assert main(report_arguments(tmp_path)) == 0
    picture = tmp_path / "images" / "overhead.png"
    older = gpu_rows()
    older[-4] |= {"prefill_ratio": 0.5}
    plots.save(plots.wanted(older)["overhead.png"], picture)
    assert main(report_arguments(tmp_path, "--check")) == 1
    assert main(report_arguments(tmp_path)) == 0
    assert main(report_arguments(tmp_path, "--check")) == 0
    picture.unlink()
    assert main(report_arguments(tmp_path, "--check")) == 1


@pytest.mark.parametrize(
    ("readme", "said"),
    [
        ("no block at all", "no block"),
        ("<!-- generated: speed -->\n<!-- /generated -->", "'speed'"),
        ("<!-- generated: targets -->\n", "no <!-- /generated -->"),
        (None, "no file"),
    ],
)
def test_a_readme_that_cannot_be_filled_is_told(tmp_path, readme, said, capsys):
    if readme is not None:
        (tmp_path / "README.md").write_text(readme)
    assert main(report_arguments(tmp_path)) == 2
    assert said in capsys.readouterr().err


def test_the_stored_readme_is_current():
    """What CI checks: the README's generated blocks are those of the stored rows."""
    assert main(["report", "--check"]) == 0


def test_the_readme_shows_lines_of_the_laboratorys_table(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    page = tmp_path / report.LABORATORY
    page.parent.mkdir(parents=True)
    table = "| plan, setting | verdict |\n| --- | ---: |\n"
    lines = "| cpu, main | better |\n| share, half | worse |\n| long | not shown |\n"
    page.write_text(f"# Page\n\n{report.NAMED}\n\n{table}{lines}\n![One](one.png)\n\n## More\n\n| cpu | other |\n")
    readme = "<!-- generated: laboratory -->\nold\n<!-- /generated -->\n"
    written = report.render(readme, [], "images")
    assert (
        "| plan, setting | verdict |\n| --- | --- |\n| cpu, main | better |\n| long | not shown |\n\nPoints of"
        in written
    )
    assert "other" not in written
    page.write_text("# Page\n")
    with pytest.raises(ValueError, match="no table under '## The comparisons named"):
        report.render(readme, [], "images")
