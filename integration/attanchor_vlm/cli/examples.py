"""One example for every command, shown at the end of its `--help`. Each runs as printed, offline and in this order, in
a folder where the first has made `sample`; a test holds the commands to that."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Iterator

import typer
from typer.models import CommandInfo

_DATA = "--data sample/train.json --images sample/images"
_TEST = "--no-train --test sample/test.json --images sample/images --metrics loss --limit 8"
EXAMPLES = {
    "sample": "attanchor sample --output sample",
    "check": "attanchor check --model sample/model --image sample/images/test-00001.png",
    "probe": f"attanchor probe --model sample/model {_DATA} --samples 32",
    "calibrate": f"attanchor calibrate --model sample/model {_DATA} --fraction 0.1 --samples 64 --plot scores.png",
    "train": f"attanchor train --model sample/model {_DATA} --preset small-llava --max-steps 5 --output runs/anchors",
    "eval": "attanchor eval --model sample/model --tau 0.6 --metrics loss,exact --data sample/test.json "
    "--images sample/images",
    "generate": "attanchor generate --model sample/model --tau 0.6 --image sample/images/test-00001.png "
    "--prompt 'Where is the purple triangle?' --explain anchors.png",
    "export": "attanchor export --model sample/model --tau 0.6 --head-dim 32 --output sample-wide",
    "export-lm": "attanchor export-lm --model sample/model --tau 0.6 --output sample-lm",
    "serve": "attanchor serve --model sample-wide",
    **{
        f"experiment {name}": f"attanchor experiment {name} {options} {_TEST} --output {name}"
        for name, options in {
            "sweep": "--model sample/model --taus 1,0.6,0.5",
            "directions": "--model sample/model --tau 0.6",
            "scale": "--models small=sample/model --tau 0.6",
            "degrade": "--model sample/model --taus 1,0.6",
            "tokens": "--model sample/model --tau 0.6",
            "paper": "--model sample/model --taus 1,0.6",
        }.items()
    },
    "lab": "attanchor lab --size smoke --output lab-out",
    "report": "attanchor report lab-out --output lab-out/report.md",
    "demo": "attanchor demo --output demo-out",
    "demo-photographs": "attanchor demo-photographs --output photographs-out",
    "demo-stage1": "attanchor demo-stage1 --output small-llava",
    "photographs": "attanchor photographs --output photographs --scenes 320 --kinds existence,place",
    "build-small-vlm": "attanchor build-small-vlm --output small-vlm",
    "lab-photographs": "attanchor lab-photographs --plan docs/lab/photographs-plan.json --output out --work work",
}
# Left out of the tests: serve needs vLLM, report needs what lab has made, and the others take from ten seconds to
# minutes, or photographs and weights that are not installed everywhere.
SLOW = {"serve", "lab", "report", "demo", "demo-photographs", "demo-stage1", "photographs", "build-small-vlm"}
SLOW |= {"lab-photographs", *(f"experiment {name}" for name in ("scale", "degrade", "tokens", "paper"))}

_WIDTH = 74  # and a backslash


def add_to(app: typer.Typer) -> None:
    """Put its example at the end of every command's help, and its whole first sentence into the list of commands."""
    for name, command in commands_of(app):
        words = " ".join(inspect.cleandoc((command.callback and command.callback.__doc__) or "").split())
        command.short_help = words.partition(". ")[0].rstrip(".")
        if name in EXAMPLES:
            command.epilog = "\b\nExample:\n" + folded(EXAMPLES[name])


def commands_of(app: typer.Typer, group: str = "") -> Iterator[tuple[str, CommandInfo]]:
    """Every command by what a user types, groups in front: "experiment tau"."""
    for command in app.registered_commands:
        own = command.name or (command.callback.__name__.replace("_", "-") if command.callback else "")
        yield f"{group}{own}", command
    for inner in app.registered_groups:
        if inner.typer_instance is not None:
            yield from commands_of(inner.typer_instance, f"{group}{inner.name} ")


def folded(line: str) -> str:
    """A command line over several, as a shell joins them again: broken in front of options."""
    glued = re.sub(" (?!--)", "\0", line)
    lines = textwrap.wrap(glued, _WIDTH, initial_indent="  ", subsequent_indent=" " * 6, break_on_hyphens=False)
    return " \\\n".join(lines).replace("\0", " ")
