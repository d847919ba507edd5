"""What the tests of `attanchor generate` share."""

from __future__ import annotations

import socket

from attanchor_vlm import cli

TAU = 0.5
QUESTION = "Where is the orange ring?"


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def run(capsys, *arguments):
    """Exit code, stdout and the last line of stderr."""
    code = cli.main([str(argument) for argument in arguments])
    said = capsys.readouterr()
    return code, said.out, (said.err.strip().splitlines() or [""])[-1]
