"""What several commands have: options and what may stand behind them, and how they end with what they started."""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Collection
from fractions import Fraction
from pathlib import Path

import torch

from benchmarks.rows import RESULTS, of_newest_gpu, read

UNAVAILABLE = 3  # exit status of a command whose backend or tool this machine lacks


def number(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} should be an integer of at least 1")
    return int(text)


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(number(part) for part in text.split(","))
    except argparse.ArgumentTypeError:
        wish = "positive integers with commas between, such as 1,8"
        raise argparse.ArgumentTypeError(f"{text!r} should be {wish}") from None


def shares(text: str) -> tuple[str, ...]:
    """Fractions between 0 and 1, as they were written."""
    parts = tuple(part for part in text.split(",") if part)
    try:
        right = all(0 < Fraction(part) < 1 for part in parts)
    except (ValueError, ZeroDivisionError):
        right = False
    if not right:
        raise argparse.ArgumentTypeError(f"{text!r} should be fractions with commas between, such as 1/2,1/3")
    return parts


def names(known: Collection[str]) -> Callable[[str], tuple[str, ...]]:
    """Some of `known`, with commas between."""

    def parse(text: str) -> tuple[str, ...]:
        given = tuple(part for part in text.split(",") if part)
        if unknown := [name for name in given if name not in known]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)} should be of {', '.join(known)}")
        return given

    return parse


def _device(text: str) -> str:
    if text == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if text not in ("cuda", "cpu"):
        raise argparse.ArgumentTypeError(f"{text!r} should be auto, cuda or cpu; CUDA_VISIBLE_DEVICES chooses a GPU")
    if text == "cuda" and not torch.cuda.is_available():
        raise argparse.ArgumentTypeError("there is no GPU here; use --device cpu")
    return text


def common(parser: argparse.ArgumentParser, name: str, dtype: bool = True) -> None:
    """Where a command runs, what it writes, and with `dtype` in which precision it measures."""
    parser.add_argument("--device", type=_device, default="auto", help="cuda, cpu, or auto (default: %(default)s)")
    output(parser, name)
    if dtype:
        choices = ["bfloat16", "float16", "float32"]
        parser.add_argument("--dtype", choices=choices, help="default: bfloat16, on a CPU float32")


def output(parser: argparse.ArgumentParser, name: str) -> None:
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.jsonl", help="JSON lines (%(default)s)")


def refusal(given: argparse.Namespace) -> str | None:
    """Why a run may not write where it would: figures of a CPU do not replace those of a GPU."""
    if "output" in given and getattr(given, "device", "cpu") == "cpu" and of_newest_gpu(read(given.output)):
        return f"{given.output} holds rows of a GPU; name another file by --output"
    return None


def heed_sigterm() -> None:
    """It ends a command as an interrupt does, so that what the command started is ended with it."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def end(process: subprocess.Popen) -> None:
    """With all that it started in a session of its own: what stays behind would disturb the next one's figures."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    # One that hangs in the driver may not even die: it is not waited for without end.
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10.0)
