"""What this machine's own Triton makes of the barrier, whatever its version: an older one dropped the acquire."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "test_triton_compile.py"
CASES = "build;build, few rows;merge;match"


@pytest.mark.skipif(torch.version.cuda is None, reason="for NVIDIA's compiler")
def test_the_barrier_is_in_the_machine_code():
    """For the GPU that is here, or the nearest target below it."""
    major = torch.cuda.get_device_capability()[0]
    target = f"sm_{min(max(major, 8), 10)}0"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), target, "--cases", CASES]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [row["case"] for row in rows] == CASES.split(";")
    for row in rows:
        assert row["barrier"] == [], row
        assert row["spills"] == 0 or target == "sm_80", row
