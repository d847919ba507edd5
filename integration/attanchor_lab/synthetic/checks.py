"""What the smoke size asserts: that the laboratory measures what it says, before any figure of it is believed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from attanchor_lab.scenes import questions
from attanchor_lab.scenes.questions import LENGTH
from attanchor_lab.synthetic import model as models
from attanchor_lab.synthetic import training
from attanchor_lab.synthetic.arms import ARMS, Asker, Batch
from attanchor_lab.synthetic.plan import Condition, LabPlan
from attanchor_vlm.model.attach import detach
from attanchor_vlm.records import Row


class CheckError(ValueError):
    """The laboratory does not do what it says."""


def run(plan: LabPlan, rows: list[Row], device: str, say: Callable[[str], None] = print) -> None:
    """Check the plan's runs, and every arm's wiring on an untrained model of the first condition.

    Raises:
        CheckError: naming the first check that fails.
    """
    condition = plan.settings[0]
    _runs(plan, rows)
    say(f"runs: {sum(row['kind'] == 'run' for row in rows)} done, all losses finite")
    say(f"matching: {_matching(rows)}")
    model, batch = _untrained(condition, device)
    identity(model, batch)
    say("identity: at tau 1 the attached model gives the untouched model's logits, bit for bit")
    same_as_attach(model, batch)
    say("placement: with the matched hosts it builds what `attach` builds, bit for bit")
    for name in ARMS:
        wiring(name, model, batch)
    say(f"wiring: {len(ARMS)} arms put their copies where they say")


def _fail_unless(holds: bool, message: str) -> None:
    if not holds:
        raise CheckError(f"the laboratory's check failed: {message}")


def _runs(plan: LabPlan, rows: list[Row]) -> None:
    done = {(row["setting"], row["arm"], row["seed"]) for row in rows if row["kind"] == "run" and _is_done(row)}
    wanted = {(condition.name, arm, seed) for condition in plan.settings for arm, seed in condition.runs()}
    failed = [row for row in rows if row["kind"] in ("run", "start") and not _is_done(row)]
    _fail_unless(not failed, f"{failed[0].get('error') if failed else ''}")
    _fail_unless(done >= wanted, f"{sorted(wanted - done)[:1]} was not run")


def _is_done(row: Row) -> bool:
    return row["status"] == "done"


def _matching(rows: list[Row]) -> str:
    """With the alignment loss, words find patches that hold them, and anchors therefore stand there."""
    row = next(row for row in rows if row["kind"] == "run" and row["arm"] == "t2i" and row["settings"]["alignment"])
    found = next(iter(row["test"].values()))["matching"]
    _fail_unless(found["hit"] > 0.75, f"only {found['hit']:.2f} of the words match a patch that holds them")
    _fail_unless(found["precision"] > 0.5, f"only {found['precision']:.2f} of the anchors stand at a true patch")
    return f"{found['hit']:.2f} of the words find a patch that holds them (chance {found['chance']:.2f})"


def _untrained(condition: Condition, device: str) -> tuple[Any, Batch]:
    torch.manual_seed(0)
    model: Any = models.build(condition.world, condition.shape)
    model = model.to(device).eval()
    with torch.no_grad():
        return model, training.new_batch(condition, model, 8, 1, training.generator_for(device, 0, 99))


@torch.no_grad()
def identity(model: Any, batch: Batch) -> None:
    """tau >= 1 is the untouched model, for every arm that `attach` serves; and that one sees its images."""
    inputs = {"input_ids": batch.ids, "attention_mask": torch.ones_like(batch.ids), **batch.images}
    untouched = detach(model)(use_cache=False, **inputs).logits[:, -1]
    rows = model.get_input_embeddings()(batch.ids)
    rows = rows.masked_scatter(batch.is_image[..., None], batch.features.to(rows.dtype))
    merged = model(inputs_embeds=rows, attention_mask=inputs["attention_mask"], use_cache=False).logits[:, -1]
    _fail_unless(torch.allclose(untouched, merged, atol=1e-4), "the untouched model does not see its images")
    for name in ("plain", "t2i", "t2i-inherit", "i2t"):
        logits = Asker(model, ARMS[name], 1.0, _generator(batch))(batch).logits
        _fail_unless(torch.equal(logits, untouched), f"{name} at tau 1 is not the untouched model")


@torch.no_grad()
def same_as_attach(model: Any, batch: Batch) -> None:
    """The controls' own assembling, given the hosts that matching finds, is `attach`."""
    for name in ("t2i", "t2i-inherit"):
        asker = Asker(model, ARMS[name], -1.0, _generator(batch))
        scores = asker(batch).built.score
        asker.tau = float(scores[torch.isfinite(scores)].median())  # about half of the words
        attached, plan = asker(batch), model.attanchor_plan
        placed = asker.placed(batch)
        for field in ("source", "is_anchor", "attention_mask", "host", "position_ids"):
            same = torch.equal(getattr(placed, field), getattr(plan, field))
            _fail_unless(same, f"{name}: {field} differs from attach")
        output = detach(model)(
            inputs_embeds=placed.embeds,
            attention_mask=placed.attention_mask,
            position_ids=placed.position_ids,
            use_cache=False,
        )
        _fail_unless(torch.equal(output.logits, attached.output.logits), f"{name}: logits differ from attach")


@torch.no_grad()
def wiring(name: str, model: Any, batch: Batch) -> None:
    """An arm's prompt holds the plain prompt in order, or what it keeps of it, and its copies where the arm says."""
    arm = ARMS[name]
    asker = Asker(model, arm, 1.0, _generator(batch))
    if arm.has_tau:
        asker.tau = -1.0  # every candidate
    answered = asker(batch)
    _fail_unless(bool(torch.isfinite(answered.logits).all()), f"{name}: the logits are not finite")
    source, is_anchor, host = answered.built.source, answered.built.is_anchor, answered.built.host
    slots = batch.ids.shape[1]
    left = batch.patches if arm.keep is None else min(int(arm.keep), batch.patches)
    own = [row[(row >= 0) & ~copied] for row, copied in zip(source, is_anchor, strict=True)]
    whole = all(len(row) == slots - batch.patches + left and bool((row.diff() > 0).all()) for row in own)
    _fail_unless(whole, f"{name}: the prompt is not whole, or its image tokens are not {left}")
    there = torch.stack([torch.isin(torch.arange(slots, device=source.device), row) for row in own])
    _fail_unless(bool((there | batch.is_image).all()), f"{name}: a token that is no image token is gone")
    _fail_unless(bool(there.gather(1, host.clamp(min=0))[host >= 0].all()), f"{name}: a host is gone")
    words = batch.ids[:, -LENGTH:]
    count = is_anchor.sum(1)
    content = questions.is_content(words).sum(1)
    if arm.copies == "image":
        _fail_unless(bool((count == batch.patches).all()), f"{name}: not every patch is copied")
        _fail_unless(bool((host[host >= 0] > batch.patches).all()), f"{name}: a copy is not behind a word")
        return
    patches = (host >= 1) & (host <= batch.patches)
    if arm.copies == "front":
        first, question = source[:, 1 : 1 + LENGTH], torch.stack(own)[:, -LENGTH:]
        _fail_unless(bool((host[:, -LENGTH:] == 0).all()), f"{name}: the question is not behind the first token")
        _fail_unless(bool((first == question).all()), f"{name}: the question is not in front, in order")
    elif arm.copies == "end":
        _fail_unless(bool((host[:, -LENGTH:] == batch.patches).all()), f"{name}: copies are not behind the image")
    elif arm.copies == "true":
        holds = questions.holders(batch.scenes, words)
        patch = host[:, -LENGTH:] - 1
        right = holds.gather(-1, patch.clamp(min=0)[..., None])[..., 0]
        _fail_unless(bool((right == (patch >= 0)).all()), f"{name}: an anchor stands at a wrong patch")
        _fail_unless(bool(((patch >= 0) == holds.any(-1)).all()), f"{name}: a word that is there has no anchor")
    elif arm.copies == "none":
        _fail_unless(bool((count == 0).all()), f"{name} inserts something")
    else:
        wanted = content if arm.content_only else torch.full_like(count, LENGTH)
        wanted = wanted.clamp(max=left)  # no more anchors than there are hosts that may stay
        _fail_unless(bool((count == wanted).all()), f"{name}: not every candidate is copied")
        _fail_unless(bool((patches == (host >= 0)).all()), f"{name}: a copy is not behind a patch")


def _generator(batch: Batch) -> torch.Generator:
    return training.generator_for(str(batch.ids.device), 5)
