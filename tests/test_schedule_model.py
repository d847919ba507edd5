"""The model of the CUDA kernel's schedules adds up where a sum can be made by hand, and the page shows its table."""

from itertools import product
from pathlib import Path

import pytest

from attanchor_kernels.testing.inputs import SHAPES, Shape
from benchmarks import schedule_model
from benchmarks.rows import RESULTS, read

PAGE = Path(__file__).parent.parent / "docs" / "kernels.md"


@pytest.mark.parametrize("draws", ["between", "early", "late"])
def test_one_tile_takes_the_sum_of_its_steps(monkeypatch, draws):
    """Nothing else is under way, and no step varies."""
    monkeypatch.setattr(schedule_model, "SPREAD", 0.0)
    shape, at = Shape("one", 32, 10, 2048), schedule_model.Latencies()
    schedule = schedule_model.NOW._replace(draws=draws)
    steps = at.draw + at.memory + at.multiply / 2 + at.publish + at.finish + at.poll + at.plan + at.leave
    steps += at.draw if draws == "between" else 0
    expected = schedule_model.floor(shape, 1) + steps
    assert schedule_model.Launch(shape, 1, schedule).run() == pytest.approx(expected)


def test_transfers_share_the_memory():
    """Two at once take as long as one after the other; one that begins later ends later."""
    simulation, ends = schedule_model.Simulation(), []

    def move(after: float, count: float):
        yield after
        yield schedule_model.Transfer(count * schedule_model.BYTES_PER_US)
        ends.append(simulation.now)

    simulation.start(move(0.0, 2.0))
    simulation.start(move(1.0, 2.0))
    assert simulation.run() == pytest.approx(4.0)
    assert ends == pytest.approx([3.0, 4.0])


def test_every_sample_is_finished():
    """With more tiles than clusters, of one sample and of several, whatever the schedule; none beats the floor."""
    shape = Shape("many", 2600, 10, 4096)
    for schedule in schedule_model.SCHEDULES:
        for batch in (1, 3):
            launch = schedule_model.Launch(shape, batch, schedule)
            assert launch.run() > schedule_model.floor(shape, batch)
            assert launch.missing == [0] * batch
            assert all(gate.open for gate in launch.complete)
    assert launch.total > schedule_model.CLUSTERS[launch.cluster]


def test_the_page_shows_the_stored_rows():
    """And they are what `python -m benchmarks schedule-model` says today, of every shape that there is a target for."""
    stored = read(RESULTS / "schedule-model.jsonl")
    assert schedule_model.tabulated(stored) in PAGE.read_text(encoding="utf-8")
    now = {(row["shape"], row["batch"]): row for row in stored if row["schedule"] == schedule_model.NOW.name}
    assert len(now) == len(SHAPES) * len(schedule_model.BATCHES)
    for shape, batch in product(SHAPES, schedule_model.BATCHES):
        assert now[shape.name, batch].items() >= schedule_model.predict(schedule_model.NOW, shape, batch).items()
