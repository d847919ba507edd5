"""`make gpu`: what it does with steps that hang, fail or have no time, and what its steps are."""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from benchmarks import cases, gpu, rows, smoke

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
    outcomes = gpu.run_all(chosen, tmp_path, 900.0)
    assert [one.status for one in outcomes] == ["timed out", "failed", "not available", "passed"]
    assert outcomes[0].seconds < 60
    assert outcomes[1].detail == "the reason"
    assert outcomes[3].detail == "42"
    with tarfile.open(tmp_path / "logs-part1.tar.gz") as archive:
        assert len(archive.getnames()) == 4
    assert sorted(os.listdir(tmp_path)) == ["logs-part1.tar.gz", "summary-part1.txt"]
    assert "fails          failed" in (tmp_path / "summary-part1.txt").read_text()


def test_what_no_time_is_left_for_is_skipped(tmp_path):
    outcomes = gpu.run_all([step("first", "pass"), step("second", "pass", limit=30.0)], tmp_path, 10.0)
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
    outcomes = gpu.run_all([step("long", "pass", least=200.0), step("short", "pass")], tmp_path, 100.0)
    assert [one.status for one in outcomes] == ["skipped", "passed"]


def test_parts_fill_one_folder(tmp_path):
    """Each replaces its own rows alone; log and summary name the part; the table judges the rows of all."""

    def part(number, us, **more):
        row = {"run": "roofline", "operation": "forward", "shape": "llava-7b", "batch": 1, "backend": "cuda"}
        row |= {"auto": True, "us": us, "gpu": "Test GPU", "date": "2026-01-01"}
        code = f"import pathlib; pathlib.Path({str(tmp_path / f'{number}.jsonl')!r}).write_text({json.dumps(row)!r})"
        gpu.run_all([step("rows", code, writes=f"{number}.jsonl", **more)], tmp_path, 900.0, number)

    part(1, 9.0)
    part(2, 12.0)
    assert [row["us"] for row in rows.read(tmp_path)] == [9.0, 12.0]
    assert "missed by 20.0 %" in (tmp_path / "summary-part2.txt").read_text()
    part(1, 8.0)
    assert [row["us"] for row in rows.read(tmp_path)] == [8.0, 12.0]
    part(2, 12.0, least=1000.0, limit=2000.0)
    assert [row["us"] for row in rows.read(tmp_path)] == [8.0, 12.0]
    assert "skipped" in (tmp_path / "summary-part2.txt").read_text()
    assert {"logs-part1.tar.gz", "summary-part1.txt", "logs-part2.tar.gz"} <= set(os.listdir(tmp_path))


def test_a_rehearsal_does_not_replace_rows_of_a_gpu(tmp_path, capsys):
    """As where a driver broke after the run."""
    stored = {"run": "roofline", "gpu": "Test GPU", "date": "2026-01-01"}
    rows.write(tmp_path / "roofline.jsonl", [stored])
    assert gpu.main(["--device", "cpu", "--output", str(tmp_path)]) == 1
    assert "is of a GPU" in capsys.readouterr().err
    assert rows.read(tmp_path) == [stored]


def test_a_rehearsal_from_a_foreign_folder(tmp_path):
    """Not installed, another working directory, under its real time limits: nothing fails, and rows are written.

    Left out are the steps whose commands the suite runs anyway.
    """
    names = ["environment", "build", "smoke", "profile"]
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [*command, "--steps", ",".join(names)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == ["logs-part1.tar.gz", "smoke.jsonl", "summary-part1.txt"]
    statuses = [line.split()[1] for line in done.stdout.splitlines() if line.split()[:1] in [[name] for name in names]]
    assert statuses[-4:] == ["passed", "not", "passed", "not"]


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


@pytest.mark.parametrize(
    ("capability", "built"), [((9, 0), "90a"), ((10, 0), "100a"), ((10, 3), "90+PTX"), ((8, 9), "80+PTX")]
)
def test_the_build_is_for_the_gpu_that_is_here(monkeypatch, capability, built):
    monkeypatch.delenv("ATTANCHOR_CUDA_ARCHS", raising=False)
    here = gpu.Gpu("Test GPU", *capability, 2**34)
    builds = [one for one in gpu.steps("python", here, Path("x")) if one.name in ("build", "phases")]
    assert len(builds) == 3
    for build in builds:
        assert dict(build.environment) == {"ATTANCHOR_BUILD_CUDA": "1", "ATTANCHOR_CUDA_ARCHS": built}
    monkeypatch.setenv("ATTANCHOR_CUDA_ARCHS", "80")
    build = next(one for one in gpu.steps("python", here, Path("x")) if one.name == "build")
    assert dict(build.environment) == {"ATTANCHOR_BUILD_CUDA": "1"}


@pytest.mark.parametrize("part", [1, 2])
def test_each_part_builds_before_it_measures(part):
    """A part may be the first that runs on its machine, and would measure Triton alone."""
    chosen = [one for one in gpu.steps("python", HOPPER, Path("x")) if one.part == part]
    names = [one.name for one in chosen]
    assert names.index("build") < min(at for at, one in enumerate(chosen) if one.writes)


def test_what_steps_name_is_there(tmp_path):
    """Test paths exist, options are known to the commands, and each step writes the one file that it says."""
    for one in gpu.steps("python", HOPPER, tmp_path):
        named = {Path(word).name for line in one.commands for word in line if word.startswith(str(tmp_path))}
        assert named - {"smoke.jsonl"} == ({one.writes} if one.writes else set()) - {"smoke.jsonl"}, one.name
        for line in one.commands:
            for word in line:
                if word.endswith(".py") or word.startswith("tests/"):
                    assert (ROOT / word).exists(), word
            if line[1:3] == ("-m", "benchmarks"):
                module = importlib.import_module(f"benchmarks.{line[3]}")
                parser = argparse.ArgumentParser()
                module.add_options(parser)
                parser.parse_args(" ".join(line[4:]).replace("--device cuda", "--device cpu").split())


def test_each_part_fits_into_its_time():
    """The total is what ends a run, ten minutes at most, fifteen both; a hang costs no other step half of it."""
    assert gpu.TOTAL[1] <= 590
    assert sum(gpu.TOTAL.values()) <= 870
    for part, total in gpu.TOTAL.items():
        limits = [one.limit for one in gpu.steps("python", HOPPER, Path("x")) if one.part == part]
        assert max(limits) <= total / 2


# --- The smoke step --------------------------------------------------------------------------------------------------


def speaking(*said: str) -> list[str]:
    """A command that is given the number of the first way, and does for each what is said."""
    code = "import json, os, sys, time\nfor what in {}[int(sys.argv[1]):]:\n    print('noise')\n"
    code += "    print(json.dumps({{'backend': what}}), flush=True)\n    exec(what)\nprint('end', flush=True)"
    return [sys.executable, "-c", code.format(list(said))]


def test_a_way_that_hangs_crashes_or_fails_costs_the_others_nothing():
    """The process behind it goes on with the next."""
    right = "print(json.dumps({'status': 'right'}), flush=True)"
    failed = "print(json.dumps({'status': 'failed'}), flush=True); time.sleep(60)"
    ways = (right, "time.sleep(60)", right, "os._exit(3)", "raise ValueError", failed, right)
    found = list(smoke.supervised(speaking(*ways), start=60.0, each=4.0))
    assert [row["status"] for row in found] == ["right", "hung", "right", "crashed", "crashed", "failed", "right"]
    assert [row["backend"] for row in found] == list(ways)


def test_a_process_that_never_begins_ends_the_smoke_run():
    (row,) = smoke.supervised([sys.executable, "-c", "raise SystemExit('no device')"])
    assert row["status"] == "crashed"
    (row,) = smoke.supervised([sys.executable, "-c", "import time; time.sleep(60)"], start=0.5)
    assert row["status"] == "hung"


def test_tiles_on_chip_are_not_chosen_after_they_failed():
    held, plain = ({"backend": "cuda", "tuning": {"hold": hold}} for hold in (1, 0))
    assert smoke.safe_choice([{**held, "status": "right"}, {**plain, "status": "hung"}]) == {}
    assert smoke.safe_choice([{**held, "status": "left out"}]) == {}
    assert smoke.safe_choice([{**held, "status": "hung"}, {**plain, "status": "right"}]) == {"hold": 0}


def test_a_wrong_way_is_found(monkeypatch):
    usual = cases.run

    def wrong(case, inputs, backend):
        fields = usual(case, inputs, "reference")
        return fields if backend == "reference" else (-fields[0], *fields[1:])

    monkeypatch.setattr(cases, "run", wrong)
    device = torch.device("cpu")
    small = [(cases.TOY, 2)]
    assert smoke.check(smoke.Way("reference", torch.float32, "forward"), device, small)["status"] == "right"
    assert smoke.check(smoke.Way("triton", torch.float32, "forward"), device, small)["status"] == "wrong"
