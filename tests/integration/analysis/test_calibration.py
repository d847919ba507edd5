"""tau for a wanted fraction: measured before training, kept while the projector drifts, stored and drawn."""

from __future__ import annotations

import dataclasses
import functools
import json

import pytest
import torch
import training_toy
from PIL import Image

from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm import AttAnchorConfig, attach, cli, load_settings, save_settings
from attanchor_vlm.analysis import calibrate as calibration
from attanchor_vlm.analysis.calibrate import Scores
from attanchor_vlm.data.batches import Collator
from attanchor_vlm.data.rows import read_rows, samples
from attanchor_vlm.model import load as loading
from attanchor_vlm.model.attach import base_of
from attanchor_vlm.training import checkpoints
from attanchor_vlm.training import run as train
from attanchor_vlm.training.config import TrainConfig
from attanchor_vlm.training.tau import RunningQuantile


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return training_toy.write_world(tmp_path_factory, train=(12, 4), val=(2, 1))


OPTIONS = {"calibration_samples": 32, "batch_size": 8}
settings = functools.partial(training_toy.settings, **OPTIONS)
run = functools.partial(training_toy.run, **OPTIONS)


def steps(result, key):
    return [line[key] for line in result.log if "loss" in line]


# --- Measuring. ------------------------------------------------------------------------------------------------------


def scores(*rows, num_candidates=None):
    return Scores(tuple(torch.tensor(row) for row in rows), num_candidates or sum(map(len, rows)))


@pytest.mark.parametrize(
    ("fraction", "tau"), [(0.25, 0.7), (0.5, 0.45), (0.75, 0.05), (1.0, -0.105), (9.0, -0.105), (1e-9, 0.85)]
)
def test_the_threshold_lies_between_the_last_wanted_score_and_the_next(fraction, tau):
    found = scores([0.9, 0.0], [0.5, 0.6, -0.1, 0.1, 0.4, 0.8])
    assert found.threshold(fraction) == pytest.approx(tau, abs=1e-4)
    wanted = min(max(round(fraction * 8), 1), 8)
    assert int(found.inserted(found.threshold(fraction)).sum()) == wanted


def test_the_threshold_never_reaches_one():
    assert scores([1.0, 1.0]).threshold(0.5) == calibration.HIGHEST_TAU


def test_a_budget_bounds_every_sample():
    found = scores([0.9, 0.8, 0.7, 0.1], [0.9, 0.1, 0.0], num_candidates=20)
    assert found.inserted(0.5).tolist() == [3, 1]
    assert found.inserted(0.5, max_anchors=2).tolist() == [2, 1]
    assert found.fraction(0.5, max_anchors=2) == pytest.approx(3 / 20)
    summary = calibration.summary(found, 0.5, wanted=0.2, max_anchors=2)
    assert summary["fraction"] == 0.15
    assert summary["anchors_per_sample"] == {"mean": 1.5, "max": 2}


@pytest.mark.parametrize(("direction", "fraction"), [("text_into_image", 0.2), ("image_into_text", 0.5)])
def test_a_model_with_the_measured_tau_inserts_the_fraction(world, direction, fraction):
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    before = AttAnchorConfig(tau=0.3, direction=direction)
    attach(model, before)
    rows, _ = read_rows(world / "train.json", world / "images")
    some = list(samples(rows, "each"))[:24]
    collate = Collator(processor, "each")
    found = calibration.measure_scores(model, collate, some, batch_size=5)
    assert model.attanchor_config == before
    assert model.attanchor_calls == 0  # the guard of training counts on it

    attach(model, dataclasses.replace(before, tau=found.threshold(fraction)))
    with torch.no_grad():
        batch = collate(some)
        model(**batch)
    inserted = int(model.attanchor_plan.is_anchor.sum())
    assert inserted == round(fraction * found.num_candidates) == int(found.inserted(model.attanchor_config.tau).sum())
    assert found.num_candidates == int(batch["anchor_mask"].sum())


def test_rows_of_text_alone_cannot_be_measured():
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    attach(model, AttAnchorConfig(tau=0.3))
    with pytest.raises(ValueError, match="no sample has an image"):
        calibration.measure_scores(model, Collator(processor, "each"), [])
    assert model.attanchor_config.tau == 0.3


# --- The running quantile. -------------------------------------------------------------------------------------------


def test_the_running_quantile_of_one_step_is_its_quantile():
    values = torch.rand(2000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    running = RunningQuantile(0.1)
    running.add(RunningQuantile.bins(torch.cat([values, torch.tensor([-torch.inf])])), 2000)
    tau = running.tau()
    assert tau == pytest.approx(float(values.quantile(0.9)), abs=1e-3)
    assert int((values >= tau).sum()) == pytest.approx(200, abs=2)
    # Half of the tokens have no score, as where the images come last: of the others twice the part is taken.
    running = RunningQuantile(0.1)
    running.add(RunningQuantile.bins(values), 4000)
    assert int((values >= running.tau()).sum()) == pytest.approx(400, abs=2)


def test_the_running_quantile_forgets():
    running = RunningQuantile(0.5, memory=5)
    low, high = (RunningQuantile.bins(torch.full((100,), value)) for value in (0.1, 0.6))
    for _ in range(10):
        running.add(low, 100)
    assert running.tau() == pytest.approx(0.1, abs=1e-3)
    taus = []
    for _ in range(8):
        running.add(high, 100)
        taus.append(running.tau())
    assert taus[0] < 0.11
    assert taus[-1] == pytest.approx(0.6, abs=1e-3)


def test_the_running_quantile_comes_back_from_json_to_the_last_bit():
    running = RunningQuantile(0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        running.add(RunningQuantile.bins(torch.rand(77, generator=generator)), 77)
    other = RunningQuantile(0.1)
    other.restore(json.loads(json.dumps(running.state())))
    more = RunningQuantile.bins(torch.rand(50, generator=generator))
    for one in (running, other):
        one.add(more, 50)
    assert torch.equal(other.weights, running.weights)
    assert other.tau() == running.tau()


@pytest.mark.parametrize("fraction", [5.0, 0.1])
def test_extreme_scores_give_a_threshold_that_can_be_used(fraction):
    running = RunningQuantile(fraction)
    running.add(RunningQuantile.bins(torch.tensor([1.0, 1.0, -1.0])), 3)
    assert -1 <= running.tau() <= calibration.HIGHEST_TAU
    AttAnchorConfig(tau=running.tau())


# --- In training. ----------------------------------------------------------------------------------------------------


def test_a_fraction_without_keeping_is_measured_once_before_training(world, tmp_path):
    said: list[str] = []
    chosen = settings(world, tmp_path / "run", fraction=0.3, max_steps=2, eval_steps=2, calibration_samples=1000)
    result = train.run(chosen, said.append, progress=False)
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    rows, _ = read_rows(world / "train.json", world / "images")
    some = list(samples(rows, "each"))
    tau, _ = calibration.threshold_for_share(model, processor, some, 0.3, AttAnchorConfig(tau=0.5))
    assert steps(result, "tau") == [tau, tau]
    assert result.tau == load_settings(tmp_path / "run").tau == tau
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["tau"] == tau
    assert any(line.startswith(f"tau {tau:.4f} inserts ") and f" on {len(some)} samples" in line for line in said)


def test_what_a_run_says_that_it_inserts_is_what_it_inserts(world, tmp_path):
    """Within a budget, that is less than was asked for."""
    said: list[str] = []
    options = {"fraction": 0.9, "max_anchors": 1, "calibration_samples": 1000, "max_steps": 1, "eval_steps": 1}
    result = train.run(settings(world, tmp_path / "run", **options), said.append, progress=False)
    model, processor = loading.load_pretrained(str(small_llava.SHIPPED))
    rows, _ = read_rows(world / "train.json", world / "images")
    attach(model, AttAnchorConfig(tau=0.5))
    found = calibration.measure_scores(model, Collator(processor, "each"), samples(rows, "each"))
    share = found.fraction(result.tau, max_anchors=1)
    assert 0.1 < share < 0.3
    count = len(found.of_sample)
    assert f"tau {result.tau:.4f} inserts {share:.1%} of the text tokens, measured on {count} samples" in said


def test_a_running_quantile_keeps_the_share_that_a_fixed_tau_loses(world, tmp_path):
    options = {"lr": 1e-2, "scheduler": "constant", "lora_dropout": 0.0, "max_steps": 26, "eval_steps": 26}
    late = {}
    for keep in (None, "quantile"):
        shares = steps(run(world, tmp_path / str(keep), fraction=0.2, hold_fraction=keep, **options), "inserted_share")
        late[keep] = sum(shares[-8:]) / 8
    assert late["quantile"] == pytest.approx(0.2, abs=0.03)
    assert late[None] < 0.13


def test_tau_is_measured_anew_before_every_epoch(world, tmp_path):
    few, per_epoch = tmp_path / "few.json", 3
    few.write_text(json.dumps(json.loads((world / "train.json").read_text())[:24]))
    assert len(list(samples(read_rows(few, world / "images")[0], "each"))) == 24
    options = {"data": few, "lr": 3e-2, "scheduler": "constant", "eval_steps": 2, "max_steps": 9}
    whole = run(world, tmp_path / "whole", fraction=0.2, hold_fraction="epoch", **options)
    taus = steps(whole, "tau")
    by_epoch = [taus[start : start + per_epoch] for start in range(0, len(taus), per_epoch)]
    assert [len(set(epoch)) for epoch in by_epoch] == [1, 1, 1]
    assert len({epoch[0] for epoch in by_epoch}) == 3
    # What the adapter is saved with is what it was validated with.
    best = min((line["eval_loss"], line["step"]) for line in whole.log if "eval_loss" in line)[1]
    assert whole.tau == taus[best - 1] == load_settings(tmp_path / "whole").tau

    # In the middle of the second epoch, nothing is measured when the run goes on.
    run(world, tmp_path / "parts", fraction=0.2, hold_fraction="epoch", **{**options, "max_steps": 4})
    said: list[str] = []
    again = settings(world, tmp_path / "parts", fraction=0.2, hold_fraction="epoch", resume=True, **options)
    rest = train.run(again, said.append, progress=False)
    assert steps(rest, "tau") == taus
    assert [line.partition(":")[0] for line in said if " inserts " in line] == ["epoch 3"]


def test_the_adapter_keeps_the_tau_of_its_own_checkpoint(world, tmp_path):
    """The best weights may be older than the last tau."""
    options = {"lr": 0.02, "scheduler": "constant", "max_steps": 4, "eval_steps": 1}
    result = run(world, tmp_path / "run", fraction=0.2, hold_fraction="quantile", **options)
    losses = {line["step"]: line["eval_loss"] for line in result.log if "eval_loss" in line}
    best = min(losses, key=losses.get)
    assert best < 4
    assert result.tau == load_settings(tmp_path / "run").tau == steps(result, "tau")[best]  # of the step behind it
    assert result.tau != checkpoints.read_state(tmp_path / "run" / "checkpoint-4")["tau"]
    assert base_of(result.model).attanchor_config.tau == result.tau


# --- The command. ----------------------------------------------------------------------------------------------------


def command(world, *more):
    options = ["--model", small_llava.SHIPPED, "--data", world / "train.json", "--images", world / "images"]
    return ["calibrate", *(str(word) for word in (*options, "--samples", 12, *more))]


def test_calibrate_prints_draws_and_stores(world, tmp_path, capsys):
    folder, picture = tmp_path / "adapter", tmp_path / "scores.png"
    folder.mkdir()
    more = ("--fraction", 0.3, "--max-anchors", 1, "--plot", picture, "--save", folder)
    assert cli.main(command(world, *more, "--json")) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["wanted"] == 0.3
    assert found["samples"] == 12
    assert found["anchors_per_sample"]["max"] == 1
    assert found["fraction"] < 0.3  # the budget takes some away
    assert list(found["quantiles"]) == ["5%", "25%", "50%", "75%", "95%"]
    stored = load_settings(folder)
    assert (stored.tau, stored.max_anchors, stored.direction) == (found["tau"], 1, "text_into_image")
    assert stored.special_token_ids  # whole settings, as training saves them
    width, height = Image.open(picture).size
    assert width > 1000 > height > 300

    # Another direction's threshold means nothing to these settings.
    assert cli.main(command(world, "--direction", "image_into_text", "--save", folder)) == 1
    assert "direction was 'text_into_image' and is 'image_into_text'" in capsys.readouterr().err
    assert load_settings(folder) == stored
    # Written by hand, without what the processor says.
    save_settings(AttAnchorConfig(tau=0.9), folder)
    assert cli.main(command(world, "--save", folder)) == 0
    assert load_settings(folder).tau < 0.9
    capsys.readouterr()
    assert cli.main(command(world, "--fraction", "2")) == 1
    assert capsys.readouterr().err.startswith("error: fraction is 2.0; it should be at most 1")
    assert cli.main(command(world, "--fraction", "2", "--direction", "image_into_text")) == 0


def test_quantiles_of_more_scores_than_torch_takes():
    found = Scores((torch.zeros(2**24), torch.ones(1)), num_candidates=2**24)
    assert set(calibration.summary(found, 0.5, wanted=0.1, max_anchors=None)["quantiles"].values()) == {0.0}


@pytest.fixture
def configured(monkeypatch):
    """The configurations with which `attanchor train` would train."""
    seen = []
    train = "attanchor_vlm.cli.training._train"
    monkeypatch.setattr(train, lambda given: seen.append(TrainConfig.from_preset("tinyllava-1b", **given)))
    return seen


def test_train_takes_what_calibrate_stored_beside_the_model(tmp_path, capsys, configured):
    model = tmp_path / "model"
    model.mkdir()
    for file in small_llava.SHIPPED.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    save_settings(AttAnchorConfig(tau=0.44, max_anchors=3, keep=0.5), model)
    base = ["train", "--model", str(model), "--data", "d.json", "--images", "i", "--output", "o"]
    for more in ([], ["--tau", "0.2"], ["--max-anchors", "5"], ["--direction", "image_into_text"]):
        assert cli.main([*base, *more]) == 0
    found = [(config.tau, config.max_anchors, config.keep) for config in configured]
    assert found == [(0.44, 3, 0.5), (0.2, None, None), (0.44, 5, 0.5), (0.12, None, None)]
    assert "tau 0.44 and max_anchors 3 and keep 0.5, from" in capsys.readouterr().out


def test_a_stored_tau_of_content_words_brings_them_along(tmp_path, configured):
    """A threshold is that of the tokens that it was measured on."""
    base = ["train", "--model", str(tmp_path), "--data", "d.json", "--images", "i", "--output", "o"]
    words = tmp_path / "words.txt"
    words.write_text("the\n")
    save_settings(AttAnchorConfig(tau=0.44, content_words=True), tmp_path)
    for more in ([], ["--content-words"], ["--function-words", str(words)], ["--tau", "0.2"]):
        assert cli.main([*base, *more]) == 0
    save_settings(AttAnchorConfig(tau=0.44), tmp_path)
    assert cli.main([*base, "--content-words"]) == 0
    found = [(config.tau, config.content_words) for config in configured]
    assert found == [(0.44, True), (0.44, True), (0.12, ("the",)), (0.2, False), (0.12, True)]


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["--fraction", "0"], 1, "fraction is 0.0; it should be greater than 0"),
        (["--plot", "scores.txt"], 2, "scores.txt should end in .png, .pdf or .svg"),
        (["--plot", f"{__file__}/scores.png"], 1, "scores.png cannot be written: "),
        (["--plot", "{folder}"], 2, "scores.png is a folder; give the name of a picture"),
        (["--fraction", "10", "--direction", "text_into_image"], 1, "fraction is 10.0; it should be at most 1"),
        (["--save", "gone"], 1, "gone is not a folder; --save should name"),
    ],
)
def test_calibrate_refuses_before_it_loads_anything(world, tmp_path, capsys, monkeypatch, more, code, message):
    monkeypatch.setattr(loading, "load_pretrained", None)
    folder = tmp_path / "scores.png"
    folder.mkdir()
    assert cli.main(command(world, *(word.format(folder=folder) for word in more))) == code
    assert message in capsys.readouterr().err


def test_one_of_tau_and_fraction(capsys):
    arguments = ["train", "--model", "m", "--data", "d", "--output", "o", "--tau", "0.1", "--fraction", "0.1"]
    assert cli.main(arguments) == 2
    assert "give one of --tau and --fraction" in capsys.readouterr().err
