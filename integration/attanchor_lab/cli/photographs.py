"""`attanchor photographs`: scenes of photographed things, to train and test a real small model on."""

from __future__ import annotations

from typing import Any

import typer

from attanchor_lab.photographs.config import PhotographConfig
from attanchor_vlm.cli.entry import app
from attanchor_vlm.cli.options import Options, quiet, takes


@app.command()
@takes(Options(PhotographConfig))
def photographs(given: dict[str, Any]) -> None:
    """Write questions about photographed things on photographs, with concepts and wordings held out.

    The photographs are those of Debian's tuxpaint-stamps-default, read where they are installed, and scikit-image's.
    """
    quiet()
    from attanchor_lab.photographs.dataset import write_photographs

    for path in write_photographs(PhotographConfig(**given), typer.echo):
        typer.echo(path)
