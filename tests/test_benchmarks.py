"""The benchmark commands at toy size on a CPU."""

import gc
import weakref
from functools import partial

import pytest
import torch

from attanchor_kernels.backends import triton as triton_backend
from benchmarks import __main__ as commands
from benchmarks import (
    accounting,
    baselines,
    cases,
    floor,
    gpu,
    models,
    overhead,
    roofline,
    rows,
    sanitize,
    timing,
    tune,
)
from benchmarks.__main__ import main


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Rows of a roofline run at toy size."""
    path = tmp_path_factory.mktemp("roofline") / "roofline.jsonl"
    assert main(["roofline", "--device", "cpu", "--output", str(path), "--batches", "2", "--budget", "0.02"]) == 0
    return path


def test_every_command_explains_itself():
    for command in ("roofline", "overhead", "training", "tune", "cpu-reference", "compare", "targets", "report"):
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0


def test_a_slow_backend_keeps_its_digits(tmp_path, monkeypatch):
    """Thousands of times slower than the roofline is still a percentage with three digits, not 0.0 or 0.01."""
    path, floor_us, slow_us = tmp_path / "roofline.jsonl", 1.0, 7770.0

    def measured(calls, **_):
        slow = getattr(calls[0], "args", ())[-1:] == ("reference",)
        seconds = (slow_us if slow else floor_us) * 1e-6
        return timing.Timing(*[seconds] * 4, "wall", calls=1, repeats=1)

    monkeypatch.setattr(timing, "wall_timing", measured)
    assert main(["roofline", "--device", "cpu", "--output", str(path), "--batches", "2", "--budget", "0.01"]) == 0
    row = next(row for row in rows.read(path) if row["operation"] == "forward" and row["backend"] == "reference")
    assert row["percent_of_roofline"] == pytest.approx(100 * floor_us / slow_us, rel=1e-3)


def test_roofline_rows_say_what_was_measured_on_what(measured):
    found = rows.read(measured)
    assert [row["backend"] for row in found if row["operation"] == "forward"] == ["floor", "reference"]
    assert {row["operation"] for row in found} == {"copy", "forward", "backward", "merge"}
    assert "masked_scatter" in {row["backend"] for row in found}
    for row in found:
        assert row["us_min"] <= row["us_p10"] <= row["us"] <= row["us_p90"]
        assert {"commit", "gpu", "driver", "torch", "triton", "date", "bytes", "method", "repeats"} <= set(row)
    forward = next(row for row in found if row["backend"] == "reference" and row["operation"] == "forward")
    assert forward["bytes"] == 2 * 128 * 4 * (46 + 46 + 8)
    assert forward["ratio"] == pytest.approx(forward["us"] / forward["floor_us"], rel=1e-3)
    assert forward["percent_of_roofline"] == pytest.approx(100 / forward["ratio"], rel=1e-2)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--shapes", "nope"], "nope"),
        (["--backends", "cudda"], "cudda"),
        (["--backends", "cuda"], "cuda, which cannot run here"),
        (["--passes", "x"], "x"),
    ],
)
def test_unknown_names_are_told(arguments, named, capsys):
    assert main(["roofline", "--device", "cpu", *arguments]) == 2
    assert named in capsys.readouterr().err


def test_no_figure_for_a_wrong_result(tmp_path, monkeypatch, capsys):
    """A backend that returns something else is reported and never timed."""
    right = roofline.run

    def wrong(case, inputs, backend):
        fields = right(case, inputs, "reference")
        return fields if backend == "reference" else (fields[0] + 1, *fields[1:])

    monkeypatch.setattr(roofline, "run", wrong)
    settings = roofline.Settings("cpu", tmp_path / "rows.jsonl", ["triton"], passes=("kernels",), budget=0.01)
    settings.names = ["triton"]
    with pytest.raises(cases.WrongResult, match="embeds differs"):
        roofline.run_cases([cases.Case("forward", cases.TOY, 1, torch.float32)], settings)
    assert "WRONG" in capsys.readouterr().out
    assert "triton" not in {row["backend"] for row in rows.read(tmp_path / "rows.jsonl")}


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

    monkeypatch.setattr(roofline, "run", failing)
    settings = roofline.Settings("cpu", tmp_path / "rows.jsonl", [], passes=("kernels",), budget=0.01)
    settings.names = ["triton", "cuda"]
    chosen = [cases.Case(operation, cases.TOY, 1, torch.float32) for operation in ("forward", "backward")]
    with pytest.raises(
        cases.WrongResult, match=r"^triton, forward, toy, B=1 failed with RuntimeError: out of resource$"
    ):
        roofline.run_cases(chosen, settings)
    assert "and a page more" in capsys.readouterr().out
    found = [(row["operation"], row["backend"]) for row in rows.read(tmp_path / "rows.jsonl") if "ratio" in row]
    assert found == [("forward", "cuda"), ("backward", "triton"), ("backward", "cuda")]


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
        (["training", "--steps", "-1"], "'-1' should be an integer of at least 1"),
        (["overhead", "--device", "cuda:1"], "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_options_that_cannot_be_are_told(arguments, said, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert said in capsys.readouterr().err


def test_a_run_on_a_cpu_does_not_replace_rows_of_a_gpu(tmp_path, monkeypatch, capsys):
    """By default runs write where the stored rows are, the sweep beside the models."""
    monkeypatch.setattr(commands, "RESULTS", tmp_path)
    stored = {"run": "roofline", "gpu": "Test GPU", "date": "2026-01-01"}
    rows.write(tmp_path / "roofline.jsonl", [stored])
    assert main(["roofline", "--device", "cpu"]) == 2
    assert "roofline.jsonl holds rows of a GPU" in capsys.readouterr().err
    assert rows.read(tmp_path) == [stored]
    written = []
    monkeypatch.setattr(overhead, "main", lambda options: written.append(options.output.name) or 0)
    assert main(["overhead", "--device", "cpu"]) == main(["overhead", "--device", "cpu", "--sweep"]) == 0
    assert written == ["overhead.jsonl", "sweep.jsonl"]


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
    assert main(["cpu-reference", "--toy", "--rounds", "2", "--output", str(path)]) == 0
    assert [(row["shape"], row["batch"]) for row in rows.read(path)] == [("toy", 1), ("toy", 4)]
    assert main(["cpu-reference", "--toy"]) == 2
    assert "--output" in capsys.readouterr().err


def test_timing_takes_medians_and_turns_over_its_inputs():
    seen = []
    taken = timing.wall_timing([lambda i=index: seen.append(i) for index in range(3)], repeats=7, budget=1e9)
    assert taken.repeats == 7
    assert seen == [0, 0, 1, 2, 0, 1, 2, 0]
    assert taken.least <= taken.p10 <= taken.p50 <= taken.p90


def test_a_call_that_waits_for_the_device_is_not_captured(monkeypatch, capsys):
    """Found out before the capture: one that fails would leave the process unfit for the models to come."""
    mode = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", mode.append)
    for method in ("graph", "event"):
        monkeypatch.setattr(timing, f"{method}_timing", lambda calls, method=method, **_: method)

    def waits():
        if mode[-1:] == ["error"]:
            raise RuntimeError("called a synchronizing CUDA operation")

    device = torch.device("cuda")
    assert timing.measure_long(lambda: None, device) == "graph"
    assert timing.measure_long(waits, device) == "event"
    assert "timed with its launches: called a synchronizing" in capsys.readouterr().out
    assert mode == ["error", "default"] * 2


def test_overhead_reports_three_parts_and_what_they_should_be(tmp_path):
    path = tmp_path / "overhead.jsonl"
    arguments = ["--device", "cpu", "--models", "tinyllava-1b,qwen2.5-vl-3b", "--batches", "1", "--new-tokens", "1,4"]
    assert main(["overhead", "--output", str(path), *arguments]) == 0
    found = rows.read(path)
    parts = [row for row in found if "construction_us" in row]
    assert [(row["model"], row["new_tokens"]) for row in parts] == [
        (name, count) for name in ("tinyllava-1b-toy", "qwen2.5-vl-3b-toy") for count in (1, 4)
    ]
    for row in parts:
        total = row["plain_us"] + row["construction_us"] + row["prefill_us"] + row["decode_us"]
        assert row["anchored_us"] == pytest.approx(total, abs=0.1)
        assert row["prefill_flops"] > 0
        assert row["prefill_bytes"] > 0
        for name in ("plain_prefill", "anchored_prefill", *(["plain_step"] if row["new_tokens"] > 1 else [])):
            assert row[f"{name}_us_p10"] <= row[f"{name}_us"] <= row[f"{name}_us_p90"]
        assert (row["decode_bytes"] > 0) == (row["new_tokens"] > 1)
    assert {row["measure"] for row in found if "measure" in row} == {"attached forward", "attached generate"}


def test_overhead_of_what_works_is_kept(tmp_path, monkeypatch, capsys):
    """A whole model that fails costs neither its decoder at the next batch nor the next model its figures."""
    from attanchor_vlm.model.attach import AttAnchorMixin

    def fails(*_, **__):
        raise RuntimeError("no generation")

    monkeypatch.setattr(AttAnchorMixin, "generate", fails)
    path = tmp_path / "overhead.jsonl"
    arguments = ["--models", "tinyllava-1b,llava-next-7b", "--batches", "1,2", "--new-tokens", "1"]
    assert main(["overhead", "--device", "cpu", "--output", str(path), *arguments]) == 1
    assert [(row["model"], row["batch"]) for row in rows.read(path)] == [
        (name, batch) for name in ("tinyllava-1b-toy", "llava-next-7b-toy") for batch in (1, 2)
    ]
    assert capsys.readouterr().err.count("tinyllava-1b, whole, B=") == 2


def test_overhead_sweep(tmp_path):
    path = tmp_path / "sweep.jsonl"
    assert main(["overhead", "--sweep", "--device", "cpu", "--models", "llava-7b", "--output", str(path)]) == 0
    assert [(row["image"], row["inserted"]) for row in rows.read(path)] == [(16, 1), (16, 3), (48, 1), (48, 3)]


def test_training_runs_both_ways(tmp_path, monkeypatch):
    """The first model is gone when the second is made: its memory is no part of the second's peak."""
    path, made = tmp_path / "training.jsonl", []
    build = models.build

    def build_alone(*arguments):
        assert not any(model() for model in made)
        model = build(*arguments)
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(models, "build", build_alone)
    gc.disable()
    try:
        assert main(["training", "--device", "cpu", "--steps", "1", "--output", str(path)]) == 0
    finally:
        gc.enable()
    assert len(made) == 2
    plain, anchored = rows.read(path)
    assert (plain["attached"], anchored["attached"]) == (False, True)
    assert plain["trained"] == anchored["trained"] > 0
    assert plain["first_loss"] != anchored["first_loss"]


@pytest.mark.parametrize("name", list(models.SPECS))
def test_counted_weights_are_those_of_the_model(name):
    """The analytic counts against the parameters of the real class, at toy size."""
    spec = models.SPECS[name].toy()
    decoder = models.Decoder(models.build(spec, torch.device("cpu"), torch.float32, toy=True))
    matrices = [p for n, p in decoder.language.named_parameters() if p.dim() == 2 and "embed" not in n]
    assert spec.language.weights == sum(matrix.numel() for matrix in matrices)
    cache = decoder.filled_cache(torch.randn(2, 5, spec.shape.hidden), None, 3)
    held = sum(layer.keys.numel() + layer.values.numel() for layer in cache.layers)
    assert spec.language.cache_bytes(2, 8) == held * accounting.BYTES


def test_a_decoding_step_leaves_the_cache_where_it_was():
    spec = models.SPECS["tinyllava-1b"].toy()
    decoder = models.Decoder(models.build(spec, torch.device("cpu"), torch.float32, toy=True))
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
    assert sanitize.main([]) == sanitize.UNAVAILABLE
    assert "it comes with the CUDA toolkit" in capsys.readouterr().out


def test_tuning_a_backend_that_is_not_there_is_no_failure_of_a_gpu_run(tmp_path, capsys):
    """`make gpu` tells "not available" from "failed" by the exit status."""
    command = ["tune", "--device", "cpu", "--backends", "cuda", "--output", str(tmp_path / "tune.jsonl")]
    assert main(command) == gpu.UNAVAILABLE
    assert "nothing to tune: " in capsys.readouterr().err
    assert main([*command[:3], "--backends", "metal"]) == 2
    assert "--backends is metal; it should be of cuda, triton" in capsys.readouterr().err


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
