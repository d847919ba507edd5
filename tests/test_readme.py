"""The README's Python blocks run as printed, in order, and its tables name what exists."""

import inspect
import re
from pathlib import Path

import pytest
from PIL import Image

import attanchor_kernels

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_the_python_blocks_run_in_order():
    """`model`, `processor` and `image`, which a reader brings, are the small model of the demo and a grey picture."""
    from attanchor_lab.small_llava.model import SHIPPED
    from attanchor_vlm.model.load import load_pretrained

    model, processor = load_pretrained(str(SHIPPED))
    names = {"model": model, "processor": processor, "image": Image.new("RGB", (96, 96), (120, 120, 120))}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert names["plan"] is not None
    assert isinstance(names["answer"], str)


def test_the_table_of_fields_is_complete():
    rows = re.findall(r"^\| `(\w+)` \| \(B,", README, re.MULTILINE)
    assert rows == list(attanchor_kernels.AnchoredSequence._fields)


@pytest.mark.parametrize("option", list(inspect.signature(attanchor_kernels.build_sequence).parameters)[3:])
def test_the_table_of_options_is_complete(option):
    assert re.search(rf"^\|.*`{option}`.*\|.*\|.*\|$", README, re.MULTILINE)


def test_the_table_of_environment_variables_is_complete():
    """Every ATTANCHOR_ variable that the code reads is in the README, and the other way round."""
    sources = [
        ROOT / "setup.py",
        *ROOT.glob("attanchor_kernels/**/*.py"),
        *ROOT.glob("integration/**/*.py"),
    ]
    read = {name for path in sources for name in re.findall(r"\bATTANCHOR_[A-Z_]+\b", path.read_text())}
    assert read == set(re.findall(r"^\| `(ATTANCHOR_[A-Z_]+)` \|", README, re.MULTILINE))


@pytest.mark.parametrize("target", re.findall(r"`make (\w+)", README))
def test_the_make_targets_exist(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\((?!http)([^)#]+)", README))))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_tests_that_the_table_of_families_names_exist():
    named = set(re.findall(r"`(test_\w+)`", README))
    assert len(named) >= 8
    files = ROOT.glob("tests/integration/model/families/test_*.py")
    assert named <= {name for path in files for name in re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE)}


def test_the_table_of_families_is_that_of_the_docs():
    def families(text: str) -> list[str]:
        return re.findall(r"^\| `(\w+)` \| (?:embeds|ids)", text, re.MULTILINE)

    assert families(README) == families((ROOT / "docs/families.md").read_text())
