"""No import runs up: each room knows only those below it, and the library knows nothing of the laboratory."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import attanchor_vlm

HOUSE = Path(__file__).parents[2] / "integration"
# From the ground up; rooms of one floor do not know each other. A module that lies in no room belongs to the ground.
FLOORS = [["ground"], ["chat"], ["data", "model"], ["analysis", "inference"], ["training", "evaluation"], ["cli"]]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(path for path in HOUSE.rglob("*.py") if path.parent.name != "examples")


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, also inside of functions; `from a import b` gives a.b as well as a."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def room_of(module: str) -> str:
    """The room of a module of the library, such as "model" of attanchor_vlm.model.attach."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[1] in FLOOR else "ground"


def runs_up(here: str, module: str) -> bool:
    """Whether the module `here` may not import `module`."""
    package = module.partition(".")[0]
    if not here.startswith("attanchor_vlm."):
        return here.startswith("attanchor_lab.") and package == "benchmarks"
    if package != "attanchor_vlm" or module == package or here == "attanchor_vlm.__init__":
        return package in ("attanchor_lab", "benchmarks")
    mine, theirs = room_of(here), room_of(module)
    return theirs != mine and FLOOR[theirs] >= FLOOR[mine]


def test_no_import_runs_up():
    names = {path: ".".join(path.relative_to(HOUSE).with_suffix("").parts) for path in MODULES}
    assert len(names) > 100
    assert not [(here, module) for path, here in names.items() for module in imported(path) if runs_up(here, module)]
    assert runs_up("attanchor_vlm.chat.masks", "attanchor_vlm.model.attach")
    assert runs_up("attanchor_vlm.cli.main", "attanchor_lab.demo")
    assert not runs_up("attanchor_vlm.model.attach", "attanchor_vlm.chat.masks")


@pytest.mark.parametrize("path", sorted((HOUSE / "examples").glob("*.py")), ids=lambda path: path.name)
def test_examples_import_public_names_alone(path):
    for module in imported(path):
        package, _, name = module.partition(".")
        if package.startswith("attanchor_") and name:
            assert package == "attanchor_vlm", f"{path.name} imports {module}"
            assert name in attanchor_vlm.__all__, f"{path.name} imports {module}, which is no public name"


def test_the_kernels_know_nothing_of_what_is_built_on_them():
    for path in (HOUSE.parent / "attanchor_kernels").rglob("*.py"):
        packages = {module.partition(".")[0] for module in imported(path)}
        assert not packages & {"transformers", "peft", "attanchor_vlm", "attanchor_lab", "benchmarks"}, path
