"""The benchmark commands at toy size on a CPU, and what is made of their rows: comparison, targets, report, runner."""

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from attanchor_kernels.backends import triton as triton_backend
from benchmarks import (
    accounting,
    cases,
    compare,
    demonstration,
    floor,
    gpu,
    models,
    plots,
    report,
    roofline,
    rows,
    sanitize,
    targets,
    timing,
    tune,
)
from benchmarks.__main__ import main

ROOT = Path(__file__).resolve().parent.parent
GPU = {"gpu": "Test GPU", "driver": "1", "cuda": "13.0", "torch": "2", "triton": "3", "processor": "cpu"}
GPU |= {"commit": "abc", "date": "2026-01-01"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a roofline run at toy size."""
    path = tmp_path_factory.mktemp("roofline") / "roofline.jsonl"
    assert main(["roofline", "--device", "cpu", "--output", str(path), "--batches", "2", "--budget", "0.02"]) == 0
    return path


def test_every_command_explains_itself():
    for command in ("roofline", "overhead", "training", "tune", "cpu-reference", "compare", "targets", "report"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_a_slow_backend_keeps_its_digits(tmp_path, monkeypatch):
    """Thousands of times slower than the roofline is still a percentage with three digits, not 0.0 or 0.01."""
    path, floor_us, slow_us = tmp_path / "roofline.jsonl", 1.0, 7770.0

    def measured(calls, **_):
        slow = getattr(calls[0], "args", ())[-1:] == ("reference",)
        seconds = (slow_us if slow else floor_us) * 1e-6
        return timing.Timing(*[seconds] * 4, "wall", calls=1, repeats=1)

    monkeypatch.setattr(timing, "wall_timing", measured)
    assert main(["roofline", "--device", "cpu", "--output", str(path), "--batches", "2", "--budget", "0.01"]) == 0
    row = next(row for row in rows.read(path) if row["operation"] == "forward" and row["backend"] == "reference")
    assert row["percent_of_roofline"] == pytest.approx(100 * floor_us / slow_us, rel=1e-3)


def test_roofline_rows_say_what_was_measured_on_what(measured):
    found = rows.read(measured)
    assert [row["backend"] for row in found if row["operation"] == "forward"] == ["floor", "reference"]
    assert {row["operation"] for row in found} == {"copy", "forward", "backward", "merge"}
    assert "masked_scatter" in {row["backend"] for row in found}
    for row in found:
        assert row["us_min"] <= row["us_p10"] <= row["us"] <= row["us_p90"]
        assert {"commit", "gpu", "driver", "torch", "triton", "date", "bytes", "method", "repeats"} <= set(row)
    forward = next(row for row in found if row["backend"] == "reference" and row["operation"] == "forward")
    assert forward["bytes"] == 2 * 128 * 4 * (46 + 46 + 8)
    assert forward["ratio"] == pytest.approx(forward["us"] / forward["floor_us"], rel=1e-3)
    assert forward["percent_of_roofline"] == pytest.approx(100 / forward["ratio"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [(["--shapes", "nope"], "nope"), (["--backends", "cudda"], "cudda"), (["--passes", "x"], "x")],
)
def test_unknown_names_are_told(arguments, named, capsys):
    assert main(["roofline", "--device", "cpu", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_no_figure_for_a_wrong_result(tmp_path, monkeypatch, capsys):
    """A backend that returns something else is reported and never timed."""
    right = roofline.run

    def wrong(case, inputs, backend):
        fields = right(case, inputs, "reference")
        return fields if backend == "reference" else (fields[0] + 1, *fields[1:])

    monkeypatch.setattr(roofline, "run", wrong)
    settings = roofline.Settings("cpu", tmp_path / "rows.jsonl", ["triton"], passes=("kernels",), budget=0.01)
    settings.names = ["triton"]
    with pytest.raises(cases.WrongResult, match="embeds differs"):
        roofline.run_cases([cases.Case("forward", cases.TOY, 1, torch.float32)], settings)
    assert "WRONG" in capsys.readouterr().out
    assert "triton" not in {row["backend"] for row in rows.read(tmp_path / "rows.jsonl")}


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_least_bytes_are_those_of_the_tensors(operation):
    """Counted from the tensors themselves; in backward the gradient's padding need not be read."""
    case = cases.Case(operation, cases.TOY, 3, torch.float32)
    inputs = cases.make_inputs(case, torch.device("cpu"), seed=0)
    got = cases.run(case, inputs, "reference")
    size = sum(tensor.nbytes for tensor in (inputs.image, inputs.text))
    if operation == "backward":
        padding = 3 * (case.max_anchors - case.anchored) * case.row_bytes
        assert case.read_bytes == inputs.grad.nbytes - padding
        assert case.written_bytes == got[0].nbytes + got[1].nbytes == size
    else:
        # In a prompt the rows of the text tensor at placeholders are not read.
        unread = 3 * cases.TOY.image * case.row_bytes if operation == "merge" else 0
        assert case.read_bytes == size - unread
        assert case.written_bytes == got[0].nbytes


@pytest.mark.parametrize(("read", "written"), [(700, 700), (700, 903), (903, 700)])
def test_the_floor_reads_and_writes_all_its_bytes(read, written):
    """The kernel of the GPU's floor, interpreted where there is none, against torch: more written, more read, equal."""
    source = torch.randint(2**40, (read,), device="cuda" if torch.cuda.is_available() else "cpu")
    expected = torch.zeros(written, dtype=torch.int64, device=source.device)
    expected[: min(read, written)] = source[: min(read, written)]
    expected[: max(read - written, 0)] += source[written:]
    assert torch.equal(floor.copy_by_triton(source, written, 256, 4), expected)
    assert torch.equal(floor.copy_by_torch(source, written), expected)


def test_the_cpu_reference_at_toy_size(tmp_path, capsys):
    """Checked against the literal loop; the stored figures of the real shape are not overwritten."""
    path = tmp_path / "cpu.jsonl"
    assert main(["cpu-reference", "--toy", "--rounds", "2", "--output", str(path)]) == 0
    assert [(row["shape"], row["batch"]) for row in rows.read(path)] == [("toy", 1), ("toy", 4)]
    assert main(["cpu-reference", "--toy"]) == 2
    assert "--output" in capsys.readouterr().err


def test_timing_takes_medians_and_turns_over_its_inputs():
    seen = []
    taken = timing.wall_timing([lambda i=index: seen.append(i) for index in range(3)], repeats=7, budget=1e9)
    assert taken.repeats == 7
    assert seen == [0, 0, 1, 2, 0, 1, 2, 0]
    assert taken.least <= taken.p10 <= taken.p50 <= taken.p90


def test_overhead_reports_three_parts_and_what_they_should_be(tmp_path):
    path = tmp_path / "overhead.jsonl"
    arguments = ["--device", "cpu", "--models", "tinyllava-1b,qwen2.5-vl-3b", "--batches", "1", "--new-tokens", "1,4"]
    assert main(["overhead", "--output", str(path), *arguments]) == 0
    found = rows.read(path)
    parts = [row for row in found if "construction_us" in row]
    assert [(row["model"], row["new_tokens"]) for row in parts] == [
        (name, count) for name in ("tinyllava-1b-toy", "qwen2.5-vl-3b-toy") for count in (1, 4)
    ]
    for row in parts:
        total = row["plain_us"] + row["construction_us"] + row["prefill_us"] + row["decode_us"]
        assert row["anchored_us"] == pytest.approx(total, abs=0.1)
        assert row["prefill_flops"] > 0
        assert (row["decode_bytes"] > 0) == (row["new_tokens"] > 1)
    assert {row["measure"] for row in found if "measure" in row} == {"attached forward", "attached generate"}


def test_overhead_sweep(tmp_path):
    path = tmp_path / "sweep.jsonl"
    assert main(["overhead", "--sweep", "--device", "cpu", "--models", "llava-7b", "--output", str(path)]) == 0
    assert [(row["image"], row["inserted"]) for row in rows.read(path)] == [(16, 1), (16, 3), (48, 1), (48, 3)]


def test_training_runs_both_ways(tmp_path):
    path = tmp_path / "training.jsonl"
    assert main(["training", "--device", "cpu", "--steps", "1", "--output", str(path)]) == 0
    plain, anchored = rows.read(path)
    assert (plain["attached"], anchored["attached"]) == (False, True)
    assert plain["trained"] == anchored["trained"] > 0
    assert plain["first_loss"] != anchored["first_loss"]


@pytest.mark.parametrize("name", list(models.SPECS))
def test_counted_weights_are_those_of_the_model(name):
    """The analytic counts against the parameters of the real class, at toy size."""
    spec = models.SPECS[name].toy()
    decoder = models.Decoder(models.build(spec, torch.device("cpu"), torch.float32, toy=True))
    matrices = [p for n, p in decoder.language.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert spec.language.weights == sum(matrix.numel() for matrix in matrices)
    cache = decoder.filled_cache(torch.randn(2, 5, spec.shape.hidden), None, 3)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert spec.language.cache_bytes(2, 8) == held * accounting.BYTES


def test_a_decoding_step_leaves_the_cache_where_it_was():
    spec = models.SPECS["tinyllava-1b"].toy()
    decoder = models.Decoder(models.build(spec, torch.device("cpu"), torch.float32, toy=True))
    embeds = torch.randn(1, 6, spec.shape.hidden)
    cache = decoder.filled_cache(embeds, None, 4)
    token, position = torch.full((1, 1), 7), torch.full((1, 1), 6)
    first = decoder.decode(token, position, cache)
    assert torch.equal(decoder.decode(token, position, cache), first)
    longer = torch.cat([embeds, decoder.embed(token)], dim=1)
    assert torch.equal(decoder.prefill(longer).argmax(-1), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_gpu_sanitizer.py runs it here")
def test_what_runs_under_the_sanitizer_finds_a_wrong_result(monkeypatch, capsys):
    """Every operator of the Triton backend on small shapes; then with a gradient of the wrong sign."""
    monkeypatch.setattr(sanitize, "CONFIGURATIONS", sanitize.CONFIGURATIONS[1:])
    sanitize.work(torch.device("cpu"), ["triton"])
    assert capsys.readouterr().out == "triton: right\n"
    usual = triton_backend.assemble_backward
    monkeypatch.setattr(triton_backend, "assemble_backward", lambda *given: tuple(-grad for grad in usual(*given)))
    with pytest.raises(AssertionError, match="triton"):
        sanitize.work(torch.device("cpu"), ["triton"])


def test_the_sanitizer_says_that_it_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_binary", lambda: None)
    assert sanitize.main([]) == sanitize.UNAVAILABLE
    assert "it comes with the CUDA toolkit" in capsys.readouterr().out


def test_tuning_tries_one_change_at_a_time(tmp_path, monkeypatch, capsys):
    """With few candidates; a schedule that is not right or does not run is told and left."""
    from attanchor_kernels.backends.triton import schedule

    usual = schedule.construct
    monkeypatch.setattr(tune, "FIELDS", {"block_rows": (16, "wrong"), "no such field": (1,)})
    path = tmp_path / "tune.jsonl"
    assert main(["tune", "--device", "cpu", "--batches", "1", "--output", str(path), "--limit", "3600"]) == 0
    (row,) = rows.read(path)
    assert row["us"] > 0
    assert set(row["changes"]) <= {"block_rows"}
    assert schedule.construct is usual
    printed = capsys.readouterr().out
    assert "block_rows=16: " in printed
    assert "'block_rows': 'wrong'}: " in printed


# --- Comparison ------------------------------------------------------------------------------------------------------


def planted(path, measured, factor):
    """The same rows with the forward of the reference slower by a factor."""
    changed = rows.read(measured)
    for row in changed:
        if row["operation"] == "forward" and row["backend"] == "reference":
            row["us"] *= factor
    rows.write(path, changed)
    return path


@pytest.mark.parametrize(("factor", "status"), [(1.0, 0), (1.04, 0), (1.2, 1), (0.5, 0)])
def test_compare_fails_on_a_planted_regression(tmp_path, measured, capsys, factor, status):
    after = planted(tmp_path / "after.jsonl", measured, factor)
    assert main(["compare", str(measured), str(after)]) == status
    printed = capsys.readouterr().out
    assert ("worse: us" in printed) == bool(status)
    assert ("better: us" in printed) == (factor < 1)


def test_compare_takes_a_threshold_and_folders(tmp_path, measured):
    after = planted(tmp_path / "after.jsonl", measured, 1.2)
    assert main(["compare", str(measured.parent), str(after), "--threshold", "30"]) == 0


def test_compare_knows_that_more_steps_are_better():
    before = {"run": "training", "model": "m", "attached": True, "steps_per_second": 10.0}
    (change,), _ = compare.changes([before], [{**before, "steps_per_second": 8.0}])
    assert change.percent == pytest.approx(25)


def test_compare_of_nothing_and_of_less(tmp_path, measured, capsys):
    assert main(["compare", str(measured), str(tmp_path)]) == 2
    rows.write(tmp_path / "less.jsonl", rows.read(measured)[:-1])
    assert main(["compare", str(measured), str(tmp_path / "less.jsonl")]) == 1
    assert "missing: run=roofline operation=merge" in capsys.readouterr().out


def test_a_broken_file_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 2"):
        rows.read(tmp_path)


# --- Targets and report ----------------------------------------------------------------------------------------------


def gpu_rows():
    """A few rows as a GPU would leave them."""

    def kernel(operation, batch, backend, us, **more):
        described = {"run": "roofline", "operation": operation, "shape": "llava-7b", "batch": batch, "backend": backend}
        return {**described, "us": us, **more, **GPU}

    overhead = {"run": "overhead", "model": "llava-7b", "batch": 8, "method": "graph", "new_tokens": 1, **GPU}
    parts = {"plain_us": 90000.0, "construction_us": 60.0, "prefill_us": 700.0, "decode_us": 0.0}
    return [
        kernel("forward", 8, "triton", 27.0, ratio=1.35, floor_us=20.0),
        kernel("forward", 8, "cuda", 24.0, ratio=1.2, floor_us=20.0),
        kernel("forward", 32, "cuda", 96.0, ratio=1.2, floor_us=80.0),
        kernel("forward", 1, "cuda", 9.0, ratio=2.0, floor_us=4.5, us_less_empty=7.5),
        kernel("forward", 8, "reference", 240.0),
        kernel("forward", 8, "triton", 0.0, measure="memory", peak_bytes=500_000),
        {**overhead, **parts, "anchored_us": 90760.0},
        {"run": "training", "model": "tinyllava-1b", "attached": False, "batch": 4, "steps_per_second": 9.0, **GPU}
        | {"peak_bytes": 2**31},
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
    assert outcome(verdicts, "construction over prefill", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "memory beside outputs, triton", "llava-7b, B=8") == "met"
    assert outcome(verdicts, "backward, fastest", "llava-7b, B=8") == "not measured"
    assert "missed by 4.3 %" in targets.table(verdicts)


def test_rows_of_a_cpu_judge_no_target(measured, capsys):
    assert main(["targets", "--results", str(measured.parent)]) == 0
    printed = capsys.readouterr().out
    assert "0 met, 0 missed" in printed
    assert printed.count("not measured |") == len(targets.judge([]))


README = "".join(f"# {name}\n<!-- generated: {name} -->\nSTALE\n<!-- /generated -->\n\n" for name in report.BLOCKS)


def report_arguments(folder, *more):
    places = ["--results", str(folder), "--readme", str(folder / "README.md"), "--images", str(folder / "images")]
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
    assert ("Not measured yet" in text) is True
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
    monkeypatch.setattr(demonstration, "RESULTS", stored)
    (demo / "results.json").write_text(json.dumps(rows.read(ROOT / "benchmarks" / "results" / "demo.jsonl")[-1]))
    arguments = ["store-demo", str(demo), "--images", str(tmp_path / "images")]
    assert main(arguments) == 2
    assert "lacks loss.png" in capsys.readouterr().err
    assert not stored.exists()
    for name in demonstration.PICTURES:
        (demo / name).write_bytes(b"picture")
    assert main(arguments) == 0
    (row,) = rows.read(stored)
    assert row["run"] == "demo"
    assert len(demonstration.lines_of(row)[1]) == len(demonstration.HEAD)
    assert sorted(os.listdir(tmp_path / "images")) == ["demo-loss.png", "demo-photographs.png", "demo-scenes.png"]


def test_check_misses_a_plot(tmp_path):
    (tmp_path / "README.md").write_text(README)
    rows.write(tmp_path / "rows.jsonl", gpu_rows())
    assert main(report_arguments(tmp_path)) == 0
    (tmp_path / "images" / "overhead.png").unlink()
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


def test_plots_only_of_what_a_gpu_measured(measured):
    assert plots.wanted(rows.read(measured)) == {}
    assert set(plots.wanted(gpu_rows())) == {"roofline.png", "overhead.png"}


def test_the_stored_readme_is_current():
    """What CI checks: the README's generated blocks are those of the stored rows."""
    assert main(["report", "--check"]) == 0


# --- The runner ------------------------------------------------------------------------------------------------------


def step(name, code, limit=300.0, **more):
    return gpu.Step(name, ((sys.executable, "-c", code),), limit, **more)


def test_a_hang_costs_one_step_and_a_failure_is_reported(tmp_path):
    """The hanging step's own child is ended too, or the wait for its output would hang as well."""
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    chosen = [
        step("hangs", child, limit=1.5),
        step("fails", "print('the reason'); raise SystemExit(7)"),
        step("lacks", f"raise SystemExit({gpu.UNAVAILABLE})"),
        step(
            "works", "import os, benchmarks, attanchor_vlm; print(os.environ['GIVEN'])", environment=(("GIVEN", "42"),)
        ),
    ]
    outcomes = gpu.run_all(chosen, tmp_path, 900.0, {"device": "cpu"})
    assert [one.status for one in outcomes] == ["timed out", "failed", "not available", "passed"]
    assert outcomes[0].seconds < 60
    assert outcomes[1].detail == "the reason"
    assert outcomes[3].detail == "42"
    assert json.loads((tmp_path / "summary.json").read_text())["steps"][1]["status"] == "failed"
    with tarfile.open(tmp_path / "logs.tar.gz") as archive:
        assert len(archive.getnames()) == 4
    assert sorted(os.listdir(tmp_path)) == ["logs.tar.gz", "summary.json"]


def test_what_no_time_is_left_for_is_skipped(tmp_path):
    outcomes = gpu.run_all([step("first", "pass"), step("second", "pass", limit=30.0)], tmp_path, 10.0, {})
    assert [one.status for one in outcomes] == ["skipped", "skipped"]


def test_the_runner_from_a_foreign_folder(tmp_path):
    """Not installed, another working directory, rows and summary in the folder asked for."""
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--steps", "environment,build,roofline"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["logs.tar.gz", "roofline.jsonl", "summary.json", "summary.txt"]
    assert "not measured" in done.stdout


HOPPER = gpu.Gpu("Test GPU", 9, 0, 140 * 2**30)


def answering(folder: Path, code: str) -> str:
    """An interpreter that does the same whatever it is asked."""
    script = folder / "python"
    script.write_text(f"#!/bin/sh\n{code}\n")
    script.chmod(0o755)
    return str(script)


@pytest.mark.parametrize(
    ("code", "found"), [("echo warning; echo '[\"Test GPU\", 9, 0, 150323855360]'", HOPPER), ("echo null", None)]
)
def test_the_gpu_is_found(tmp_path, code, found):
    assert gpu.find_gpu(answering(tmp_path, code)) == found


def test_a_driver_that_hangs_or_fails_is_told(tmp_path):
    """Asked in a process of its own, with a limit."""
    with pytest.raises(RuntimeError, match="did not say within 1 s"):
        gpu.find_gpu(answering(tmp_path, "exec sleep 60"), limit=1.0)
    with pytest.raises(RuntimeError, match="no CUDA driver"):
        gpu.find_gpu(answering(tmp_path, "echo no CUDA driver >&2; exit 1"))


@pytest.mark.parametrize(("capability", "built"), [((9, 0), "90a"), ((10, 0), "100a"), ((10, 3), "80+PTX")])
def test_the_build_is_for_the_gpu_that_is_here(monkeypatch, capability, built):
    monkeypatch.delenv("ATTANCHOR_CUDA_ARCHS", raising=False)
    here = gpu.Gpu("Test GPU", *capability, 2**34)
    build = next(one for one in gpu.steps("python", here, Path("x")) if one.name == "build")
    assert dict(build.environment) == {"ATTANCHOR_BUILD_CUDA": "1", "ATTANCHOR_CUDA_ARCHS": built}
    monkeypatch.setenv("ATTANCHOR_CUDA_ARCHS", "80")
    build = next(one for one in gpu.steps("python", here, Path("x")) if one.name == "build")
    assert dict(build.environment) == {"ATTANCHOR_BUILD_CUDA": "1"}


def test_every_file_that_a_step_names_is_there():
    """Test paths and modules of the commands."""
    for one in gpu.steps("python", HOPPER, Path("x")):
        for command in one.commands:
            for part in command:
                if part.endswith(".py") or part.startswith("tests/"):
                    assert (ROOT / part).exists(), part


@pytest.mark.parametrize("part", [1, 2, 3])
def test_all_files_of_a_part_are_few(part, tmp_path):
    """Rows, summary and packed logs: at most eight, whatever fails."""
    chosen = [one for one in gpu.steps("python", None, tmp_path) if one.part == part]
    names = {word for one in chosen for line in one.commands for word in line}
    files = {name for name in names if name.startswith(str(tmp_path)) and name != str(tmp_path / "lab")}
    files |= {"lab/plan.json", "lab/rows.jsonl"} if str(tmp_path / "lab") in names else set()
    assert files
    assert len(files) + len(["summary.json", "summary.txt", "logs.tar.gz"]) <= 8


def test_the_whole_fits_into_its_time():
    """The total is what ends a run, nine minutes at most; a hang costs no other step more than half of it."""
    assert gpu.TOTAL <= 540
    for part, count in {1: 5, 2: 6, 3: 1}.items():
        limits = [one.limit for one in gpu.steps("python", HOPPER, Path("x")) if one.part == part]
        assert len(limits) == count
        assert max(limits) <= gpu.TOTAL / min(count, 2)


def test_the_laboratory_is_a_step(tmp_path):
    """Its rehearsal's plan names the GPU's size; the rehearsal itself is run by the laboratory's own tests."""
    (step,) = [one for one in gpu.steps("python", HOPPER, tmp_path) if one.name == "laboratory"]
    ((_, _, module, command, *options),) = step.commands
    assert (module, command) == ("attanchor_vlm.cli", "lab")
    assert "--rehearse" not in options
    (rehearsal,) = [one for one in gpu.steps("python", None, tmp_path) if one.name == "laboratory"]
    assert "--rehearse" in rehearsal.commands[0]


def test_the_readme_says_what_the_laboratorys_page_says_in_short(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "ROOT", tmp_path)
    page = tmp_path / report.LABORATORY
    page.parent.mkdir(parents=True)
    page.write_text("# Page\n\n## In short\n\n- One.\n- **Two?** No.\n\n## More\n\n- Three.\n")
    readme = "<!-- generated: laboratory -->\nold\n<!-- /generated -->\n"
    written = report.render(readme, [], "images")
    assert "- One.\n- **Two?** No.\n\nFrom the rows" in written
    assert "Three" not in written
    assert "old" not in written
    page.write_text("# Page\n")
    with pytest.raises(ValueError, match="In short"):
        report.render(readme, [], "images")
