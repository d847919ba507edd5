"""A plan from a plan.json, changed by hand or not: every value is looked at before anything is run."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from attanchor_lab.synthetic.plan import Plan
from attanchor_lab.synthetic.plans import device_for, rehearsal

_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    bool: ((bool,), "true or false"),
    str: ((str,), "a string"),
}


def from_file(
    path: Path, rehearse: bool = False, workers: int | None = None, minutes: float | None = None
) -> tuple[Plan, str]:
    """A plan of the user's own, and the device that it asks for: its key "device", "cpu" by default.

    Args:
        rehearse: At toy size, on the CPU.
        workers, minutes: Others than the file's own.

    Raises:
        ValueError: the file is missing or no plan, or it asks for a GPU that is not here.
    """
    if not path.is_file():
        raise ValueError(f"plan {path} is no file; begin with the plan.json that `attanchor lab` writes")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"plan {path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"plan {path} is {type(values).__name__}; it should be a JSON object")
    device = values.get("device", "cpu")
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device of the plan is {device!r}; it should be 'cpu' or 'cuda'")
    made = from_dict(values)
    if rehearse:
        made = rehearsal(made)
    if workers is not None:
        made = dataclasses.replace(made, workers=workers)
    if minutes is not None:
        made = dataclasses.replace(made, minutes=minutes)
    return made, device_for(device == "cuda", rehearse, "device of the plan is 'cuda'")


def from_dict(values: Mapping[str, Any]) -> Plan:
    """The plan of a plan.json, which also says when and where it was written.

    Raises:
        ValueError: a key is unknown or missing, or a value is wrong.
    """
    names = {field.name for field in dataclasses.fields(Plan)}
    return _made(Plan, {name: value for name, value in values.items() if name in names}, "the plan")


def _made(kind: Any, value: Any, name: str) -> Any:
    """`value` of a JSON file as a `kind`, which is a type as a dataclass's field may have it."""
    if dataclasses.is_dataclass(kind):
        return _part(kind, value, name)
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{name} is {value!r}; it should be a list")
        return tuple(_made(get_args(kind)[0], one, name) for one in value)
    if get_origin(kind) in (Union, types.UnionType):
        (kind,) = (one for one in get_args(kind) if one is not type(None))
        return None if value is None else _made(kind, value, name)
    known, words = _KINDS[kind]
    if not isinstance(value, known) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{name} is {value!r}; it should be {words}")
    return value


def _part(kind: Any, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} is {value!r}; it should be an object")
    hints = get_type_hints(kind)
    if unknown := sorted(set(value) - set(hints)):
        raise ValueError(f"{name} holds {unknown}; known are {sorted(hints)}")
    fields = dataclasses.fields(kind)
    needed = [
        field.name
        for field in fields
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := sorted(set(needed) - set(value)):
        raise ValueError(f"{name} lacks {missing}")
    return kind(**{key: _made(hints[key], one, f"{key} of the plan") for key, one in value.items()})
