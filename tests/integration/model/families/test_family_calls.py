"""Every family, called and kept in other ways: past `forward`, saved, frozen, older transformers, other dtypes."""

from __future__ import annotations

import pytest
import torch
from builders import BY_NAME
from shared import GREEDY, MIXED, NEW, attached, every_family, every_route
from tiny import difference, plain
from tiny_families import END, EOS, IMAGE
from transformers import AutoModelForImageTextToText

from attanchor_vlm import attach, prepare_inputs
from attanchor_vlm.model.families import adapter_for


@every_family
def test_calls_past_the_attached_forward_fail_unless_prepared(family):
    model, batch = attached(family), family.prompts([1, 2])[0]
    with pytest.raises(RuntimeError, match="past the attached forward"):
        model.base_model(**plain(batch))
    with torch.no_grad():
        hidden = model.base_model(**prepare_inputs(model, **batch)).last_hidden_state
        assert torch.equal(model.lm_head(hidden), model(**batch).logits)


@every_family
def test_a_saved_model_is_loaded_with_its_settings(family, tmp_path):
    model, batch = attached(family), family.prompts([1, 2], "left")[0]
    expected, generated = model(**batch).logits, model.generate(**batch, **GREEDY)
    model.save_pretrained(tmp_path)
    loaded = attach(AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32).eval())
    assert type(loaded).__name__ == type(family.model()).__name__
    loaded.generation_config = model.generation_config
    assert torch.equal(loaded(**batch).logits, expected)
    assert torch.equal(loaded.generate(**batch, **GREEDY), generated)


@every_family
def test_gradient_checkpointing_leaves_the_frozen_tower_frozen(family):
    batch, gradients, seen = family.with_labels(family.prompts([1, 2])[0]), [], []
    for checkpointing in (False, True):
        model = attached(family).train()
        tower = adapter_for(model).vision_tower(model).requires_grad_(False)
        assert any("projector" in name or "merger" in name or "connector" in name for name in trained(model))
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        layer = next(module for module in tower.modules() if isinstance(module, torch.nn.LayerNorm | torch.nn.Linear))
        layer.register_forward_hook(lambda module, args, output: seen.append(output.requires_grad))
        model(**batch).loss.backward()
        assert model.attanchor_plan.is_anchor.any()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert seen
    assert not any(seen)
    assert difference(*gradients) < 1e-5


def trained(model) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


@every_family
def test_without_a_mask_markers_and_padding_take_no_part(family):
    model, batch = attached(family, tau=-1), family.prompts([1, 2], "left")[0]
    with torch.no_grad():
        model(**plain(batch))
    ids, scores = batch["input_ids"], model.attanchor_plan.score
    named = {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3"}  # families whose config names their image markers
    expected = ((ids == IMAGE).cumsum(-1) > 0) & (ids > (END if family.name in named else EOS)) & (ids != IMAGE)
    assert torch.equal(torch.isfinite(scores), expected)


@every_family
def test_attention_implementations_agree(family):
    model, batch = attached(family), family.prompts(MIXED, "left")[0]
    with torch.no_grad():
        expected = model(**batch).logits
        assert model.config._attn_implementation == "sdpa"
        model.set_attn_implementation("eager")
        logits = model(**batch).logits
    real = model.attanchor_plan.source >= 0
    assert difference(logits[real], expected[real]) < 1e-4


@every_route
def test_bfloat16(family, route):
    model, batch = attached(family, route).bfloat16(), family.prompts(MIXED, "left")[0]
    batch["pixel_values"] = batch["pixel_values"].bfloat16()
    with torch.no_grad():
        assert model(**batch).logits.dtype == torch.bfloat16
    assert model.attanchor_plan.is_anchor.any()
    assert model.generate(**batch, **GREEDY).shape[1] == batch["input_ids"].shape[1] + NEW


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("llava", {}),
        pytest.param("qwen2_5_vl", {}, marks=pytest.mark.nightly),  # whose window attention takes long to trace
        pytest.param("llava", {"keep": 0.5, "placement": "random"}, marks=pytest.mark.nightly),
    ],
    ids=str,
)
def test_torch_compile(name, settings):
    """The whole call, with the graph breaks that reading lengths needs; without a code generator, which is not ours."""
    family = BY_NAME[name]
    model, batch = attached(family, **settings), family.with_labels(family.prompts([1, 2])[0])
    expected = model(**batch)
    compiled = torch.compile(model, backend="eager")(**batch)
    compiled.loss.backward()
    assert model.attanchor_calls == 2
    assert difference(compiled.logits, expected.logits) < 1e-5
    assert difference(compiled.loss, expected.loss) < 1e-5
    torch.compiler.reset()
