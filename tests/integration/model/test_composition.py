"""What an attached model is combined with: loops that bypass it, wrappers, peft, gradient checkpointing, Trainer."""

from __future__ import annotations

import functools
import inspect
import json

import pytest
import torch
from tiny import difference, plain, prompts, tiny_llava, with_labels
from training_toy import arguments
from transformers import LlavaForConditionalGeneration, Trainer

from attanchor_vlm import (
    AttAnchorConfig,
    attach,
    detach,
    expect_anchors,
    is_attached,
    load_adapter,
    prepare_inputs,
    save_settings,
)

TAU = 0.1  # about half of the candidates of a tiny model
LORA = r".*(language_model)\..*\.(q|v)_proj|.*multi_modal_projector\.linear_[12]"
ROUTES = ["embeds", "ids"]


# --- The guard. -------------------------------------------------------------------------------------------------------


def test_calls_past_the_attached_forward_fail():
    model, batch = tiny_llava(), prompts([1])
    attach(model, AttAnchorConfig(tau=TAU))
    with pytest.raises(RuntimeError, match="past the attached forward"):
        LlavaForConditionalGeneration.forward(model, **plain(batch))  # as Liger does
    encoded = {"image": model.get_image_features(batch["pixel_values"])}
    for past in ({"mm_encoder_outputs": encoded}, {}):  # encoded already, or by position
        images = () if past else (batch["pixel_values"],)
        with pytest.raises(RuntimeError, match="past the attached forward"):
            model.base_model(batch["input_ids"], *images, **past)
    attach(model, AttAnchorConfig(tau=1))
    model.base_model(**plain(batch))
    detach(model)
    model.base_model(**plain(batch))


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_prepared_inputs_are_not_rewritten_again(route, lora):
    base, batch = attach(tiny_llava(), AttAnchorConfig(tau=TAU, route=route)), with_labels(prompts([1, 2]))
    model = with_lora(base) if lora else base
    expected = model(**batch)
    prepared = prepare_inputs(model, **batch)
    again = model(**prepared)
    assert torch.equal(expected.logits, again.logits)
    assert torch.equal(expected.loss, again.loss)
    assert model.attanchor_plan.is_anchor.any()
    attach(model, AttAnchorConfig(tau=1))
    assert prepare_inputs(model, **batch).keys() == plain(batch).keys()
    with pytest.raises(ValueError, match="is not attached"):
        prepare_inputs(tiny_llava(), **batch)


def test_expected_anchors_that_never_came():
    model, batch = tiny_llava(), prompts([1])
    attach(model, AttAnchorConfig(tau=TAU))
    with expect_anchors(model):
        model(**batch)
    with pytest.raises(RuntimeError, match="no call was rewritten"), expect_anchors(model):
        model(input_ids=batch["input_ids"].clamp(min=4))
    attach(model, AttAnchorConfig(tau=1))
    with expect_anchors(model):
        model(**batch)
    attach(model, AttAnchorConfig(tau=1, keep=0.5))
    with expect_anchors(model):
        model(**batch)
    with pytest.raises(RuntimeError, match="no call was rewritten"), expect_anchors(model):
        model(input_ids=batch["input_ids"].clamp(min=4))
    with pytest.raises(RuntimeError, match="called with images past the attached forward"):
        model.model(**plain(batch))


# --- Wrappers of forward on the instance. -----------------------------------------------------------------------------


def test_a_model_on_several_devices_runs_through_us_also_inside_accelerates_hooks():
    """`from_pretrained(device_map=…)` puts them around the forward that the model has then."""
    from accelerate import dispatch_model
    from accelerate.hooks import remove_hook_from_module

    batch = with_labels(prompts([1, 2]))
    expected = attach(tiny_llava(), AttAnchorConfig(tau=TAU))(**batch)
    model = dispatch_model(tiny_llava(), {"": "cpu"}, force_hooks=True)
    before = model(**plain(batch)).logits
    attach(model, AttAnchorConfig(tau=TAU))
    assert "forward" in vars(model)
    assert "anchor_mask" in inspect.signature(model.forward).parameters  # or Trainer drops the column
    assert torch.equal(model(**batch).logits, expected.logits)
    assert model.attanchor_plan.is_anchor.any()
    assert torch.equal(detach(model)(**plain(batch)).logits, before)
    assert "anchor_mask" not in inspect.signature(model.forward).parameters
    remove_hook_from_module(attach(model, AttAnchorConfig(tau=TAU)))
    assert torch.equal(model(**batch).logits, expected.logits)


def test_a_wrapper_that_keeps_the_attached_forward_is_harmless_once_detached():
    """As accelerate's for mixed precision, which Trainer leaves on the model."""
    model, batch = tiny_llava(), plain(prompts([1]))
    before = model(**batch).logits
    attach(model, AttAnchorConfig(tau=-1))
    model.forward = functools.partial(type(model).forward, model)
    assert model(**batch).logits.shape != before.shape
    assert torch.equal(detach(model)(**batch).logits, before)


# --- peft and Trainer. ------------------------------------------------------------------------------------------------


def with_lora(model):
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=4, target_modules=LORA, init_lora_weights=False))


@pytest.mark.parametrize("settings", [{"tau": TAU}, {"tau": TAU, "keep": 1 / 3}, {"tau": 1, "keep": 4}], ids=str)
@pytest.mark.parametrize("order", ["attach first", "lora first"])
def test_lora_trains_the_projector_through_the_anchors(order, settings):
    model, batch, config = tiny_llava(), with_labels(prompts([1, 2])), AttAnchorConfig(**settings)
    model = with_lora(attach(model, config)) if order == "attach first" else attach(with_lora(model), config)
    assert is_attached(model)
    model.train()
    model(**batch).loss.backward()
    assert model.attanchor_plan.is_anchor.any() == (settings["tau"] < 1)
    assert (model.attanchor_plan.source.shape[1] < batch["input_ids"].shape[1]) == ("keep" in settings)
    trained = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(gradient is not None and gradient.abs().max() > 0 for gradient in trained.values())
    assert not any("vision_tower" in name for name in trained)


@pytest.mark.parametrize("settings", [{}, {"keep": 0.5, "keep_by": "salience"}], ids=str)
def test_an_adapter_is_saved_reloaded_and_merged(tmp_path, settings):
    batch = prompts([1, 2])
    torch.manual_seed(1)
    model = attach(with_lora(tiny_llava()), AttAnchorConfig(tau=TAU, **settings)).eval()
    expected = model(**batch).logits
    model.save_pretrained(tmp_path)
    save_settings(model, tmp_path)

    loaded = load_adapter(tiny_llava(), tmp_path).eval()
    assert loaded.attanchor_config == AttAnchorConfig(tau=TAU, **settings)
    assert torch.equal(loaded(**batch).logits, expected)
    with pytest.warns(UserWarning, match="trained with AttAnchor .tau=0.1, text_into_image., but the model"):
        bare = load_adapter(tiny_llava(), tmp_path, attach_model=False)
    assert not is_attached(bare)
    with pytest.warns(UserWarning, match="attached with AttAnchorConfig.tau=0.5"):
        load_adapter(attach(tiny_llava(), AttAnchorConfig(tau=0.5)), tmp_path, attach_model=False)

    merged = loaded.merge_and_unload()
    assert is_attached(merged)
    assert difference(merged(**batch).logits, expected) < 1e-4
    merged.save_pretrained(tmp_path / "merged")
    written = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert (written["architectures"], written["attanchor"]["tau"]) == (["LlavaForConditionalGeneration"], TAU)


@pytest.mark.parametrize("keep", [None, 1 / 3])
@pytest.mark.parametrize("when", ["before attach", "after attach"])
def test_gradient_checkpointing_leaves_the_frozen_tower_frozen(when, keep):
    batch, config = with_labels(prompts([1, 2])), AttAnchorConfig(tau=TAU, keep=keep)
    plain_model = attach(with_lora(tiny_llava()), config).train()
    plain_model(**batch).loss.backward()
    expected = {name: p.grad for name, p in plain_model.named_parameters() if p.grad is not None}

    model = with_lora(tiny_llava())
    model.load_state_dict(plain_model.state_dict())
    if when == "before attach":
        model.gradient_checkpointing_enable()
    attach(model, config)
    if when == "after attach":
        model.gradient_checkpointing_enable()
    model.train()
    seen = []
    tower = model.get_base_model().model.vision_tower
    tower.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state.requires_grad))
    model(**batch).loss.backward()
    assert seen[0] is False
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert difference(parameter.grad, expected[name]) < 1e-5


def test_trainer_keeps_the_columns_and_takes_a_step(tmp_path):
    batch = with_labels(prompts([1, 1, 1, 1]))
    rows = [{name: value[row] for name, value in batch.items()} for row in range(4)]
    model = with_lora(attach(tiny_llava(), AttAnchorConfig(tau=TAU)))
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    steps = {"max_steps": 1, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    usual = {"label_names": None, "remove_unused_columns": True, "save_strategy": "no"}
    chosen = arguments(tmp_path, **steps, **usual, gradient_checkpointing=True)
    trainer = Trainer(model, chosen, train_dataset=rows, eval_dataset=rows)
    assert trainer.label_names == ["labels"]
    trainer._set_signature_columns_if_needed()
    assert {"anchor_mask", "pixel_values", "labels", "attention_mask"} <= set(trainer._signature_columns)
    loss = trainer.evaluate()["eval_loss"]
    model.eval()
    assert loss == pytest.approx(float(model(**batch).loss), rel=1e-3)
    calls = model.attanchor_calls
    trainer.train()
    assert model.attanchor_calls == calls + 2  # two micro-batches
    assert any(not torch.equal(p, before[name]) for name, p in model.named_parameters() if name in before)
