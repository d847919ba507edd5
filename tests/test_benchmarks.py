"""The benchmark commands at toy size on a CPU."""

import weakref
from functools import partial

import pytest
import torch

import attanchor_vlm
from attanchor_kernels.backends import triton as triton_backend
from benchmarks import baselines, cases, floor, gpu, models, overhead, roofline, rows, sanitize, timing, tune
from benchmarks.__main__ import COMMANDS, main


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a roofline run at toy size."""
    path = tmp_path_factory.mktemp("roofline") / "roofline.jsonl"
    assert main(["roofline", "--device", "cpu", "--output", str(path), "--batches", "2", "--budget", "0.02"]) == 0
    return path


def test_every_command_explains_itself():
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_a_slow_backend_keeps_its_digits(tmp_path, monkeypatch):
    """Thousands of times slower than the roofline is still a percentage with three digits, not 0.0 or 0.01."""
    path, floor_us, slow_us = tmp_path / "roofline.jsonl", 1.0, 7770.0

    def prepared(calls, *_, **__):
        slow = getattr(calls[0], "args", ())[-1:] == ("reference",)
        return timing.Take(lambda: (slow_us if slow else floor_us) * 1e-6, "wall")

    monkeypatch.setattr(timing, "prepare", prepared)
    assert main(["roofline", "--device", "cpu", "--output", str(path), "--batches", "2", "--budget", "0.01"]) == 0
    row = next(row for row in rows.read(path) if row["operation"] == "forward" and row["backend"] == "reference")
    assert row["percent_of_roofline"] == pytest.approx(100 * floor_us / slow_us, rel=1e-3)


def test_roofline_rows_say_what_was_measured_on_what(measured):
    found = rows.read(measured)
    assert [row["backend"] for row in found if row["operation"] == "forward"] == ["floor", "reference"]
    assert {row["operation"] for row in found} == {"copy", *cases.OPERATIONS}
    assert "masked_scatter" in {row["backend"] for row in found}
    for row in found:
        assert row["us_min"] <= row["us_p10"] <= row["us"] <= row["us_p90"]
        assert {"commit", "gpu", "driver", "torch", "triton", "date", "bytes", "method", "repeats"} <= set(row)
    forward = next(row for row in found if row["backend"] == "reference" and row["operation"] == "forward")
    assert forward["bytes"] == 2 * 128 * 4 * (46 + 46 + 8)
    assert forward["ratio"] == pytest.approx(forward["us"] / forward["floor_us"], rel=1e-3)
    assert forward["percent_of_roofline"] == pytest.approx(100 / forward["ratio"], rel=1e-2)


def test_rows_of_a_cpu_judge_no_kernel_and_are_not_drawn(measured, capsys):
    from benchmarks import plots, targets

    assert main(["targets", "--results", str(measured.parent)]) == 0
    printed = capsys.readouterr().out
    assert "0 met, 0 missed" in printed
    assert printed.count("not measured |") == len(targets.judge([]))
    assert plots.wanted(rows.read(measured)) == {}


def test_no_figure_for_a_wrong_result(tmp_path, monkeypatch, capsys):
    """A backend that returns something else is reported and never timed."""
    right = roofline.run

    def wrong(case, inputs, backend):
        fields = right(case, inputs, "reference")
        return fields if backend == "reference" else (fields[0] + 1, *fields[1:])

    assert failing_run(tmp_path, monkeypatch, wrong, ["triton"]) == []
    assert "embeds differs" in capsys.readouterr().err


def test_a_backend_that_fails_costs_no_other_its_figures(tmp_path, monkeypatch, capsys):
    """Nor any other case, nor memory; what failed is told in the end as well."""
    right, held = roofline.run, []

    def failing(case, inputs, backend):
        assert not any(tensor() is not None for tensor in held)
        if backend == "triton" and case.operation == "forward":
            kept, error = torch.empty(1), RuntimeError("out of resource\nand a page more")
            held.append(weakref.ref(kept))
            raise error  # and this frame, which its traceback holds, holds it
        return right(case, inputs, "reference")

    found = failing_run(tmp_path, monkeypatch, failing, ["triton", "cuda"])
    assert found == [("forward", "cuda"), ("backward", "triton"), ("backward", "cuda")]
    said = capsys.readouterr().err
    assert "and a page more" in said
    assert said.endswith("wrong or missing: triton, forward, toy, B=1: RuntimeError: out of resource\n")


def failing_run(tmp_path, monkeypatch, run, names):
    """What has a ratio where the operators are replaced by `run`, and the command says that something failed."""
    monkeypatch.setattr(roofline, "run", run)
    monkeypatch.setattr(roofline, "kernel_backends", lambda _: names)
    path = tmp_path / "rows.jsonl"
    arguments = ["--device", "cpu", "--batches", "1", "--operations", "forward,backward", "--passes", "kernels"]
    assert main(["roofline", *arguments, "--budget", "0.01", "--output", str(path)]) == 1
    return [(row["operation"], row["backend"]) for row in rows.read(path) if "ratio" in row]


@pytest.mark.parametrize(("name", "matmul"), [("toy", "float32"), ("qwen2.5-vl-3b", "bfloat16")])
def test_the_compiled_baseline_is_right_and_compiled_twice(monkeypatch, name, matmul):
    """Once for B = 1 and once for every other batch. Traced as for a GPU; what is compiled of it runs eagerly here."""
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    compiled = baselines.Compiled(matmul)
    shape = cases.SHAPE_OF[name]._replace(image=36, text=15, hidden=64)
    for batch in (1, 8, 32, 64):
        case = cases.Case("forward", shape, batch, torch.bfloat16, anchored=3)
        inputs = cases.make_inputs(case, torch.device("cpu"), seed=batch)
        assert (inputs.position_ids is None) == (name == "toy")
        fields = compiled(inputs)
        for one, other in zip(fields[:6], cases.run(case, inputs, "reference")[:6], strict=True):
            assert torch.equal(one, other)
    assert len(made) == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["roofline", "--batches", "0"], "'0' should be positive integers"),
        (["roofline", "--batches", "1,x"], "'1,x' should be positive integers"),
        (["training", "--pairs", "-1"], "'-1' should be an integer of at least 1"),
        (["overhead", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
        (["overhead", "--keep", "1/2,4/3"], "'1/2,4/3' should be fractions"),
        (["roofline", "--shapes", "nope"], "nope should be of tinyllava-1b"),
        (["roofline", "--passes", "x"], "x should be of kernels, baselines"),
        (["tune", "--backends", "metal"], "metal should be of cuda, triton"),
    ],
)
def test_options_that_cannot_be_are_told(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_what_cannot_run_here_is_told(tmp_path, capsys):
    """A backend that is not there; figures of a GPU that would be lost."""
    assert main(["roofline", "--device", "cpu", "--backends", "cuda"]) == gpu.UNAVAILABLE
    assert "cuda, which cannot run here" in capsys.readouterr().err
    path = tmp_path / "roofline.jsonl"
    rows.write(path, [{"run": "roofline", "gpu": "Test GPU", "date": "2026-01-01"}])
    assert main(["roofline", "--device", "cpu", "--output", str(path)]) == 2
    assert "roofline.jsonl holds rows of a GPU" in capsys.readouterr().err
    assert len(rows.read(path)) == 1


@pytest.mark.parametrize("operation", cases.OPERATIONS)
def test_least_bytes_are_those_of_the_tensors(operation):
    """Counted from the tensors themselves; in backward the gradient's padding need not be read."""
    case = cases.Case(operation, cases.TOY, 3, torch.float32)
    inputs = cases.make_inputs(case, torch.device("cpu"), seed=0)
    got = cases.run(case, inputs, "reference")
    size = sum(tensor.nbytes for tensor in (inputs.image, inputs.text))
    if operation == "backward":
        padding = 3 * (case.max_anchors - case.anchored) * case.row_bytes
        assert case.read_bytes == inputs.grad.nbytes - padding
        assert case.written_bytes == got[0].nbytes + got[1].nbytes == size
    else:
        # In a prompt the rows of the text tensor at placeholders are not read.
        unread = 3 * cases.TOY.image * case.row_bytes if operation == "merge" else 0
        assert got[0].shape[1] == (30 if operation == "drop" else 54)
        assert case.read_bytes == size - unread
        assert case.written_bytes == got[0].nbytes


@pytest.mark.parametrize(("read", "written"), [(700, 700), (700, 903), (903, 700)])
def test_the_floor_reads_and_writes_all_its_bytes(read, written):
    """The kernel of the GPU's floor, interpreted where there is none, against torch: more written, more read, equal."""
    source = torch.randint(2**40, (read,), device="cuda" if torch.cuda.is_available() else "cpu")
    expected = torch.zeros(written, dtype=torch.int64, device=source.device)
    expected[: min(read, written)] = source[: min(read, written)]
    expected[: max(read - written, 0)] += source[written:]
    assert torch.equal(floor.copy_by_triton(source, written, 256, 4), expected)
    assert torch.equal(floor.copy_by_torch(source, written), expected)


def test_the_cpu_reference_at_toy_size(tmp_path, capsys):
    """Checked against the literal loop; the stored figures of the real shape are not overwritten."""
    path = tmp_path / "cpu.jsonl"
    arguments = ["cpu-reference", "--toy", "--rounds", "2", "--batches", "1,4", "--threads", "1,2"]
    assert main([*arguments, "--output", str(path)]) == 0
    found = rows.read(path)
    sizes = [(dtype, batch) for dtype in ("float32", "bfloat16") for batch in (1, 4)]
    assert [(row["dtype"], row["batch"]) for row in found] == sizes * 2
    assert [("of_loop" in row, row["method"]) for row in found[::4]] == [(True, "thread time"), (False, "wall")]
    assert main(["cpu-reference", "--toy"]) == 2
    assert "--output" in capsys.readouterr().err


def test_timing_takes_medians_and_turns_over_its_inputs():
    seen = []
    calls = [lambda i=index: seen.append(i) for index in range(3)]
    taken = timing.measure(calls, torch.device("cpu"), repeats=7, budget=1e9)
    assert taken.repeats == 7
    assert seen == [0, 0, 1, 2, 0, 1, 2, 0]
    assert taken.least <= taken.p10 <= taken.p50 <= taken.p90


def test_pairs_take_turns_and_their_ratios_are_of_neighbours():
    """On a machine that gets slower all the time, what one side after the other would show is not there."""
    clock, seen = iter(range(1, 100)), []

    def take(name, factor):
        return timing.Take(lambda: seen.append(name) or factor * next(clock), "wall")

    same, twice = (timing.pairs(take("plain", 1), take("other", factor), 20) for factor in (1, 2))
    assert seen[:6] == ["plain", "other", "other", "plain", "plain", "other"]
    assert same.quartiles[1] == pytest.approx(1, abs=0.05)
    assert twice.quartiles[1] == pytest.approx(2, abs=0.1)
    assert same.describe("step")["step_within_spread"] is True
    assert twice.describe("step")["step_within_spread"] is False
    alone = timing.pairs(take("plain", 1), take("one", 3), 1)
    assert alone.quartiles == [pytest.approx(3, abs=0.2)] * 3


def test_the_peak_of_a_call_is_what_it_held_at_most():
    """Also where a larger call came before, and memory that is given back in the meantime counts."""
    size = 2**26
    for factor in (2, 1):
        peak, made = timing.peak_of(
            lambda f=factor: len(torch.ones(f * size // 4)) + torch.ones(1), torch.device("cpu")
        )
        assert made == factor * size // 4 + 1
        assert peak == pytest.approx(factor * size, rel=0.1)


def test_a_call_that_waits_for_the_device_is_not_captured(monkeypatch, capsys):
    """Found out before the capture: one that fails would leave the process unfit for the models to come."""
    mode = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    for method in ("graph", "eager"):
        monkeypatch.setattr(timing, f"_{method}", lambda calls, count, method=method: (method, count))

    def waits():
        if mode[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    device = torch.device("cuda")
    assert timing.prepare_long(lambda: None, device) == ("graph", 1)
    assert timing.prepare_long(waits, device) == ("eager", 1)
    assert "timed with its launches: called a synchronizing" in capsys.readouterr().out
    assert mode == ["error", "default"] * 2


def test_overhead_reports_every_part_of_every_side(tmp_path):
    path = tmp_path / "overhead.jsonl"
    arguments = ["--device", "cpu", "--models", "tinyllava-1b,qwen2.5-vl-3b", "--pairs", "2", "--whole"]
    assert main(["overhead", "--output", str(path), *arguments]) == 0
    found = rows.read(path)
    kept = [(f"keep {share}", length) for share, length in (("1/2", 19), ("1/3", 16), ("1/9", 13))]
    expected = [("plain", 26), ("anchors", 27), *kept]
    for name in ("tinyllava-1b-toy", "qwen2.5-vl-3b-toy"):
        of_model = [row for row in found if row["model"] == name and "measure" not in row]
        assert [(row["side"], row["length"]) for row in of_model] == expected
        plain, *others = of_model
        for row in others:
            assert row["kv_bytes"] * plain["length"] == plain["kv_bytes"] * row["length"]
            assert (row["flops_ratio"] < plain["flops_ratio"] == 1) == (row["length"] < plain["length"])
            assert row["method"] == "wall"
            for part in ("construction", "prefill", "step"):
                assert row[f"{part}_ratio_q1"] <= row[f"{part}_ratio"] <= row[f"{part}_ratio_q3"]
                assert min(row[f"{part}_us"], row[f"plain_{part}_us"]) > 0
    whole = [(row["measure"], row["side"]) for row in found if "measure" in row]
    assert whole == [(f"attached {what}", side) for what in ("forward", "generate") for side, _ in expected[1:]]


def test_overhead_of_what_works_is_kept(tmp_path, monkeypatch, capsys):
    """A whole model that fails costs neither its decoder at the next batch nor the next model its figures."""

    def fails(*_):
        raise RuntimeError("no generation")

    monkeypatch.setattr(overhead, "measure_whole", fails)
    path = tmp_path / "overhead.jsonl"
    arguments = ["--models", "tinyllava-1b,llava-next-7b", "--batches", "1,2", "--pairs", "1", "--whole"]
    assert main(["overhead", "--device", "cpu", "--output", str(path), *arguments]) == 1
    assert [(row["model"], row["batch"]) for row in rows.read(path) if row["side"] == "anchors"] == [
        (name, batch) for name in ("tinyllava-1b-toy", "llava-next-7b-toy") for batch in (1, 2)
    ]
    assert capsys.readouterr().err.count("wrong or missing: tinyllava-1b-toy, whole, B=") == 2


def test_overhead_sweep(tmp_path):
    path = tmp_path / "sweep.jsonl"
    arguments = ["overhead", "--sweep", "--device", "cpu", "--models", "llava-7b", "--pairs", "1"]
    assert main([*arguments, "--output", str(path)]) == 0
    found = [(row["image"], row["inserted"]) for row in rows.read(path) if row["side"] == "anchors"]
    assert found == [(16, 1), (16, 3), (48, 1), (48, 3)]


def test_training_runs_both_ways(tmp_path, monkeypatch):
    """By turns on one model, which is plain again in the end; the losses differ."""
    made, built = [], models.build
    monkeypatch.setattr(models, "build", lambda *given: made.append(built(*given)) or made[-1])
    path = tmp_path / "training.jsonl"
    assert main(["training", "--device", "cpu", "--pairs", "1", "--output", str(path)]) == 0
    (row,) = rows.read(path)
    assert not attanchor_vlm.is_attached(made[0])
    assert row["last_loss"] < row["first_loss"]
    assert min(row["trained"], row["train_step_us"], row["plain_train_step_us"]) > 0


@pytest.mark.parametrize("name", list(models.SPECS))
def test_counted_weights_are_those_of_the_model(name):
    """The analytic counts against the parameters of the real class, at toy size."""
    spec = models.SPECS[name].toy()
    decoder = models.Decoder(models.build(spec, torch.device("cpu"), torch.float32, toy=True))
    matrices = [p for n, p in decoder.language.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert spec.language.weights == sum(matrix.numel() for matrix in matrices)
    cache = decoder.filled_cache(torch.randn(2, 5, spec.shape.hidden), None, 3)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert 2 * spec.language.cache_bytes(8, torch.float32) == held


@pytest.mark.parametrize("renamed", [False, True])
def test_a_decoding_step_leaves_the_cache_where_it_was(renamed):
    spec = models.SPECS["tinyllava-1b"].toy()
    model = models.build(spec, torch.device("cpu"), torch.float32, toy=True)
    if renamed:  # as from transformers 5.24 on
        language = model.model.language_model
        forward = language.forward
        language.forward = lambda cache=None, **others: forward(past_key_values=cache, **others)
    decoder = models.Decoder(model)
    assert decoder.cache_name == "cache" or not renamed
    embeds = torch.randn(1, 6, spec.shape.hidden)
    cache = decoder.filled_cache(embeds, None, 4)
    token, position = torch.full((1, 1), 7), torch.full((1, 1), 6)
    first = decoder.decode(token, position, cache)
    assert torch.equal(decoder.decode(token, position, cache), first)
    longer = torch.cat([embeds, decoder.embed(token)], dim=1)
    assert torch.equal(decoder.prefill(longer).argmax(-1), first)


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests/gpu/test_gpu_sanitizer.py runs it here")
def test_what_runs_under_the_sanitizer_finds_a_wrong_result(monkeypatch, capsys):
    """Every operator of the Triton backend on small shapes; then with a gradient of the wrong sign."""
    monkeypatch.setattr(sanitize, "CONFIGURATIONS", sanitize.CONFIGURATIONS[1:])
    sanitize.work(torch.device("cpu"), ["triton"])
    assert capsys.readouterr().out == "triton: right\n"
    usual = triton_backend.assemble_backward
    monkeypatch.setattr(triton_backend, "assemble_backward", lambda *given: tuple(-grad for grad in usual(*given)))
    with pytest.raises(AssertionError, match="triton"):
        sanitize.work(torch.device("cpu"), ["triton"])


def test_the_sanitizer_says_that_it_is_not_here(monkeypatch, capsys):
    monkeypatch.setattr(sanitize, "find_binary", lambda: None)
    assert main(["sanitize"]) == sanitize.UNAVAILABLE
    assert "it comes with the CUDA toolkit" in capsys.readouterr().out


def test_tuning_a_backend_that_is_not_there_is_no_failure_of_a_gpu_run(tmp_path, capsys):
    """`make gpu` tells "not available" from "failed" by the exit status."""
    command = ["tune", "--device", "cpu", "--backends", "cuda", "--output", str(tmp_path / "tune.jsonl")]
    assert main(command) == gpu.UNAVAILABLE
    assert "nothing to tune: " in capsys.readouterr().err


def test_tuning_the_blocks_of_columns_leaves_none_out():
    """A slice is counted in blocks: with smaller ones it would end before its last column."""
    from attanchor_kernels.backends.triton import schedule

    for block in tune.FIELDS["triton"]["block_hidden"]:
        with tune.choice_with("triton", {"block_hidden": block}):
            chosen = schedule.construct(torch.device("cpu"), 2, 8, 576, 626, 4096, 8)
        assert (chosen.block_hidden, chosen.slice_blocks * block, chosen.slices) == (block, 512, 8)


def test_tuning_tries_one_change_at_a_time(tmp_path, monkeypatch, capsys):
    """With few candidates; a schedule that is not right or does not run is told and left."""
    from attanchor_kernels.backends.triton import schedule

    usual = schedule.construct
    monkeypatch.setattr(tune, "FIELDS", {"triton": {"block_rows": (16, "wrong"), "no such field": (1,)}})
    path = tmp_path / "tune.jsonl"
    assert main(["tune", "--device", "cpu", "--batches", "1", "--output", str(path), "--limit", "3600"]) == 0
    (row,) = rows.read(path)
    assert row["us"] > 0
    assert set(row["changes"]) <= {"block_rows"}
    assert schedule.construct is usual
    printed = capsys.readouterr().out
    assert "block_rows=16: " in printed
    assert "'block_rows': 'wrong'}: " in printed
