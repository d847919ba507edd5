"""What the eleven families are tested for, on those that are served by facts alone: `pytest -m nightly`, by hand."""

from __future__ import annotations

import pytest
import test_families
import test_family_generate
import torch
from shared import GREEDY, LOGITS, MIXED, greedy_by_forward
from table_families import TABLE
from test_family_generate import CACHES
from tiny import difference, plain

from attanchor_vlm.model.config import DIRECTIONS

pytestmark = pytest.mark.nightly

# What the plain models of these do without anchors as with them; `test_the_plain_model_does_so_too` shows it.
ROUNDED = ("minicpm_ocr", "qwen3_5")  # linear attention, whose chunks lie otherwise in other lengths
ALONE = ("minicpmv4_6", "minicpmv4_7", "hunyuan_vl", *ROUNDED)  # not what they are in a batch
CACHED = ("qwen3_vl_moe", "qwen3_omni_moe_thinker")  # not what they are without a cache
NO_BEAMS = ("llama4",)
OTHERWISE = {
    **dict.fromkeys(("inkling2", "inkling_mm_model"), ("cache_implementation",)),
    **dict.fromkeys(("molmo2", "ovis2", "llama4", "granite4_vision"), ("prefill_chunk_size",)),
    "gemma4_unified": ("cache_implementation", "prefill_chunk_size"),
}
# Images of one token, or two, make too few anchors to tell.
FEW_TOKENS = ("got_ocr2", "pp_chart2table", "unlimited_ocr")

every_family = pytest.mark.parametrize("family", TABLE, ids=str)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def _skip(family, names, why="the plain model does so, too"):
    if family.name in names:
        pytest.skip(why)


def _skip_few(family, direction, *more):
    _skip(family, (*FEW_TOKENS, *more) if direction == "image_into_text" else (), "too few anchors to tell")


@both_directions
@every_family
def test_hosts(family, direction):
    _skip_few(family, direction)
    test_families.test_hosts_are_the_best_matches_by_the_models_own_features(family, direction)


@both_directions
@every_family
def test_batches(family, direction):
    _skip(family, ALONE)
    _skip_few(family, direction, "step3p7")
    test_families.test_a_batch_is_its_samples_alone(family, "ids", "left", direction)


@both_directions
@pytest.mark.parametrize("family", [family for family in TABLE if len(family.routes) > 1], ids=str)
def test_both_routes(family, direction):
    test_families.test_both_routes_agree(family, "right", direction)


@every_family
def test_beams(family):
    _skip(family, (*CACHED, *NO_BEAMS))
    test_family_generate.test_the_score_of_beams_is_that_of_an_uncached_forward(family, "ids")


@both_directions
@every_family
def test_generation(family, direction):
    _skip(family, CACHED)
    if direction == "image_into_text":  # 2.6e-5 off, where the plain model's rounding reaches 1.5e-5
        _skip(family, ("minicpm_ocr",), "rounds by more than the test allows")
    for route in family.routes:
        test_family_generate.test_cached_generation_agrees_with_uncached_forwards(family, route, direction)


@every_family
def test_nothing_to_insert_and_other_caches(family):
    test_families.test_tau_one_is_the_untouched_model(family)
    _skip(family, CACHED)
    test_family_generate.other_ways_change_nothing(family, "ids", OTHERWISE.get(family.name, ()))


# --- The plain model. ---


def _alone(model, family) -> float:
    """How far logits of a batch are from those of its samples."""
    found = []
    for images in ([1, 2, 0, 1], [3, 2, 0, 1]):
        batch, alone = family.prompts(images, "left")
        together, real = model(**plain(batch)).logits, batch["attention_mask"].bool()
        found += [difference(together[row][real[row]], model(**plain(one)).logits[0]) for row, one in enumerate(alone)]
    return max(found)


def _cached(model, family) -> float:
    """How far logits of `generate` are from those of forwards of the whole sequence."""
    batch = plain(family.prompts(MIXED, "left")[0])
    logits = model.generate(**batch, **GREEDY, **LOGITS).logits
    return difference(torch.stack(logits, 1), greedy_by_forward(family, model, batch)[1])


def _otherwise(model, family, **option) -> float:
    """How far logits of `generate` are from those with an option of it."""
    batch = plain(family.prompts(MIXED, "left")[0])
    logits = (torch.stack(model.generate(**batch, **GREEDY, **LOGITS, **more).logits) for more in ({}, option))
    return difference(*logits)


def _with_its_caches(model, family) -> float:
    return min(_otherwise(model, family, **{name: CACHES[name]}) for name in OTHERWISE[family.name])


SHOWN = {
    **dict.fromkeys(ALONE, _alone),
    **dict.fromkeys(CACHED, _cached),
    **{f"{name}-beams": lambda model, family: _otherwise(model, family, num_beams=3) for name in NO_BEAMS},
    **dict.fromkeys(OTHERWISE, _with_its_caches),
}
RAISED = {
    "llama4": "pooler_output",
    "llama4-beams": "Image features and image tokens do not match",
    "granite4_vision": "pooler_output",
    "ovis2": "'NoneType' object is not subscriptable",
    "inkling_mm_model": "must match the size of tensor b",
}


@pytest.mark.parametrize("shown", SHOWN)
@torch.no_grad()
def test_the_plain_model_does_so_too(shown):
    family = next(family for family in TABLE if family.name == shown.partition("-")[0])
    if shown in RAISED:
        with pytest.raises(Exception, match=RAISED[shown]):
            SHOWN[shown](family.model(), family)
    else:
        assert SHOWN[shown](family.model(), family) > 2e-5  # which is what the tests with anchors allow
