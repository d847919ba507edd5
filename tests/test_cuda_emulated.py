"""The CUDA kernels' own source, run on a CPU over an emulated device, against the float64 oracle and the reference."""

import itertools
from pathlib import Path

import emulated
import pytest
import torch
from limits import LIMITS
from strategies import KERNEL_DTYPES

from attanchor_kernels import checks, reference
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import assert_keeps_contract, assert_same_fields
from attanchor_kernels.testing.inputs import TAU, Shape, matched_pair, random_roles

if torch.cuda.is_available():
    pytest.skip("the kernels themselves run here: tests/gpu", allow_module_level=True)
if emulated.missing():
    pytest.skip(f"the emulator was left out: {emulated.missing()}", allow_module_level=True)

from checking import check, check_rows, emulator, launch, run

from benchmarks import cases, phases, smoke, tune

PLAIN = ("text_into_image", "sequential", None, "right")


@pytest.mark.parametrize("direction", ["text_into_image", "image_into_text"])
@pytest.mark.parametrize("dtype", KERNEL_DTYPES, ids=str)
def test_more_than_a_tile(poisoned_empty, dtype, direction):
    """Several tiles, blocks of texts, chunks and slices of columns, twins far apart: every variant, one result."""
    generator = torch.Generator().manual_seed(5)
    image = torch.randn(1, 70, 560, generator=generator)
    text = torch.randn(1, 66, 560, generator=generator)
    text[:, ::9] += image[:, 3::8][:, :8]
    image[:, 68], text[:, 65] = image[:, 3], text[:, 9]  # equal hosts, equal movers
    arguments = None, None, None, 6, direction, "inherit", None, "left"
    problem = checks.build_call(image.to(dtype), text.to(dtype), 0.3, *arguments).problem
    results = []
    # float16 differs from bfloat16 in its multiplication alone.
    for tuning in launch.variants(dtype)[:: 5 if dtype == torch.float16 else 1]:
        schedule = tuning._replace(tile_rows=16, lag=1), tuning.cluster * 3, 11
        results.append(run(problem, schedule, plan=tuning.hold == 0))
    assert_keeps_contract(results[0][0], problem, trimmed=False)
    check_rows(problem, *results[0])
    for result, _ in results[1:]:
        assert torch.equal(result.source, results[0][0].source)
        assert torch.equal(result.host, results[0][0].host)
        assert (result.score - results[0][0].score).abs().max() < 2e-5


@pytest.mark.parametrize("make", LIMITS.values(), ids=LIMITS.keys())
def test_limit(poisoned_empty, make):
    """Just below, at and above the sizes at which a kernel changes its way."""
    problem = make()
    check(problem, (launch.Tuning(), 8, 12))
    if problem.hidden * problem.text.element_size() % 16 == 0:
        result, _ = run(problem, (launch.variants(problem.text.dtype)[-1], 8, 13))
        assert_keeps_contract(result, problem, trimmed=False)


@pytest.mark.parametrize("direction", ["text_into_image", "image_into_text"])
@pytest.mark.parametrize(
    ("budget", "keep"), [(1, None), (150, None), (299, None), (150, 0), (150, 7), (150, 299), (150, 300)]
)
def test_large_budget(poisoned_empty, direction, budget, keep):
    """More movers than are ranked against each other: one block selects the cut, exactly, with many equal scores, and
    where image tokens are dropped every host stays."""
    generator = torch.Generator().manual_seed(budget)
    movers, hosts = (torch.randint(-1, 2, (1, count, 5), generator=generator).float() for count in (300, 20))
    image, text = (hosts, movers) if direction == "text_into_image" else (movers, hosts)
    positions = "sequential" if keep is None else "inherit"
    arguments = None, None, None, budget, direction, positions, None, "right"
    problem = checks.build_call(image, text, 0.0, *arguments, keep=keep).problem
    check(problem, (launch.Tuning(32, 1, hold=0), 4, budget))


def test_merge_of_many_samples(poisoned_empty):
    """Features of a sample begin after those of all samples before it, however blocks meet the samples."""
    generator = torch.Generator().manual_seed(2)
    roles = random_roles(5, 170, generator)
    features = int(((roles == 2) | (roles == 4)).sum())
    text = torch.randn(5, 170, 24, generator=generator, dtype=torch.bfloat16)
    image = torch.randn(features, 24, generator=generator, dtype=torch.bfloat16)
    turn = torch.randint(0, 3, roles.shape, generator=generator, dtype=torch.int32).sort(1).values
    for seed, direction in enumerate(("text_into_image", "image_into_text")):
        problem = checks.merge_call(*(text, image, roles, 0.5, turn, 20, direction, "inherit", None, "right")).problem
        for features_there in (features, features - 40):  # with 40 fewer, the last placeholders hold NaN
            check(problem._replace(image=image[:features_there]), (launch.Tuning(lag=2), 3, seed))
        unknown = torch.where(roles == 0, torch.randint(5, 256, roles.shape, generator=generator), roles)
        result, _ = run(problem._replace(roles=unknown.to(torch.uint8)), (launch.Tuning(), 2, seed))
        expected, _ = run(problem, (launch.Tuning(), 2, seed))
        for one, other in zip(result, expected, strict=True):
            assert torch.equal(one.nan_to_num(0), other.nan_to_num(0))


@pytest.mark.parametrize(
    ("direction", "resident", "merges"),  # each with each of the others
    [
        ("text_into_image", 1, True),
        ("text_into_image", 2, False),
        ("text_into_image", 5, True),
        ("image_into_text", 1, False),
        ("image_into_text", 2, True),
        ("image_into_text", 5, False),
    ],
)
def test_held_tiles(poisoned_empty, direction, resident, merges):
    """Clusters with more tiles of a sample than they can hold give some up and read them again; none waits for ever."""
    generator = torch.Generator().manual_seed(resident)
    if merges:
        problem = merge_on_held_tiles(direction, generator)
    else:
        image, text = (torch.randn(3, count, 32, generator=generator, dtype=torch.bfloat16) for count in (110, 70))
        mask = torch.rand(3, 110, generator=generator) < 0.7
        arguments = None, None, None, direction, "sequential", None, "right"
        problem = checks.build_call(image, text, 0.5, mask, *arguments).problem
    schedule = launch.Tuning(32, 4, hold=1, bulk=1), 4 * resident, resident
    expected = check(problem, schedule)
    # The columns are one chunk, so clusters of any size have the same sums.
    tuning = launch.Tuning(32, 8, hold=1, bulk=int(not merges))
    result, _ = run(problem, (tuning, 8 * resident, resident), plan=False)
    assert_same_fields(result, expected)


def merge_on_held_tiles(direction: str, generator: torch.Generator) -> Problem:
    roles = random_roles(4, 140, generator)
    roles[1] = 2  # a sample of images alone, one without any, one of padding
    roles[2][roles[2] != 0] = 3
    roles[3] = 0
    image = torch.randn(int(((roles == 2) | (roles == 4)).sum()), 32, generator=generator, dtype=torch.bfloat16)
    text = torch.randn(4, 140, 32, generator=generator, dtype=torch.bfloat16)
    return checks.merge_call(*(text, image, roles, 0.5, None, 9, direction, "inherit", None, "left")).problem


@pytest.mark.parametrize("features", [0, 5, 60, 70])
def test_missing_features_on_held_tiles(poisoned_empty, features):
    """More placeholders without a feature than the tiles have rows: each becomes a row of NaN with all its fields."""
    generator = torch.Generator().manual_seed(features)
    roles = torch.full((2, 130), 2, dtype=torch.uint8)
    roles[:, ::5] = 3
    roles[1, :40] = 0
    text = torch.randn(2, 130, 32, generator=generator, dtype=torch.bfloat16)
    problem = Problem(text[0, :features].clone(), text, 0.5, roles=roles, max_anchors=9, pad_left=True)
    for tuning in (launch.Tuning(), launch.Tuning(32, 8, hold=1), launch.Tuning(32, 4, hold=1, bulk=0)):
        check(problem, (tuning, 8, features))


@pytest.mark.parametrize("operation", ["forward", "drop"])
def test_smoke_knows_every_way(operation):
    """What `python -m benchmarks smoke` asks of the binary exists and is right, however the cluster is cut."""
    emulator.configure(16, 3)
    for tuning in smoke.compiled(torch.bfloat16, operation):
        way = smoke.Way("cuda", torch.bfloat16, operation, tuning)
        ended = smoke.check(way, torch.device("cpu"), [(Shape("aligned", 40, 12, 136), 1)])
        assert ended == {"status": "right"}, f"{way}: {ended}"


def test_phases_follow_each_other(monkeypatch):
    """The build with stamps, which the emulator is: every block of a cluster goes through all phases in their order."""
    monkeypatch.setattr(phases, "WARM_UP", 1)
    emulator.configure(32, 5)
    case = cases.Case("forward", Shape("toy", 70, 9, 1024), 2, anchored=2)
    times = phases.stamped(case, torch.device("cpu"))
    reached = times.flatten(0, 1)[(times > 0).flatten(0, 1).any(1)]
    assert len(reached) == 2 * 3 * 4  # samples, tiles, blocks of a cluster
    assert (reached > 0).all()
    assert (reached.diff(dim=1) >= 0).all()
    made = phases.rows(case, times)
    assert [row["step"] for row in made] == ["whole", *(" -> ".join(two) for two in itertools.pairwise(phases.PHASES))]
    assert all(0 <= row["us"] <= row["p90"] <= made[0]["us"] and row["count"] == len(reached) for row in made[1:])
    source = (Path(__file__).parent.parent / "csrc" / "stamps.cuh").read_text()
    assert ", ".join(phases.PHASES) in source
    assert phases.rows(case, torch.zeros_like(times)) == []


def test_tuning_changes_the_choice_and_puts_it_back():
    """What `python -m benchmarks tune` tries reaches the launch; a way that there is not is an error, and the last."""
    image = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(0))
    problem = Problem(image, image.clone(), 0.5)
    emulator.configure(8, 0)
    with (
        tune.choice_with("cuda", {"tile_images": 16}),
        pytest.raises(RuntimeError, match="no construct kernel that was asked"),
    ):
        launch.construct(problem)  # float32 has none
    with tune.choice_with("cuda", {"hold": 0, "tile_rows": 3}):
        assert launch.launched(problem).tile_rows == 3
    embeds, made = launch.construct(problem)
    assert made.host.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(embeds, reference.construct(problem)[0])


def test_the_launch_says_what_ran():
    """What is asked for is what runs, or an error that says why not; left to the shape, the rule decides."""
    image, text = (torch.zeros(1, count, 2048, dtype=torch.bfloat16) for count in (5, 3))
    problem = Problem(image, text, 0.5)
    emulator.configure(32, 0)
    for tuning in launch.variants(torch.bfloat16):
        way = launch.launched(problem, tuning=tuning)
        assert way[:3] == (tuning.tile_images, tuning.cluster, bool(tuning.hold))
        assert way.bulk == (tuning.hold == 1 and tuning.bulk != 0)
        assert way.resident == 32
        assert way.blocks <= way.resident
        assert way.shared_bytes > tuning.hold * tuning.tile_images * 4096 // tuning.cluster
    way = launch.launched(problem)
    assert (way.hold, way.cluster, way.tile_rows, way.lag) == (True, 8, 0, 0)
    way = launch.launched(problem, copy=False)
    assert (way.hold, way.cluster) == (False, 8)
    assert way.tile_rows * way.lag > 0
    assert launch.launched(problem._replace(image=image[:0], text=text[:0])) is None
    with pytest.raises(RuntimeError, match="hold is 1; tiles are kept on chip only where rows are copied"):
        launch.launched(problem, copy=False, tuning=launch.Tuning(hold=1))
    emulator.configure(7, 0)  # no cluster of 8 fits
    assert launch.launched(problem).cluster == 4
    with pytest.raises(RuntimeError, match="no construct kernel that was asked for runs on this device"):
        launch.launched(problem, tuning=launch.Tuning(cluster=8))
    emulator.fail("out of memory")
    with pytest.raises(RuntimeError, match=r"attanchor_cuda\.construct: out of memory"):
        launch.launched(problem)
    emulator.fail("")
    assert launch.launched(problem).cluster == 4


def test_memory_that_runs_out_is_told_by_its_allocator():
    """What fails within the binary is an error without a type and a reason: PyTorch's own is raised."""
    image = torch.zeros(1, 5, 4096, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        launch.construct(Problem(image, image.clone(), 0.5, max_anchors=2**30))
    wide = image[..., :1].expand(1, 5, 2**40)  # whose copy with contiguous rows is too large
    with pytest.raises(RuntimeError, match="you tried to allocate"):
        launch.plan(Problem(wide, wide, 0.5))


def test_the_binary_says_what_it_was_built_for():
    """As setup.py tells it, through the preprocessor."""
    assert emulator.binary.architectures.split("_") == ["80", "90+PTX"]


def test_surplus_features_get_no_gradient(poisoned_empty):
    """Features beyond the last placeholder: ignored forward, zero gradient backward."""
    generator = torch.Generator().manual_seed(3)
    roles = random_roles(2, 40, generator)
    image = torch.randn(90, 12, generator=generator)
    text = torch.randn(2, 40, 12, generator=generator)
    problem = checks.merge_call(text, image, roles, 0.1, None, None, *PLAIN).problem
    check(problem, (launch.Tuning(), 3, 4))


def test_large_d_in_slices(poisoned_empty):
    """At D = 9000, with sums that truncate, a text equal to an image scores 1 within the band."""
    image = torch.rand(1, 3, 9000, generator=torch.Generator().manual_seed(6)).bfloat16()
    problem = checks.build_call(image, image.clone(), 0.9, None, None, None, None, *PLAIN).problem
    for tile_images, cluster, hold in ((16, 1, 0), (64, 8, 0), (64, 8, 1)):
        result, _ = run(problem, (launch.Tuning(tile_images, cluster, hold=hold), 8, 1))
        assert (result.score - 1).abs().max() < 2e-5
        assert result.host.tolist() == [[0, 1, 2]]


@pytest.mark.parametrize(
    ("tile_images", "cluster", "ways"),
    # Every tile and every cluster meets every way to read and to hold rows.
    [
        (32, 8, [{"hold": 0}, {"hold": 1, "bulk": 1}]),
        (64, 4, [{"hold": 0}, {"hold": 1, "bulk": 1}]),
        (32, 4, [{"hold": 1, "bulk": 0}]),
        (64, 8, [{"hold": 1, "bulk": 0}]),
    ],
)
def test_long_rows(poisoned_empty, tile_images, cluster, ways):
    """The pipeline well under way in every block of a cluster: the reference's very rows and places."""
    image, text = matched_pair(1, Shape("long rows", 70, 20, 400 * cluster), dtype=torch.bfloat16)
    problem = checks.build_call(image, text, TAU, None, None, None, 8, *PLAIN).problem
    expected_rows, expected = reference.construct(problem)
    for seed, way in enumerate(ways):
        result, places = run(problem, (launch.Tuning(tile_images, cluster, **way), 16, seed))
        assert result.is_anchor.any()
        assert torch.equal(result.embeds, expected_rows)
        assert torch.equal(places, expected.places)
        assert (result.score - expected.score).abs().max() < 2e-6


@pytest.mark.parametrize(("shift", "resident"), enumerate([1, 2, 3, 5, 16]))
def test_barrier_on_any_device(shift, resident):
    """More match tiles than blocks run at once, several samples: no deadlock, one result.

    Device, lag and grid (of the device's number of blocks, of one, two and three) each meet each of the others.
    """
    generator = torch.Generator().manual_seed(7)
    image = torch.randn(5, 70, 8, generator=generator, dtype=torch.float16)
    text = torch.randn(5, 6, 8, generator=generator, dtype=torch.float16)
    problem = checks.build_call(image, text, 0.3, None, None, None, 3, *PLAIN).problem
    results = []
    for seed in range(4):
        tuning = launch.Tuning(16, 1, tile_rows=4, lag=(1, 2, 5)[(seed + shift) % 3], blocks=seed)
        results.append(run(problem, (tuning, resident, seed), plan=seed == shift % 3)[0])
    assert_keeps_contract(results[0], problem, trimmed=False)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize(
    ("tuning", "what"),
    [
        (launch.Tuning(32, 1, hold=0, lag=1), "the match of a sample"),
        (launch.Tuning(32, 8, hold=1), "the rows of a tile"),
        (launch.Tuning(32, 8, hold=1, bulk=0), "the match of a sample"),
    ],
)
def test_a_wait_ends_in_a_debug_build(poisoned_empty, tuning, what):
    """As it is here: who has looked for a second for what others are to do ends the launch and says so."""
    problem = Problem(*matched_pair(1, Shape("slow", 70, 6, 64), dtype=torch.float32), TAU)
    emulator.clock(10**9)
    try:
        with pytest.raises(RuntimeError, match=f"a block waited in vain for {what}"):
            run(problem, (tuning, 16, 1), plan=False)
    finally:
        emulator.clock(1)
        for words in emulator.workspace.held(torch.device("cpu")):
            words.zero_()
    run(problem, (tuning, 16, 1), plan=False)


@pytest.mark.parametrize(
    "tuning", [launch.Tuning(16, 1, hold=0, lag=1), launch.Tuning(32, 4, hold=1)], ids=["", "held"]
)
def test_other_work_takes_room(poisoned_empty, tuning):
    """Where fewer blocks run than the launch counted on, those that have not begun hold nothing up."""
    image, text = matched_pair(2, Shape("crowded", 70, 6, 16), dtype=torch.bfloat16)
    problem = Problem(image, text, TAU)
    for seed, running in enumerate((1, 2)):
        result, _ = run(
            problem, (tuning, tuning.cluster * 5, seed), occupied=tuning.cluster * (5 - running), plan=False
        )
        assert_keeps_contract(result, problem, trimmed=False)
