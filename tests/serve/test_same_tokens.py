"""vLLM says what `generate` says, token for token, in the same environment."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from same_tokens import FAMILIES, OTHERS, SETTINGS

SCRIPT = Path(__file__).with_name("same_tokens.py")
PROMPTS = os.environ.get("PROMPTS")  # for each setting of each family; by default few, and of most families none
LONG = FAMILIES[:2]
FURTHER = [*FAMILIES[2:], *(OTHERS if PROMPTS else ())]


@functools.cache
def rows_of(families, prompts, settings):
    """What the script prints, by family and setting."""
    command = [sys.executable, SCRIPT, ",".join(families), prompts, ",".join(settings)]
    limit = 60 * len(families) * int(prompts)  # seconds
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit)
    assert done.returncode == 0, done.stderr[-3000:]
    rows = [json.loads(line.removeprefix("ROW ")) for line in done.stdout.splitlines() if line.startswith("ROW ")]
    return {(row["family"], row["setting"]): row for row in rows}


def check(row):
    assert row["first"] == row["expected"], row["setting"]
    assert row["second"] == row["expected"], f"{row['setting']}, from the prefix cache"
    assert bool(sum(row["inserted"])) == (row["setting"] != "one")


@pytest.mark.parametrize("family", LONG)
def test_tokens_are_those_of_generate(family):
    found = rows_of(LONG, PROMPTS or "15", tuple(SETTINGS))
    by_name = {name: found[family, name] for name in SETTINGS}
    for row in by_name.values():
        check(row)
        assert any(row["cached"])
        assert len({tuple(tokens) for tokens in row["expected"]}) > 10  # or equality would say little
    assert max(by_name["low"]["inserted"]) > 10
    assert set(by_name["budget"]["inserted"]) == {0, 3}
    assert set(by_name["reverse"]["inserted"]) == {0, 4}
    # The settings matter.
    assert len({str(by_name[name]["expected"]) for name in ("low", "one", "budget", "keep", "reverse")}) == 5
    assert (by_name["sequential"]["expected"] != by_name["middle"]["expected"]) == (family == "qwen2_5_vl")


@pytest.mark.parametrize("family", FURTHER)
def test_tokens_of_other_language_models_are_those_of_generate(family):
    if family == "qwen3_vl" and not importlib.util.find_spec("torchvision"):
        pytest.skip("vLLM's module of Qwen3-VL needs torchvision")
    settings = tuple(SETTINGS) if PROMPTS else ("keep",)
    found = rows_of(tuple(FURTHER), PROMPTS or "5", settings)
    for name in settings:
        check(found[family, name])
        assert len({tuple(tokens) for tokens in found[family, name]["expected"]}) > 2
