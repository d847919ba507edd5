"""Phi-4 Multimodal, whose forward takes no encoded images: what its first layer is given, and what its adapter adds."""

from __future__ import annotations

import pytest
import torch
from table_families import phi4_multimodal
from tiny import difference, plain
from tiny_families import BOS, IMAGE, PAD, SIDE

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.training.lora import add_lora


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = phi4_multimodal().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1)
        model.lm_head.weight[:8] = 0  # a generated placeholder has no image
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, PAD
    return model


@pytest.fixture
def batch():
    """Two images, one of two crops side by side and one of two on top of each other; the second prompt is shorter."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for high, wide, words in ((1, 2, 8), (2, 1, 4)):
        tokens = 2 * high * (2 * wide + 1) + 1 + 2 * (2 + 1)
        rows.append([BOS, *[IMAGE] * tokens, *torch.randint(8, 64, (words,), generator=generator).tolist()])
    length = max(map(len, rows))
    return {
        "input_ids": torch.tensor([[PAD] * (length - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows]),
        "image_pixel_values": torch.randn(2, 3, 3, SIDE, SIDE, generator=generator),
        "image_sizes": torch.tensor([[SIDE, 2 * SIDE], [2 * SIDE, SIDE]]),
        "image_attention_mask": torch.ones(2, 3, 4, 4),
    }


@pytest.mark.parametrize("direction", ["text_into_image", "image_into_text"])
def test_its_first_layer_is_given_the_gathered_plain_prompt(model, batch, direction):
    calls = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: calls.append(args[0]))
    with torch.no_grad():
        model(**plain(batch))
        attach(model, AttAnchorConfig(tau=-1, direction=direction))(**batch)  # which checks itself
    plan = model.attanchor_plan
    real = plan.source >= 0
    expected = torch.stack([own[source] for own, source in zip(calls[0], plan.source.clamp(min=0), strict=True)])
    assert int(plan.is_anchor.sum()) >= 12
    assert difference(expected[real], calls[-1][real]) < 1e-5
    # Two learned rows stand behind lines and between the views of an image.
    adapter = adapter_for(model)
    silent = adapter.silent_features(model, adapter.encode_images(model, batch))
    assert int(silent.sum()) == (2 + 1 + 2) + (4 + 1 + 2)
    is_image = adapter.placeholders(model, batch["input_ids"])
    slots = torch.zeros_like(is_image)
    for row, (source, anchor, host) in enumerate(zip(plan.source, plan.is_anchor, plan.host, strict=True)):
        slots[row, source[anchor] if direction == "image_into_text" else host[host >= 0]] = True
    assert slots.any()
    assert not (slots[is_image] & silent).any()


def test_cached_generation_agrees_with_uncached_forwards(model, batch):
    attach(model, AttAnchorConfig(tau=-1))
    tokens = model.generate(**batch, max_new_tokens=3, do_sample=False)[:, -3:]
    mask = torch.cat([batch["attention_mask"].bool() & (batch["input_ids"] >= 8), torch.zeros(2, 2).bool()], 1)
    ones = torch.ones(2, 2).long()
    longer = {"input_ids": torch.cat([batch["input_ids"], tokens[:, :2]], 1)}
    longer |= {"attention_mask": torch.cat([batch["attention_mask"], ones], 1), "anchor_mask": mask}
    with torch.no_grad():
        logits = model(**{**batch, **longer}).logits
    assert torch.equal(logits[:, -3:].argmax(-1), tokens)


def test_image_tokens_are_dropped_and_anchors_bounded_image_by_image(model, batch):
    """The second image's last lines are padding: 3 x 2 tokens of its crops, and 2 x 2 of the whole."""
    batch["image_attention_mask"][1, 2, 2:] = 0
    ids, image = batch["input_ids"], batch["input_ids"] == IMAGE
    batch["input_ids"] = ids.masked_fill(image & (image.cumsum(-1) <= 3) & (torch.arange(2) == 1)[:, None], 9)
    adapter = adapter_for(model)
    assert adapter.token_shapes(model, batch, 22) == [[(2, 4), (2, 2)], [(3, 2), (2, 2)]]
    rows, is_image = adapter.encode_images(model, batch), adapter.placeholders(model, batch["input_ids"])
    content = torch.zeros_like(is_image).masked_scatter(is_image, ~adapter.silent_features(model, rows))
    attach(model, AttAnchorConfig(tau=1, keep=0.5))
    with torch.no_grad():
        model(**batch)
    left = [content[row, source[source >= 0]].sum() for row, source in enumerate(model.attanchor_plan.source)]
    assert [int(count) for count in left] == [12 // 2, 10 // 2]
    attach(model, AttAnchorConfig(tau=-1, max_anchors_per_frame=1))
    with torch.no_grad():
        model(**batch)
    assert model.attanchor_plan.is_anchor.sum(-1).tolist() == [1, 1]


def test_sound_beside_images_is_refused(model, batch):
    attach(model, AttAnchorConfig(tau=-1))
    with pytest.raises(ValueError, match="audio_input_features is given beside images"):
        model(**batch, audio_input_features=torch.randn(1, 16, 16))


def test_lora_leaves_its_encoders_alone():
    with torch.device("meta"):
        adapted = add_lora(phi4_multimodal(), rank=4, alpha=8, dropout=0.0).get_base_model()
    names = {name for name, module in adapted.named_modules() if hasattr(module, "lora_A")}
    layers = {f"model.layers.{layer}.{part}" for layer in range(2) for part in ("self_attn.qkv_proj", "mlp.down_proj")}
    assert layers < names
    assert {name for name in names if "embed_tokens_extend" in name} == {
        f"model.embed_tokens_extend.image_embed.img_projection_{way}" for way in ("up", "down")
    }
