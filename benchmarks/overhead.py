"""What anchors cost in whole models: construction, the longer prefill, and decoding over the longer cache. All three.

The language model is that of the model's own class, at its real size with random weights. It is fed the plain prompt
and the prompt with anchors in it, S and S + inserted rows, each under a CUDA graph where it can be captured (`method`
in the row says so), so that launches from Python hide nothing. The vision tower, the same with and without, is left out
of what the cost is compared with. Models that `attach` serves are also run whole and eagerly, as a user would.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attanchor_kernels import merge_sequence
from attanchor_kernels.testing.inputs import TAU, Shape
from benchmarks import accounting, models, timing
from benchmarks.baselines import plain_merge
from benchmarks.cases import BEFORE, Case, Inputs, make_inputs, run, verify
from benchmarks.models import Decoder, Spec
from benchmarks.rows import Row, Store

SWEEP_IMAGE = (576, 1152, 2304, 4608, 9216)
SWEEP_SHARES = (0.02, 0.1, 0.3, 0.9)
SWEEP_MODELS = ("tinyllava-1b", "llava-7b")
GENERATED = 16  # tokens of the eager, whole generation


class Prompt:
    """The plain prompt and the anchored one of a case, as embeddings and, for M-RoPE, positions."""

    def __init__(self, case: Case, inputs: Inputs) -> None:
        assert inputs.roles is not None
        self.plain = plain_merge(inputs)
        options: dict[str, Any] = {}
        if inputs.position_ids is not None:
            options = {"positions": "inherit", "position_ids": inputs.position_ids}
        result = merge_sequence(
            inputs.text, inputs.image, inputs.roles, TAU, max_anchors=case.anchored, trim=True, **options
        )
        assert result.embeds is not None
        self.anchored = result.embeds
        assert self.anchored.shape[1] == self.plain.shape[1] + case.anchored
        self.plain_positions = inputs.position_ids
        self.anchored_positions = result.position_ids if inputs.position_ids is not None else None


class Run:
    """One run of the command: where rows go, and how long each figure may take."""

    def __init__(self, device: str, output: Path, toy: bool, budget: float) -> None:
        self.device = torch.device(device)
        self.toy = toy
        self.dtype = torch.float32 if self.device.type == "cpu" else torch.bfloat16
        self.store = Store(output, device, "overhead")
        self.budget = budget

    def case(self, spec: Spec, batch: int, anchored: int | None = None) -> Case:
        """The prompt of a model; anchors fill the budget exactly, so that no row is padding."""
        count = round(0.1 * spec.shape.text) if anchored is None else anchored
        return Case("merge", spec.shape, batch, self.dtype, count, count)

    def construction(self, case: Case) -> tuple[float, float, Inputs]:
        """Microseconds of `merge_sequence` and of the merge that it replaces, cold caches, checked first."""
        count = timing.rotation(case.least_bytes, self.device)
        sets = [make_inputs(case, self.device, seed) for seed in range(count)]
        verify(case, run(case, sets[0], "reference"), run(case, sets[0], "auto"))
        anchors = timing.measure([partial(run, case, inputs, "auto") for inputs in sets], self.device, budget=0.3)
        plain = timing.measure([partial(plain_merge, inputs) for inputs in sets], self.device, budget=0.3)
        return anchors.p50 * 1e6, plain.p50 * 1e6, sets[0]

    def prefill(self, decoder: Decoder, embeds: Tensor, positions: Tensor | None) -> timing.Timing:
        return timing.measure_long(lambda: decoder.prefill(embeds, positions), self.device, budget=self.budget)

    def step(self, decoder: Decoder, embeds: Tensor, positions: Tensor | None, new_tokens: int) -> timing.Timing:
        """One decoding step at a cache that has room for `new_tokens` beyond the prompt."""
        cache = decoder.filled_cache(embeds, positions, new_tokens)
        token = torch.zeros(len(embeds), 1, dtype=torch.int64, device=self.device)
        position = torch.full((len(embeds), 1), embeds.shape[1], device=self.device)
        if positions is not None:
            position = position.expand(3, -1, -1).contiguous()
        return timing.measure_long(lambda: decoder.decode(token, position, cache), self.device, budget=self.budget)


def measure_model(run: Run, spec: Spec, decoder: Decoder, batch: int, new_tokens: tuple[int, ...]) -> list[Row]:
    """One row for each number of new tokens. The first new token comes out of the prefill."""
    case = run.case(spec, batch)
    construction, replaced, inputs = run.construction(case)
    prompt = Prompt(case, inputs)
    sides = {"plain": (prompt.plain, prompt.plain_positions), "anchored": (prompt.anchored, prompt.anchored_positions)}
    prefill = {name: run.prefill(decoder, *side) for name, side in sides.items()}
    rows = []
    for count in new_tokens:
        total = {name: taken.p50 * 1e6 for name, taken in prefill.items()}
        steps = {name: run.step(decoder, *side, count) for name, side in sides.items()} if count > 1 else {}
        decoding = {name: (count - 1) * steps[name].p50 * 1e6 if steps else 0.0 for name in sides}
        row = {
            **_who(spec, case),
            "new_tokens": count,
            "method": "+".join(sorted({taken.method for taken in (*prefill.values(), *steps.values())})),
            "plain_us": round(total["plain"] + decoding["plain"], 2),
            "anchored_us": round(construction + total["anchored"] + decoding["anchored"], 2),
            "construction_us": round(construction, 3),
            "replaced_merge_us": round(replaced, 3),
            "prefill_us": round(total["anchored"] - total["plain"], 2),
            "decode_us": round(decoding["anchored"] - decoding["plain"], 2),
            **_spread("prefill", prefill),
            **_spread("step", steps),
            **_counted(spec, case, prompt, count),
        }
        rows.append(run.store.add(row))
        _say(rows[-1])
    return rows


def _who(spec: Spec, case: Case) -> Row:
    described = case.describe()
    described.pop("shape")
    described.pop("bytes")
    return {"model": spec.name, **described}


def _spread(what: str, sides: dict[str, timing.Timing]) -> Row:
    """Median and percentiles of one call of each side, in microseconds."""
    return {
        f"{side}_{what}_{figure}": value
        for side, taken in sides.items()
        for figure, value in taken.describe().items()
        if figure.startswith("us")
    }


def _counted(spec: Spec, case: Case, prompt: Prompt, count: int) -> Row:
    """The same parts in operations and bytes, from sizes alone."""
    language, batch = spec.language, case.batch
    plain, anchored = prompt.plain.shape[1], prompt.anchored.shape[1]

    def decoded(counted: Any, length: int) -> int:
        return sum(counted(batch, length + step) for step in range(count - 1))

    flops, read = language.decode_flops, language.decode_bytes
    return {
        "construction_flops": accounting.construction_flops(
            batch, case.shape.image, case.shape.text, case.shape.hidden
        ),
        "construction_bytes": case.least_bytes,
        "plain_flops": language.prefill_flops(batch, plain) + decoded(flops, plain),
        "plain_bytes": language.prefill_bytes(batch, plain) + decoded(read, plain),
        "prefill_flops": language.prefill_flops(batch, anchored) - language.prefill_flops(batch, plain),
        "prefill_bytes": language.prefill_bytes(batch, anchored) - language.prefill_bytes(batch, plain),
        "decode_flops": decoded(flops, anchored) - decoded(flops, plain),
        "decode_bytes": decoded(read, anchored) - decoded(read, plain),
    }


def _say(row: Row) -> None:
    plain = row["plain_us"]
    parts = ", ".join(
        f"{name} {100 * row[key] / plain:+.3f} %"
        for key, name in (("construction_us", "construction"), ("prefill_us", "prefill"), ("decode_us", "cache"))
    )
    tokens = f"{row['new_tokens']} new" if "new_tokens" in row else f"M={row['image']}, {row['inserted']} inserted"
    print(f"{row['model']:<18}B={row['batch']:<3}{tokens:<24}{plain / 1e3:>10.2f} ms   {parts}", flush=True)


def measure_sweep(run: Run, spec: Spec, decoder: Decoder) -> list[Row]:
    """Prefill and construction at B = 1 over image tokens and inserted share."""
    rows = []
    for image in (16, 48) if run.toy else SWEEP_IMAGE:
        shape = Shape(spec.name, image, spec.shape.text, spec.shape.hidden)
        at = spec._replace(shape=shape)
        plain: timing.Timing | None = None
        for share in (0.1, 0.3) if run.toy else SWEEP_SHARES:
            inserted = max(1, min(round(share * shape.text), shape.text - BEFORE))
            case = run.case(at, 1, inserted)
            construction, replaced, inputs = run.construction(case)
            prompt = Prompt(case, inputs)
            plain = plain or run.prefill(decoder, prompt.plain, prompt.plain_positions)
            anchored = run.prefill(decoder, prompt.anchored, prompt.anchored_positions)
            row = {
                **_who(at, case),
                "measure": "sweep",
                "share": share,
                "method": anchored.method,
                "plain_us": round(plain.p50 * 1e6, 2),
                "anchored_us": round(construction + anchored.p50 * 1e6, 2),
                "construction_us": round(construction, 3),
                "replaced_merge_us": round(replaced, 3),
                "prefill_us": round((anchored.p50 - plain.p50) * 1e6, 2),
                "decode_us": 0.0,
                **_spread("prefill", {"plain": plain, "anchored": anchored}),
                **_counted(at, case, prompt, 1),
            }
            rows.append(run.store.add(row))
            _say(rows[-1])
    return rows


def measure_attached(run: Run, spec: Spec, model: Any, batch: int) -> list[Row]:
    """The whole model, vision tower and all, eagerly through `attach`: a forward, and a short generation."""
    from attanchor_vlm import AttAnchorConfig, attach, detach

    arguments = whole_prompt(run.device, run.dtype, spec, model, batch)
    count = round(0.1 * spec.shape.text)
    generated = 4 if run.toy else GENERATED

    @torch.no_grad()
    def forward() -> Any:
        return model(**arguments, logits_to_keep=1).logits

    def generate() -> Tensor:
        return model.generate(**arguments, max_new_tokens=generated, min_new_tokens=generated, do_sample=False)

    calls = {"forward": forward, "generate": generate}
    plainly = {name: _eager(call, run) for name, call in calls.items()}
    # Random weights have no meaning to match: the best-scoring tokens are inserted, as many as usual.
    attach(model, AttAnchorConfig(tau=-1.0, max_anchors=count))
    try:
        attached = {name: _eager(call, run) for name, call in calls.items()}
    finally:
        detach(model)
    rows = []
    for name in calls:
        plain, anchored = plainly[name], attached[name]
        row = {
            **_who(spec, run.case(spec, batch)),
            "measure": f"attached {name}",
            "method": anchored.method,
            "new_tokens": generated if name == "generate" else 1,
            "plain_us": round(plain.p50 * 1e6, 2),
            "anchored_us": round(anchored.p50 * 1e6, 2),
            **_spread(name, {"plain": plain, "anchored": anchored}),
        }
        rows.append(run.store.add(row))
        added = 100 * (row["anchored_us"] / row["plain_us"] - 1)
        print(f"{spec.name:<18}B={batch:<3}eager, whole {name:<12}{row['plain_us'] / 1e3:>9.2f} ms   {added:+.2f} %")
    return rows


def _eager(call: Any, run: Run) -> timing.Timing:
    if run.device.type == "cuda":
        return timing.event_timing([call], repeats=5, budget=run.budget, least_calls=1)
    return timing.wall_timing([call], repeats=5, budget=run.budget)


def whole_prompt(device: torch.device, dtype: torch.dtype, spec: Spec, model: Any, batch: int) -> dict[str, Tensor]:
    """Text, one image, text, as a processor would hand it to the model: input ids, mask and pixels."""
    generator = torch.Generator().manual_seed(0)
    side = model.config.vision_config.image_size
    first = min(4, spec.language.vocabulary - 1)
    ids = torch.randint(
        first, spec.language.vocabulary, (batch, spec.shape.image + spec.shape.text), generator=generator
    )
    ids[:, BEFORE : BEFORE + spec.shape.image] = models.IMAGE_TOKEN
    pixels = torch.randn(batch, 3, side, side, generator=generator)
    return {
        "input_ids": ids.to(device),
        "attention_mask": torch.ones_like(ids).to(device),
        "pixel_values": pixels.to(device, dtype),
    }


def main(options: argparse.Namespace) -> int:
    """Every model and batch; what fails is reported, the rest goes on. Returns 1 if anything failed."""
    on_cpu = options.device == "cpu"
    toy = on_cpu and not options.real_size
    names = options.models or (SWEEP_MODELS if options.sweep else tuple(models.SPECS))
    if unknown := [name for name in names if name not in models.SPECS]:
        print(f"--models is {', '.join(unknown)}; it should be of {', '.join(models.SPECS)}", file=sys.stderr)
        return 2
    run = Run(options.device, options.output, toy, budget=0.2 if toy else 1.5)
    failed = []

    @contextlib.contextmanager
    def reported(what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            failed.append(what)
            print(f"{what} failed: {type(error).__name__}: {error}", file=sys.stderr, flush=True)

    for name in names:
        spec = models.SPECS[name].toy() if toy else models.SPECS[name]
        model: Any = None
        decoder: Any = None
        with reported(name):
            model = models.build(spec, run.device, run.dtype, toy)
            decoder = Decoder(model)
            if options.sweep:
                measure_sweep(run, spec, decoder)
            else:
                for batch in options.batches or ((1, 2) if on_cpu else (1, 8)):
                    with reported(f"{name}, B={batch}"):
                        measure_model(run, spec, decoder, batch, options.new_tokens)
                    if spec.attachable:
                        with reported(f"{name}, whole, B={batch}"):
                            measure_attached(run, spec, model, batch)
        model = decoder = None  # a model of 14 GB must be gone before the next one comes
        gc.collect()
        if run.device.type == "cuda":
            torch.cuda.empty_cache()
    return int(bool(failed))
