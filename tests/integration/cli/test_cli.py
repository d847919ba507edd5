"""The command `attanchor`: a mistake ends in one line that says what to do, and everything can be done from it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from importlib import metadata

import pytest
import torch
import typer
from training_toy import write_world
from transformers import Gemma3Config, LlamaConfig, LlavaConfig, Qwen2_5_VLConfig

import attanchor_vlm
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import cli, load_settings
from attanchor_vlm.cli.options import Options, takes
from attanchor_vlm.errors import SetupError, missing
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.families.tiles import LlavaAdapter
from attanchor_vlm.model.rules import RULES
from attanchor_vlm.settings import setting
from attanchor_vlm.training.config import PRESETS, TrainConfig


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory, "random", train=(8, 0))


def command(world, *more, **changed):
    options = {"--model": world / "model", "--data": world / "train.json", "--images": world / "images", **changed}
    return [str(word) for option in options.items() for word in option] + [str(word) for word in more]


def fails(capsys, arguments):
    """Exit code and the one line on stderr."""
    code = cli.main([str(argument) for argument in arguments])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return code, lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Missing command (see attanchor --help)"),
        (["trian"], "No such command 'trian'"),
        (["train"], "Missing option '--model' (see attanchor train --help)"),
        (["train", "--tau", "high"], "'--tau'"),
        (["train", "--nope"], "--nope"),
        (["generate", "--model", "m", "--image", "i"], "give one of the two: a question as --prompt"),
        (["demo", "--output", "o", "--steps", "1"], "'--steps'"),
    ],
)
def test_a_wrong_command_line_is_exit_code_2(capsys, arguments, message):
    code, line = fails(capsys, arguments)
    assert code == 2
    assert message in line


@pytest.mark.parametrize(
    ("changed", "more", "message"),
    [
        ({"--data": "gone.json"}, (), "gone.json cannot be read: No such file or directory"),
        ({"--images": "gone"}, (), "gone is not a folder"),
        ({"--model": "./gone"}, (), "model ./gone is not a folder; give the folder of a saved model, or a Hub id"),
        (
            {},
            ("--preset", "tiny"),
            "preset is 'tiny'; it should be one of tinyllava-1b, llava-7b, qwen2.5-vl-3b, small-llava",
        ),
        ({}, ("--lr", "-1"), "lr is -1.0; it should be greater than 0"),
        ({}, ("--resume",), "holds no checkpoint to resume from"),
        ({}, ("--optimizer", "adamx"), "optimizer is 'adamx'; it should be one of"),
        ({}, ("--tau", "nan"), "tau is NaN"),
    ],
)
def test_what_the_command_names_and_cannot_be_used_is_exit_code_1(world, tmp_path, capsys, changed, more, message):
    arguments = ["train", *command(world, "--output", tmp_path / "run", "--preset", "small-llava", *more, **changed)]
    code = cli.main(arguments)
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 1
    assert last.startswith("error: ")
    assert message in last


def test_a_hub_that_cannot_be_reached_is_said_at_once(hub_out_of_reach, monkeypatch):
    with pytest.raises(SetupError, match=r"nobody/nothing is no folder here, and .* cannot be reached \(no route"):
        loading.load_pretrained("nobody/nothing")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SetupError, match="not in the Hub's cache, and HF_HUB_OFFLINE is set"):
        loading.load_pretrained("nobody/nothing")
    with pytest.raises(SetupError, match="model my model is no folder here, and cannot be a Hub id: Repo id"):
        loading.load_pretrained("my model")


@pytest.mark.parametrize("name", ["train", "probe", "generate"])
def test_a_model_that_is_not_there_is_said_before_images_are_checked(world, tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr("attanchor_vlm.data.rows.unreadable", None)
    gone, output = tmp_path / "gone", tmp_path / "out"
    asked = {"--model": gone, "--input": world / "train.json", "--images": world / "images", "--output": output}
    words = {
        "train": command(world, "--output", output, **{"--model": gone}),
        "probe": command(world, **{"--model": gone}),
        "generate": [word for option in asked.items() for word in option],
    }
    code, line = fails(capsys, [name, *words[name]])
    assert code == 1
    assert line.startswith(f"error: model {gone} is not a folder; give the folder of a saved model, or a Hub id")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_no_model_is_refused(tmp_path):
    with pytest.raises(SetupError, match=r"cannot be loaded: .*\(the folder should hold config.json"):
        loading.load_pretrained(str(tmp_path))


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("model.safetensors", "", "Error while deserializing header"),
        ("config.json", "[]", "argument after"),
        ("config.json", '{"model_type": "llava", "text_config": 3}', "'text_config': TypeError: Field 'text_config'"),
        ("processor_config.json", "[]", "'list' object has no attribute"),
    ],
)
def test_a_model_with_a_damaged_file_is_one_line_that_names_it(tmp_path, file, text, reason):
    model = tmp_path / "model"
    shutil.copytree(small_llava.SHIPPED, model)
    (model / file).write_text(text)
    with pytest.raises(SetupError) as caught:
        loading.load_pretrained(str(model))
    message = str(caught.value)
    assert message.startswith(f"model {model} cannot be loaded: ")
    assert reason in message
    assert message.endswith(" as save_pretrained writes them)")
    assert len(message.splitlines()) == 1


def test_a_bug_keeps_its_traceback(world, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "choose_dtype", lambda *args: {}["a bug"])
    with pytest.raises(KeyError):
        cli.main(["train", *command(world, "--output", tmp_path / "run")])


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of …"),
            "the GPU's memory is too small: CUDA out of memory. Tried to allocate 20.00 MiB; take a smaller batch",
        ),
        (
            ModuleNotFoundError("No module named 'peft'", name="peft"),
            "No module named 'peft'; attanchor_vlm needs `pip install \"attanchor-kernels[vlm]\"`",
        ),
    ],
)
def test_what_a_machine_lacks_is_one_line(world, capsys, monkeypatch, error, said):
    def load(*args):
        raise error

    monkeypatch.setattr(loading, "load_pretrained", load)
    code, line = fails(capsys, ["generate", "--model", world / "model", "--tau", "0.5", "--prompt", "Where?"])
    assert code == 1
    assert line.startswith(f"error: {said}")


def test_train_with_overrides_and_calibrate(world, tmp_path, capsys):
    output = tmp_path / "run"
    options = ["--preset", "small-llava", "--tau", "-1", "--max-steps", "2", "--eval-steps", "1", "--batch-size", "4"]
    options += ["--val-fraction", "0.2", "--lora-rank", "2", "--lora-alpha", "4", "--max-anchors", "3"]
    options += ["--patience", "0"]
    assert cli.main(["train", *command(world, "--output", output, *options)]) == 0
    said = capsys.readouterr().out
    assert "tau -1, text_into_image; learning rate 0.002, batch 4 x 1, 2 steps, LoRA rank 2, float32; preset" in said
    assert "2 steps in" in said
    assert "validation loss" in said
    settings = load_settings(output)
    assert (settings.tau, settings.max_anchors) == (-1, 3)
    run = json.loads((output / "run.json").read_text())
    assert run["settings"]["lora_rank"] == 2
    assert run["settings"]["patience"] == 0
    assert run["result"]["steps"] == 2
    card = (output / "README.md").read_text()
    assert f'load("{world / "model"}", "{output}")' in card
    assert "tau -1, text_into_image; 2 steps, validation loss" in card

    assert cli.main(["calibrate", *command(world, "--fraction", "0.25", "--samples", "12")]) == 0
    said = capsys.readouterr().out
    assert said.startswith("--tau ")
    assert re.search(r"inserts 2[456]\.\d% of the text tokens, measured on 12 samples", said)


def test_every_option_of_train_reaches_the_settings(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "attanchor_vlm.cli.training._train", lambda given: seen.append(TrainConfig.from_preset("llava-7b", **given))
    )
    options = ["train", "--model", "m", "--data", "rows", "--output", "o", "--fraction", "0.2", "--hold-fraction"]
    options += ["quantile", "--calibration-samples", "9", "--stream", "--shuffle-buffer", "7", "--max-steps", "3"]
    options += ["--save-steps", "2", "--fsdp", "--gradient-checkpointing"]
    assert cli.main(options) == 0
    assert cli.main([*options[:7], "--images", "i", "--group-by-length"]) == 0
    streamed, grouped = seen
    assert (streamed.fraction, streamed.hold_fraction, streamed.calibration_samples) == (0.2, "quantile", 9)
    assert (streamed.stream, streamed.shuffle_buffer, streamed.max_steps, streamed.save_steps) == (True, 7, 3, 2)
    assert (streamed.fsdp, streamed.gradient_checkpointing, streamed.images) == (True, True, None)
    assert (grouped.group_by_length, grouped.stream, str(grouped.images)) == (True, False, "i")
    assert (streamed.held_out, grouped.held_out) == (0.0, 0.02)


@pytest.mark.parametrize(
    ("config", "preset", "tau", "dtype"),
    [
        (LlavaConfig(text_config=LlamaConfig(hidden_size=4096)), "llava-7b", 0.12, "float16"),
        (LlavaConfig(text_config=LlamaConfig(hidden_size=2048)), "tinyllava-1b", 0.12, "float16"),
        (LlavaConfig(text_config=LlamaConfig(hidden_size=576)), "small-vlm", 0.12, "bfloat16"),
        (Qwen2_5_VLConfig(), "qwen2.5-vl-3b", 0.08, "bfloat16"),
        (Gemma3Config(), "qwen2.5-vl-3b", 0.08, "bfloat16"),
        (None, "small-llava", 0.12, "float32"),
    ],
)
def test_a_preset_is_that_of_the_models_family_unless_one_is_named(world, tmp_path, config, preset, tau, dtype):
    if config is not None:
        config.save_pretrained(tmp_path)
    run = {"model": str(world / "model" if config is None else tmp_path), "data": "d", "output": "o"}
    chosen = TrainConfig.from_preset(**run)
    assert (chosen.preset, chosen.tau, chosen.dtype) == (preset, tau, dtype)
    assert TrainConfig.from_preset("llava-7b", **run, tau=0.3, lr=None) == TrainConfig(
        **run, **PRESETS["llava-7b"] | {"preset": "llava-7b", "tau": 0.3}
    )


def test_the_former_name_of_an_option_is_refused_with_its_new_one(capsys):
    code, line = fails(capsys, ["train", "--keep-fraction", "epoch"])
    assert code == 2
    assert "--keep-fraction" in line
    assert "--hold-fraction" in line


def test_an_option_of_int_or_float_keeps_which_it_was():
    """As of image tokens to keep: 1 is one of them, and 1.0 all."""

    @dataclasses.dataclass
    class Config:
        keep: float | int | None = setting(None, "How many, or which part.")

    seen, app = [], typer.Typer()
    app.command()(takes(Options(Config))(seen.append))
    for given in ("1", "1.0"):
        app(["--keep", given], standalone_mode=False)
    assert seen == [{"keep": 1}, {"keep": 1.0}]
    assert [type(one["keep"]) for one in seen] == [int, float]


def test_a_command_line_without_its_packages_says_which():
    script = "import sys; sys.modules['typer'] = None; from attanchor_vlm.cli import main"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert done.stderr.endswith('; attanchor_vlm needs `pip install "attanchor-kernels[vlm]"`\n')
    assert len(done.stderr.splitlines()) == 1


def test_a_public_name_without_its_packages_says_which(monkeypatch):
    monkeypatch.delitem(vars(attanchor_vlm), "attach", raising=False)
    monkeypatch.delitem(sys.modules, "attanchor_vlm.model.attach")
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'transformers.*; .* `pip install "attanchor-kernels\[vlm\]"`'):
        _ = attanchor_vlm.attach


@pytest.mark.parametrize(("failed", "blamed"), [(None, True), ("torchvision.ops", True), ("peft", False)])
def test_a_torchvision_of_another_pytorch_is_named(tmp_path, monkeypatch, failed, blamed):
    (tmp_path / "torchvision.py").write_text("raise RuntimeError('operator torchvision::nms\\ndoes not exist')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "torchvision", raising=False)
    said = missing(ModuleNotFoundError("Could not import module 'PreTrainedModel'", name=failed))
    assert said.startswith("torchvision cannot be imported (operator torchvision::nms does not exist); ") == blamed
    assert said.endswith(f"PyTorch {metadata.version('torch')}, or uninstall it") == blamed


def test_a_module_of_ours_that_is_missing_is_a_bug():
    assert missing(ModuleNotFoundError("No module named 'attanchor_vlm.gone'", name="attanchor_vlm.gone")) is None


def test_help_answers_without_loading_torch():
    script = "import sys; from attanchor_vlm import cli; print(cli.main(['train', '--help']), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0 False", done.stderr
    for option in ["model", "data", "images", "preset", "tau", "direction", "resume", "skip-bad", "seed"]:
        assert f"--{option}" in done.stdout
    said = " ".join(done.stdout.split())
    for default in ("0.12; qwen2.5-vl-3b 0.08", "0.0001; llava-7b 0.0002; small-llava 0.002", "32; llava-7b 8", "each"):
        assert f"[default: {default}" in said


def test_check_says_rule_by_rule_what_holds(world, capsys, monkeypatch):
    command = ["check", "--model", str(world / "model")]
    assert cli.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [["ok", rule] for rule in RULES]
    # An adapter that knows the image's features in another order.
    monkeypatch.setattr(LlavaAdapter, "feature_rows", lambda self, encoded: encoded.pooler_output[0].flip(0))
    assert cli.main([*command, "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    assert not said["ok"]
    assert "others than those in the prompt" in said["rules"]["rows"]["found"]
    assert said["rules"]["positions"] == {"found": None, "note": None}
