"""Every command that README.md or a page of docs/ prints as ```bash runs as printed, in the order of the page."""

from __future__ import annotations

import os
import pkgutil
import re
import shlex
import shutil
from pathlib import Path

import pytest

from attanchor_lab import sample as scenes
from attanchor_vlm import cli

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]


def commands(page: Path) -> list[list[str]]:
    """The `attanchor` commands of a page: continued lines joined, comments left out."""
    found = []
    for block in re.findall(r"```bash\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] == "attanchor":
                found.append(words[1:])
    return found


@pytest.fixture(scope="module")
def sample(tmp_path_factory, short_examples):
    folder = tmp_path_factory.mktemp("docs")
    assert cli.main(["sample", "--output", str(folder / "sample")]) == 0
    return folder / "sample"


@pytest.mark.parametrize(
    "page", [page for page in PAGES if commands(page)], ids=lambda page: str(page.relative_to(ROOT))
)
def test_the_commands_of_a_page_run_as_printed(page, sample, tmp_path, monkeypatch, capfd):
    shutil.copytree(sample, tmp_path / "sample")
    monkeypatch.chdir(tmp_path)
    for arguments in commands(page):
        if arguments[:1] == ["sample"]:
            continue  # made once for all pages; its own test is below
        assert cli.main(arguments) == 0, f"attanchor {shlex.join(arguments)}: {capfd.readouterr().err}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_dotted_name_of_a_page_exists(page):
    text = page.read_text(encoding="utf-8")
    names = set(re.findall(r"\battanchor_(?:kernels|vlm|lab)(?:\.\w+)+", text))
    for module, imported in re.findall(r"^from (attanchor_[\w.]+) import ([\w, ]+)", text, re.MULTILINE):
        names |= {f"{module}.{name.split()[0]}" for name in imported.split(",")}
    for name in sorted(names):
        pkgutil.resolve_name(name)


def test_a_sample_is_whole_and_never_overwrites(sample, capsys):
    assert sorted(os.listdir(sample)) == ["images", "model", "test.json", "train.json"]
    assert len(list((sample / "images").iterdir())) == scenes.TRAIN_SCENES + scenes.TEST_SCENES
    assert cli.main(["sample", "--output", str(sample)]) == 1
    assert "take another folder" in capsys.readouterr().err
