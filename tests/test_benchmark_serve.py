"""`python -m benchmarks serve` without vLLM: its servers end with it, however it ends."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from benchmarks import rows, serve
from benchmarks.__main__ import main

# It starts a process of its own, as vLLM does, and does not end that one.
STUB = """
import os, pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(os.environ["PIDS"]).write_text(f"{os.getpid()} {child.pid}.")
time.sleep(600)
"""


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as status:
        return status.read().rpartition(")")[2].split()[0] != "Z"  # ended, and nobody has asked for it


def test_a_server_ends_with_all_that_it_started(tmp_path, monkeypatch):
    (tmp_path / "vllm/entrypoints/openai").mkdir(parents=True)
    (tmp_path / "vllm/entrypoints/openai/api_server.py").write_text(STUB)
    pids = tmp_path / "pids"
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PIDS", str(pids))
    with serve.Server(tmp_path / "model", None):
        while not pids.is_file() or not pids.read_text().endswith("."):
            time.sleep(0.05)
        started = [int(pid) for pid in pids.read_text().rstrip(".").split()]
        assert all(map(is_there, started))
    end = time.monotonic() + 10
    while any(map(is_there, started)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_there, started))


def test_a_server_that_does_not_start_is_told_with_its_log(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(serve, "_write_model", lambda folder: folder / "model")
    monkeypatch.setattr(serve, "SIDES", {})
    monkeypatch.setitem(sys.modules, "openai", SimpleNamespace(OpenAI=None))
    assert main(["serve", "--output", str(tmp_path / "serve.jsonl")]) == 1
    said = capsys.readouterr().err
    assert "servers failed: RuntimeError: a server ended at its start" in said
    assert "No module named 'vllm'" in said


def test_sigterm_ends_a_command_as_an_interrupt_does(tmp_path):
    os.mkfifo(tmp_path / "rows.jsonl")
    command = [sys.executable, "-m", "benchmarks", "compare", tmp_path / "rows.jsonl", tmp_path]
    process = subprocess.Popen(command, cwd=rows.ROOT)
    with open(tmp_path / "rows.jsonl", "w"):  # which waits for the reader
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 143
