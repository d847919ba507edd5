"""Options that several commands share, and what commands do before their heavy imports."""

from __future__ import annotations

import os
import warnings
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from attanchor_vlm.records import check_parent


class Direction(str, Enum):
    text_into_image = "text_into_image"
    image_into_text = "image_into_text"


class Positions(str, Enum):
    sequential = "sequential"
    inherit = "inherit"


class Route(str, Enum):
    embeds = "embeds"
    ids = "ids"


class Dtype(str, Enum):
    float16 = "float16"
    bfloat16 = "bfloat16"
    float32 = "float32"


class Turns(str, Enum):
    each = "each"
    all = "all"


MODEL = Annotated[str, typer.Option(help="Folder of a saved model, or a Hugging Face Hub id.")]
ADAPTER = Annotated[Path | None, typer.Option(help="Folder of a trained adapter; brings its own tau.")]
DATA = Annotated[Path, typer.Option(help="LLaVA-Instruct rows: a .json list, or .jsonl.")]
IMAGES = Annotated[Path, typer.Option(help="Folder that the rows' images are in.")]
SKIP_BAD = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and list them, instead of stopping.")]


CONTENT_WORDS = Annotated[
    bool, typer.Option("--content-words", help="Leave English function words and punctuation out of the anchors.")
]
FUNCTION_WORDS = Annotated[
    Path | None, typer.Option(help="A file of words, one a line, to leave out with punctuation: for other languages.")
]


def content_words(english: bool, words: Path | None) -> bool | tuple[str, ...] | None:
    """What `AttAnchorConfig.content_words` should be; None where neither option is given."""
    if english and words is not None:
        raise typer.BadParameter("give one of --content-words and --function-words", param_hint="--function-words")
    if words is None:
        return english or None
    from attanchor_vlm.chat.words import read_words

    return read_words(words)


def check_picture(path: Path, option: str) -> None:
    """Refuse, before any work, a name that no picture could be written under.

    Raises:
        BadParameter, ValueError: naming it.
    """
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{path} should end in .png, .pdf or .svg", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the name of a picture", param_hint=option)
    check_parent(path)


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def to_gpu(model):
    return model.to("cuda") if has_gpu() else model


def quiet() -> None:
    """Keep transformers' own chatter out of the output; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures, and of palettes
    # What one library of Hugging Face says to another about its names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
