"""Every family of models, attached: the same properties for each, and what is particular to some.

`builders.py` has the models and their prompts. What does not depend on the family is tested one folder up, on LLaVA.
"""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
import torch
from builders import END, EOS, FAMILIES, IMAGE, VOCABULARY, Family, features, plain
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText

from attanchor_vlm import AttAnchorConfig, attach, prepare_inputs
from attanchor_vlm.adapters import adapter_for
from attanchor_vlm.config import DIRECTIONS

NEW = 4
MIXED = [1, 2, 0]
GREEDY = {"max_new_tokens": NEW, "do_sample": False}
LOGITS = {"return_dict_in_generate": True, "output_logits": True}

MROPE = [family for family in FAMILIES if family.inherits]
FLAT = [family for family in FAMILIES if not family.inherits]
NEWLINES = [family for family in FAMILIES if family.newlines]
VIDEO = [family for family in FAMILIES if family.inherits or family.name == "llava_onevision"]
PAGE = Path(__file__).parents[3] / "docs" / "families.md"
BY_NAME = {family.name: family for family in FAMILIES}

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
every_route = pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(family, route, id=f"{family}-{route}") for family in FAMILIES for route in family.routes],
)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)
both_sides = pytest.mark.parametrize("side", ["left", "right"])


@functools.cache
def tau_for(name: str, direction: str = "text_into_image") -> float:
    """A threshold that inserts about half of the candidates, in the middle between two scores."""
    family = BY_NAME[name]
    model, (batch, _) = attach(family.model(), AttAnchorConfig(tau=-1, direction=direction)), family.prompts(MIXED)
    with torch.no_grad():
        model(**batch)
    scores = model.attanchor_plan.score
    scores = scores[torch.isfinite(scores)].unique()
    middle = len(scores) // 2
    return float(scores[middle - 1 : middle + 1].mean())


def attached(family: Family, route: str | None = None, direction: str = "text_into_image", **settings):
    tau = settings.pop("tau", None)
    tau = tau_for(family.name, direction) if tau is None else tau
    return attach(family.model(), AttAnchorConfig(tau=tau, route=route, direction=direction, **settings))


def own_logits(model, logits: Tensor) -> Tensor:
    """The logits at the caller's own tokens, in order, of all samples in one (tokens, V)."""
    plan = model.attanchor_plan
    return logits[(plan.source >= 0) & ~plan.is_anchor]


def difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


@torch.no_grad()
def greedy_by_forward(family: Family, model, batch: dict) -> tuple[Tensor, Tensor]:
    """New tokens (B, NEW) and their logits (B, NEW, V), every one from a forward of the whole sequence."""
    tokens, scores = [], []
    for _ in range(NEW):
        scores.append(model(**batch).logits[:, -1])  # left padding: the last token is at the end
        tokens.append(scores[-1].argmax(-1, keepdim=True))
        batch = family.longer(batch, tokens[-1])
    return torch.cat(tokens, 1), torch.stack(scores, 1)


# --- Nothing to insert. ----------------------------------------------------------------------------------------------


@both_sides
@every_family
def test_tau_one_is_the_untouched_model(family, side):
    model, batch = family.model(), family.with_labels(family.prompts(MIXED, side)[0])
    question = family.prompts([1, 2], "left")[0]
    before, generated = model(**plain(batch)), model.generate(**plain(question), **GREEDY)
    attach(model, AttAnchorConfig(tau=1))
    after = model(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(model.generate(**question, **GREEDY), generated)
    assert model.attanchor_calls == 0


@both_directions
@both_sides
@every_route
def test_nothing_allowed_is_the_untouched_model_but_for_rounding(family, route, side, direction):
    model, batch = family.model(), family.with_labels(family.prompts(MIXED, side)[0])
    with torch.no_grad():
        before = model(**plain(batch))
        attach(model, AttAnchorConfig(tau=-1, route=route, direction=direction))
        after = model(**{**batch, "anchor_mask": torch.zeros_like(batch["anchor_mask"])})
    assert model.attanchor_calls == 1
    assert not model.attanchor_plan.is_anchor.any()
    assert difference(before.logits[batch["attention_mask"].bool()], own_logits(model, after.logits)) < 1e-4
    assert difference(before.loss, after.loss) < 1e-4


@every_route
def test_nothing_allowed_generates_as_the_untouched_model(family, route):
    model, batch = family.model(), family.prompts(MIXED, "left")[0]
    before = model.generate(**plain(batch), **GREEDY, **LOGITS)
    attach(model, AttAnchorConfig(tau=-1, route=route))
    after = model.generate(**{**batch, "anchor_mask": torch.zeros_like(batch["anchor_mask"])}, **GREEDY, **LOGITS)
    assert model.attanchor_calls == 1
    assert torch.equal(before.sequences, after.sequences)
    assert difference(torch.stack(before.logits), torch.stack(after.logits)) < 1e-4


# --- With anchors. ---------------------------------------------------------------------------------------------------


@both_directions
@every_family
def test_hosts_are_the_best_matches_by_the_models_own_features(family, direction):
    """Worked out token by token: the features stand in their order, and what is no image content takes no part."""
    model, (batch, _) = attached(family, direction=direction), family.prompts(MIXED)
    ids, rows = batch["input_ids"], features(model, batch)
    with torch.no_grad():
        model(**batch)
        embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = rows
    content = ids == IMAGE
    if family.newlines:
        content[ids == IMAGE] = (rows != model.base_model.image_newline).any(-1)
    plan, inserted = model.attanchor_plan, 0
    for row in range(len(MIXED)):
        texts, images = batch["anchor_mask"][row].nonzero()[:, 0].tolist(), content[row].nonzero()[:, 0].tolist()
        movers, hosts = (texts, images) if direction == "text_into_image" else (images, texts)
        expected = torch.full((ids.shape[1],), -1)
        for mover in movers if hosts else []:
            scores = F.cosine_similarity(embeds[row, mover].double(), embeds[row, hosts].double())
            if float(scores.max()) >= tau_for(family.name, direction):
                expected[mover] = hosts[int(scores.argmax())]
        assert torch.equal(plan.host[row], expected)
        inserted += int((expected >= 0).sum())
    assert 2 < inserted < int(torch.isfinite(plan.score).sum()) - 2
    assert int(plan.is_anchor.sum()) == inserted


@both_directions
@both_sides
@pytest.mark.parametrize("family", [family for family in FAMILIES if len(family.routes) > 1], ids=str)
def test_both_routes_agree(family, side, direction):
    batch, losses, logits, gradients = family.with_labels(family.prompts(MIXED, side)[0]), [], [], []
    for route in family.routes:
        model = attached(family, route, direction)
        output = model(**batch)
        output.loss.backward()
        assert model.attanchor_plan.is_anchor.any()
        real = model.attanchor_plan.source >= 0
        losses.append(output.loss)
        logits.append(output.logits[real])
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert difference(logits[0], logits[1]) < 1e-4
    assert difference(losses[0], losses[1]) < 1e-5
    assert gradients[0].abs().max() > 1e-3
    assert difference(gradients[0], gradients[1]) < 1e-4


@pytest.mark.parametrize("family", [family for family in FAMILIES if len(family.routes) == 1], ids=str)
def test_a_route_that_the_model_cannot_take_is_refused(family):
    with pytest.raises(ValueError, match=f"route is 'embeds'; for {family} it should be one of 'ids'"):
        attached(family, "embeds", tau=0.1)


@both_directions
@both_sides
@every_route
def test_a_batch_is_its_samples_alone(family, route, side, direction):
    model, (batch, alone) = attached(family, route, direction), family.prompts([1, 2, 0, 1], side)
    with torch.no_grad():
        together = model(**batch).logits
        plan, inserted = model.attanchor_plan, 0
        for row, sample in enumerate(alone):
            logits = model(**sample).logits[0]
            inserted += int(model.attanchor_plan.is_anchor.sum()) if model.attanchor_plan else 0
            assert difference(together[row][plan.source[row] >= 0], logits) < 2e-5
    assert inserted == int(plan.is_anchor.sum()) > 4


# --- generate. -------------------------------------------------------------------------------------------------------


@both_directions
@every_route
def test_cached_generation_agrees_with_uncached_forwards(family, route, direction):
    model, (batch, _) = attached(family, route, direction), family.prompts(MIXED, "left")
    output = model.generate(**batch, **GREEDY, **LOGITS)
    assert model.attanchor_plan.is_anchor.any()
    tokens, logits = greedy_by_forward(family, model, batch)
    length = batch["input_ids"].shape[1]
    assert torch.equal(output.sequences[:, :length], batch["input_ids"])
    assert torch.equal(output.sequences[:, length:], tokens)
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5


@every_route
def test_a_right_padded_batch_generates_as_its_samples_alone(family, route):
    model, (batch, alone) = attached(family, route), family.prompts(MIXED, "right")
    together = model.generate(**batch, **GREEDY)[:, -NEW:]
    assert model.attanchor_plan.attention_mask[:, -1].all()  # padded on the left, whatever the caller did
    for row, sample in enumerate(alone):
        assert torch.equal(together[row], model.generate(**sample, **GREEDY)[0, -NEW:])


@both_directions
@every_route
def test_the_score_of_beams_is_that_of_an_uncached_forward(family, route, direction):
    model, (batch, _) = attached(family, route, direction), family.prompts(MIXED, "left")
    output = model.generate(
        **batch,
        **GREEDY,
        num_beams=3,
        num_return_sequences=2,
        length_penalty=0.0,
        return_dict_in_generate=True,
        output_scores=True,
    )
    for beam in range(2):
        new = output.sequences[beam::2, -NEW:]
        with torch.no_grad():
            logits = model(**family.longer(batch, new)).logits[:, -NEW - 1 : -1]
        expected = logits.log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
        assert torch.allclose(output.sequences_scores[beam::2], expected, atol=1e-4)


@every_route
def test_other_ways_to_prefill_and_to_cache_change_nothing(family, route):
    model, (batch, _) = attached(family, route), family.prompts(MIXED, "left")
    expected = model.generate(**batch, **GREEDY)
    options = [{"use_cache": False}, {"cache_implementation": "static"}]
    if family.name not in ("paligemma", "gemma3"):  # tokens that see later ones: chunks change them, anchors or not
        options.append({"prefill_chunk_size": 8})
    for option in options:
        assert torch.equal(model.generate(**batch, **GREEDY, **option), expected), option


@every_route
def test_pauses_of_think_mode_come_in_front_of_what_is_generated(family, route):
    settings = {"pause_tokens": 3, "pause_token_id": VOCABULARY - 1}
    model, (batch, _) = attached(family, route, "image_into_text", **settings), family.prompts(MIXED, "left")
    output = model.generate(**batch, **GREEDY, **LOGITS)
    plan, new = model.attanchor_plan, output.sequences[:, -NEW:]
    assert plan.is_anchor.any()
    assert [int(row) for row in (plan.attention_mask.bool() & (plan.source < 0)).sum(-1)] == [3, 3, 0]
    longer = family.longer(batch, new)
    longer["labels"] = torch.cat([torch.full_like(batch["input_ids"], -100), new], 1)  # in front of what is learned
    with torch.no_grad():
        logits = model(**longer).logits[:, -NEW - 1 : -1]
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5


# --- Around it. ------------------------------------------------------------------------------------------------------


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
def test_before_transformers_5_18_the_ids_route_passes_pixels(family, monkeypatch):
    model, batch = attached(family, "ids"), family.prompts([1, 2], "left")[0]
    with torch.no_grad():
        expected = model(**batch).logits
    generated = model.generate(**batch, **GREEDY)
    for module in ("mixin", "prepare"):
        monkeypatch.setattr(f"attanchor_vlm.{module}.accepts_encoded_images", lambda model: False)
    assert "pixel_values" in prepare_inputs(model, **batch)
    with torch.no_grad():
        assert difference(model(**batch).logits, expected) < 1e-5
    assert torch.equal(model.generate(**batch, **GREEDY), generated)


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


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_torch_compile(name):
    """The whole call, with the graph breaks that reading lengths needs; without a code generator, which is not ours."""
    family = BY_NAME[name]
    model, batch = attached(family), family.with_labels(family.prompts([1, 2])[0])
    expected = model(**batch)
    compiled = torch.compile(model, backend="eager")(**batch)
    compiled.loss.backward()
    assert model.attanchor_calls == 2
    assert difference(compiled.logits, expected.logits) < 1e-5
    assert difference(compiled.loss, expected.loss) < 1e-5
    torch.compiler.reset()


# --- Newline rows. ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [False, True])
@both_directions
@pytest.mark.parametrize("family", NEWLINES, ids=str)
def test_newline_rows_neither_host_nor_move(family, direction, autocast):
    model, (batch, _) = attached(family, direction=direction, tau=-1), family.prompts([1, 2])
    rows = features(model, batch)
    newline = model.base_model.image_newline
    with torch.no_grad():
        newline += 1
        is_newline = (features(model, batch) != rows).any(-1)  # told by what the parameter changes
        newline -= 1
        # Made the best match of every text token that there is.
        newline.copy_(model.get_input_embeddings()(batch["input_ids"][batch["anchor_mask"]]).mean(0) * 5)
    assert 5 < int(is_newline.sum()) < len(rows) // 2
    slots = (batch["input_ids"] == IMAGE).nonzero()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        model(**batch)
    plan = model.attanchor_plan
    hosts = {(row, int(host)) for row in range(2) for host in plan.host[row] if host >= 0}
    assert hosts
    for row, slot in slots[is_newline].tolist():
        assert (row, slot) not in hosts
        assert plan.host[row, slot] < 0
        assert not torch.isfinite(plan.score[row, slot])


def test_onevision_takes_several_images_of_a_sample_as_one_tile_each():
    family = BY_NAME["llava_onevision"]
    model, batch = attached(family), family.prompts([2, 1])[0]
    batch["batch_num_images"] = torch.tensor([2, 1])
    counts = [len(part) for part in model.get_image_features(
        batch["pixel_values"], batch["image_sizes"], batch_num_images=batch["batch_num_images"]
    ).pooler_output]  # fmt: skip
    assert counts[:2] == [17, 17] != counts[2:]
    rows, masks = [], []
    for own in (counts[:2], counts[2:]):
        row = [1, 9, *(token for count in own for token in [IMAGE] * count + list(range(10, 17)))]
        rows.append(row)
        masks.append([token >= 10 for token in row])
    length = max(map(len, rows))
    batch["input_ids"] = torch.tensor([[0] * (length - len(row)) + row for row in rows])
    batch["anchor_mask"] = torch.tensor([[False] * (length - len(mask)) + mask for mask in masks])
    batch["attention_mask"] = (batch["input_ids"] != 0).long()
    output = model.generate(**batch, **GREEDY, **LOGITS)
    assert model.attanchor_plan.is_anchor.any()
    tokens, logits = greedy_by_forward(family, model, batch)
    assert torch.equal(output.sequences[:, -NEW:], tokens)
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5


# --- Positions. ------------------------------------------------------------------------------------------------------


@both_directions
@both_sides
@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_anchors_take_the_positions_of_their_hosts(family, side, direction):
    model, (batch, _) = attached(family, direction=direction), family.prompts(MIXED, side)
    given = {name: batch[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    plain_positions, _ = model.base_model.get_rope_index(batch["input_ids"], **given)
    with torch.no_grad():
        model(**batch)
    plan = model.attanchor_plan
    assert plan.position_ids.shape == (3, *plan.input_ids.shape)
    for row in range(len(MIXED)):
        source, copied = plan.source[row], plan.is_anchor[row]
        own = source[(source >= 0) & ~copied]
        assert torch.equal(own, batch["attention_mask"][row].nonzero()[:, 0])
        assert torch.equal(plan.position_ids[:, row, (source >= 0) & ~copied], plain_positions[:, row, own])
        hosts = plan.host[row][source[copied]]
        assert torch.equal(plan.position_ids[:, row, copied], plain_positions[:, row, hosts])
    moved = plain_positions[:, batch["input_ids"] == IMAGE]
    assert (moved[0] != moved[1]).any()  # the axes differ, or nothing is tested
    assert (moved[1] != moved[2]).any()


@pytest.mark.parametrize(
    ("family", "route"),
    [pytest.param(family, route, id=f"{family}-{route}") for family in MROPE for route in family.routes],
)
def test_mrope_generation_continues_where_the_untouched_model_would(family, route):
    batch, positions = family.prompts(MIXED, "left")[0], []

    def record(module, args, kwargs):
        positions.append(kwargs["position_ids"][-3:, :, -1])  # Qwen puts a row of text positions in front

    for model in (family.model(), attached(family, route)):
        model.base_model.language_model.register_forward_pre_hook(record, with_kwargs=True)
        model.generate(**batch if hasattr(model, "attanchor_plan") else plain(batch), **GREEDY)
    assert model.attanchor_plan.is_anchor.any()
    assert len(positions) == 2 * NEW
    for before, after in zip(positions[:NEW], positions[NEW:], strict=True):
        assert torch.equal(before, after)
        assert torch.equal(after[0], after[1])


@both_directions
@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_positions_may_be_flat(family, direction):
    batch = family.prompts(MIXED, "left")[0]
    for route in family.routes:
        model = attached(family, route, direction, positions="sequential")
        output = model.generate(**batch, **GREEDY, **LOGITS)
        tokens, logits = greedy_by_forward(family, model, batch)
        assert torch.equal(output.sequences[:, -NEW:], tokens)
        assert difference(torch.stack(output.logits, 1), logits) < 2e-5
        plan = model.attanchor_plan
        counted = (plan.attention_mask.cumsum(-1) - 1).masked_fill(plan.attention_mask == 0, 0)
        assert torch.equal(plan.position_ids, counted.expand(3, -1, -1))
        assert plan.is_anchor.any()


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_positions_that_are_given_are_inherited(family):
    model, batch = attached(family), family.prompts(MIXED)[0]
    given = {name: batch[name] for name in ("mm_token_type_ids", "image_grid_thw", "attention_mask")}
    positions, _ = model.base_model.get_rope_index(batch["input_ids"], **given)
    text = (batch["attention_mask"].cumsum(-1) - 1).clamp(min=0)[None]
    with torch.no_grad():
        expected = model(**batch).logits
        assert torch.equal(model(**batch, position_ids=positions).logits, expected)
        assert torch.equal(model(**batch, position_ids=torch.cat([text, positions])).logits, expected)
    assert len(model.attanchor_plan.position_ids) == 3  # no text positions, which would repeat at anchors


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_needs_to_know_the_grids(family):
    model, batch = attached(family), family.prompts([1])[0]
    del batch["mm_token_type_ids"]
    for call in (model, model.generate):
        with pytest.raises(ValueError, match=r"mm_token_type_ids \(1 at image tokens\) is missing"):
            call(**batch)
    attached(family, positions="sequential")(**batch)


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_a_decoding_loop_without_positions_continues_after_the_anchors(family):
    model, batch = attached(family), family.prompts([2], "left")[0]
    expected = model.generate(**batch, **GREEDY)[:, -NEW:]
    tokens = []
    with torch.no_grad():
        output = model(**batch, use_cache=True)
        for _ in range(NEW):
            tokens.append(output.logits[:, -1:].argmax(-1))
            output = model(input_ids=tokens[-1], past_key_values=output.past_key_values, use_cache=True)
    assert torch.equal(torch.cat(tokens, 1), expected)


@pytest.mark.parametrize("family", FLAT, ids=str)
def test_inherit_needs_insisting_where_tokens_have_one_position(family):
    with pytest.raises(ValueError, match=f"{family} has one position per token: repeated positions are then taken"):
        attached(family, positions="inherit")
    batch = family.prompts(MIXED, "left")[0]
    model = attached(family, positions="inherit", force_inherit=True)
    output = model.generate(**batch, **GREEDY, **LOGITS)
    plan = model.attanchor_plan
    assert plan.is_anchor.any()
    assert torch.equal(plan.position_ids.amax(-1), batch["attention_mask"].sum(-1) - 1)
    tokens, logits = greedy_by_forward(family, model, batch)
    assert torch.equal(output.sequences[:, -NEW:], tokens)
    assert difference(torch.stack(output.logits, 1), logits) < 2e-5


# --- Bidirectional masks, videos. ------------------------------------------------------------------------------------


@both_directions
@pytest.mark.parametrize("family", [family for family in FAMILIES if family.token_types], ids=str)
def test_token_types_follow_the_anchors(family, direction):
    seen, name = [], family.token_types
    model, batch = attached(family, direction=direction), family.with_labels(family.prompts([1, 2])[0])
    model.base_model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs[name]), with_kwargs=True)
    with torch.no_grad():
        model(**batch)
    plan = model.attanchor_plan
    assert plan.is_anchor.any()
    copies_an_image = direction == "image_into_text"
    expected = {"gemma3": 1, "paligemma": 0}.get(family.name, int(copies_an_image))
    assert (seen[0][plan.is_anchor] == expected).all()
    own = batch[name].gather(1, plan.source.clamp(min=0))
    kept = (plan.source >= 0) & ~plan.is_anchor
    assert torch.equal(seen[0][kept], own[kept])


def test_gemma3_images_stay_whole_around_their_anchors():
    family = BY_NAME["gemma3"]
    model, batch = attached(family, tau=-1), family.prompts([1])[0]
    encoded = model.get_image_features(batch["pixel_values"])
    rows = encoded.pooler_output = encoded.pooler_output.detach().requires_grad_()
    del batch["pixel_values"]
    logits = model(**batch, mm_encoder_outputs={"image": encoded}).logits
    plan = model.attanchor_plan
    images = ((plan.input_ids[0] == IMAGE) & ~plan.is_anchor[0]).nonzero()[:, 0]
    assert plan.is_anchor[0, images[0] : images[-1]].any()  # an anchor stands between the first and the last
    logits[0, images[0]].square().sum().backward()
    assert rows.grad[0, -1].abs().max() > 1e-3


def test_paligemma_prompts_see_no_answer():
    family = BY_NAME["paligemma"]
    model, batch = attached(family), family.with_labels(family.prompts([1, 2])[0])
    with torch.no_grad():
        before, plan = model(**batch).logits, model.attanchor_plan
        answers = batch["labels"] != -100
        batch["input_ids"][answers] = 8 + (batch["input_ids"][answers] - 8 + 17) % (VOCABULARY - 8)
        after = model(**batch).logits
    assert torch.equal(plan.source, model.attanchor_plan.source)
    prompt = (plan.labels == -100) & (plan.source >= 0)
    assert torch.equal(before[prompt], after[prompt])
    assert difference(before[plan.labels != -100], after[plan.labels != -100]) > 0.01


@pytest.mark.parametrize("family", VIDEO, ids=str)
def test_videos_are_refused(family):
    model, batch = attached(family), family.prompts([1], "left")[0]
    for video in ({"pixel_values_videos": torch.zeros(1)}, {"mm_encoder_outputs": {"video": object()}}):
        name = next(iter(video))
        for call in (model, model.generate):
            for images in (batch, {"input_ids": batch["input_ids"]}):
                with pytest.raises(ValueError, match=f"{name}.* is given, but anchors are inserted in images only"):
                    call(**images, **video)


# --- The page about them. --------------------------------------------------------------------------------------------


def test_the_page_lists_every_family_and_names_tests_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    here = {name for name in globals() if name.startswith("test_")}
    assert here - named == {"test_the_page_lists_every_family_and_names_tests_that_exist"}
    assert named - here <= {
        "test_processors",
        "test_a_chat_is_answered_with_anchors_on_the_users_text",
        "test_a_checkpoint_on_disk_is_trained_by_the_command_line",
    }
    listed = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| (\w+) \|", page, re.MULTILINE)
    adapters = {family.name: adapter_for(family.model()) for family in FAMILIES}
    expected = [(name, ", ".join(adapter.routes), adapter.positions) for name, adapter in adapters.items()]
    assert listed == expected
