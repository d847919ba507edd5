"""memcheck, racecheck and synccheck over every kernel. `make gpu` runs the same as a step of its own."""

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import sanitize

ROOT = Path(__file__).resolve().parent.parent.parent
LIMIT = 600  # seconds for each tool; they run at once


def test_the_sanitizer_finds_nothing():
    command = [sys.executable, "-m", "benchmarks", "sanitize", "--limit", str(LIMIT)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode == sanitize.UNAVAILABLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr
