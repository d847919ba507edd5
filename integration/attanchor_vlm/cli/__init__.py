"""The command line. Heavy imports stand inside the commands: `--help` and mistakes in the options answer at once."""

# Each of these registers its commands, in the order in which `attanchor --help` lists them.
from attanchor_vlm.cli import probe, training, evaluation, experiments, looking, serving, demos, lab  # noqa: F401, I001
from attanchor_vlm.cli.entry import app, main

__all__ = ["app", "main"]
