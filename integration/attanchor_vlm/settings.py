"""Settings as fields of dataclasses. Each says its default, its help and its bounds once: the command line, the Python
API and the files of a run are made of the fields."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

REQUIRED = dataclasses.MISSING


def differences(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Say which settings of `now` were others `before`; empty for none. One that is missing was None."""
    return "; ".join(
        f"{name} was {before.get(name)!r} and is {value!r}" for name, value in now.items() if before.get(name) != value
    )


def check_one_of(name: str, value: object, allowed: Iterable[object]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; it should be one of {', '.join(map(repr, allowed))}")


def setting(
    default: Any,
    help: str,
    *,
    choices: Sequence[str] = (),
    above: float | None = None,
    at_least: float | None = None,
    below: float | None = None,
    needs: str = "",
    resumable: bool = False,
    all_of: Sequence[str] = (),
    metavar: str | None = None,
) -> Any:
    """A dataclass field that says of itself what a command line and a check of its value need.

    Args:
        default: A value, a type such as `dict` to call for one, or `REQUIRED`.
        help: One sentence, or two.
        choices, above, at_least, below: What `check_values` holds a value other than None to.
        needs: The setting without which this one has no effect.
        resumable: Whether a resumed run may change it.
        all_of: Of names in a list: those that the command line's word "all" stands for.
        metavar: What the command line's help calls the value.
    """
    about = dict(locals())
    del about["default"]
    if isinstance(default, type) and default is not REQUIRED:
        return dataclasses.field(default_factory=default, metadata=about)
    return dataclasses.field(default=default, metadata=about)


def redefined(config: type, name: str, default: Any) -> Any:
    """The field `name` of a parent class, with another default."""
    return setting(default, **next(field.metadata for field in settings_of(config) if field.name == name))


def settings_of(config: Any) -> list[dataclasses.Field[Any]]:
    """The fields of a dataclass, or of one of its objects, that are settings: made by `setting`."""
    return [field for field in dataclasses.fields(config) if "help" in field.metadata]


def check_values(config: Any) -> None:
    """Hold every setting to what its field says."""
    for field in settings_of(config):
        name, value, about = field.name, getattr(config, field.name), field.metadata
        if about["choices"] and (value is not None or field.default is not None):
            check_one_of(name, value, about["choices"])
        if value is None:
            continue
        above, at_least, below = about["above"], about["at_least"], about["below"]
        low = (above is None or value > above) and (at_least is None or value >= at_least)
        if not (low and (below is None or value < below)):
            bounds = [f"greater than {above}"] if above is not None else []
            bounds += [f"at least {at_least}"] if at_least is not None else []
            bounds += ["finite" if below == math.inf else f"less than {below}"] if below is not None else []
            raise ValueError(f"{name} is {value}; it should be {' and '.join(bounds)}")
        needed = about["needs"]
        if needed and value != field.default and not _is_given(getattr(config, needed)):
            said = value if isinstance(value, Path) else repr(value)
            raise ValueError(f"{name} is {said}, but there is no {needed}; leave it out, or say {needed}")


def _is_given(value: object) -> bool:
    return value is not None and value is not False


def check_fraction(fraction: float, direction: str | None, name: str = "fraction") -> None:
    """Refuse a fraction that no threshold can give: text has no more anchors than tokens. `direction` may be None."""
    if not fraction > 0:
        raise ValueError(f"{name} is {fraction}; it should be greater than 0")
    if fraction > 1 and direction == "text_into_image":
        raise ValueError(f"{name} is {fraction}; it should be at most 1, which is every text token (0.1 is a tenth)")
