"""vLLM says what `generate` says, token for token, in the same environment."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from same_tokens import SETTINGS

SCRIPT = Path(__file__).with_name("same_tokens.py")
PROMPTS = os.environ.get("PROMPTS", "15")  # for each setting
LIMIT = 120 * int(PROMPTS)  # seconds


@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_tokens_are_those_of_generate(family):
    command = [sys.executable, SCRIPT, family, PROMPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line.removeprefix("ROW ")) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    assert [row["setting"] for row in rows] == list(SETTINGS)
    for row in rows:
        assert row["first"] == row["expected"], row["setting"]
        assert row["second"] == row["expected"], f"{row['setting']}, from the prefix cache"
        assert any(row["cached"])
        assert len({tuple(tokens) for tokens in row["expected"]}) > 10  # or equality would say little
        assert bool(sum(row["inserted"])) == (row["setting"] != "one")
    by_name = {row["setting"]: row for row in rows}
    assert max(by_name["low"]["inserted"]) > 10
    assert set(by_name["budget"]["inserted"]) == {0, 3}
    assert set(by_name["reverse"]["inserted"]) == {0, 4}
    # The settings matter.
    assert len({str(by_name[name]["expected"]) for name in ("low", "one", "budget", "keep", "reverse")}) == 5
    assert (by_name["sequential"]["expected"] != by_name["middle"]["expected"]) == (family == "qwen2_5_vl")
