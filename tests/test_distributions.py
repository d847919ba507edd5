"""The wheel and the source distribution hold what they should, and install into an empty environment; no network."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ["attanchor_kernels", *sorted(path.parent.name for path in ROOT.glob("integration/*/__init__.py"))]
LIES_IN = {name: ROOT / name if name == "attanchor_kernels" else ROOT / "integration" / name for name in PACKAGES}
DATA = ("py.typed", "values.json")
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"ATTANCHOR_BUILD_CUDA": "0"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(kind: str, source: Path, to: Path) -> Path:
    to.mkdir(exist_ok=True)
    return to / run(sys.executable, "-c", BUILD, f"build_{kind}", to, folder=source).splitlines()[-1]


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the sources: a build leaves folders behind."""
    folder = tmp_path_factory.mktemp("checkout") / "attanchor"
    ignored = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "*.so", "__pycache__")
    for name in ("attanchor_kernels", "csrc", "integration"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(checkout) -> Path:
    return build("wheel", checkout, checkout.parent / "built")


@pytest.fixture(scope="module")
def source(checkout) -> Path:
    """The unpacked source distribution."""
    archive = build("sdist", checkout, checkout.parent / "built")
    with tarfile.open(archive) as opened:
        opened.extractall(checkout.parent, filter="data")
    return checkout.parent / archive.name.removesuffix(".tar.gz")


def test_the_wheel_holds_every_module_and_asset_and_nothing_else(wheel):
    expected = {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for name, folder in LIES_IN.items()
        for path in folder.rglob("*")
        if path.suffix == ".py" or path.name in DATA or ("assets" in path.parts and path.is_file())
    }
    assert {f"{name}/py.typed" for name in PACKAGES} <= expected
    assert any(name.endswith("/model.safetensors") for name in expected)
    assert {name for name in contents(wheel) if ".dist-info/" not in name} == expected


def test_the_metadata_is_what_an_index_shows(wheel):
    held = contents(wheel)
    metadata = message_from_bytes(next(data for name, data in held.items() if name.endswith(".dist-info/METADATA")))
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License"] == "Apache-2.0"
    assert metadata["Author"]
    assert "Typing :: Typed" in metadata.get_all("Classifier")
    assert any(name.endswith("/LICENSE") for name in held)
    # Every extra but the bare tools brings what the command line needs.
    for extra in ("demo", "data", "lab"):
        assert f'attanchor-kernels[vlm]; extra == "{extra}"' in metadata.get_all("Requires-Dist")


def test_the_source_distribution_builds_the_same_wheel(source, wheel, checkout):
    sources = {path.name for path in (source / "csrc").rglob("*") if path.is_file()}
    assert sources == {path.name for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert not (source / "tests").exists()
    again = contents(build("wheel", source, checkout.parent / "again"))
    assert again == contents(wheel)


def test_the_wheel_installs_and_runs_in_an_empty_environment(wheel, tmp_path):
    """Its dependencies are this environment's; nothing of the checkout is on the path."""
    venv.create(tmp_path / "empty", symlinks=True)
    python = tmp_path / "empty" / "bin" / "python"
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel, folder=tmp_path)
    packages = next(tmp_path.glob("empty/lib/python*/site-packages"))
    (packages / "dependencies.pth").write_text("\n".join(path for path in sys.path if path.endswith("-packages")))
    files = ", ".join(f"{name}.__file__" for name in PACKAGES)
    found = run(python, "-c", f"import {', '.join(PACKAGES)}; print({files})", folder=tmp_path).split()
    assert found == [str(packages / name / "__init__.py") for name in PACKAGES]
    said = run(tmp_path / "empty" / "bin" / "attanchor", "--help", folder=tmp_path)
    assert {"demo", "train", "eval"} <= set(re.findall(r"\w+", said))


def test_the_lock_names_all_that_the_metadata_asks_for():
    """A name that was added to pyproject.toml without `make lock` is missing from the environment of the checks."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    asked += (ROOT / "requirements/ci.in").read_text().splitlines()
    names = {found.group().lower().replace("_", "-") for line in asked if (found := re.match(r"[\w-]+", line))}
    locked = set(re.findall(r"^([a-z0-9-]+)==", (ROOT / "requirements/ci.txt").read_text(), re.MULTILINE))
    assert names - locked == {"attanchor-kernels", "torch"}


def test_the_tests_that_upstream_breaks_exist():
    for line in (ROOT / "tests/upstream.txt").read_text().splitlines():
        if not line.startswith("#"):
            file, name = re.match(r"(test_\w+\.py)::(test_\w+)\S*: \S", line).groups()
            assert any(f"def {name}(" in path.read_text() for path in (ROOT / "tests").rglob(file)), line
