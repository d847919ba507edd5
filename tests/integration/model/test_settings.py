"""Settings and what keeps them: config.json, copies, the file beside an adapter; adapters of model families."""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
import torch
from tiny import IMAGE, PATCHES, prompts, tiny_llava
from transformers import LlamaForCausalLM, LlavaForConditionalGeneration

import attanchor_vlm
from attanchor_vlm import AttAnchorConfig, attach, detach, is_attached, load_settings, prepare_inputs, save_settings
from attanchor_vlm.model.adapter_files import load_adapter
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.config import BACKENDS, DIRECTIONS, POSITIONS
from attanchor_vlm.model.families import FamilyAdapter, adapter_for, register

TAU = 0.1  # about half of the candidates of a tiny model


# --- Settings. --------------------------------------------------------------------------------------------------------


def test_attaching_again_replaces_the_settings():
    model, batch = tiny_llava(), prompts([1])
    attach(model, AttAnchorConfig(tau=-1))
    model(**batch)
    kind = type(model)
    attach(model, AttAnchorConfig(tau=1))
    assert type(model) is kind
    assert model.attanchor_config == AttAnchorConfig(tau=1)
    assert model.attanchor_plan is None
    assert sum(hook.__name__ == "refuse_bypass" for hook in model.model._forward_pre_hooks.values()) == 1


def test_inherit_in_a_family_with_one_position_per_token():
    model, batch = tiny_llava(), prompts([1, 2], "left")
    with pytest.raises(ValueError, match="repeated positions are then taken for packed"):
        attach(model, AttAnchorConfig(tau=TAU, positions="inherit"))
    assert not is_attached(model)
    attach(model, AttAnchorConfig(tau=TAU, positions="inherit", force_inherit=True))
    model(**batch)
    plan = model.attanchor_plan
    own = (plan.source >= 0) & ~plan.is_anchor
    for row in range(2):
        count = int(batch["attention_mask"][row].sum())
        assert plan.position_ids[row][own[row]].tolist() == list(range(count))
        for place in plan.is_anchor[row].nonzero().flatten().tolist():
            assert plan.position_ids[row, place] == plan.position_ids[row, place - 1]
    assert plan.is_anchor.any()
    model.config.text_config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="or other attention code"):
        attach(model, AttAnchorConfig(tau=TAU, positions="inherit", force_inherit=True))


def test_an_unknown_family_is_served_by_the_contract_of_transformers():
    model, batch = tiny_llava(), prompts([1, 2])
    expected = attach(model, AttAnchorConfig(tau=TAU, route="ids"))(**batch).logits
    _rename(detach(model), "other_vl")
    assert torch.equal(attach(model, AttAnchorConfig(tau=TAU))(**batch).logits, expected)
    assert model.attanchor_plan.is_anchor.any()
    assert adapter_for(model).routes == ("ids",)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("mllama", {}, "read by cross-attention"),
        ("instructblip", {}, "learned queries"),
        ("encoding_vl", {"is_encoder_decoder": True}, "it is an encoder-decoder"),
        ("nameless_vl", {"image_token_id": None}, "names no image_token_id"),
    ],
)
def test_a_family_that_cannot_have_anchors_is_told_why(name, change, reason):
    model = tiny_llava()
    _rename(model, name)
    for key, value in change.items():
        setattr(model.config, key, value)
    with pytest.raises(ValueError, match=rf"cannot insert anchors in '{name}' \(Llava\w+\): .*{reason}.*register"):
        attach(model, AttAnchorConfig(tau=TAU))


def test_a_forward_without_encoded_images_is_told_so():
    model = LlamaForCausalLM(tiny_llava().config.text_config)
    with pytest.raises(ValueError, match="it has no mm_encoder_outputs in forward"):
        attach(model, AttAnchorConfig(tau=TAU))


def _rename(model, name):
    model.config.__class__ = type("Other", (type(model.config),), {"model_type": name})


def test_a_model_that_names_no_base_model():
    """As models of one's own may: `base_model` is then the model itself."""
    model, batch = tiny_llava(), prompts([1])
    expected = attach(model, AttAnchorConfig(tau=TAU))(**batch).logits
    own = {"base_model_prefix": "", "get_input_embeddings": lambda self: self.model.get_input_embeddings()}
    detach(model).__class__ = type("Flat", (LlavaForConditionalGeneration,), own)
    assert torch.equal(attach(model, AttAnchorConfig(tau=TAU))(**batch).logits, expected)


def test_what_is_no_adapter_is_not_registered():
    class Other(FamilyAdapter):
        model_types = ("other_vl",)

    for given, name in ((Other, "the class Other"), ("other_vl", "str")):
        with pytest.raises(TypeError, match=f"adapter is {name}; it should be an instance of a subclass"):
            register(given)
    for types in ((), "other_vl"):
        with pytest.raises(ValueError, match=r"FamilyAdapter\.model_types is .*; it should be a tuple"):
            register(FamilyAdapter(model_types=types))


def test_an_adapter_states_its_routes_and_token_types(monkeypatch):
    class OnlyEmbeds(FamilyAdapter):
        routes = ("embeds",)

    model = tiny_llava()
    monkeypatch.setattr("attanchor_vlm.model.families._REGISTRY", {"llava": OnlyEmbeds()})
    with pytest.raises(ValueError, match="route is 'ids'; for llava it should be one of 'embeds'"):
        attach(model, AttAnchorConfig(tau=TAU, route="ids"))

    class WithTypes(FamilyAdapter):
        image_arguments = adapter_for(model).image_arguments
        token_types = MappingProxyType({"token_type_ids": 7, "mm_token_type_ids": None})

        def silent_features(self, model, rows):
            return torch.arange(len(rows)) % PATCHES == PATCHES - 1

    monkeypatch.setattr("attanchor_vlm.model.families._REGISTRY", {"llava": WithTypes()})
    attach(model, AttAnchorConfig(tau=-1))
    batch = prompts([1, 2], "left")
    types = torch.randint(0, 5, batch["input_ids"].shape)
    new = prepare_inputs(model, **batch, token_type_ids=types, mm_token_type_ids=types)
    plan = model.attanchor_plan
    copied = types.gather(1, plan.source.clamp(min=0)).masked_fill(plan.source < 0, 0)
    assert torch.equal(new["mm_token_type_ids"], copied)
    assert torch.equal(new["token_type_ids"], copied.masked_fill(plan.is_anchor, 7))
    hosts = plan.host[plan.host >= 0]
    last_of_image = (batch["input_ids"] == IMAGE) & (batch["input_ids"].roll(-1, 1) != IMAGE)
    assert len(hosts) == int(batch["anchor_mask"].sum())
    for row in range(2):
        used = plan.host[row][plan.host[row] >= 0]
        assert not last_of_image[row][used][: len(used)].any()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"tau": "0.1"}, TypeError, "tau is str"),
        ({"tau": True}, TypeError, "tau is bool"),
        ({"tau": torch.tensor(0.1)}, TypeError, "tau is Tensor"),
        ({"tau": float("nan")}, ValueError, "tau is NaN"),
        ({"tau": float("inf")}, ValueError, "tau is inf"),
        ({"tau": 0.1, "direction": "both"}, ValueError, "direction is 'both'; it should be one of 'text_into_image'"),
        ({"tau": 0.1, "direction": None}, ValueError, "direction is None; it should be one of 'text_into_image'"),
        ({"tau": 0.1, "positions": "flat"}, ValueError, "positions is 'flat'"),
        ({"tau": 0.1, "route": "kwargs"}, ValueError, "route is 'kwargs'"),
        ({"tau": 0.1, "backend": "cpu"}, ValueError, "backend is 'cpu'"),
        ({"tau": 0.1, "max_anchors": -1}, ValueError, "max_anchors is -1"),
        ({"tau": 0.1, "max_anchors": 1.5}, TypeError, "max_anchors is float"),
        ({"tau": 0.1, "keep": "third"}, TypeError, "keep is str"),
        ({"tau": 0.1, "keep": True}, TypeError, "keep is bool"),
        ({"tau": 0.1, "keep": 0}, ValueError, "keep is 0"),
        ({"tau": 0.1, "keep": 1.5}, ValueError, "keep is 1.5; a fraction should be"),
        ({"tau": 0.1, "keep": float("nan")}, ValueError, "keep is nan"),
        ({"tau": 0.1, "keep": 0.5, "keep_by": "luck"}, ValueError, "keep_by is 'luck'; it should be one of 'cells'"),
        ({"tau": 0.1, "force_inherit": 1}, TypeError, "force_inherit is int"),
        ({"tau": 0.1, "special_token_ids": ["a"]}, TypeError, "special_token_ids holds 'a'"),
        ({"tau": 0.1, "generation_prompt_ids": 3}, TypeError, "generation_prompt_ids is int"),
    ],
)
def test_wrong_settings(settings, error, message):
    with pytest.raises(error, match=message):
        AttAnchorConfig(**settings)


def test_settings_as_json():
    settings = AttAnchorConfig(tau=0.12, max_anchors=8, special_token_ids=[3, 4], direction="image_into_text")
    assert AttAnchorConfig.from_dict(json.loads(json.dumps(settings.to_dict()))) == settings
    for keep in (1, 1.0, 192, 1 / 3):
        again = AttAnchorConfig.from_dict(json.loads(json.dumps(AttAnchorConfig(tau=1, keep=keep).to_dict()))).keep
        assert (type(again), again) == (type(keep), keep)
    assert AttAnchorConfig.from_dict({"tau": 0.1}) == AttAnchorConfig(tau=0.1)  # as older versions wrote it
    tau = AttAnchorConfig(tau=np.float32(0.5)).to_dict()["tau"]
    assert (type(tau), tau) == (float, 0.5)
    with pytest.raises(ValueError, match=r"hold \['taw'\]"):
        AttAnchorConfig.from_dict({"tau": 0.1, "taw": 0.2})
    with pytest.raises(ValueError, match="lack tau"):
        AttAnchorConfig.from_dict({})
    with pytest.raises(TypeError, match="are list"):
        AttAnchorConfig.from_dict([])


def test_settings_name_what_the_operators_know():
    from attanchor_kernels import backends, checks

    assert (DIRECTIONS, POSITIONS, BACKENDS) == (checks.DIRECTIONS, checks.POSITIONS, backends.NAMES)


def test_attach_wants_a_model_and_settings():
    with pytest.raises(TypeError, match="model is Linear"):
        attach(torch.nn.Linear(2, 2), AttAnchorConfig(tau=0.1))
    with pytest.raises(TypeError, match="config is float"):
        attach(tiny_llava(), 0.1)
    with pytest.raises(ValueError, match="config is None"):
        attach(tiny_llava())
    headless = tiny_llava().base_model
    with pytest.raises(TypeError, match="model is LlavaModel, which has no language modelling head"):
        attach(headless, AttAnchorConfig(tau=0.1))
    assert not hasattr(headless.config, "attanchor")


def test_every_public_name_is_there_and_importing_the_package_needs_no_torch():
    assert all(getattr(attanchor_vlm, name) is not None for name in attanchor_vlm.__all__)
    code = "import sys, attanchor_vlm; assert 'torch' not in sys.modules; attanchor_vlm.AttAnchorConfig(tau=1); "
    code += "assert 'torch' not in sys.modules"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


# --- Saving, copying. -------------------------------------------------------------------------------------------------


def test_an_attached_model_can_be_copied_and_pickled():
    model, batch = tiny_llava(), prompts([1, 2])
    attach(model, AttAnchorConfig(tau=TAU))
    file = io.BytesIO()
    torch.save(model, file)  # before a forward: transformers' own hooks cannot be pickled
    file.seek(0)
    expected = model(**batch).logits
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert is_attached(other)
        assert torch.equal(other(**batch).logits, expected)
        detach(other)
        assert type(other) is LlavaForConditionalGeneration
        assert not other.model._forward_pre_hooks
    assert is_attached(model)


def test_sidecar(tmp_path):
    settings = AttAnchorConfig(tau=0.12, direction="image_into_text")
    assert save_settings(settings, tmp_path) == tmp_path / "attanchor.json"
    assert load_settings(tmp_path) == settings == load_settings(tmp_path / "attanchor.json")
    assert [path.name for path in tmp_path.iterdir()] == ["attanchor.json"]
    with pytest.raises(FileNotFoundError, match="copied without its settings"):
        load_settings(tmp_path / "elsewhere")
    (tmp_path / "attanchor.json").write_text('{"tau": ')
    with pytest.raises(ValueError, match=r"attanchor\.json: "):
        load_settings(tmp_path)
    with pytest.raises(ValueError, match="the model is not attached"):
        save_settings(tiny_llava(), tmp_path)


def test_an_adapter_of_an_earlier_version_gives_what_it_gave_then():
    """Written by the version before the rooms, with what its model said to the same prompts."""
    folder = Path(__file__).parent / "adapter-of-earlier-version"
    expected = json.loads((folder / "expected.json").read_text())
    model = load_adapter(tiny_llava(), folder)
    with torch.no_grad():
        logits = model(**prompts([1, 2])).logits
    assert base_of(model).attanchor_plan.is_anchor.sum(-1).tolist() == expected["inserted"]
    assert logits[1, -1, :8].tolist() == pytest.approx(expected["logits"], abs=1e-3)
