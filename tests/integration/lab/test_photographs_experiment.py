"""The experiment on photographs with a tiny model: rows, going on, and what is made of them."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest
import small_vlm_toy
import torch
from PIL import Image

from attanchor_lab.accuracy import is_right
from attanchor_lab.photographs.stamps import find_stamps
from attanchor_lab.small_vlm import build, experiment
from attanchor_lab.small_vlm.experiment import Measurement, PhotographPlan
from attanchor_lab.small_vlm.readings import known_stamps
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.load import save_pretrained

PLAN = PhotographPlan(
    question="Do anchors help?",
    contrasts=(("t2i", "plain"),),
    margin=0.03,
    world={"pixels": small_vlm_toy.SIDE},
    build={},
    stage2={"max_steps": 1, "batch_size": 2, "dtype": "float32"},
    arms={"plain": {}, "t2i": {"fraction": 0.5}},
    seeds=(0, 1),
    tests=(
        Measurement("keep", ("t2i",), {"keep": 0.5, "keep_by": "random"}, seeds=1),
        Measurement("tau", ("t2i",), {"fraction": 0.9}, degrade=("blur", 2.0), splits=("seen",), seeds=1),
    ),
    questions=2,
    splits=("seen",),
)


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A folder with a world of four questions and a model of tiny parts."""
    world = tmp_path / "work" / "world"
    (world / "images").mkdir(parents=True)
    for number in range(4):
        pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(world / "images" / f"{number}.png")

    def rows(kind):
        talk = [{"from": "human", "value": "<image>\nIs there an owl?"}, {"from": "gpt", "value": "yes"}]
        return [{"image": f"{number}.png", "kind": kind, "conversations": talk} for number in range(4)]

    for name, kind in (
        ("train-questions", "existence"),
        ("test-existence-seen", "existence"),
        ("test-what-seen", "what"),
    ):
        (world / f"{name}.json").write_text(json.dumps(rows(kind)))
    (world / "world.json").write_text("{}")
    model, processor = build.assemble(small_vlm_toy.parts())
    save_pretrained(model, processor, world.parent / "model")
    monkeypatch.setattr("attanchor_vlm.model.load.choose_dtype", lambda wanted, say: model.dtype)
    return world.parent


def test_every_arm_and_measurement_gets_its_row_once(work, tmp_path):
    said: list[str] = []
    rows = experiment.run(PLAN, tmp_path / "out", work, said.append)
    assert [(row["arm"], row["seed"], row["test"]) for row in rows] == [
        ("stage 1", 0, "as built"),
        *((arm, seed, "as trained") for seed in (0, 1) for arm in ("plain", "t2i")),
        ("t2i", 0, "keep"),
        ("t2i", 0, "tau"),
    ]
    trained, kept, more = rows[2], rows[5], rows[6]
    assert rows[1]["figures"]["inserted_share"] == 0
    assert 0 < trained["figures"]["inserted_share"] < more["figures"]["inserted_share"]
    assert len(trained["right"]["seen"]) == 4
    assert kept["figures"]["tau"] == trained["figures"]["tau"] != more["figures"]["tau"]
    assert len(trained["figures"]["losses"]) == 1
    told = json.loads((tmp_path / "out" / "plan.json").read_text())
    del told["more_seeds"]  # as earlier versions wrote it
    (tmp_path / "out" / "plan.json").write_text(json.dumps(told))
    again = experiment.run(PLAN, tmp_path / "out", work, said.append)
    assert len(again) == len(rows)
    assert said[-1] == "7 rows are there, 0 to come"
    assert any("t2i | plain | seen | 2" in line for line in experiment.as_markdown(rows, PLAN, work))
    with pytest.raises(SetupError, match="holds another plan"):
        experiment.run(dataclasses.replace(PLAN, margin=0.5), tmp_path / "out", work, said.append)


def test_further_arms_have_as_many_seeds_as_the_plan_says(tmp_path):
    plan = dataclasses.replace(PLAN, more={"front": {"placement": "front"}}, more_seeds=1)
    keys = [job.key for job in experiment._jobs(plan, tmp_path, tmp_path, print)]
    assert [key for key in keys if key[0] == "front"] == [("front", 0, "as trained")]


def test_an_interrupted_training_ends_the_experiment(work, tmp_path, monkeypatch):
    monkeypatch.setattr("attanchor_vlm.training.run.run", lambda *arguments: SimpleNamespace(interrupted=True))
    said: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        experiment.run(PLAN, tmp_path / "out", work, said.append)
    assert said[-1] == "interrupted while plain, seed 0, was trained; the same command goes on"


def test_arms_are_compared_question_by_question():
    def row(arm, seed, right):
        return {"arm": arm, "seed": seed, "test": "as trained", "right": {"seen": right}}

    rows = [row("plain", 0, "0011"), row("t2i", 0, "1011"), row("plain", 1, "0000"), row("t2i", 1, "1100")]
    (line,) = experiment.differences(rows, PLAN, {"seen": ["a", "a", "b", "b"]})
    assert line["difference"] == pytest.approx(3 / 8)
    assert line["seeds"] == 2
    # Scene a gains in three of four answers, scene b in none: two clusters of means 3/4 and 0 around 3/8.
    assert line["low"] < 0 < line["high"]
    assert np.isnan(line["p"])  # too few seeds


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [(0.01, 0.2, "better"), (-0.2, -0.01, "worse"), (-0.01, 0.2, "not shown"), (0.01, 0.02, "too small to matter")],
)
def test_a_difference_below_the_margin_does_not_matter(low, high, said):
    assert experiment.verdict(low, high, 0.03) == said


def test_an_answer_is_right_but_for_capitals_and_the_full_stop():
    assert is_right("A lion.", "a lion")
    assert not is_right("a lion cub", "a lion")


def test_scenes_are_of_what_the_tower_can_tell(tmp_path, monkeypatch):
    source = tmp_path / "stamps" / "animals"
    source.mkdir(parents=True)
    for name in ("tiger", "owl", "gnu"):
        Image.new("RGBA", (40, 40), (1, 2, 3, 255)).save(source / f"{name}.png")
        (source / f"{name}.txt").write_text(f"A {name}.\n")
    monkeypatch.setattr(experiment.sources, "class_names", lambda: ["Sumatran Tiger", "owl"])
    always = torch.zeros(2, 8), torch.tensor([1.0, 0.0])  # to this tower everything is a tiger
    monkeypatch.setattr(experiment.sources, "read_tower", lambda side: (small_vlm_toy.tower(), always))
    for _ in range(2):  # a run that is gone on with finds the links there
        known = known_stamps(source.parent, tmp_path / "known")
    assert [(stamp.name, stamp.theme) for stamp in find_stamps(known)] == [("tiger", "animals")]


def test_a_plan_with_an_unknown_key_is_refused(tmp_path):
    told = dataclasses.asdict(PLAN) | {"sedes": [0]}
    (tmp_path / "plan.json").write_text(json.dumps(told))
    with pytest.raises(SetupError, match="sedes"):
        experiment.read_plan(tmp_path / "plan.json")


def test_the_plans_in_the_documentation_can_be_read():
    """And they share world, model and training, so that they share what is made in the folder of the work."""
    folder = experiment.Path(__file__).parents[3] / "docs" / "lab"
    plan, *others = (experiment.read_plan(path) for path in sorted(folder.glob("photographs*-plan.json"), reverse=True))
    assert set(plan.arms) | set(plan.more) == {"plain", "t2i", "random", "front"}
    assert plan.contrasts[0] == ("t2i", "plain")
    assert len(others) == 2
    for other in others:
        assert (other.world, other.build, other.stage2) == (plan.world, plan.build, plan.stage2)
        assert all((plan.arms | plan.more).get(arm, told) == told for arm, told in (other.arms | other.more).items())
