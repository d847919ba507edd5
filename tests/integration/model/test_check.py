"""The self-check: every family passes it, every seeded fault is found under its rule, and it leaves no trace."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from builders import BY_NAME, FAMILIES
from shared import every_route
from table_families import TABLE

from attanchor_vlm import AttAnchorConfig, attach, prepare_inputs
from attanchor_vlm.errors import FamilyError, SetupError
from attanchor_vlm.model import check, families
from attanchor_vlm.model.check import findings
from attanchor_vlm.model.families import TESTED, FamilyAdapter, adapter_for, register
from attanchor_vlm.model.families.qwen_vl import QwenVLAdapter
from attanchor_vlm.model.families.tiles import Gemma3Adapter, LlavaAdapter
from attanchor_vlm.model.rules import RULES


def found_in(family, adapter=None, images=(1,), side="right", model=None, **settings):
    """What every rule finds, by rule."""
    family = {**BY_NAME, **{one.name: one for one in TABLE}}[family]
    model = attach(model or family.model(), AttAnchorConfig(tau=0.5, **settings))
    batch = family.prompts(list(images), side)[0]
    mask = batch.pop("anchor_mask")
    adapter = adapter.bound_to(model) if adapter else adapter_for(model)
    return {one.rule: one for one in findings(model, adapter, model.attanchor_config, batch, mask)}


# --- No false alarm. ---


@pytest.mark.parametrize("direction", ["text_into_image", "image_into_text"])
@every_route
def test_every_family_keeps_every_rule(family, route, direction):
    for images, side in (([1], "right"), ([2, 0, 1], "left")):  # an image a sample, and not
        found = found_in(family.name, None, images, side, route=route, direction=direction)
        assert set(found) == set(RULES)
        assert not [one for one in found.values() if one.found]


def test_no_family_is_left_out_that_is_not_tested():
    assert {family.name for family in FAMILIES} >= TESTED


def test_losses_of_a_sliding_window_are_a_note():
    found = found_in("gemma3", images=[3])
    assert found["sight"].found is None
    assert "out of a sliding window in layer 0" in found["sight"].note


@pytest.mark.parametrize("name", ["llava", "gemma3"])
def test_masks_of_eager_attention_are_read(name):
    model = BY_NAME[name].model()
    model.set_attn_implementation("eager")
    assert not [one for one in found_in(name, model=model).values() if one.found]


# --- Seeded faults. ---


class ReversedRows(LlavaAdapter):
    def feature_rows(self, encoded):
        return super().feature_rows(encoded).flip(0)


class Reordered(LlavaAdapter):
    def regroup(self, encoded, rows, order, per_sample):
        return super().regroup(encoded, rows, order.flip(0), per_sample)


class WithoutTokenTypes(Gemma3Adapter):
    def bound_to(self, model):
        bound = super().bound_to(model)
        bound.token_types = {}
        return bound


class FlatPositions(QwenVLAdapter):
    def plain_positions(self, model, input_ids, attention_mask, arguments):
        return torch.arange(input_ids.shape[1]).expand(3, *input_ids.shape)


class HalfOfDeepstack(QwenVLAdapter):
    def regroup(self, encoded, rows, order, per_sample):
        regrouped = super().regroup(encoded, rows, order, per_sample)
        regrouped.deepstack_features = regrouped.deepstack_features[:1]
        return regrouped


FAULTS = [
    ("llava", ReversedRows(), {"route": "embeds"}, {"rows", "arguments", "parity"}, "others than those in the prompt"),
    ("llava", ReversedRows(), {"route": "ids"}, {"rows", "arguments", "parity"}, "others than those in the prompt"),
    ("llava", Reordered(), {"route": "ids"}, {"arguments", "parity"}, "inputs_embeds is another by"),
    (
        "gemma3",
        Gemma3Adapter(token_types={"token_type_ids": 0}),
        {},
        {"sight"},
        "own tokens lose sight of later ones in layer 0",
    ),
    ("gemma3", WithoutTokenTypes(), {}, {"sight"}, "own tokens lose sight of later ones in layer 0"),
    (
        "paligemma",
        FamilyAdapter(token_types={"token_type_ids": 1}),
        {},
        {"hosts"},
        "anchors see other tokens than their hosts in layer 0",
    ),
    ("qwen2_5_vl", FlatPositions(), {}, {"positions", "parity"}, "own tokens have moved"),
    ("qwen2_5_vl", QwenVLAdapter(positions="sequential"), {}, {"positions", "parity"}, "own tokens have moved"),
    (
        "qwen3_vl",
        QwenVLAdapter(routes=("embeds", "ids")),
        {"route": "embeds"},
        {"arguments", "parity"},
        "deepstack_visual_embeds[0] is missing",
    ),
    ("qwen3_vl", HalfOfDeepstack(), {}, {"arguments", "parity"}, "deepstack_visual_embeds[1] is missing"),
]


@pytest.mark.parametrize(("name", "adapter", "settings", "rules", "said"), FAULTS)
def test_a_fault_of_an_adapter_is_found(name, adapter, settings, rules, said, monkeypatch):
    monkeypatch.setattr("attanchor_vlm.model.attach.adapter_for", adapter.bound_to)  # whose routes are allowed
    found = found_in(name, adapter, **settings)
    assert {rule for rule, one in found.items() if one.found} == rules
    assert any(said in one.found for one in found.values() if one.found)


def broken_when_longer(model, module, name, change):
    """Break one argument of `module` in prompts that are longer than the first one, which is the plain one."""
    first = []

    def hook(_, args, kwargs):
        first[:] = first or [kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]]
        length = (kwargs["inputs_embeds"] if "inputs_embeds" in kwargs else args[0]).shape[1]
        return (args, {**kwargs, name: change(kwargs[name], length)}) if length > first[0].shape[1] else None

    module.register_forward_pre_hook(hook, with_kwargs=True)
    return model


def hidden(row, column, see=False):
    """A mask in which one token does not see another one, or does."""

    def change(_, length):
        seen = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
        seen[..., row, column] = see
        return seen

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (hidden(-1, -3), "1 own tokens lose sight of earlier ones in layer 1"),
        (hidden(0, -1, True), "1 own tokens see later ones that they did not see in layer 1"),
    ],
)
def test_a_mask_that_cuts_or_leaks_is_found_in_any_layer(change, said):
    model = BY_NAME["llava"].model()
    broken_when_longer(model, model.model.language_model.layers[1], "attention_mask", change)
    found = found_in("llava", model=model)
    assert found["sight"].found == said


def test_positions_that_are_not_counted_are_found():
    model = BY_NAME["llava"].model()
    broken_when_longer(model, model.get_decoder(), "position_ids", lambda given, length: given * 2)
    found = found_in("llava", model=model)
    assert [rule for rule, one in found.items() if one.found] == ["positions"]
    assert "not counted in their order" in found["positions"].found


def test_a_model_that_takes_given_positions_otherwise_has_no_parity():
    model = BY_NAME["llava"].model()

    def hook(_, args, kwargs, output):
        output.last_hidden_state.mul_(1 if kwargs.get("position_ids") is None else 1.1)

    model.get_decoder().register_forward_hook(hook, with_kwargs=True)
    found = found_in("llava", model=model)
    assert [rule for rule, one in found.items() if one.found] == ["parity"]


# --- When it runs, and what it leaves. ---


@pytest.fixture
def unlisted(monkeypatch):
    """A LLaVA with a wrong adapter that its user registered."""
    monkeypatch.setitem(families._REGISTRY, "llava", ReversedRows())


def batch_of(images=(1, 1), name="llava"):
    return BY_NAME[name].prompts(list(images))[0]


@pytest.mark.usefixtures("unlisted")
@pytest.mark.parametrize("call", ["forward", "generate", "prepare_inputs"])
def test_a_broken_model_is_refused_in_every_call(call):
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5))
    calls = {
        "forward": model,
        "generate": lambda **batch: model.generate(**batch, max_new_tokens=1),
        "prepare_inputs": lambda **batch: prepare_inputs(model, **batch),
    }
    for _ in range(2):
        with pytest.raises(FamilyError, match=r"LlavaForCon.*placeholders, in their order \(rows\): the adapter's are"):
            calls[call](**batch_of())
    model(**batch_of([0]))  # no image: nothing to check
    attach(model, AttAnchorConfig(tau=0.5), check="never")
    calls[call](**batch_of())


def test_it_runs_once_and_only_where_it_is_due(monkeypatch):
    ran = []
    monkeypatch.setattr(check, "findings", lambda *args: ran.append(args) or [check.Finding("parity")])
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5))
    model(**batch_of())
    assert not ran  # a tested family
    attach(model, AttAnchorConfig(tau=0.5), check="always")
    for _ in range(2):
        model(**batch_of())
    assert len(ran) == 1
    attach(model, AttAnchorConfig(tau=1), check="always")
    model(**batch_of())
    assert len(ran) == 1  # handed through
    with pytest.raises(ValueError, match="check is 'often'; it should be one of 'auto', 'always', 'never'"):
        attach(model, AttAnchorConfig(tau=0.5), check="often")


def test_threads_share_one_check(monkeypatch):
    ran, original = [], check.findings
    monkeypatch.setattr(check, "findings", lambda *args: ran.append(args) or original(*args))
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5), check="always")
    barrier = threading.Barrier(4, timeout=60)

    def run(_):
        barrier.wait()
        with torch.no_grad():
            return model(**batch_of()).logits

    with ThreadPoolExecutor(4) as pool:
        first, *others = pool.map(run, range(4))
    assert len(ran) == 1
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("training", [True, False])
def test_it_leaves_no_trace(training):
    family = BY_NAME["gemma3"]
    batch = family.with_labels(batch_of([1, 1], "gemma3"))
    logits, draws = [], []
    for when in ("never", "always"):
        model = attach(family.model().train(training), AttAnchorConfig(tau=0.5), check=when)
        model.model.vision_tower.eval()  # as a user may have frozen it
        torch.manual_seed(1)
        output = model(**batch)
        output.loss.backward()
        logits.append(output.logits)
        draws.append(torch.rand(3))
        assert model.training == training
        assert not model.model.vision_tower.training
        assert model.attanchor_calls == 1
        assert not any(hook for module in model.modules() for hook in module._forward_hooks.values())
        assert "check" not in model.config.attanchor
    assert torch.equal(*logits)
    assert torch.equal(*draws)


@pytest.mark.parametrize(("when", "most"), [("always", None), ("never", 1)])
def test_a_wrong_call_is_told_as_such(when, most):
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5, max_anchors_per_frame=most), check=when)
    batch = batch_of([1, 1])
    with pytest.raises(ValueError, match="have 32 image placeholders and the images 16 features") as caught:
        model(**{**batch, "pixel_values": batch["pixel_values"][:1]})
    assert not isinstance(caught.value, FamilyError)


def test_parameters_that_deepspeed_shards_are_refused(monkeypatch):
    monkeypatch.setattr(check.dist, "is_initialized", lambda: True)
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5), check="always")
    next(model.parameters()).ds_id = 0
    with pytest.raises(SetupError, match=r"sharded by DeepSpeed \(ZeRO-3\).*`attanchor check --model PATH` before"):
        model(**batch_of())
    attach(model, AttAnchorConfig(tau=0.5), check="never")(**batch_of())


def test_a_whole_batch_that_fails_is_not_tried_again(monkeypatch):
    """Of processes that share a model, one would run more than the others, which wait for ever."""
    tries = []
    monkeypatch.setattr(check, "rewrite", lambda *arguments: tries.append(arguments) or [].index(0))
    model, settings = BY_NAME["llava"].model(), AttAnchorConfig(tau=-1)
    with pytest.raises(ValueError, match="not in list"):
        check._first_sample(model, adapter_for(model), settings, batch_of(), None, crop=False)
    assert len(tries) == 1


class Misplaced(FamilyAdapter):
    """Of a family that encodes into a field which this one has not."""

    def feature_rows(self, encoded):
        return encoded.projected_states


def test_an_adapter_that_does_not_fit_is_told_with_what_failed(monkeypatch):
    model, batch = BY_NAME["llava"].model(), batch_of()
    monkeypatch.setitem(families._REGISTRY, "llava", Misplaced(model_types=("llava",)))
    attach(model, AttAnchorConfig(tau=0.5))
    told = r"model_type 'llava'.*the prompt fails: AttributeError: .*projected_states.*Misplaced.*`attanchor check"
    for options in ({}, {"logits_to_keep": 1}):
        with pytest.raises(FamilyError, match=told) as caught:
            model(**batch, **options)
        assert isinstance(caught.value.__cause__, AttributeError)
    with pytest.raises(ValueError, match="Input image size") as caught:  # nor does the untouched model take these
        model(**{**batch, "pixel_values": batch["pixel_values"][..., :8]})
    assert not isinstance(caught.value, FamilyError)


class Large(FamilyAdapter):
    def feature_rows(self, encoded):
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_memory_that_runs_out_is_no_fault_of_the_model(monkeypatch):
    """Callers halve their batch on it."""
    monkeypatch.setitem(families._REGISTRY, "llava", Large(model_types=("llava",)))
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5))
    with pytest.raises(torch.OutOfMemoryError):
        model(**batch_of())


def test_an_adapter_that_a_user_registers_is_checked(monkeypatch):
    monkeypatch.setitem(families._REGISTRY, "llava", None)  # put back afterwards
    register(FamilyAdapter(model_types=("llava",)))
    model = attach(BY_NAME["llava"].model(), AttAnchorConfig(tau=0.5))
    model(**batch_of())
    assert model._attanchor_calls.checked == {"image"}


def test_what_is_read_off_one_model_is_not_taken_for_another():
    first, other = BY_NAME["qwen2_5_vl"].model(), BY_NAME["qwen2_5_vl"].model()
    text = other.config.get_text_config()
    text.rope_parameters = {**text.rope_parameters, "mrope_section": [1, 1, 1, 1]}
    assert [adapter_for(model).positions_per_token for model in (first, other)] == [3, 4]
