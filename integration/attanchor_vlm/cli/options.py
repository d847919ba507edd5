"""Options of commands: those made of a dataclass's fields, those that several commands share, and what is done before
heavy imports."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from attanchor_vlm.records import check_parent
from attanchor_vlm.settings import REQUIRED, settings_of

# Of `AnchorOptions`: what a trained model can be used with other than as stored.
IN_USE = ("tau", "keep", "keep_by", "content_words")

MODEL = Annotated[str, typer.Option(help="Folder of a saved model, or a Hugging Face Hub id.")]
ADAPTER = Annotated[Path | None, typer.Option(help="Folder of a trained adapter; brings its own tau.")]
DATA = Annotated[Path, typer.Option(help="LLaVA-Instruct rows: a .json list, or .jsonl.")]
IMAGES = Annotated[Path, typer.Option(help="Folder that the rows' images are in.")]
FUNCTION_WORDS = Annotated[
    Path | None, typer.Option(help="A file of words, one a line, to leave out with punctuation: for other languages.")
]
SKIP_BAD = Annotated[bool, typer.Option("--skip-bad", help="Leave bad rows out and list them, instead of stopping.")]


Dtype = Literal["float16", "bfloat16", "float32"]
DTYPE = Annotated[Dtype | None, typer.Option(help="Of the weights; by default bfloat16 on a GPU, else float32.")]


@dataclasses.dataclass(frozen=True)
class Options:
    """The options that the settings of a dataclass make.

    Attributes:
        config: The dataclass.
        only: Names of its settings; empty for all.
        leave_out: Names of those that make no option.
        renamed: Options by another name than their setting.
        unsaid: What the help gives for all their defaults; by default each says its own.
        presets: Named defaults, which the help lists too.
    """

    config: type
    only: tuple[str, ...] = ()
    leave_out: tuple[str, ...] = ()
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unsaid: str | None = None
    presets: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)

    def fields(self) -> Iterable[dataclasses.Field[Any]]:
        every = {field.name: field for field in settings_of(self.config)}
        return [every[name] for name in self.only or every if name not in self.leave_out]

    def parameters(self) -> list[inspect.Parameter]:
        hints = typing.get_type_hints(self.config)
        made = []
        for field in self.fields():
            name, about = self.renamed.get(field.name, field.name), field.metadata
            help = about["help"] + self._default(field)
            required = field.default is REQUIRED and field.default_factory is REQUIRED and self.unsaid is None
            kind, default = _kind(hints[field.name], about["choices"]), None
            if kind is bool:
                option, default = typer.Option(f"--{name.replace('_', '-')}", help=help), False
            else:
                parser, metavar = None, about["metavar"]
                if kind == int | float:  # typer takes no union; the parser says which
                    kind, parser, metavar = str, _number, "NUMBER"
                option = typer.Option(help=help, metavar=metavar, parser=parser, show_default=False)
                kind = kind if required else kind | None
            made.append(_parameter(name, Annotated[kind, option], REQUIRED if required else default))
            if field.name == "content_words":
                made.append(_parameter("function_words", FUNCTION_WORDS, None))
        return made

    def given(self, values: dict[str, Any]) -> dict[str, Any]:
        """The settings that a command line's `values` give."""
        found = {}
        for field in self.fields():
            name = self.renamed.get(field.name, field.name)
            value = values[name]
            if field.name == "content_words":
                value = _content_words(value, values["function_words"])
            elif field.metadata["all_of"] and value is not None:
                value = _names(value, field.metadata["all_of"])
            elif isinstance(value, list):
                value = _folders(value, f"--{name.replace('_', '-')}")
            if value is not None and value is not False:
                found[field.name] = value
        return found

    def _default(self, field: dataclasses.Field[Any]) -> str:
        if self.unsaid is not None:
            return f" [default: {self.unsaid}]"
        said = [] if field.default in (REQUIRED, None, ()) or field.default is False else [_said(field.default)]
        said += [f"{name} {_said(other[field.name])}" for name, other in self.presets.items() if field.name in other]
        return f" [default: {'; '.join(said)}]" if said else ""


def takes(*groups: Options) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options of `groups`: one dict each, in front of its own arguments, of what was given."""

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = dict(list(inspect.signature(function, eval_str=True).parameters.items())[len(groups) :])

        @functools.wraps(function)
        def run(**values: Any) -> None:
            function(*[group.given(values) for group in groups], **{name: values[name] for name in own})

        named = {parameter.name: parameter for group in groups for parameter in group.parameters()} | own
        every = sorted(named.values(), key=lambda one: (one.default is not one.empty, one.name != "model"))
        run.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
        del run.__wrapped__  # type: ignore[attr-defined]
        return run

    return decorate


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    default = inspect.Parameter.empty if default is REQUIRED else default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _kind(hint: Any, choices: tuple[str, ...]) -> Any:
    """What an option of a setting's type takes."""
    if choices:
        return Literal[tuple(choices)]
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if is_union else [hint]
    if bool in kinds:
        return bool
    if {int, float} <= set(kinds):
        return int | float
    origin = typing.get_origin(kinds[0])  # names are written with commas between, other collections option by option
    return kinds[0] if origin is None else str if origin is tuple else list[str]


def _number(text: str) -> int | float:
    return int(text) if text.strip().isdigit() else float(text)


def _said(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def _names(given: str, whole: tuple[str, ...]) -> tuple[str, ...]:
    """Names with commas between, each once; `whole` for "all", nothing for "none"."""
    if given.strip() in ("all", "none"):
        return whole if given.strip() == "all" else ()
    return tuple(dict.fromkeys(name.strip() for name in given.split(",") if name.strip()))


def _folders(given: list[str], option: str) -> dict[str, Path]:
    found = {}
    for one in given:
        name, _, folder = one.partition("=")
        if not name or not folder:
            raise typer.BadParameter(f"{one!r} should be NAME=DIR, such as pope=data/POPE", param_hint=option)
        found[name] = Path(folder)
    return found


def _content_words(english: bool, words: Path | None) -> bool | tuple[str, ...] | None:
    if english and words is not None:
        raise typer.BadParameter("give one of --content-words and --function-words", param_hint="--function-words")
    if words is None:
        return english or None
    from attanchor_vlm.chat.words import read_words

    return read_words(words)


def check_picture(path: Path, option: str) -> None:
    """Refuse, before any work, a name that no picture could be written under."""
    if path.suffix not in (".png", ".pdf", ".svg"):
        raise typer.BadParameter(f"{path} should end in .png, .pdf or .svg", param_hint=option)
    if path.is_dir():
        raise typer.BadParameter(f"{path} is a folder; give the name of a picture", param_hint=option)
    check_parent(path)


def note(line: str) -> None:
    """Say something that is no result: on stderr."""
    typer.echo(line, err=True)


def quiet() -> None:
    """Keep transformers' own chatter out of the output; errors still come through."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of large pictures, and of palettes
    # What one library of Hugging Face says to another about its names.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|peft|accelerate)\.")
