"""The laboratory: arms that differ in placement alone, training that is the same for all, runs that survive a kill."""

from __future__ import annotations

import dataclasses
import json
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from attanchor_kernels import build_sequence
from attanchor_vlm import cli
from attanchor_vlm.lab import (
    arms,
    checks,
    jobs,
    laboratory,
    measure,
    model,
    placement,
    plans,
    questions,
    rows,
    scenes,
    settings,
    training,
)
from attanchor_vlm.lab.alignment import alignment_loss, match_counts, match_quality
from attanchor_vlm.lab.arms import ARMS, Asker
from attanchor_vlm.lab.questions import Mixture

TOY = settings.Setting(
    "toy",
    "a toy",
    arms=("plain", "t2i"),
    seeds=(0, 1),
    more=("front",),
    more_seeds=1,
    world=scenes.World(4, 4, least=2, most=4, distractors=2),
    shape=model.Shape(width=32, layers=2, heads=2, content=20),
    stage1=settings.Stage1(steps=2, batch=4, each=3, encoder_steps=3),
    stage2=settings.Stage2(steps=3, batch=4),
    test_scenes=6,
)


@pytest.fixture
def untrained():
    return checks._untrained(TOY, "cpu")


# --- Placement. ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("positions", ["sequential", "inherit"])
def test_matched_hosts_give_what_the_operator_builds(positions):
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(3, 7, 16, generator=generator), torch.randn(3, 5, 16, generator=generator)
    built = build_sequence(image, text, 0.2, positions=positions)
    assert 0 < built.is_anchor.sum() < 15
    host = torch.cat([torch.full((3, 7), -1), built.host], 1)
    placed = placement.place(torch.cat([image, text], 1), host, positions)
    for field in ("embeds", "position_ids", "attention_mask", "source", "is_anchor"):
        assert getattr(placed, field).equal(getattr(built, field)), field


def test_copies_stand_right_behind_their_host_in_their_own_order():
    rows_ = torch.arange(6.0).view(1, 6, 1)
    placed = placement.place(rows_, torch.tensor([[-1, -1, -1, 1, 0, 1]]))
    assert placed.source.tolist() == [[0, 4, 1, 3, 5, 2, 3, 4, 5]]
    assert placed.is_anchor.int().tolist() == [[0, 1, 0, 1, 1, 0, 0, 0, 0]]
    assert placed.embeds.flatten().tolist() == [0, 4, 1, 3, 5, 2, 3, 4, 5]


def test_samples_of_different_length_are_padded_on_the_right():
    rows_ = torch.ones(2, 3, 2)
    placed = placement.place(rows_, torch.tensor([[-1, 0, 0], [-1, -1, -1]]), "inherit")
    assert placed.attention_mask.tolist() == [[1] * 5, [1, 1, 1, 0, 0]]
    assert placed.source[1].tolist() == [0, 1, 2, -1, -1]
    assert placed.position_ids.tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]
    assert not placed.embeds[1, 3:].any()


@pytest.mark.parametrize("host", [[[3, -1, -1]], [[-2, -1, -1]]])
def test_a_host_outside_of_the_prompt_is_refused(host):
    with pytest.raises(ValueError, match="host holds"):
        placement.place(torch.ones(1, 3, 2), torch.tensor(host))


def test_the_checks_hold(untrained):
    checks.identity(*untrained)
    checks.same_as_attach(*untrained)
    for name in ARMS:
        checks.wiring(name, *untrained)


def _one_patch_off(rows_, host, positions="sequential", place=placement.place):
    return place(rows_, torch.where(host > 1, host - 1, host), positions)


def test_the_checks_see_a_misplaced_anchor(untrained, monkeypatch):
    monkeypatch.setattr(placement, "place", _one_patch_off)
    with pytest.raises(checks.CheckError, match="differs from attach"):
        checks.same_as_attach(*untrained)
    for name in ("true", "end"):
        with pytest.raises(checks.CheckError, match=name):
            checks.wiring(name, *untrained)


def test_the_checks_see_an_arm_that_inserts_nothing(untrained, monkeypatch):
    monkeypatch.setattr(Asker, "takes_part", lambda self, batch: torch.zeros_like(batch.is_image))
    for name in ("t2i", "random", "front"):
        with pytest.raises(checks.CheckError, match=name):
            checks.wiring(name, *untrained)


def test_true_patches_are_those_of_the_object_asked_for():
    world = TOY.world
    drawn = scenes.draw(world, 200, torch.Generator().manual_seed(0))
    asked = questions.ask(world, drawn, 1, Mixture(), torch.Generator().manual_seed(1)).flat()
    holds = questions.holders(drawn, asked.words)
    patch = placement.true_patches(holds, asked.target, torch.Generator().manual_seed(2))
    content = questions.is_content(asked.words)
    there = (asked.target >= 0)[:, None] & content
    assert patch[there].equal(asked.target[:, None].expand_as(patch)[there])
    assert (patch[~content] == -1).all()
    absent = (asked.target < 0)[:, None] & content
    assert (patch[absent] >= 0).any()
    assert (patch[absent] < 0).any()


# --- Training. -------------------------------------------------------------------------------------------------------


def test_packed_questions_are_answered_as_separate_prompts(untrained):
    made, _ = untrained
    generator = torch.Generator().manual_seed(3)
    drawn = scenes.draw(TOY.world, 3, generator)
    asked = questions.ask(TOY.world, drawn, 4, TOY.mixture, generator)
    pixels = scenes.render(TOY.world, drawn, generator)
    with torch.no_grad():
        features = torch.stack(list(made.get_image_features(pixels, return_dict=True).pooler_output))
        packed = training.packed_answers(made, features, asked.words)
        index = torch.arange(3).repeat_interleave(4)
        batch = arms.encode(made, drawn[index], asked.flat(), pixels[index])
        alone = Asker(made, ARMS["plain"], 1.0, generator)(batch).logits
    assert (packed.flatten(0, 1) - alone).abs().max() < 1e-4


def test_all_arms_of_a_seed_see_the_same_data_from_the_same_weights(monkeypatch):
    seen: dict[str, list] = {}
    new_batch = training.new_batch

    def recorded(setting, base, *more):
        batch = new_batch(setting, base, *more)
        first = not seen[current]
        weights = base.lm_head.weight.detach().clone() if first else None
        seen[current].append((batch.ids, batch.questions.answer, batch.scenes.where, weights))
        return batch

    monkeypatch.setattr(training, "new_batch", recorded)
    monkeypatch.setattr(training, "starting_tau", lambda setting, asker, generator: 0.1)
    state, _ = training.stage1(TOY, 0, "cpu")
    for current in ("plain", "t2i", "random", "true", "i2t"):
        seen[current] = []
        training.stage2(TOY, ARMS[current], 0, state, "cpu")
    for arm, batches in seen.items():
        assert len(batches) == 3
        for ours, theirs in zip(batches, seen["plain"], strict=True):
            assert all(a.equal(b) for a, b in zip(ours[:3], theirs[:3], strict=True)), arm
        assert batches[0][3].equal(state["lm_head.weight"])


@pytest.mark.parametrize("method", ["full", "lora"])
def test_stage_2_trains_what_it_should_and_nothing_else(method):
    setting = dataclasses.replace(TOY, stage2=dataclasses.replace(TOY.stage2, method=method))
    state, _ = training.stage1(setting, 0, "cpu")
    asker, log = training.stage2(setting, ARMS["t2i-inherit"], 0, state, "cpu")
    after = {name.replace(".base_layer", ""): value for name, value in asker.model.state_dict().items()}
    changed = {name for name, value in state.items() if not after[name].equal(value)}
    assert not any("vision_tower" in name for name in changed)
    assert bool(changed) == (method == "full")
    assert 0 < log["trained_parameters"] < sum(value.numel() for value in state.values())
    adapters = [value for name, value in asker.model.state_dict().items() if "lora_B" in name]
    assert any(value.any() for value in adapters) == (method == "lora")


def test_without_stage_1_the_weights_are_random_and_the_encoder_is_not():
    setting = dataclasses.replace(TOY, stage1=dataclasses.replace(TOY.stage1, steps=0, encoder_steps=40))
    state, measured = training.stage1(setting, 0, "cpu")
    torch.manual_seed(0)
    fresh = model.build(TOY.world, TOY.shape).state_dict()
    differ = {name for name in state if not state[name].equal(fresh[name])}
    assert differ
    assert all("vision_tower" in name for name in differ)
    assert measured["encoder"]["colour"] > 0.5


def test_the_alignment_loss_is_least_where_patches_are_their_words():
    drawn = scenes.draw(TOY.world, 20, torch.Generator().manual_seed(0))
    table = torch.eye(len(questions.WORDS))
    colour, shape = drawn.on_patches(drawn.colour), drawn.on_patches(drawn.shape)
    empty = (shape < 0)[..., None]
    of_objects = table[colour + questions.COLOUR] + table[shape + questions.SHAPE]
    right = torch.where(empty, table[questions.ID["empty"]], of_objects)
    wrong_word = torch.where(empty, table[questions.ID["the"]], of_objects)
    half = torch.where(empty, right, table[colour + questions.COLOUR])
    swapped = torch.where(empty, of_objects.roll(1, 0), table[questions.ID["empty"]])
    best, *others = (alignment_loss(one, table, drawn, 0.1) for one in (right, wrong_word, half, swapped))
    assert best < 0.1
    assert all(other > best + 0.3 for other in others)


def test_matching_is_counted_against_the_true_patches():
    """Two scenes by hand: a red circle at patch 3, a blue ring at patch 5, and the second with nothing asked for."""
    where, colour = torch.tensor([[3, 5]] * 2), torch.tensor([[0, 4]] * 2)
    drawn = scenes.Scenes(where, colour, torch.tensor([[0, 5]] * 2), torch.ones(2, 2, dtype=torch.bool), where, 16)
    words = torch.tensor([[questions.ID[word] for word in ("where", "is", "the", "red", "ring", "?")]] * 2)
    best = torch.tensor([[0, 0, 0, 3, 5, 0], [0, 0, 0, 3, 2, 0]])
    host = torch.tensor([[-1, -1, -1, 3, -1, 7], [-1, -1, -1, -1, 2, -1]])
    found = match_quality(match_counts(host, best, words, drawn, torch.tensor([3, -1])))
    assert found["hit"] == 3 / 4
    assert found["chance"] == pytest.approx(1 / 16)
    assert found["hit_referred"] == 1 / 2  # of red and ring in the first scene, red stands at the patch asked for
    assert found["precision"] == 1 / 3
    assert found["recall"] == 1 / 4
    assert found["share"] == 3 / 12


def test_tau_is_chosen_for_a_share():
    scores = torch.linspace(0, 1, 101)
    tau = training.tau_for(scores, 0.25)
    assert (scores >= tau).float().mean() == pytest.approx(0.25, abs=0.01)
    assert training.tau_for(scores, 1.0) == -1.0


def test_a_held_share_follows_the_scores_and_a_fixed_tau_does_not():
    state, _ = training.stage1(TOY, 0, "cpu")
    long = dataclasses.replace(TOY.stage2, steps=20, batch=32, lr=2e-2)
    taus = {}
    for hold in (True, False):
        setting = dataclasses.replace(TOY, stage2=dataclasses.replace(long, hold_share=hold))
        _, log = training.stage2(setting, ARMS["t2i"], 0, state, "cpu")
        taus[hold] = {line["tau"] for line in log["log"]}
        assert log["log"][0]["share"] == pytest.approx(setting.stage2.share, abs=0.13)
    assert len(taus[False]) == 1
    assert len(taus[True]) > 1


def test_measures_say_what_the_answers_were(monkeypatch):
    """A model that always says yes."""
    state, _ = training.stage1(TOY, 0, "cpu")
    asker, _ = training.stage2(TOY, ARMS["t2i"], 0, state, "cpu")
    setting = dataclasses.replace(TOY, test_scenes=60, blur_test=(0.0, 0.8))
    call = Asker.__call__

    def yes(self, batch, copies=True, **more):
        answered = call(self, batch, copies, **more)
        logits = torch.zeros_like(answered.logits)
        logits[:, questions.YES] = 9
        return answered._replace(logits=logits)

    monkeypatch.setattr(Asker, "__call__", yes)
    found = measure.measure(setting, asker, 0, "cpu", pictures=True)
    test = found["test"]["0"]
    assert test["yes_share"] == 1
    assert test["present"] == 1
    assert set(test["negatives"].values()) == {0}
    assert 0.4 < test["existence"] < 0.6
    assert test["colour"] == test["place"] == 0
    assert test["mean"] == pytest.approx(test["existence"] / 3)
    assert set(found["test"]) == {"0", "0.8"}
    assert 0.1 < test["matching"]["share"] < 0.4
    attention = found["attention"]
    assert attention["with_copies"]["copies"] > 0
    assert attention["without_copies"]["copies"] == 0
    assert sum(attention["with_copies"][key] for key in ("image", "copies")) <= 1
    json.dumps(found, allow_nan=False)
    for picture in found["pictures"]:
        assert len(picture["attention"]) == TOY.world.patches
        assert 0 < sum(picture["attention"]) <= 1
        assert picture["question"].endswith("?")


def test_attention_is_counted_at_the_true_patch(untrained, monkeypatch):
    """Attention that goes to the true patch alone is all there; with copies, all goes to the copies."""
    made, _ = untrained
    generator = torch.Generator().manual_seed(3)
    drawn = scenes.draw(TOY.world, 5, generator)
    asked = questions.ask(TOY.world, drawn, 1, Mixture((0, 0, 1)), generator).flat()
    with torch.no_grad():
        batch = arms.encode(made, drawn, asked, scenes.render(TOY.world, drawn, generator))
        asker = Asker(made, ARMS["true"], 1.0, generator)
        length = asker(batch).built.source.shape[1]

        def to(slot):
            attentions = torch.zeros(2, 5, 2, length, length)
            attentions[:, torch.arange(5), :, :, slot] = 1
            return lambda *_: (attentions, asker(batch).built)

        # Both words are copied behind the true patch, so it stands where it would, and they right behind it.
        for offset, (patch, copies) in {0: (1, 0), 1: (0, 1), 2: (0, 1), 3: (0, 0)}.items():
            monkeypatch.setattr(measure, "_attentions", to(asked.target + 1 + offset))
            found = measure._attended(asker, batch, True)
            assert (found["patch"], found["copies"]) == (patch, copies), offset


# --- The laboratory. -------------------------------------------------------------------------------------------------


class InProcess:
    """A pool without processes, which counts what it was given."""

    def __init__(self, plan=None):
        self.names: list[str] = []

    def submit(self, function, job):
        self.names.append(job.name)
        future: Future = Future()
        try:
            future.set_result(function(job))
        except BaseException as error:
            future.set_exception(error)
        return future

    def shutdown(self, **unused):
        pass


@pytest.fixture
def pool(monkeypatch):
    pools: list[InProcess] = []

    def made(plan):
        pools.append(InProcess())
        return pools[-1]

    monkeypatch.setattr(laboratory, "_pool", made)
    return pools


def plan(**changed) -> settings.Plan:
    return settings.Plan("toy", (dataclasses.replace(TOY, **changed),), (settings.Contrast("toy", "t2i"),), workers=1)


def silent(line: str) -> None:
    pass


def test_a_laboratory_is_gone_on_with_after_a_kill(tmp_path, pool):
    whole = laboratory.run(plan(), tmp_path / "whole", "cpu", silent, progress=False)
    assert [row["kind"] for row in whole] == ["plan", "start", "run", "run", "run", "start", "run", "run"]
    assert not (tmp_path / "whole" / "checkpoints").exists()

    folder = tmp_path / "cut"
    lines = (tmp_path / "whole" / "rows.jsonl").read_text().splitlines()
    folder.mkdir()
    (folder / "plan.json").write_text((tmp_path / "whole" / "plan.json").read_text())
    (folder / "rows.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])
    again = laboratory.run(plan(), folder, "cpu", silent, progress=False)
    assert pool[-1].names == [
        "toy, seed 0: weights before stage 2",
        "toy, seed 0: front",
        "toy, seed 1: weights before stage 2",
        "toy, seed 1: plain",
        "toy, seed 1: t2i",
    ]
    first, second = rows.latest(whole), rows.latest(again)
    assert set(first) == set(second)
    for key, row in first.items():
        if key[0] == "run":
            assert row["test"] == second[key]["test"]  # the same weights and data, whenever they are made
    before = len(pool)
    laboratory.run(plan(), folder, "cpu", silent, progress=False)
    assert len(pool) == before  # nothing is left to do


def test_a_line_cut_short_does_not_take_the_next_row_with_it(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"kind": "plan"}\n{"kind": "ru')
    rows.append(file, {"kind": "run", "setting": "a", "arm": "b", "seed": 0, "status": "done"})
    assert [row["kind"] for row in rows.read(file, cut_short=True)] == ["plan", "run"]
    with pytest.raises(ValueError, match="line 2 is no JSON"):
        rows.read(file)


def test_rows_say_what_was_run(tmp_path, pool):
    found = laboratory.run(plan(), tmp_path / "lab", "cpu", silent, progress=False)
    for row in found[1:]:
        assert row["settings"] == TOY.to_dict()
        assert {"commit", "torch", "transformers", "processor", "seed", "seconds", "load_before"} <= set(row)
    written = json.loads((tmp_path / "lab" / "plan.json").read_text())
    assert plans.from_dict(written) == dataclasses.replace(plan(), size="toy")


def test_a_failed_run_is_kept_and_the_rest_goes_on(tmp_path, pool, monkeypatch):
    run = jobs._run

    def sometimes(job):
        if job.arm == "t2i" and job.seed == 0:
            raise FloatingPointError("the loss became nan")
        return run(job)

    monkeypatch.setattr(jobs, "_run", sometimes)
    said: list[str] = []
    found = laboratory.run(plan(), tmp_path / "lab", "cpu", said.append, progress=False)
    failed = [row for row in found if row.get("status") == "failed"]
    assert [(row["arm"], row["seed"], row["error"]) for row in failed] == [
        ("t2i", 0, "FloatingPointError: the loss became nan")
    ]
    assert "4 of 5 runs done, 1 failed" in said[-1]
    assert sum(row.get("status") == "done" and row["kind"] == "run" for row in found) == 4
    monkeypatch.setattr(jobs, "_run", run)
    again = laboratory.run(plan(), tmp_path / "lab", "cpu", silent, progress=False)
    assert sum(row.get("status") == "failed" for row in again) == 1  # the failure stays in the rows
    assert rows.latest(again)["run", "toy", "t2i", 0]["status"] == "done"


def test_arms_without_weights_fail_instead_of_waiting(tmp_path, pool, monkeypatch):
    def broken(job):
        raise RuntimeError("no memory")

    monkeypatch.setattr(jobs, "_start", broken)
    found = laboratory.run(plan(), tmp_path / "lab", "cpu", silent, progress=False)
    assert all(row["status"] == "failed" for row in found[1:])
    assert len(found) == 1 + 2 + 5


def test_nothing_is_started_after_the_time(tmp_path, pool):
    said: list[str] = []
    late = dataclasses.replace(plan(), minutes=0.0)
    found = laboratory.run(late, tmp_path / "lab", "cpu", said.append, progress=False)
    assert [row["kind"] for row in found] == ["plan"]
    assert "5 not started" in said[-1]


def test_another_plan_or_another_folder_is_refused(tmp_path, pool):
    laboratory.run(dataclasses.replace(plan(), minutes=0.0), tmp_path / "lab", "cpu", silent, progress=False)
    with pytest.raises(ValueError, match="holds the plan of another laboratory"):
        laboratory.run(plan(alignment=0.0), tmp_path / "lab", "cpu", silent, progress=False)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file"):
        laboratory.run(plan(), tmp_path / "file", "cpu", silent, progress=False)
    (tmp_path / "stray").mkdir()
    (tmp_path / "stray" / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"no plan\.json"):
        laboratory.run(plan(), tmp_path / "stray", "cpu", silent, progress=False)


@pytest.mark.parametrize("size", plans.SIZES)
def test_every_plan_can_be_written_and_read(size):
    made = plans.plan(size, workers=2)
    assert plans.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert all("plain" in setting.arms for setting in made.settings)
    assert all(len(setting.seeds) >= 3 for setting in made.settings) or size == "smoke"


def test_the_plans_hold_every_arm_and_setting_that_is_promised():
    smoke = {arm for setting in plans.plan("smoke").settings for arm, _ in setting.runs()}
    assert smoke == set(ARMS)
    gpu = plans.plan("gpu").settings
    assert {setting.world.patches for setting in gpu} == {144, 576, 1152}
    assert {arm for setting in gpu for arm, _ in setting.runs()} == set(ARMS) - {"t2i-content", "true"}
    assert {setting.stage1.steps > 0 for setting in gpu} == {True, False}
    for of in ("alignment", "blur_train"):
        assert len({getattr(setting, of) for setting in gpu}) > 1
    for of in ("hold_share", "method", "share", "steps"):
        assert len({getattr(setting.stage2, of) for setting in gpu}) > 1
    assert len({setting.shape.layers for setting in gpu}) > 1


def test_the_cpu_size_rehearsed_and_reported(tmp_path, pool, capsys):
    folder = str(tmp_path / "lab")
    assert cli.main(["lab", "--size", "cpu", "--rehearse", "--output", folder, "--no-progress"]) == 0
    assert "12 of 12 runs done" in capsys.readouterr().out
    assert cli.main(["report", folder, "--output", str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "page.md").read_text()
    assert "nothing can be said" in text  # one seed
    assert all(path in text for path in (f"page-main-{kind}.png" for kind in ("forest", "bars", "pictures")))


def test_every_setting_of_the_gpu_size_rehearsed(tmp_path, pool):
    made = plans.plan("gpu", rehearse=True)
    small = [dataclasses.replace(one, arms=("plain",), more=(), test_scenes=2) for one in made.settings]
    short = dataclasses.replace(made, settings=tuple(small), contrasts=(), minutes=None)
    found = laboratory.run(short, tmp_path / "lab", "cpu", silent, progress=False)
    assert {row["setting"] for row in found if row["kind"] == "run"} == {one.name for one in made.settings}
    assert all(row.get("status", "done") == "done" for row in found)


def test_the_plan_in_the_documentation_can_be_run():
    folder = Path(__file__).parents[2] / "docs" / "lab"
    made, device = plans.from_file(folder / "long-plan.json", workers=3)
    assert (device, made.workers, made.size) == ("cpu", 3, "long")
    main = next(setting for setting in plans.plan("cpu").settings if setting.name == "main")
    assert made.settings[0].start_key() == main.start_key()
    assert made.settings[0].stage2.steps == 3000


def test_settings_share_their_weights_where_they_can():
    settings_ = {setting.name: setting.start_key() for setting in plans.plan("gpu").settings}
    same = {"main-144", "others-144", "long-144", "lora-144", "fixed-tau-144", "few-anchors-144"}
    assert len({settings_[name] for name in same}) == 1
    assert len(set(settings_.values())) == 1 + len(settings_) - len(same)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"arms": ("t2i",)}, "lacks the arm 'plain'"),
        ({"arms": ("plain", "t3i")}, r"\['t3i'\]"),
        ({"more": ("plain",)}, "twice"),
    ],
)
def test_a_wrong_setting_is_refused(changed, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TOY, **changed)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "give --size or --plan"),
        (["--size", "cpu", "--plan", "plan.json"], "give --size or --plan"),
        (["--size", "gpu"], "there is no GPU here"),
        (["--plan", "nowhere.json"], "is no file"),
        (["--plan", "unknown.json"], "['speed']"),
        (["--plan", "broken.json"], "no JSON"),
    ],
)
def test_a_wrong_command_ends_in_one_line(tmp_path, capsys, monkeypatch, words, message):
    if "gpu" in words and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "broken.json").write_text("{")
    setting = {**TOY.to_dict(), "speed": 3}
    (tmp_path / "unknown.json").write_text(json.dumps({"size": "x", "settings": [setting], "contrasts": []}))
    assert cli.main(["lab", "--output", "out", *words]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert message in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_smoke_size_as_printed(tmp_path, capsys):
    """In processes of its own, from the command line, with its checks."""
    assert cli.main(["lab", "--size", "smoke", "--output", str(tmp_path / "smoke"), "--no-progress"]) == 0
    said = capsys.readouterr().out
    assert "14 of 14 runs done" in said
    for check in ("runs:", "matching:", "identity:", "placement:", "wiring:"):
        assert check in said
    found = rows.read(tmp_path / "smoke")
    assert {row["arm"] for row in found if row["kind"] == "run"} == set(ARMS)
    assert all(row["training"]["log"][-1]["answer_loss"] < 4 for row in found if row["kind"] == "run")
