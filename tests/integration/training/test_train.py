"""The training loop on a small real LLaVA: it learns, resumes exactly, spares the tower, says what it inserts."""

from __future__ import annotations

import functools
import json
import signal

import pytest
import torch
import training_toy
from tiny import tiny_llava
from training_toy import at_the_end_of, lines, logged
from transformers import LlamaForCausalLM

from attanchor_vlm import AttAnchorConfig, attach, load_adapter, load_settings
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import read_rows, samples
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.attach import anchor_counts, base_of
from attanchor_vlm.training import run as train
from attanchor_vlm.training import trainer as trainer_module
from attanchor_vlm.training.lora import add_lora


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small model with random weights, and a few scenes on disk."""
    return training_toy.write_world(tmp_path_factory, "random", train=(12, 3), val=(3, 1))


OPTIONS = {"tau": -1.0, "eval_batch_size": 16}
settings = functools.partial(training_toy.settings, **OPTIONS)
run = functools.partial(training_toy.run, **OPTIONS)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    """One run that several tests look at: text into image, every token inserted."""
    output = tmp_path_factory.mktemp("trained") / "run"
    result = run(world, output, max_steps=12, eval_steps=4)
    return result


def test_the_loss_goes_down(trained):
    losses = [line["loss"] for line in trained.log if "loss" in line]
    assert len(losses) == trained.steps == 12
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])
    validation = [line["eval_loss"] for line in trained.log if "eval_loss" in line]
    assert len(validation) == 3
    assert validation[-1] < validation[0]
    assert trained.val_loss == min(validation)


def test_every_step_logs_what_was_inserted(trained):
    steps = [line for line in lines(trained.output) if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 13))
    assert all(line["inserted_share"] == 1 for line in steps)  # tau -1 takes every token of the question
    assert all(-1 <= line["anchor_score"] <= 1 for line in steps)
    assert len({line["anchor_score"] for line in steps}) > 6


@pytest.mark.parametrize(("tau", "direction"), [(0.2, "text_into_image"), (0.2, "image_into_text"), (1.0, None)])
def test_the_share_is_that_of_the_plan(world, tmp_path, monkeypatch, tau, direction):
    """What the log says of the first step, counted anew from the operator's plan."""
    seen = []

    def counting(model, inputs):
        if plan := base_of(model).attanchor_plan:
            inserted, candidates = int(plan.is_anchor.sum()), int(inputs["anchor_mask"].sum())
            seen.append((inserted, candidates, float(plan.score[plan.host >= 0].sum())))
        return anchor_counts(model, inputs)

    monkeypatch.setattr(trainer_module, "anchor_counts", counting)
    options = {"tau": tau, "direction": direction, "max_steps": 1, "eval_steps": 1}
    result = run(world, tmp_path / "run", **options, accumulation=2, lora_dropout=0.0)
    line = next(line for line in result.log if "loss" in line)
    if tau == 1:
        assert line["inserted_share"] == 0
        assert "anchor_score" not in line
        return
    inserted, candidates, score = map(sum, zip(*seen, strict=True))
    assert inserted > 0
    assert len(seen) == 2
    assert line["inserted_share"] == pytest.approx(inserted / candidates)
    assert line["anchor_score"] == pytest.approx(score / inserted, rel=1e-5)


def test_only_language_model_and_projector_are_trained(world, trained):
    fresh, _ = loading.load_pretrained(str(world / "model"))
    after = {name.replace(".base_layer", ""): p for name, p in base_of(trained.model).named_parameters()}
    for name, parameter in fresh.named_parameters():
        assert torch.equal(parameter, after[name]), f"{name}, a weight of the model itself, changed"
    adapted = {name for name, p in trained.model.named_parameters() if p.requires_grad}
    assert adapted
    assert all("lora_" in name for name in adapted)
    assert not any("vision_tower" in name for name in adapted)
    assert {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "linear_1", "linear_2"} == {
        name.rpartition(".lora_")[0].rpartition(".")[2] for name in adapted
    }
    moved = [name for name, p in trained.model.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(moved) == len(adapted) // 2


def test_the_adapter_comes_back_with_its_settings(world, trained):
    assert load_settings(trained.output).tau == -1
    fresh, processor = loading.load_pretrained(str(world / "model"))
    loaded = load_adapter(fresh, trained.output).eval()
    rows, _ = read_rows(world / "val.json", world / "images")
    batch = Collator(processor, "each")(list(samples(rows[:4], "each")))
    with torch.no_grad():
        expected, actual = trained.model.eval()(**batch), loaded(**batch)
    assert base_of(loaded).attanchor_plan.is_anchor.any()
    assert torch.equal(actual.logits, expected.logits)
    for checkpoint in train.complete_checkpoints(trained.output):
        assert load_settings(checkpoint) == load_settings(trained.output)


def test_an_interrupted_run_resumes_as_if_nothing_had_been(world, tmp_path, monkeypatch):
    whole = run(world, tmp_path / "whole", tau=0.2)
    usual = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a shell
    with monkeypatch.context() as patch:
        at_the_end_of(4, lambda: signal.raise_signal(signal.SIGINT), patch)
        first = run(world, tmp_path / "parts", tau=0.2)
    assert first.interrupted
    assert first.steps == 4
    assert not (tmp_path / "parts" / "adapter_config.json").exists()
    assert signal.getsignal(signal.SIGINT) is usual

    second = run(world, tmp_path / "parts", tau=0.2, resume=True)
    assert second.steps == 6
    assert not second.interrupted
    names = ("loss", "eval_loss", "inserted_share")
    assert logged(second.log, *names) == pytest.approx(logged(whole.log, *names), rel=1e-6)
    assert logged(lines(tmp_path / "parts"), *names) == logged(second.log, *names)
    for (name, a), (_, b) in zip(whole.model.named_parameters(), second.model.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7, msg=name)

    # Trainer would take a seventh step of six.
    saved = (tmp_path / "parts" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(SetupError, match=r"made 6 steps, and 6 are asked for; raise --max-steps"):
        run(world, tmp_path / "parts", tau=0.2, resume=True)
    assert (tmp_path / "parts" / "adapter_model.safetensors").read_bytes() == saved


def test_gradient_checkpointing_changes_nothing_and_spares_the_tower(world, tmp_path):
    options = {"max_steps": 2, "eval_steps": 2, "lora_dropout": 0.0}
    plain = run(world, tmp_path / "plain", **options)
    watched = []

    def watch(module, inputs, output):
        watched.append(output.requires_grad)

    with pytest.MonkeyPatch.context() as patch:
        original = add_lora

        def add_lora_and_watch(model, *shape):
            model.model.vision_tower.encoder.register_forward_hook(lambda m, i, o: watch(m, i, o.last_hidden_state))
            return original(model, *shape)

        patch.setattr(train, "add_lora", add_lora_and_watch)
        spared = run(world, tmp_path / "spared", gradient_checkpointing=True, **options)
    assert watched
    assert not any(watched)
    for one, other in zip(plain.log, spared.log, strict=True):
        if "loss" in one:
            assert other["loss"] == pytest.approx(one["loss"], rel=1e-5)
            assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)


def test_bad_rows_stop_the_run_or_are_left_out_and_listed(world, tmp_path):
    rows = json.loads((world / "train.json").read_text())
    rows[3]["image"] = "gone.png"
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"bad.json, row 4: image .*gone.png does not exist"):
        run(world, tmp_path / "run", data=path)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    said: list[str] = []
    chosen = settings(world, tmp_path / "run", data=path, skip_bad=True, max_steps=1, eval_steps=1)
    result = train.run(chosen, said.append, progress=False)
    assert result.skipped == 1
    listed = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert [(one["row"], one["file"]) for one in listed] == [(4, str(path))]
    assert "gone.png" in listed[0]["reason"]
    assert any("1 bad rows left out" in line for line in said)
    assert any("row 4" in line for line in said)


def test_an_output_in_use_is_not_overwritten(world, trained):
    with pytest.raises(SetupError, match="holds a trained run; continue it with --resume"):
        run(world, trained.output)
    with pytest.raises(SetupError, match=r"had other settings: tau was -1.0 and is 0.5; lr was 0.005 and is 0.1"):
        run(world, trained.output, resume=True, lr=0.1, tau=0.5)


def test_rows_without_images_cannot_be_trained_with_anchors(world, tmp_path):
    path = tmp_path / "text.json"
    turns = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "left"}]
    path.write_text(json.dumps([{"conversations": turns}] * 4))
    with pytest.raises(DataError, match="no row with an image"):
        run(world, tmp_path / "run", data=path, val_data=None, val_fraction=0)


def test_a_short_run_may_draw_rows_of_text_alone(world, tmp_path):
    rows = json.loads((world / "train.json").read_text())[:12]
    for row in rows[:-1]:
        del row["image"]
        row["conversations"] = [{"from": "human", "value": "Where?"}, {"from": "gpt", "value": "left"}]
    path = tmp_path / "mixed.json"
    path.write_text(json.dumps(rows))
    result = run(world, tmp_path / "run", data=path, val_data=None, val_fraction=0, max_steps=1, eval_steps=1)
    assert result.log[0]["inserted_share"] == 0  # the row with an image was not among the first four
    assert result.val_loss is None
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
    assert load_settings(tmp_path / "run").tau == -1


def test_label_smoothing_is_refused(world, tmp_path):
    from transformers import TrainingArguments

    model, _ = loading.load_pretrained(str(world / "model"))
    with pytest.raises(ValueError, match=r"label_smoothing_factor is 0\.1; it should be 0"):
        trainer_module.AnchorTrainer(
            model=model, args=TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to="none")
        )


def test_an_optimizer_that_is_not_installed_is_said_before_training(world, tmp_path):
    with pytest.raises(SetupError, match=r"^optimizer galore_adamw cannot be used here: .*"):
        run(world, tmp_path / "run", optimizer="galore_adamw")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.json"]


def test_a_run_that_diverges_ends_as_others_do(world, tmp_path):
    said: list[str] = []
    chosen = settings(world, tmp_path / "run", lr=1e30, warmup=0.0, scheduler="constant", max_steps=3, eval_steps=3)
    result = train.run(chosen, said.append, progress=False)
    assert result.val_loss is None
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["val_loss"] is None


def test_lora_refuses_a_model_it_does_not_fit():
    with pytest.raises(TypeError, match="model is Sequential; it should be a transformers model"):
        add_lora(torch.nn.Sequential(torch.nn.Linear(2, 2)), rank=2, alpha=4, dropout=0.0)
    with pytest.raises(SetupError, match="nothing of a projector is found in LlamaForCausalLM"):
        add_lora(LlamaForCausalLM(tiny_llava().config.text_config), rank=2, alpha=4, dropout=0.0)


def test_mixed_precision_follows_the_run_in_float32(world, tmp_path, monkeypatch):
    """Both compute in autocast on a CPU as well, though users get them on a GPU alone."""
    full = run(world, tmp_path / "full")
    expected = [line["loss"] for line in full.log if "loss" in line]
    monkeypatch.setattr("transformers.training_args.is_torch_bf16_gpu_available", lambda: True)
    for dtype in (torch.bfloat16, torch.float16):
        monkeypatch.setattr(loading, "choose_dtype", lambda wanted, say, dtype=dtype: dtype)
        half = run(world, tmp_path / str(dtype))
        losses = [line["loss"] for line in half.log if "loss" in line]
        assert losses == pytest.approx(expected, rel=2e-3)
        assert losses != expected
        assert half.val_loss == pytest.approx(full.val_loss, rel=2e-3)


def test_runs_that_differ_in_anchors_alone_start_alike(world, tmp_path):
    """The same adapters, order and first batch: with nothing reaching tau, the first loss is that of plain training."""
    plain = run(world, tmp_path / "plain", tau=1.0, max_steps=1, eval_steps=1)
    nothing = run(world, tmp_path / "nothing", tau=0.9999, max_steps=1, eval_steps=1)
    assert nothing.log[0]["inserted_share"] == 0
    assert nothing.log[0]["loss"] == pytest.approx(plain.log[0]["loss"], rel=1e-5)


def test_the_attached_model_is_left_as_its_own_class(world):
    model, _ = loading.load_pretrained(str(world / "model"))
    attach(model, AttAnchorConfig(tau=0.5))
    peft = add_lora(model, rank=2, alpha=4, dropout=0.0)
    assert type(base_of(peft)).__name__ == "LlavaForConditionalGeneration"
