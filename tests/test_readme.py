"""The README's Python blocks run as printed, the operators' tables name what exists, and every link leads somewhere."""

import inspect
import re
from pathlib import Path

import pytest

import attanchor_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


OPERATORS = (ROOT / "docs" / "operators.md").read_text()


def blocks(page: str) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page, re.DOTALL)


def test_the_python_blocks_run_in_order(tmp_path, monkeypatch):
    """As a newcomer runs them: in a folder where `attanchor sample` has written its sample."""
    from attanchor_lab.sample import write_sample

    write_sample(tmp_path / "sample")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in blocks(README):
        exec(compile(block, "README.md", "exec"), names)
    assert names["plan"] is not None
    assert names["tokens"].shape[1] > names["batch"]["input_ids"].shape[1]


def test_the_example_of_the_operators_runs():
    (block,) = blocks(OPERATORS)
    exec(compile(block, "docs/operators.md", "exec"), {})


def test_the_table_of_fields_is_complete():
    rows = re.findall(r"^\| `(\w+)` \| \(B,", OPERATORS, re.MULTILINE)
    assert rows == list(attanchor_kernels.AnchoredSequence._fields)


@pytest.mark.parametrize("option", list(inspect.signature(attanchor_kernels.build_sequence).parameters)[3:])
def test_the_table_of_options_is_complete(option):
    assert re.search(rf"^\|.*`{option}`.*\|.*\|.*\|$", OPERATORS, re.MULTILINE)


def test_the_table_of_environment_variables_is_complete():
    """Every ATTANCHOR_ variable that the code reads is on the page, and the other way round."""
    sources = [
        ROOT / "setup.py",
        *ROOT.glob("attanchor_kernels/**/*.py"),
        *ROOT.glob("integration/**/*.py"),
    ]
    read = {name for path in sources for name in re.findall(r"\bATTANCHOR_[A-Z_]+\b", path.read_text())}
    assert read == set(re.findall(r"^\| `(ATTANCHOR_[A-Z_]+)` \|", OPERATORS, re.MULTILINE))


@pytest.mark.parametrize("target", re.findall(r"`make ([\w-]+)", README))
def test_the_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere(page):
    links = set(re.findall(r"\]\((?!http)([^)#\s]+)", (ROOT / page).read_text()))
    assert [link for link in sorted(links) if not (ROOT / page).parent.joinpath(link).exists()] == []


def test_the_index_names_every_page():
    named = set(re.findall(r"\((\S+?)\)", (ROOT / "docs" / "README.md").read_text()))
    assert {path.name for path in (ROOT / "docs").glob("*.md")} <= {*named, "README.md"}
