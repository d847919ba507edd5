"""Two processes over gloo come to the losses of one with the same global batch: copied (DDP) and sharded (FSDP2)."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
from pathlib import Path

import forked
import pytest
import torch
import training_toy
from tiny import IMAGE, prompts, tiny_llava, with_labels
from training_toy import at_the_end_of, before_every_loss, lines, logged

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, cli, distributed, load_adapter, load_settings
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.training import run as train
from attanchor_vlm.training.lora import add_lora, choose_optimizer, layer_classes

PAGE = Path(__file__).parents[3] / "docs" / "several-gpus.md"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Scenes, of which two rows in three have lost their image, and answers of very different lengths."""
    folder = tmp_path_factory.mktemp("world")
    scenes.write_dataset(folder, "train", 8, seed=0)
    scenes.write_dataset(folder, "val", 4, seed=1)
    rows = json.loads((folder / "train.json").read_text())[:12]  # three steps an epoch
    for index, row in enumerate(rows):
        row["conversations"][1]["value"] += " left right" * (index % 5)
    (folder / "images.json").write_text(json.dumps(rows))
    for row in rows[::3] + rows[1::3]:
        del row["image"]
        row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "").strip()
    (folder / "mixed.json").write_text(json.dumps(rows))
    val = json.loads((folder / "val.json").read_text())[:16]  # as many for each process
    (folder / "val.json").write_text(json.dumps(val))
    return folder


def settings(world, output, data, processes, **more):
    defaults = {"lora_dropout": 0.0, "fraction": 0.3, "hold_fraction": "quantile", "batch_size": 4 // processes}
    defaults |= {"max_steps": 5, "eval_steps": 2, "eval_batch_size": 16 // processes, "calibration_samples": 8}
    return training_toy.settings(world, output, data=world / data, lr=None, **{**defaults, **more})


def train_twice(world, output, data, options):
    """In each process: train until one of them is told to end, in the second epoch, then go on."""
    if options.get("fsdp"):
        _shard_on_cpu()
    had_image, said, ends = [], [], []

    def terminate_one():
        if not ends and distributed.rank() == 1:
            signal.raise_signal(signal.SIGTERM)

    before_every_loss(lambda _, inputs: had_image.append("pixel_values" in inputs))
    at_the_end_of(4, terminate_one)
    with distributed.session():
        for resume in (False, True):
            chosen = settings(world, output, data, 2, resume=resume, **options)
            result = train.run(chosen, said.append, progress=False)
            ends.append((result.steps, result.interrupted))
        assert ends == [(4, True), (5, False)]
        notes = distributed.gather({"had_image": had_image, "said": said})
    if distributed.is_main():
        (output / "notes.json").write_text(json.dumps(notes))


def _shard_on_cpu() -> None:
    """Let accelerate shard over gloo: it leaves FSDP out on the CPU, though torch has it."""
    from accelerate import state

    original = state.AcceleratorState.__init__

    def init(self, *args, fsdp_plugin=None, **kwargs):
        original(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = state.DistributedType.FSDP, fsdp_plugin
            state.PartialState._shared_state["distributed_type"] = self.distributed_type

    state.AcceleratorState.__init__ = init
    distributed.can_shard = lambda: True


def assert_same_run(output, whole):
    names = ("loss", "eval_loss", "grad_norm", "inserted_share", "anchor_score", "tau")
    two, one = (
        logged([line for line in log if "train_runtime" not in line], *names) for log in (lines(output), whole.log)
    )
    assert two == pytest.approx(one, rel=2e-4)
    assert {step for step, _ in two} == {1, 2, 3, 4, 5}


def assert_same_adapter(output, whole):
    assert load_settings(output).tau == pytest.approx(whole.tau, rel=1e-6)
    plain, _ = loading.load_pretrained(str(small_llava.SHIPPED))
    loaded = load_adapter(plain, output)
    for (name, a), (_, b) in zip(loaded.named_parameters(), whole.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4, msg=name)


def test_two_processes_train_as_one(world, tmp_path):
    """Unequal numbers of answer tokens, batches without an image on one side only, a running quantile, samples
    grouped by length; interrupted in one process, and resumed."""
    output, options = tmp_path / "two", {"group_by_length": True}
    assert forked.together(train_twice, world, output, "mixed.json", options) == [0, 0]
    chosen = settings(world, tmp_path / "one", "mixed.json", 1, **options)
    whole = train.run(chosen, lambda line: None, progress=False)
    assert_same_run(output, whole)
    assert_same_adapter(output, whole)
    first, second = json.loads((output / "notes.json").read_text())
    assert any(a != b for a, b in zip(first["had_image"], second["had_image"], strict=True))
    assert len([line for line in first["said"] if " inserts " in line]) == 1  # not measured again on resume
    assert second["said"] == []
    state = json.loads((output / "checkpoint-5" / "attanchor_state.json").read_text())
    assert sorted(path.name for path in (output / "checkpoint-5").glob("rng_state_*")) == [
        "rng_state_0.pth",
        "rng_state_1.pth",
    ]
    assert state["step"] == 5


def test_two_processes_that_share_a_model_train_as_one(world, tmp_path):
    """FSDP2, with gradient checkpointing; the model calls its embedding and projector inside its own forward."""
    output = tmp_path / "two"
    options = {"fsdp": True, "gradient_checkpointing": True}
    assert forked.together(train_twice, world, output, "images.json", options) == [0, 0]
    assert (output / "checkpoint-5" / "pytorch_model_fsdp.bin").is_file()  # it was sharded
    whole = train.run(settings(world, tmp_path / "one", "images.json", 1), lambda line: None, progress=False)
    assert_same_run(output, whole)
    assert_same_adapter(output, whole)


def check_sharded(with_tower):
    """In each process, over FSDP2: the second has no image at first (if its tower is sharded, nothing to copy), then
    other lengths than the first."""
    from torch.distributed.fsdp import fully_shard

    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    whole, model = (attach(tiny_llava(), AttAnchorConfig(tau=-1), check=when) for when in ("never", "always"))
    tower = model.model.vision_tower.encoder.layers if with_tower else ()
    for layer in (*model.model.language_model.layers, *tower, model):
        fully_shard(layer)
    for images, checked in (([1], set()), ([1, 2 * rank], {"image", "video"})):
        batch = prompts(images, seed=rank)
        if rank and not checked:
            kept = (batch["input_ids"] == IMAGE) == with_tower
            batch = {name: value[kept][None] if value.shape == kept.shape else value for name, value in batch.items()}
            if not with_tower:
                del batch["pixel_values"], batch["anchor_mask"]
        logits = model(**with_labels(batch)).logits
        assert model._attanchor_calls.checked == checked
        assert torch.equal(logits, whole(**with_labels(batch)).logits)
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("with_tower", [True, False])
def test_a_sharded_model_checks_itself_once_all_processes_can(with_tower):
    assert forked.together(check_sharded, with_tower) == [0, 0]


def run_command(options, folder):
    os.chdir(folder)
    code = cli.main(options)
    distributed.wait_for_all()
    return code


def test_torchrun_as_the_page_says(tmp_path, monkeypatch):
    """The commands of docs/several-gpus.md, read by torchrun's own parser; the first is run by its launcher, and the
    same in one process."""
    from torch.distributed import run as torchrun
    from torch.distributed.launcher.api import elastic_launch

    forked.context()  # what its server loads
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "--output", "sample"]) == 0
    commands = re.findall(r"^(?:srun )?torchrun (?:.*\\\n)*.*$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(commands) == 4
    runs = []
    for command in commands:
        words = shlex.split(command.replace("\\\n", " ").replace("$SLURM_NNODES", "2"))
        arguments = torchrun.parse_args(words[words.index("torchrun") + 1 :])
        assert (arguments.training_script, arguments.training_script_args[0]) == ("attanchor_vlm.cli", "train")
        runs.append(arguments)
    options = runs[0].training_script_args

    def launch(config, entrypoint):
        """As torchrun does, but its processes need not import everything first."""
        config.start_method = "forkserver"

        def start(*words):
            assert list(words) == ["-u", "-m", "attanchor_vlm.cli", *options]
            assert elastic_launch(config, run_command)(options, str(tmp_path)) == {0: 0, 1: 0}

        return start

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(torchrun, "elastic_launch", launch)
    with forked.time_limit():
        torchrun.run(runs[0])

    one = list(options)
    one[one.index("--batch-size") + 1] = str(2 * int(one[one.index("--batch-size") + 1]))
    one[one.index("--output") + 1] = "runs/one"
    assert cli.main(one) == 0
    outputs = [tmp_path / options[options.index("--output") + 1], tmp_path / "runs" / "one"]
    losses = [[line["loss"] for line in lines(output) if "loss" in line] for output in outputs]
    assert len(losses[0]) == 4
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


def test_sharding_is_refused_where_it_cannot_be(world, tmp_path, monkeypatch):
    chosen = settings(world, tmp_path / "run", "mixed.json", 1, fsdp=True)
    with pytest.raises(
        SetupError, match="fsdp shards a model over several processes, and this is one; start them with"
    ):
        train.run(chosen, lambda line: None, progress=False)
    monkeypatch.setattr(train.distributed, "world_size", lambda: 2)
    if not torch.cuda.is_available():
        with pytest.raises(SetupError, match="fsdp needs GPUs, and there is none"):
            train._check_sharding(chosen)
    # A process without an image would wait for the others' projector for ever.
    monkeypatch.setattr(train, "_check_sharding", lambda settings: None)
    monkeypatch.setattr(train.distributed, "world_size", lambda: 1)
    with pytest.raises(DataError, match=r"mixed.json, row 1: it has no image, and with fsdp every batch needs one"):
        train.run(chosen, lambda line: None, progress=False)
    said: list[str] = []
    assert choose_optimizer("paged_adamw_8bit", said.append, sharded=True) == "adamw_torch"
    assert choose_optimizer("adafactor", said.append, sharded=True) == "adafactor"
    assert said == ["paged_adamw_8bit cannot step sharded parameters (fsdp): training with adamw_torch"]


def test_layers_are_cut_where_the_model_has_them():
    """CLIP's own list names the layers of its text tower too, which a LLaVA does not have."""
    model, _ = loading.load_pretrained(str(small_llava.SHIPPED))
    assert layer_classes(model) == ["CLIPEncoderLayer", "LlamaDecoderLayer"]
    assert layer_classes(add_lora(model, rank=2, alpha=4, dropout=0.0)) == ["CLIPEncoderLayer", "LlamaDecoderLayer"]


def fail_on_main(folder):
    def work():
        raise DataError("the data is bad")

    with distributed.session():
        try:
            distributed.on_main(work)
        except DataError as error:
            (folder / f"{distributed.rank()}.txt").write_text(str(error))
        except SystemExit as exit:
            (folder / f"{distributed.rank()}.txt").write_text(f"exit {exit.code}")
        assert distributed.on_main(lambda: 7) == 7
        assert distributed.gather(distributed.rank()) == [0, 1]
        assert distributed.any_of(distributed.rank() == 1)
        assert distributed.add_up(torch.ones(2)).tolist() == [2, 2]


def test_a_mistake_is_said_by_one_process(tmp_path):
    assert forked.together(fail_on_main, tmp_path) == [0, 0]
    assert (tmp_path / "0.txt").read_text() == "the data is bad"
    assert (tmp_path / "1.txt").read_text() == "exit 1"


def test_one_process_needs_no_others():
    assert distributed.on_main(lambda: 3) == 3
    assert distributed.gather(4) == [4]
    assert not distributed.any_of(False)
    assert distributed.any_of(True)
    distributed.wait_for_all()
    with distributed.session():
        assert not torch.distributed.is_initialized()
