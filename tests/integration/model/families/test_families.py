"""Every family of models, attached: nothing to insert, hosts, routes, batches.

`builders.py` has the models and their prompts, `shared.py` what the tests share. What does not depend on the family is
tested one folder up, on LLaVA.
"""

from __future__ import annotations

import re
from pathlib import Path

import family_pages
import pytest
import torch
from builders import FAMILIES, features, separators
from shared import (
    GREEDY,
    LOGITS,
    MIXED,
    attached,
    both_directions,
    both_sides_and_directions,
    check_nothing_allowed,
    check_routes_agree,
    check_samples_alone,
    every_family,
    every_route,
    tau_for,
)
from tiny import difference, plain
from tiny_families import IMAGE
from torch.nn import functional as F

from attanchor_vlm import AttAnchorConfig, attach
from attanchor_vlm.model.families import adapter_for

HERE = Path(__file__).parent
PAGE = HERE.parents[3] / "docs" / "families.md"
ON_THE_PAGE = {"test_families"} | {
    f"test_family_{part}" for part in ("generate", "calls", "positions", "inputs", "keep", "video")
}


# --- Nothing to insert. ---


@every_family
def test_tau_one_is_the_untouched_model(family):
    model, batch = family.model(), family.with_labels(family.prompts(MIXED)[0])
    question = family.prompts([1, 2], "left")[0]
    before, generated = model(**plain(batch)), model.generate(**plain(question), **GREEDY)
    attach(model, AttAnchorConfig(tau=1))
    after = model(**batch)
    assert torch.equal(before.logits, after.logits)
    assert torch.equal(before.loss, after.loss)
    assert torch.equal(model.generate(**question, **GREEDY), generated)
    assert model.attanchor_calls == 0


@both_sides_and_directions
@every_route
def test_nothing_allowed_is_the_untouched_model_but_for_rounding(family, route, side, direction):
    check_nothing_allowed(family, route, side, direction)


@every_route
def test_nothing_allowed_generates_as_the_untouched_model(family, route):
    model, batch = family.model(), family.prompts(MIXED, "left")[0]
    before = model.generate(**plain(batch), **GREEDY, **LOGITS)
    attach(model, AttAnchorConfig(tau=-1, route=route))
    after = model.generate(**{**batch, "anchor_mask": torch.zeros_like(batch["anchor_mask"])}, **GREEDY, **LOGITS)
    assert model.attanchor_calls == 1
    assert torch.equal(before.sequences, after.sequences)
    assert difference(torch.stack(before.logits), torch.stack(after.logits)) < 1e-4


# --- With anchors. ---


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
        content[ids == IMAGE] = torch.stack([(rows - one).norm(dim=-1) > 1e-4 for one in separators(model)]).all(0)
    plan, inserted = model.attanchor_plan, 0
    for row in range(len(MIXED)):
        texts, images = batch["anchor_mask"][row].nonzero()[:, 0].tolist(), content[row].nonzero()[:, 0].tolist()
        movers, hosts = (texts, images) if direction == "text_into_image" else (images, texts)
        expected = torch.full((ids.shape[1],), -1)
        for mover in movers if hosts else []:
            scores = F.cosine_similarity(embeds[row, mover].double(), embeds[row, hosts].double())
            if float(scores.max()) >= tau_for(family, direction):
                expected[mover] = hosts[int(scores.argmax())]
        assert torch.equal(plan.host[row], expected)
        inserted += int((expected >= 0).sum())
    assert 2 < inserted < int(torch.isfinite(plan.score).sum()) - 2
    assert int(plan.is_anchor.sum()) == inserted


@both_sides_and_directions
@pytest.mark.parametrize("family", [family for family in FAMILIES if len(family.routes) > 1], ids=str)
def test_both_routes_agree(family, side, direction):
    check_routes_agree(family, side, direction)


@pytest.mark.parametrize("family", [family for family in FAMILIES if len(family.routes) == 1], ids=str)
def test_a_route_that_the_model_cannot_take_is_refused(family):
    with pytest.raises(ValueError, match=f"route is 'embeds'; for {family} it should be one of 'ids'"):
        attached(family, "embeds", tau=0.1)


@both_sides_and_directions
@every_route
def test_a_batch_is_its_samples_alone(family, route, side, direction):
    check_samples_alone(family, route, side, direction)


# --- The page about them. ---


def test_the_page_lists_every_family_and_names_tests_that_exist():
    page = PAGE.read_text(encoding="utf-8")
    files = {path: re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE) for path in HERE.glob("test_*.py")}
    named = set(re.findall(r"`(test_\w+)`", page))
    assert named <= {name for names in files.values() for name in names}
    # What is tested of every family has its place on the page.
    expected = {name for path, names in files.items() for name in names if path.stem in ON_THE_PAGE}
    assert expected - named == {"test_the_page_lists_every_family_and_names_tests_that_exist"}
    for whole in (path.read_text(encoding="utf-8") for path in family_pages.PAGES):
        assert family_pages.filled(whole) == whole, "python tests/integration/support/family_pages.py writes it anew"
    listed = re.findall(r"^\| `(\w+)` \| ([\w, ]+) \| (\w+) \| ✓ \| ✓", page, re.MULTILINE)
    adapters = {family.name: adapter_for(family.model()) for family in FAMILIES}
    expected = [(name, ", ".join(adapter.routes), adapter.positions) for name, adapter in adapters.items()]
    assert listed == expected
