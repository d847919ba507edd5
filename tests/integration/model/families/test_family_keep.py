"""Every family with image tokens dropped: the sequence is the gathered one, every image has its share, it decodes."""

from __future__ import annotations

import itertools

import pytest
import test_family_generate
import torch
from builders import BY_NAME, FAMILIES, features
from shared import (
    FLAT,
    MIXED,
    MROPE,
    attached,
    check_cached_generation,
    check_generates,
    check_routes_agree,
    check_samples_alone,
    every_family,
    every_route,
    tau_for,
)
from tiny import difference, plain
from tiny_families import IMAGE

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.model.dropping import cells_of
from attanchor_vlm.model.families import adapter_for

KEEP = 1 / 3
TILES_ARE_IMAGES = ("idefics3", "smolvlm")


def dropping(family, route=None, anchors=True, **settings):
    tau = tau_for(family, settings.get("direction", "text_into_image")) if anchors else 1
    return attached(family, route, tau=tau, **{"keep": KEEP, **settings})


def content_of(family, model, batch):
    """(B, S) bool: image tokens that are image content."""
    content = batch["input_ids"] == IMAGE
    if family.newlines:
        content[batch["input_ids"] == IMAGE] = (features(model, batch) != model.base_model.image_newline).any(-1)
    return content


def survivors(plan, content):
    """(B, S) bool: the caller's image tokens that are still there."""
    slots = torch.where(plan.is_anchor, -1, plan.source) + 1
    present = torch.zeros(len(slots), content.shape[1] + 1, dtype=torch.bool).scatter(1, slots, True)[:, 1:]
    assert present[~content & (slots.amax(1, keepdim=True) < 0)].all()
    return present & content


@torch.no_grad()
def gathered(family, batch, plan):
    """The untouched model's logits for the plan's rows, each looked up in what it makes of the whole prompt."""
    model, ids = family.model(), batch["input_ids"]
    embeds = model.get_input_embeddings()(ids)
    embeds[ids == IMAGE] = features(model, batch)
    at, real = plan.source.clamp(min=0), (plan.source >= 0)[..., None]
    given = {
        "inputs_embeds": embeds.gather(1, at[..., None].expand(-1, -1, embeds.shape[-1])) * real,
        "attention_mask": plan.attention_mask,
        "position_ids": plan.position_ids,
    }
    if family.name in ("paligemma", "gemma3"):
        types = batch["token_type_ids"].gather(1, at)
        given["token_type_ids"] = types.masked_fill(plan.is_anchor, int(family.name == "gemma3"))
    if family.name != "qwen3_vl":
        return model(**given).logits
    encoded = model.get_image_features(batch["pixel_values"], batch["image_grid_thw"])
    row = ((ids == IMAGE).flatten().cumsum(0).view_as(ids) - 1).gather(1, at)
    holds = (plan.input_ids == IMAGE) & ~plan.is_anchor
    deepstack = [torch.cat(list(layer))[row[holds]] for layer in encoded.deepstack_features]
    output = model.model.language_model(**given, visual_pos_masks=holds, deepstack_visual_embeds=deepstack)
    return model.lm_head(output.last_hidden_state)


@pytest.mark.parametrize(("anchors", "side"), [(True, "left"), (False, "right")], ids=["anchors", "plain"])
@every_route
def test_the_logits_are_those_of_the_gathered_sequence(family, route, side, anchors):
    model, batch = dropping(family, route, anchors), family.with_labels(family.prompts(MIXED, side)[0])
    output = model(**batch)
    plan = model.attanchor_plan
    assert plan.is_anchor.any() == anchors
    assert plan.source.shape[1] < batch["input_ids"].shape[1]
    real = plan.source >= 0
    assert difference(output.logits[real], gathered(family, batch, plan)[real]) < 1e-4
    flat = output.logits[:, :-1].flatten(0, 1), plan.labels[:, 1:].flatten()
    assert difference(output.loss, torch.nn.functional.cross_entropy(*flat)) < 1e-4
    supervised = [batch["labels"][row][batch["labels"][row] != -100].tolist() for row in range(len(MIXED))]
    assert [plan.labels[row][plan.labels[row] != -100].tolist() for row in range(len(MIXED))] == supervised


def images_of(family, batch, row):
    """The slots of each image of a row, or of each tile where tiles are images of their own."""
    runs, before = [], None
    for slot in (batch["input_ids"][row] == IMAGE).nonzero()[:, 0].tolist():
        if slot - 1 != before:
            runs.append([])
        runs[-1].append(slot)
        before = slot
    if family.name not in TILES_ARE_IMAGES:
        return runs
    side = features(BY_NAME[family.name].model(), family.prompts([1])[0]).shape[0]
    return [run[at : at + side] for run in runs for at in range(0, len(run), side)]


@pytest.mark.parametrize("keep", [1 / 3, 3])
@every_family
def test_every_image_has_its_share(family, keep):
    model, batch = dropping(family, anchors=False, keep=keep), family.prompts([1, 3, 0, 2], "left")[0]
    content = content_of(family, model, batch)
    with torch.no_grad():
        model(**batch)
    left, images = survivors(model.attanchor_plan, content), 0
    for row in range(4):
        for slots in images_of(family, batch, row):
            size = int(content[row, slots].sum())
            expected = min(keep, size) if isinstance(keep, int) else max(1, int(keep * size + 0.5))
            assert int(left[row, slots].sum()) == expected
            images += 1
    assert images >= 6


@every_family
def test_hosts_stay_and_dropping_more_than_there_is_drops_nothing(family):
    batch = family.prompts(MIXED)[0]
    model, few, all_ = attached(family), dropping(family), dropping(family, keep=10_000)
    with torch.no_grad():
        expected, found = model(**batch).logits, all_(**batch).logits
        few(**batch)
    assert torch.equal(expected, found)
    assert all(a is b or torch.equal(a, b) for a, b in zip(model.attanchor_plan, all_.attanchor_plan, strict=True))
    hosts, left = few.attanchor_plan.host, survivors(few.attanchor_plan, batch["input_ids"] == IMAGE)
    assert (hosts >= 0).any()
    for row in range(len(MIXED)):
        assert left[row, hosts[row][hosts[row] >= 0]].all()


# --- What holds without dropping too. ---


@every_route
def test_a_batch_is_its_samples_alone(family, route):
    check_samples_alone(family, route, "left", "text_into_image", keep=KEEP)


@every_route
def test_cached_generation_agrees_with_uncached_forwards(family, route):
    check_cached_generation(family, route, "text_into_image", keep=KEEP)


@every_route
def test_the_score_of_beams_is_that_of_an_uncached_forward(family, route):
    test_family_generate.test_the_score_of_beams_is_that_of_an_uncached_forward(family, route, keep=KEEP)


@pytest.mark.parametrize("family", [family for family in FAMILIES if len(family.routes) > 1], ids=str)
def test_both_routes_agree(family):
    check_routes_agree(family, "left", "image_into_text", keep=KEEP)


# --- Positions, cells, salience. ---


@pytest.mark.parametrize("family", MROPE, ids=str)
def test_mrope_survivors_keep_their_positions(family):
    model, batch = dropping(family), family.prompts(MIXED, "left")[0]
    with torch.no_grad():
        model(**batch)
    plan, names = model.attanchor_plan, ("mm_token_type_ids", "image_grid_thw", "attention_mask")
    positions, _ = model.model.get_rope_index(batch["input_ids"], **{name: batch[name] for name in names})
    own = (plan.source >= 0) & ~plan.is_anchor
    for row in range(len(MIXED)):
        assert torch.equal(plan.position_ids[:, row, own[row]], positions[:, row, plan.source[row, own[row]]])


@pytest.mark.parametrize(
    ("family", "implementation"), zip(FLAT, itertools.cycle(["sdpa", "eager"]), strict=False), ids=str
)
def test_one_position_per_token_may_be_inherited(family, implementation):
    """Gaps where tokens were dropped, repeats at anchors: what a sample alone and a padded batch make of them agrees
    with attention code that knows of no packed sequences."""
    model, (batch, alone) = dropping(family, positions="inherit"), family.prompts(MIXED, "left")
    model.set_attn_implementation(implementation)
    with torch.no_grad():
        logits, plan = model(**batch).logits, model.attanchor_plan
        real = plan.source >= 0
        own = real & ~plan.is_anchor
        counted = (batch["attention_mask"].cumsum(-1) - 1).gather(1, plan.source.clamp(min=0))
        assert torch.equal(plan.position_ids[own], counted[own])
        assert difference(logits[real], gathered(family, batch, plan)[real]) < 1e-4
        assert difference(logits[0][real[0]], model(**alone[0]).logits[0]) < 2e-5
    check_generates(family, model, batch)


def test_inherited_positions_under_flash_attention_need_insisting(monkeypatch):
    family = BY_NAME["llava"]
    model = family.model()
    monkeypatch.setattr(model.config.get_text_config(), "_attn_implementation_internal", "flash_attention_2")
    with pytest.raises(ValueError, match="positions is 'inherit'"):
        attach(model, AttAnchorConfig(tau=1, keep=0.5, positions="inherit"))
    attach(model, AttAnchorConfig(tau=1, keep=0.5, positions="inherit", force_inherit=True))


@pytest.mark.parametrize("shape", [(1, 7), (7, 1), (4, 6), (24, 24), (3, 50), (50, 3)])
def test_cells_are_rectangles_that_cover_the_grid(shape):
    for count in {1, 2, 3, 5, 7, shape[0] * shape[1] // 3, shape[0] * shape[1] - 1, shape[0] * shape[1]}:
        if not 1 <= count <= shape[0] * shape[1]:
            continue
        cells = cells_of(shape, count).view(shape)
        assert cells.unique().tolist() == list(range(count))
        for cell in range(count):
            lines, columns = (cells == cell).nonzero().T
            area = (lines.max() - lines.min() + 1) * (columns.max() - columns.min() + 1)
            assert int(area) == len(lines)


def encoder_attention(model, pixels):
    """(N, P) the class token's attention by the encoder's own eager code, in the layer behind the features'."""
    tower = model.model.vision_tower
    tower.set_attn_implementation("eager")
    with torch.no_grad():
        weights = tower(pixels, output_attentions=True).attentions
    return weights[model.config.vision_feature_layer + 1][:, :, 0, 1:].mean(1)


@pytest.mark.parametrize("keep", [0.4, 5])
@pytest.mark.parametrize("how", ["pixels", "encoded"])
def test_salience_is_the_attention_of_the_class_token(how, keep):
    family = BY_NAME["llava"]
    model, batch = dropping(family, anchors=False, keep=keep, keep_by="salience"), family.prompts([1, 3], "left")[0]
    attention = encoder_attention(family.model(), batch["pixel_values"])
    count = keep if keep == 5 else 6
    expected = torch.zeros_like(attention).scatter(1, attention.topk(count).indices, 1).bool()
    if how == "encoded":
        encoded = model.get_image_features(batch.pop("pixel_values"), return_dict=True)
        batch["mm_encoder_outputs"] = {"image": encoded}
    with torch.no_grad():
        model(**batch)
        left = survivors(model.attanchor_plan, batch["input_ids"] == IMAGE)
        assert torch.equal(left[batch["input_ids"] == IMAGE].view(4, 16), expected)
        if how == "encoded":
            encoded.hidden_states = None
            with pytest.raises(ValueError, match="keep_by 'salience' needs the hidden states"):
                model(**batch)


def test_salience_of_tiles_lies_where_their_features_lie():
    family = BY_NAME["llava_next"]
    model, batch = family.model(), family.prompts([2, 1])[0]
    with torch.no_grad():
        encoded = adapter_for(model).encode_images(model, batch)
        found = adapter_for(model).class_token_attention(model, batch, encoded)
        patches = model.model.multi_modal_projector(encoded.hidden_states[model.config.vision_feature_layer][:, 1:])
    rows = features(model, batch)
    content = (rows != model.model.image_newline).any(-1)
    tiles = [own[:count] for own, count in zip(batch["pixel_values"], _tiles(batch), strict=True)]
    attention = encoder_attention(model, torch.cat(tiles)).flatten()
    nearest = torch.cdist(rows[content], patches.flatten(0, 1)).argmin(1)
    assert len(nearest.unique()) == len(nearest) > 40
    assert len(found) == len(rows)
    assert difference(found[content], attention[nearest]) < 1e-6


def _tiles(batch):
    return [int((own != 0).flatten(1).any(1).sum()) for own in batch["pixel_values"]]


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.name not in ("llava", "llava_next")], ids=str)
def test_without_a_class_token_salience_is_relevance(family):
    batch, plans = family.prompts(MIXED)[0], []
    for rule in ("salience", "relevance"):
        model = dropping(family, keep_by=rule)
        with torch.no_grad():
            model(**batch)
        plans.append(model.attanchor_plan)
    assert all(a is b or torch.equal(a, b) for a, b in zip(*plans, strict=True))


def test_no_cell_is_empty_where_one_token_of_each_stays():
    """LLaVA's 16 patches in 5 cells: each survivor is its cell's best match with the question."""
    family = BY_NAME["llava"]
    model, batch = dropping(family, anchors=False, keep=5), plain(family.prompts([1])[0])
    with torch.no_grad():
        model(**batch)
    rows, cells = features(model, batch), cells_of((4, 4), 5)
    slots = (batch["input_ids"][0] == IMAGE).nonzero()[:, 0]
    left = survivors(model.attanchor_plan, batch["input_ids"] == IMAGE)[0, slots]
    text = model.get_input_embeddings()(batch["input_ids"][0, torch.isfinite(model.attanchor_plan.score[0])])
    relevance = torch.nn.functional.cosine_similarity(rows[:, None], text[None], dim=-1).amax(1)
    best = [int(relevance.masked_fill(cells != cell, -2).argmax()) for cell in range(5)]
    assert left.nonzero()[:, 0].tolist() == sorted(best)
