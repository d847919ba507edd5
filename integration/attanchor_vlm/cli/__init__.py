"""The command line. Heavy imports stand inside the commands: `--help` and mistakes in the options answer at once."""

import sys
from importlib.metadata import entry_points

from attanchor_vlm.errors import missing

try:
    # Each of these registers its commands, in the order in which `attanchor --help` lists them.
    from attanchor_vlm.cli import analysis, training, evaluation, looking, serving  # noqa: F401, I001
    from attanchor_vlm.cli.entry import app, main

    for entry in entry_points(group="attanchor.commands"):  # other packages' commands, such as the laboratory's
        entry.load()
except ImportError as error:  # without the extra "vlm" there are the operators alone
    if (hint := missing(error)) is None:
        raise
    raise SystemExit(f"error: {hint}") from None
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    raise SystemExit(130) from None

__all__ = ["app", "main"]
