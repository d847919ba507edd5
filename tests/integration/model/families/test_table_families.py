"""Every family that is served by facts alone, on one small random model each: what its decoder is given, and logits.

The oracle is the untouched model: whatever its decoder is given for the plain prompt, gathered by the plan's source.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from builders import Family, features
from table_families import TABLE
from tiny import difference, own_logits, plain
from tiny_families import SOUND
from torch import Tensor

from attanchor_vlm import AnchorPlan, AttAnchorConfig, attach, prepare_inputs
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.families.structure import language_model
from attanchor_vlm.model.geometry import patch_boxes

# Counted or made anew for the longer sequence.
_MADE = ("attention_mask", "position_ids", "past_key_values", "cache_position", "position_embeddings")


@pytest.mark.parametrize("family", TABLE, ids=str)
def test_the_decoder_is_given_the_gathered_plain_prompt(family: Family):
    model, (batch, _) = family.model(), family.prompts([1, 2])
    calls: list[dict[str, Any]] = []
    decoder = language_model(model)
    first = decoder.layers[0] if decoder is model.base_model else decoder  # which encodes the images itself
    first.register_forward_pre_hook(
        lambda _, args, given: calls.append({**dict(enumerate(args)), **given}), with_kwargs=True
    )
    with torch.no_grad():
        before = model(**plain(batch)).logits
        attach(model, AttAnchorConfig(tau=-1), check="never")  # whose calls would be among these
        nothing = model(**{**batch, "anchor_mask": torch.zeros_like(batch["anchor_mask"])}).logits
        assert difference(before[batch["attention_mask"].bool()], own_logits(model, nothing)) < 1e-4
        anchored = model(**batch).logits
    plan, (old, _, new) = model.attanchor_plan, calls
    assert int(plan.is_anchor.sum()) == int(batch["anchor_mask"].sum()) > 8
    real = plan.source >= 0
    for name in {*old, *new} - {*_MADE}:
        _check_gathered(name, old.get(name), new.get(name), plan, batch["input_ids"].shape)
    _check_positions(family, old["position_ids"], new["position_ids"], plan)
    if adapter_for(model).token_types.get(family.token_types) is not None:
        _check_masks(old["attention_mask"], new["attention_mask"], batch["attention_mask"].bool(), plan)
    assert adapter_for(model).routes == family.routes
    for route in family.routes[1:]:
        with torch.no_grad():
            other = attach(model, AttAnchorConfig(tau=-1, route=route))(**batch).logits
        assert difference(anchored[real], other[real]) < 1e-4
    model._attanchor_calls.checked.clear()  # by another route
    with torch.no_grad():
        attach(model, AttAnchorConfig(tau=0.5))(**family.prompts([1, 1])[0])
    assert model._attanchor_calls.checked == {"image"}


@pytest.mark.parametrize("route", ["ids", "embeds"])
def test_sound_in_the_prompt_stays_where_it_is(route):
    """Its placeholders are no words, whatever a mask says; what is encoded already is handed on."""
    family = next(family for family in TABLE if family.name == "qwen2_5_omni_thinker")
    model, (batch, _) = family.model(), family.prompts([1, 2], "left")
    sound = torch.full((2, 4), SOUND)
    ones = torch.ones_like(sound)
    for name, values in (("input_ids", sound), ("attention_mask", ones), ("anchor_mask", ones.bool())):
        batch[name] = torch.cat([batch[name], values], 1)
    words = int(batch["anchor_mask"].sum()) - sound.numel()
    generator = torch.Generator().manual_seed(0)
    batch |= {"input_features": torch.randn(2, 16, 16, generator=generator)}
    batch |= {"feature_attention_mask": torch.tensor([[1] * 16, [1] * 15 + [0]])}
    calls: list[dict[str, Any]] = []
    language_model(model).register_forward_pre_hook(lambda *call: calls.append(call[2]), with_kwargs=True)
    with torch.no_grad():
        model(**plain(batch))
        attach(model, AttAnchorConfig(tau=-1, route=route))(**batch)
    old, plan, new = calls[0], model.attanchor_plan, calls[-1]
    assert int(plan.is_anchor.sum()) == words > 8
    _check_gathered("inputs_embeds", old["inputs_embeds"], new["inputs_embeds"], plan, batch["input_ids"].shape)
    _check_positions(family, old["position_ids"], new["position_ids"], plan)
    encoded = {"image": model.base_model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])}
    del batch["pixel_values"]
    handed_on = prepare_inputs(model, **batch, mm_encoder_outputs={**encoded, "audio": sound})["mm_encoder_outputs"]
    assert handed_on["audio"] is sound


def _check_gathered(name: str, old: Any, new: Any, plan: AnchorPlan, shape: torch.Size) -> None:
    """An argument of the decoder, as deep as it is nested; what has no value per token is the same."""
    assert type(old) is type(new), name
    if isinstance(old, dict):
        old, new = [*old.items()], [*new.items()]
    if isinstance(old, (list, tuple)):
        assert len(old) == len(new), name
        for before, after in zip(old, new, strict=True):
            _check_gathered(name, before, after, plan, shape)
    elif not isinstance(old, Tensor):
        assert old == new or not isinstance(old, (int, float, str)), name
    elif old.shape[:2] == shape:
        expected = torch.stack([own[source] for own, source in zip(old, plan.source.clamp(min=0), strict=True)])
        real = plan.source >= 0
        assert difference(expected[real].float(), new[real].float()) < 1e-5, name
    else:
        assert difference(old.float(), new.float()) < 1e-5, name


def _check_positions(family: Family, old: Tensor, new: Tensor, plan: AnchorPlan) -> None:
    real = plan.source >= 0
    if not family.inherits:
        assert torch.equal(new[real], (real.cumsum(-1) - 1)[real])
        return
    host = plan.host.gather(1, plan.source.clamp(min=0))
    place = torch.where(plan.is_anchor, host, plan.source).clamp(min=0)
    expected = old[-len(new) :].gather(2, place.expand(len(new), -1, -1))
    assert torch.equal(new[:, real], expected[:, real])
    assert (new[0] != new[-1])[real].any()


def _check_masks(before: Any, after: Any, real: Tensor, plan: AnchorPlan) -> None:
    """In blocks of mutual attention, in every kind of layer: of what stands behind them, the prompt's own tokens see
    what they saw, and an anchor what its host sees."""
    pairs = [(before[kind], after[kind]) for kind in before] if isinstance(before, dict) else [(before, after)]
    for old, new in pairs:
        for row, (source, is_anchor) in enumerate(zip(plan.source, plan.is_anchor, strict=True)):
            kept, own = old[row, 0][real[row]][:, real[row]], (source >= 0) & ~is_anchor
            assert torch.equal(kept.triu(1), new[row, 0][own][:, own].triu(1))
            for at in is_anchor.nonzero()[:, 0].tolist():
                host = int(((source == plan.host[row, source[at]]) & own).nonzero())
                assert torch.equal(new[row, 0, at, at + 1 :], new[row, 0, host, at + 1 :])


@pytest.mark.parametrize(
    ("name", "silent"),
    # By image: behind each line of tokens, and around them; behind each view; behind each line of its tiles; of tokens.
    [
        ("hunyuan_vl", [2 + 2, 3 + 2, 4 + 2]),
        ("deepseek_ocr2", [1, 1, 1]),
        ("llava_next_video", [4, 8, 8]),
        ("emu3", [4, 6, 4]),
    ],
)
def test_separators_are_no_image_content(name, silent):
    family = next(family for family in TABLE if family.name == name)
    model, (batch, _) = family.model(), family.prompts([1, 2])
    rows = features(model, batch)
    found = adapter_for(model).silent_features(model, rows)
    assert int(found.sum()) == sum(silent)
    attach(model, AttAnchorConfig(tau=-1), check="never")(**batch)
    plan, is_image = model.attanchor_plan, adapter_for(model).placeholders(model, batch["input_ids"])
    hosts = torch.zeros_like(is_image)
    for row, host in enumerate(plan.host):
        hosts[row, host[host >= 0]] = True
    assert hosts.any()
    assert not (hosts[is_image] & found).any()


@pytest.mark.parametrize(
    ("name", "tokens", "left"),
    # Half of the content: of granite4_vision 12, 12 and 20 tokens; its 2, 4 and 4 newlines stay.
    [("lighton_ocr", [6, 10], [3, 5]), ("granite4_vision", [14, 40], [8, 24])],
)
def test_without_a_known_grid_there_are_no_boxes_and_each_image_is_one_line(name, tokens, left):
    family = next(family for family in TABLE if family.name == name)
    model, (batch, _) = family.model(), family.prompts([1, 2])
    with pytest.raises(ValueError, match=f"not known for {name}: boxes are not available"):
        patch_boxes(model, None, batch, 0, [[(24, 16)], [(16, 24), (16, 16)]])
    attach(model, AttAnchorConfig(tau=1, keep=0.5))
    with torch.no_grad():
        model(**batch)
    before = adapter_for(model).placeholders(model, batch["input_ids"])
    kept = adapter_for(model).placeholders(model, model.attanchor_plan.input_ids)
    assert before.sum(-1).tolist() == tokens
    assert kept.sum(-1).tolist() == left
