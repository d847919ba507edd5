"""`make gpu`: what it does with steps that hang, fail or have no time, and what its steps are."""

import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from benchmarks import gpu, rows

ROOT = Path(__file__).resolve().parent.parent


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
    assert sorted(os.listdir(tmp_path)) == ["logs.tar.gz", "summary.json", "summary.txt"]


def test_what_no_time_is_left_for_is_skipped(tmp_path):
    outcomes = gpu.run_all([step("first", "pass"), step("second", "pass", limit=30.0)], tmp_path, 10.0, {})
    assert [one.status for one in outcomes] == ["skipped", "skipped"]


def test_a_run_that_is_ended_ends_its_step(tmp_path, monkeypatch):
    """A step is in a process group of its own, which a caller's time limit does not reach."""
    code = "import os, pathlib, signal, time; pathlib.Path('{}').write_text(str(os.getpid())); "
    code = code.format(tmp_path / "pid") + "os.kill(os.getppid(), signal.SIGTERM); time.sleep(600)"
    monkeypatch.setattr(gpu, "steps", lambda *_: [step("sleeps", code)])
    usual = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(SystemExit):
            gpu.main(["--device", "cpu", "--output", str(tmp_path / "out")])
    finally:
        signal.signal(signal.SIGTERM, usual)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


def test_a_step_starts_only_where_it_can_be_of_use(tmp_path):
    outcomes = gpu.run_all([step("long", "pass", least=200.0), step("short", "pass")], tmp_path, 100.0, {})
    assert [one.status for one in outcomes] == ["skipped", "passed"]


def test_parts_fill_one_folder(tmp_path):
    """Each replaces its own rows alone; log and summary name the part; the table judges the rows of all."""

    def part(number, us, **more):
        row = {
            "run": "roofline",
            "operation": "forward",
            "shape": "llava-7b",
            "batch": 1,
            "backend": "cuda",
            "auto": True,
        }
        row |= {"us": us, "gpu": "Test GPU", "date": "2026-01-01"}
        code = f"import pathlib; pathlib.Path({str(tmp_path / f'{number}.jsonl')!r}).write_text({json.dumps(row)!r})"
        gpu.run_all([step("rows", code, writes=f"{number}.jsonl", **more)], tmp_path, 900.0, {"part": number})

    part(1, 9.0)
    part(2, 12.0)
    assert [row["us"] for row in rows.read(tmp_path)] == [9.0, 12.0]
    assert "missed by 20.0 %" in (tmp_path / "summary-part2.txt").read_text()
    part(1, 8.0)
    assert [row["us"] for row in rows.read(tmp_path)] == [8.0, 12.0]
    part(2, 12.0, least=1000.0, limit=2000.0)
    assert [row["us"] for row in rows.read(tmp_path)] == [8.0, 12.0]
    assert "skipped" in (tmp_path / "summary-part2.txt").read_text()
    assert {"logs-part1.tar.gz", "summary-part1.json", "logs-part2.tar.gz"} <= set(os.listdir(tmp_path))


def test_a_rehearsal_does_not_replace_rows_of_a_gpu(tmp_path, monkeypatch, capsys):
    """As where a driver broke after the run."""
    chosen = [step("rows", "pass", writes="lab")]
    monkeypatch.setattr(gpu, "steps", lambda *_: chosen)
    gpu.run_all(chosen, tmp_path, 900.0, {"gpu": "Test GPU", "part": 3})
    (tmp_path / "lab").mkdir()
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "is of a GPU" in capsys.readouterr().err
    assert (tmp_path / "lab").exists()


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


@pytest.mark.parametrize("part", [1, 2])
def test_each_part_that_measures_kernels_builds_them(part):
    """A part may be the first that runs on its machine, and would measure Triton alone."""
    names = [one.name for one in gpu.steps("python", HOPPER, Path("x")) if part in one.parts]
    assert names.index("build") < names.index({1: "roofline", 2: "overhead"}[part])


def test_every_file_that_a_step_names_is_there():
    """Test paths and modules of the commands."""
    for one in gpu.steps("python", HOPPER, Path("x")):
        for command in one.commands:
            for part in command:
                if part.endswith(".py") or part.startswith("tests/"):
                    assert (ROOT / part).exists(), part


@pytest.mark.parametrize("part", [1, 2, 3])
def test_all_files_of_a_part_are_few(part):
    """Rows, summary and packed logs: at most eight, whatever fails."""
    files = {one.writes for one in gpu.steps("python", None, Path("x")) if part in one.parts and one.writes}
    if "lab" in files:
        files = files - {"lab"} | {"lab/plan.json", "lab/rows.jsonl"}
    assert files
    assert len(files) + len(["summary.json", "summary.txt", "logs.tar.gz"]) <= 8


def test_a_step_writes_what_it_says(tmp_path):
    for one in gpu.steps("python", HOPPER, tmp_path):
        named = {Path(word).name for line in one.commands for word in line if word.startswith(str(tmp_path))}
        assert named == ({one.writes} if one.writes else set()), one.name


def test_the_whole_fits_into_its_time():
    """The total is what ends a run, nine minutes at most; a hang costs no other step more than half of it."""
    assert gpu.TOTAL <= 540
    for part, count in {1: 7, 2: 6, 3: 1}.items():
        limits = [one.limit for one in gpu.steps("python", HOPPER, Path("x")) if part in one.parts]
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
