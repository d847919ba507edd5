"""The command `attanchor` itself: its name, and how it ends.

A user's mistake ends in one line that says what to do. Exit code 2 is for the command line itself, 1 for what it names,
130 for a run that was interrupted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from types import FrameType
from typing import Annotated

import typer

from attanchor_vlm.cli import examples
from attanchor_vlm.errors import missing

_EPILOG = """\b
Everything can be tried offline: `attanchor sample --output sample` writes a
small model and data, and the help of every command ends with an example.

\b
Exit codes:
  0    done
  1    something that the command names cannot be used, or work failed
  2    the command line is wrong
  130  interrupted
With ATTANCHOR_TRACEBACK=1, errors show where they were raised.
"""

app = typer.Typer(
    help="AttAnchor in vision-language models: choose a threshold, train, generate, explain, serve.",
    epilog=_EPILOG,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version  # of what is installed; importing the package would load torch

        typer.echo(f"attanchor {version('attanchor-kernels')}")
        raise typer.Exit


@app.callback()
def _attanchor(
    _: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code. `setup.py` makes it the console command `attanchor`."""
    examples.add_to(app)
    try:
        with _imports_end_at_once():
            code = app(args=arguments, prog_name="attanchor", standalone_mode=False)
        if code == 130:  # typer's own word for an interruption
            raise KeyboardInterrupt
    except KeyboardInterrupt:
        _tell("interrupted")
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's own flush at the end
        return 1
    except Exception as error:
        # Told apart by what they can do: newer typers carry a click of their own.
        if hasattr(error, "format_message") and hasattr(error, "exit_code"):
            _tell(f"error: {_usage_message(error)}")
            return error.exit_code
        if type(error).__name__ == "Abort":
            _tell("interrupted")
            return 130
        message = _message(error)
        if os.environ.get("ATTANCHOR_TRACEBACK") == "1" or message is None:
            raise
        _tell(f"error: {message}")
        return 1
    return code if isinstance(code, int) else 0


@contextlib.contextmanager
def _imports_end_at_once() -> Iterator[None]:
    """Let Ctrl-C end the process there and then while it imports: half-imported, C++ aborts, and some packages catch
    whatever is raised and go on without what they miss."""
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _interrupted)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _interrupted(number: int, frame: FrameType | None) -> None:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            with contextlib.suppress(OSError, RuntimeError):  # a closed pipe; interrupted while it was written to
                sys.stdout.flush()
            _tell("interrupted")
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _tell(line: str) -> None:
    """Print a line to stderr, behind the progress bars that an error left open."""
    tqdm = getattr(sys.modules.get("tqdm"), "tqdm", None)  # imported only where a command shows bars
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(line, file=sys.stderr)


def _usage_message(error) -> str:
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "attanchor"
    message = " ".join(error.format_message().split()).rstrip(".")
    return f"{message or 'no command given'} (see {command} --help)"


def _message(error: BaseException) -> str | None:
    """What the user is told of an error; None for bugs, which keep their traceback."""
    if _is_ours(error) and isinstance(error, (ValueError, TypeError, OSError)):
        return str(error)
    if isinstance(error, OSError) and error.errno is not None:  # files: full disks, missing rights, …
        named = f"{error.filename}: " if error.filename is not None else ""
        return f"{named}{error.strerror or error}"
    if type(error).__name__ == "SafetensorError":  # its way to say the same of weights
        return f"weights cannot be read or written: {error}"
    if type(error) is Exception and "(os error " in str(error):  # that of tokenizers
        return f"a tokenizer cannot be read or written: {error}"
    if isinstance(error, ModuleNotFoundError):
        return missing(error)
    if type(error).__name__ == "OutOfMemoryError":  # torch's
        reason = ". ".join(str(error).split(". ")[:2]).rstrip(".")
        return f"the GPU's memory is too small: {reason}; take a smaller batch, or a smaller model"
    return None


def _is_ours(error: BaseException) -> bool:
    """Whether the error was raised by this project, whose messages are written for the user."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    name = frame.f_globals.get("__name__", "")
    return name.partition(".")[0] in ("attanchor_vlm", "attanchor_lab", "attanchor_kernels")
