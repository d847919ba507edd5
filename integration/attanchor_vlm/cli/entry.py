"""The command `attanchor` itself: its name, and how it ends.

A user's mistake ends in one line that says what to do. Exit code 2 is for the command line itself, 1 for what it names,
130 for a run that was interrupted.
"""

from __future__ import annotations

import os
import sys

import typer

app = typer.Typer(
    help="AttAnchor in vision-language models: train, calibrate, look.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. `setup.py` makes it the console command `attanchor`."""
    try:
        code = app(args=arguments, prog_name="attanchor", standalone_mode=False)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        # Told apart by what they can do: newer typers carry a click of their own.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            print(f"error: {_usage_message(error)}", file=sys.stderr)
            return error.exit_code
        if type(error).__name__ == "Abort":
            print("interrupted", file=sys.stderr)
            return 130
        if os.environ.get("ATTANCHOR_TRACEBACK") == "1" or not _is_users(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return code if isinstance(code, int) else 0


def _usage_message(error) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "attanchor"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message or 'no command given'} (see {command} --help)"


def _is_users(error: BaseException) -> bool:
    """Whether the error was raised by this project, whose messages are written for the user; others are bugs, and keep
    their traceback."""
    if not isinstance(error, (ValueError, TypeError, OSError)):
        return False
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    name = frame.tb_frame.f_globals.get("__name__", "") if frame is not None else ""
    return name.partition(".")[0] in ("attanchor_vlm", "attanchor_kernels")
