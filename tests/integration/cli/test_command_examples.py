"""Every command has an example in its help, which runs as printed; and what holds for the command line as a whole."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from importlib.metadata import version

import pytest
from forked import at_most
from transformers import PreTrainedTokenizerFast

from attanchor_vlm import cli
from attanchor_vlm.cli.examples import EXAMPLES, SLOW, commands_of, folded

COMMANDS = [name for name, _ in commands_of(cli.app)]


def help_of(capsys, *command):
    assert cli.main([*command, "--help"]) == 0
    return capsys.readouterr().out


def printed(text):
    """The example at the end of a help, as a shell reads it."""
    found = re.search(r"\n  Example:\n((?:    .*\n?)+)\Z", text)
    assert found, f"no example at the end of:\n{text}\nEvery command has one, in attanchor_vlm/cli/examples.py"
    return shlex.split(found.group(1).replace("\\\n", ""))


@pytest.fixture(scope="module")
def folder(tmp_path_factory, short_examples):
    return tmp_path_factory.mktemp("examples")


def test_every_command_has_an_example_and_every_example_a_command():
    assert set(EXAMPLES) == set(COMMANDS)
    assert set(EXAMPLES) >= SLOW
    assert next(iter(EXAMPLES)) == "sample"  # which makes what the others need


@pytest.mark.parametrize("name", COMMANDS)
def test_help_ends_with_an_example_that_fits_the_screen(name, capsys):
    text = help_of(capsys, *name.split())
    words = printed(text)
    assert " ".join(words).startswith(f"attanchor {name} ")
    assert words == shlex.split(EXAMPLES[name])
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", [name for name in EXAMPLES if name not in SLOW])
def test_an_example_runs_as_printed(name, folder, monkeypatch, capfd):
    """In the order of the table: the first makes the sample."""
    monkeypatch.chdir(folder)
    if name != "sample" and not (folder / "sample").exists():
        assert cli.main(shlex.split(EXAMPLES["sample"])[1:]) == 0
    assert cli.main(printed(help_of(capfd, *name.split()))[1:]) == 0, capfd.readouterr().err


def test_long_lines_are_folded_in_front_of_options_and_stay_one_command():
    line = "attanchor do --first 'a b' --second " + "x" * 40 + " --third '$c' --fourth d --fifth 'it s'"
    text = folded(line)
    assert shlex.split(text.replace("\\\n", "")) == shlex.split(line)
    assert text.count("\n") == 2
    for part in text.split("\n")[1:]:
        assert part.startswith("      --")


def test_help_lists_every_command_whole_and_the_exit_codes(capsys):
    text = help_of(capsys)
    for name in COMMANDS:
        assert re.search(rf"^  {name.split()[0]} +\S", text, re.MULTILINE)
    assert "..." not in text.partition("Commands:")[2]
    assert re.findall(r"^    (\d+) +\S", text, re.MULTILINE) == ["0", "1", "2", "130"]
    assert "attanchor sample --output sample" in text


def test_the_version_is_that_of_the_installed_package(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"attanchor {version('attanchor-kernels')}\n"


# --- How a command ends. ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sample(folder):
    if not (folder / "sample").exists():
        assert cli.main(["sample", "--output", str(folder / "sample")]) == 0
    return folder / "sample"


def test_files_that_cannot_be_written_are_one_line(sample, tmp_path, capsys):
    blocked = tmp_path / "file"
    blocked.write_text("years of work")
    generate = ["generate", "--model", sample / "model", "--tau", "0.6", "--prompt", "Where is the purple triangle?"]
    image = sample / "images" / "test-00000.png"
    for arguments in (
        [*generate, "--image", image, "--explain", blocked / "anchors.png"],
        ["export-lm", "--model", sample / "model", "--output", blocked / "lm"],
    ):
        assert cli.main([str(word) for word in arguments]) == 1
        last = capsys.readouterr().err.strip().splitlines()[-1]
        assert re.match(rf"error: .*{blocked} is not a folder$", last)
    assert blocked.read_text() == "years of work"


def test_a_full_disk_is_one_line_and_nothing_half_written(sample, tmp_path, capsys):
    with at_most(1_000_000):
        assert cli.main(["export-lm", "--model", str(sample / "model"), "--output", str(tmp_path / "lm")]) == 1
    assert re.search(r"^error: weights cannot be .*: .*File too large", capsys.readouterr().err, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_in_front_of_a_tokenizer_is_one_line(sample, tmp_path, capsys, monkeypatch):
    """Its package raises an `Exception`, no OSError."""
    save = PreTrainedTokenizerFast.save_pretrained

    def fills(*arguments, **options):
        with at_most(5_000):
            return save(*arguments, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", fills)
    words = ["export", "--model", sample / "model", "--tau", 0.6, "--head-dim", 32, "--output", tmp_path / "wide"]
    assert cli.main([str(word) for word in words]) == 1
    assert re.search(r"^error: a tokenizer cannot be .*: File too large", capsys.readouterr().err, re.MULTILINE)
    assert not list(tmp_path.iterdir())


def test_a_reader_that_has_seen_enough_is_no_error():
    end, start = os.pipe()
    os.close(end)
    script = "import sys; from attanchor_vlm import cli; sys.exit(cli.main(['--help']))"
    done = subprocess.run([sys.executable, "-c", script], stdout=start, stderr=subprocess.PIPE, check=False)
    os.close(start)
    assert (done.returncode, done.stderr) == (1, b"")


def test_interruption_is_exit_code_130(sample, monkeypatch, capsys):
    from attanchor_vlm.model import load as loading

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(loading, "load_pretrained", interrupted)
    arguments = ["generate", "--model", sample / "model", "--tau", "0.6", "--prompt", "What?"]
    assert cli.main([str(word) for word in arguments]) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_an_import_that_catches_everything_is_interrupted_all_the_same(tmp_path):
    catching = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\nexcept BaseException:\n    pass\n"
    (tmp_path / "catching.py").write_text(catching)
    script = (
        "import signal, sys\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom attanchor_vlm import cli\n"
    )
    script += "cli.app.command('go')(lambda: __import__('catching'))\nsys.exit(cli.main(['go']))"
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "interrupted\n")
