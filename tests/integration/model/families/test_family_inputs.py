"""What some families have besides: newline features, images per sample, token types; and videos, which are refused."""

from __future__ import annotations

import pytest
import torch
from builders import BY_NAME, FAMILIES, features
from shared import NEWLINES, attached, both_directions, check_generates
from tiny import difference
from tiny_families import IMAGE, VOCABULARY

# --- Newline rows. ---


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
    check_generates(family, model, batch)


# --- Bidirectional masks, videos. ---


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
