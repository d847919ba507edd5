"""Measure what anchors cost, and make tables and plots of it: `python -m benchmarks COMMAND --help`."""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks import options
from benchmarks.rows import BadRows

COMMANDS = {
    "smoke": "every way of every kernel once, held to the reference, in processes that may hang",
    "sanitize": "every kernel under compute-sanitizer; exit status 3 if it is not here",
    "roofline": "every operator and backend against a copy of the same bytes",
    "overhead": "what anchors cost in whole models, and what dropping image tokens saves",
    "training": "a short LoRA training run of TinyLLaVA, plain against anchors",
    "tune": "search for faster launch configurations of the forward kernels",
    "serve": "requests a second of `attanchor serve` and of vLLM without it; in the environment of `make serve-test`",
    "same-tokens": "prompts that vLLM answers with the tokens of `generate`; in the same environment",
    "host": "host time of a call whose launch is left out, against a plain autograd.Function",
    "phases": "time each phase of the CUDA kernel, by a build of its own; exit status 3 without a GPU",
    "schedule-model": "predict what schedules of the CUDA kernel take, from assumed latencies",
    "cpu-reference": "the reference on a CPU against its unavoidable work, masked_scatter and a literal loop",
    "store-demo": "store what `make demo` wrote, for the README",
    "compare": "two sets of rows; exit status 1 if anything became slower, 2 if nothing can be compared",
    "targets": "every target: met, missed by how much, or not measured",
    "report": "write the README's tables and plots from the stored rows",
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, what in COMMANDS.items():
        command = commands.add_parser(name, help=what, description=what)
        if name in arguments[:1]:  # only this one is imported: some need no model code
            module = importlib.import_module(f"benchmarks.{name.replace('-', '_')}")
            module.add_options(command)
            command.set_defaults(main=module.main)
    given = parser.parse_args(arguments)
    try:
        if reason := options.refusal(given):
            print(reason, file=sys.stderr)
            return 2
        return given.main(given)
    except BadRows as error:
        print(error, file=sys.stderr)
        return 2


if __name__ == "__main__":
    options.heed_sigterm()
    sys.exit(main())
