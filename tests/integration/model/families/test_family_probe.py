"""The probe's cosines and the alignment's image tokens in every family: those that the model itself matches with."""

from __future__ import annotations

import checkpoints
import numpy as np
import pytest
import torch
from builders import FAMILIES, FIRST_WORD, Family, features
from PIL import Image

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.analysis.probe_control import permute_projector
from attanchor_vlm.analysis.probe_scores import image_rows, prompt_scores
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import Sample
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.model.families import adapter_for
from attanchor_vlm.model.families.structure import projectors
from attanchor_vlm.model.geometry import patch_boxes
from attanchor_vlm.training.alignment import KEY, Aligner, CaptionLabels, ClipLabels, Votes, image_alignment
from attanchor_vlm.training.alignment.aligner import _check_projector
from attanchor_vlm.training.lora import add_lora

every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)


@every_family
def test_the_best_cosines_are_those_of_the_matching(family: Family):
    batch, _ = family.prompts([1, 2])
    model = attach(family.model(), AttAnchorConfig(tau=-1))
    with torch.no_grad():
        model(**batch)
        arguments = {name: value for name, value in batch.items() if name != "anchor_mask"}
        for row, patches in enumerate(image_rows(model, arguments)):
            chosen = batch["anchor_mask"][row]
            text = model.get_input_embeddings()(batch["input_ids"][row][chosen])
            cosines = torch.cosine_similarity(text[:, None], patches[None], dim=-1)
            assert torch.allclose(cosines.amax(1), model.attanchor_plan.score[row][chosen], atol=1e-5)


@every_family
@pytest.mark.parametrize("tau", [-1.0, 1.0])
def test_the_alignment_sees_the_image_tokens_of_the_step(family: Family, tau: float):
    """With anchors and without; its gradient is that of the loss on the model's own features."""
    batch, _ = family.prompts([1, 0, 2])
    batch = family.with_labels(batch)
    words, right = torch.tensor([FIRST_WORD, FIRST_WORD + 1]), torch.tensor([[1.0, 0], [0, 0], [0, 1]])
    model = attach(family.model(), AttAnchorConfig(tau=tau)).train()
    aligner = Aligner(CaptionLabels(None), weight=0.5)
    with aligner.watching(model):
        output = model(**batch)
        loss = aligner(model, {**batch, KEY: {"words": words, "right": right}}, output)
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert found
    assert not any("language_model" in name or "embed_tokens" in name or "lm_head" in name for name in found)

    other = family.model().train()
    adapter = adapter_for(other)
    counts = adapter.placeholders(other, batch["input_ids"]).sum(-1).tolist()
    own = {name: value for name, value in batch.items() if name not in ("anchor_mask", "labels")}
    rows = adapter.feature_rows(adapter.encode_images(other, own))
    silent = adapter.silent_features(other, rows)
    parts = list(rows.split(counts))
    if silent is not None:
        assert silent.any()
        parts = [part[~hidden] for part, hidden in zip(parts, silent.split(counts), strict=True)]
    expected = 0.5 * image_alignment(parts, other.get_input_embeddings()(words), right)
    expected.backward()
    assert torch.allclose(loss, expected, rtol=1e-5)
    for name, parameter in other.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name


@every_family
def test_a_projector_is_permuted_or_known_to_be_out_of_reach(family: Family):
    """The control's image tokens are the model's own with their features in another order."""
    batch, _ = family.prompts([1, 2])
    model = family.model()
    before = features(model, batch)
    after = features(permute_projector(model, seed=1), batch)
    order = torch.randperm(before.shape[1], generator=torch.Generator().manual_seed(1))
    adapter = adapter_for(model)
    hidden = adapter.silent_features(model, before)
    kept = slice(None) if hidden is None else ~hidden  # newline rows are a parameter of their own
    assert torch.allclose(after[kept], before[kept][:, order], atol=1e-5)
    assert (after[kept] - before[kept]).abs().max() > 0.01


@every_family
def test_where_nothing_of_the_projector_is_trained_alignment_is_refused(family: Family):
    model = add_lora(attach(family.model(), AttAnchorConfig(tau=0.5)), rank=16, alpha=32, dropout=0.0)
    _check_projector(model)
    for name, _ in projectors(base_of(model)):
        base_of(model).get_submodule(name).requires_grad_(False)
    with pytest.raises(SetupError, match="projector is trained, so the alignment has nothing to change"):
        _check_projector(model)


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "internvl", "idefics3", "gemma3"])
def test_probe_and_clip_labels_through_the_familys_own_processor(name, tmp_path, monkeypatch):
    """Two images with another one's questions; CLIP saw one thing in the upper half of each, another in the lower."""
    model, processor = checkpoints.write(tmp_path, name, monkeypatch)
    paths = [tmp_path / f"{number}.png" for number in range(2)]
    for number, path in enumerate(paths):
        checkpoints.picture(number).save(path)
    asked = [
        Sample(n, (("user", "<image>\nIs there a red dog?"), ("assistant", "No.")), (path,))
        for n, path in enumerate(paths)
    ]
    prompts = list(prompt_scores(model, processor, asked, 2))
    assert [len(p.elsewhere) for p in prompts] == [1, 1]
    assert all(set(p.kinds) == {"content", "function", "punctuation"} for p in prompts)

    table = np.zeros((2, 16, 5, 2), np.uint16)
    table[:, :8, 0], table[:, 8:, 0] = (0, 65535), (1, 65535)
    labels = ClipLabels(processor, model, Votes(["red", "dog"], paths, table))
    batch = Collator(processor, "each")(asked)
    made = labels(asked, batch)
    rows = features(model, {k: v for k, v in batch.items() if k != "mm_token_type_ids"})
    assert made["right"].shape == (len(rows), len(made["words"]))
    images = [[Image.open(path).convert("RGB")] for path in paths]
    boxes = [(row, box) for row in range(2) for box in patch_boxes(model, processor, batch, row, images)]
    upper, lower = labels.tokens
    column = {token: index for index, token in enumerate(made["words"].tolist())}
    seen = set()
    for (row, box), right in zip(boxes, made["right"], strict=True):
        if box.pixels is None:
            assert right.abs().max() == 0
            continue
        (_, top, _, bottom), height = box.pixels, images[row][0].height
        above = max(0.0, min(bottom, height / 2) - top) / (bottom - top)
        assert right[column[upper[0]]] == pytest.approx(above, abs=1e-3)
        assert right[column[lower[0]]] == pytest.approx(1 - above, abs=1e-3)
        seen.add(round(above))
    assert seen == {0, 1}
