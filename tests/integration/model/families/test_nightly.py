"""What the eleven families are tested for, on those that are served by facts alone: `pytest -m nightly`, by hand."""

from __future__ import annotations

import pytest
import test_families
import test_family_generate
from table_families import TABLE

from attanchor_vlm.model.config import DIRECTIONS

pytestmark = pytest.mark.nightly

# What the plain models of these seem to do without anchors as with them; not shown of qwen3_vl_moe,
# qwen3_omni_moe_thinker, minicpmv4_6, minicpmv4_7, hunyuan_vl and granite4_vision.
ALONE = {"minicpmv4_6", "minicpmv4_7", "minicpm_ocr", "hunyuan_vl", "qwen3_5"}  # not what they are in a batch
CACHED = {"qwen3_vl_moe", "qwen3_omni_moe_thinker"}  # not what they are without a cache
NO_BEAMS = {*CACHED, "llama4"}
PREFILL = {*CACHED, "gemma4_unified", "molmo2", "ovis2", "llama4", "granite4_vision"}  # static caches, or chunks
FEW_TOKENS = {"got_ocr2", "pp_chart2table", "step3p7", "unlimited_ocr"}  # one-token images: anchors too few to tell
LONG = {"deepseek_ocr2"}  # whose images in the text are longer than a tiny context

every_family = pytest.mark.parametrize("family", TABLE, ids=str)
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


def _skip(family, names, direction="text_into_image"):
    if family.name in names or (direction == "image_into_text" and family.name in FEW_TOKENS | LONG):
        pytest.skip("a limit of the plain model, as far as is known, or too small a model to tell")


@both_directions
@every_family
def test_hosts(family, direction):
    _skip(family, (), direction)
    test_families.test_hosts_are_the_best_matches_by_the_models_own_features(family, direction)


@both_directions
@every_family
def test_batches(family, direction):
    _skip(family, ALONE, direction)
    test_families.test_a_batch_is_its_samples_alone(family, "ids", "left", direction)


@both_directions
@every_family
def test_both_routes(family, direction):
    _skip(family, () if len(family.routes) > 1 else (family.name,), direction)
    test_families.test_both_routes_agree(family, "right", direction)


@every_family
def test_beams(family):
    _skip(family, NO_BEAMS, "image_into_text")
    test_family_generate.test_the_score_of_beams_is_that_of_an_uncached_forward(family, "ids")


@both_directions
@every_family
def test_generation(family, direction):
    _skip(family, CACHED, direction)
    for route in family.routes:
        test_family_generate.test_cached_generation_agrees_with_uncached_forwards(family, route, direction)


@every_family
def test_nothing_to_insert_and_other_caches(family):
    test_families.test_tau_one_is_the_untouched_model(family)
    _skip(family, PREFILL)
    test_family_generate.test_other_ways_to_prefill_and_to_cache_change_nothing(family, "ids")
