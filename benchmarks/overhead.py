"""What anchors cost in whole models, and what dropping image tokens saves: construction, prefill, cache, memory.

The language model is that of the model's own class, at its real size with random weights. It is fed the plain prompt
and the prompts that `merge_sequence` makes of it, each timed beside the plain one by turns: rows hold the median of the
ratios and their quartiles. On a GPU a call is one CUDA graph where it can be captured (`method` in the row says so), so
that launches from Python hide nothing. The vision tower, the same on all sides, is left out of what the cost is
compared with; with --whole, models that `attach` serves are also run whole and eagerly, as a user would.
"""

from __future__ import annotations

import argparse
import inspect
import sys
from collections.abc import Callable, Mapping
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import attanchor_vlm
import torch
from torch import Tensor

from attanchor_kernels import merge_sequence
from attanchor_kernels.testing.inputs import TAU, Shape
from benchmarks import models, options, timing
from benchmarks.baselines import plain_merge
from benchmarks.cases import BEFORE, Case, Inputs, WrongResult, make_inputs, run, verify
from benchmarks.models import Decoder, Spec
from benchmarks.rows import Row, Run, ratio

SWEEP_IMAGE = (576, 1152, 2304, 4608, 9216)
SWEEP_SHARES = (0.02, 0.1, 0.3, 0.9)
SWEEP_MODELS = ("tinyllava-1b", "llava-7b")
KEEP = ("1/2", "1/3", "1/9")
CAN_KEEP = "keep" in inspect.signature(merge_sequence).parameters
CONSTRUCTIONS = 15  # pairs
ROOM = 32  # tokens that the cache of a decoding step has room for beyond the prompt
GENERATED = 16  # tokens of the eager, whole generation


class Side(NamedTuple):
    """One way to make the sequence of a prompt: with anchors, and with `keep` of a sample's image tokens."""

    name: str
    keep: int | None = None


def sides(shape: Shape, keep: tuple[str, ...]) -> list[Side]:
    """Anchors over all image tokens, then over each of these shares of them."""
    return [Side("anchors"), *(Side(f"keep {share}", round(Fraction(share) * shape.image)) for share in keep)]


class Prompt(NamedTuple):
    """Embeddings (B, L, D) of one side and, for M-RoPE, their positions."""

    embeds: Tensor
    positions: Tensor | None


def merged(case: Case, side: Side, inputs: Inputs, backend: str = "auto") -> Prompt:
    """What `attach` runs: `merge_sequence`, cut to its length."""
    assert inputs.roles is not None
    settings: dict[str, Any] = {"max_anchors": case.anchored, "trim": True, "backend": backend}
    if inputs.position_ids is not None:
        settings |= {"positions": "inherit", "position_ids": inputs.position_ids}
    if side.keep is not None:
        settings["keep"] = side.keep
    result = merge_sequence(inputs.text, inputs.image, inputs.roles, TAU, **settings)
    assert result.embeds is not None
    return Prompt(result.embeds, None if inputs.position_ids is None else result.position_ids)


def measure(
    on: Run, spec: Spec, decoder: Decoder, case: Case, chosen: list[Side], count: int, decode: bool = True, **more: Any
) -> None:
    """Store a row for the plain prompt and one for each side: construction, prefill and, with `decode`, one new token.

    Raises:
        WrongResult: `merge_sequence` differs from the reference.
    """
    sets = [make_inputs(case, on.device, seed) for seed in range(timing.rotation(case.least_bytes, on.device))]
    verify(case, run(case, sets[0], "reference"), run(case, sets[0], "auto"))  # counts the anchors too
    plain = Prompt(plain_merge(sets[0]), sets[0].position_ids)
    prompts = {"plain": plain, **{side.name: merged(case, side, sets[0]) for side in chosen}}

    for side in chosen:
        # Rows may differ: rounding changes which of two equally relevant image tokens stays.
        if prompts[side.name].embeds.shape != merged(case, side, sets[0], "reference").embeds.shape:
            raise WrongResult(f"{side.name} is not as long as the reference's at {case.label}")

    parts = {"construction": _construction(on, case, chosen, sets)}
    if on.device.type == "cuda":  # eager above, as `attach` runs it; here device time alone, and at capacity
        everything = [side for side in chosen if side.keep is None]
        parts["device_construction"] = _construction(on, case, everything, sets, at_capacity=True)
    decoder.filled_cache(*plain, ROOM)  # what is made once is no side's memory
    peaks, caches = {}, {}
    for name, prompt in prompts.items():
        peaks[name], caches[name] = timing.peak_of(partial(decoder.filled_cache, *prompt, ROOM), on.device)
    prefills = {name: partial(decoder.prefill, *one) for name, one in prompts.items()}
    parts["prefill"] = _beside_plain(on, prefills, count, warm=True)  # each length has been run
    if decode:
        steps = {name: _step(decoder, one, caches[name]) for name, one in prompts.items()}
        parts["step"] = _beside_plain(on, steps, count)

    flops = spec.language.prefill_flops
    length = plain.embeds.shape[1]
    described = {key: value for key, value in case.describe().items() if key not in ("shape", "bytes", "inserted")}
    for name, prompt in prompts.items():
        row = {"model": spec.name, **described, **more, "side": name, "length": prompt.embeds.shape[1]}
        if name != "plain":
            row |= {"inserted": case.anchored, "keep": next(side.keep for side in chosen if side.name == name)}
            row |= {"pairs": count, "method": parts["prefill"][name].method}
            for part, found in parts.items():
                row |= found[name].describe(part) if name in found else {}
            row["flops_ratio"] = round(flops(row["length"]) / flops(length), 4)
        row["kv_bytes"] = case.batch * spec.language.cache_bytes(row["length"], case.dtype)
        row["peak_bytes"] = peaks[name]
        _say(on.add(row))


def _construction(
    on: Run, case: Case, chosen: list[Side], sets: list[Inputs], at_capacity: bool = False
) -> dict[str, timing.Pairs]:
    """`merge_sequence` beside the merge that it replaces, over rotated inputs."""

    def take(make: Callable[[Inputs], Any]) -> timing.Take:
        return timing.prepare([partial(make, inputs) for inputs in sets], on.device, eager=not at_capacity)

    def by(side: Side) -> Callable[[Inputs], Any]:
        return partial(run, case, backend="auto") if at_capacity else partial(merged, case, side)

    timing.forget_captures(on.device)
    return timing.pairs(take(plain_merge), {side.name: take(by(side)) for side in chosen}, CONSTRUCTIONS)


def _beside_plain(
    on: Run, calls: Mapping[str, Callable[[], Any]], count: int, warm: bool = False
) -> dict[str, timing.Pairs]:
    takes = {name: timing.prepare_long(call, on.device, warm=warm) for name, call in calls.items()}
    return timing.pairs(takes.pop("plain"), takes, count)


def _step(decoder: Decoder, prompt: Prompt, cache: Any) -> Callable[[], Tensor]:
    """One decoding step at a cache that holds the prompt."""
    batch, length, _ = prompt.embeds.shape
    token = torch.zeros(batch, 1, dtype=torch.int64, device=prompt.embeds.device)
    position = torch.full((batch, 1), length, device=token.device)
    if prompt.positions is not None:
        position = position.expand(3, -1, -1).contiguous()
    return partial(decoder.decode, token, position, cache)


def _say(row: Row) -> None:
    where = f"{row['model']:<18}{row['dtype']:<9}B={row['batch']:<3}{row['side']:<10}{row['length']:>6} tokens"
    parts = [
        f"{part} {row[f'{part}_us'] / 1e3:.4g} ms, {ratio(row, part)}"
        for part in ("construction", "prefill", "step")
        if f"{part}_us" in row
    ]
    print("; ".join([where, *parts]), flush=True)


def measure_whole(on: Run, spec: Spec, model: Any, case: Case, count: int) -> None:
    """The whole model, vision tower and all, eagerly through `attach`: a forward, and a short generation.

    Random weights have no meaning to match: the best-scoring tokens are inserted, as many as usual.
    """
    arguments = whole_prompt(on.device, on.dtype, spec, model, case.batch)
    generated = min(GENERATED, spec.shape.text // 2)
    config = attanchor_vlm.AttAnchorConfig(tau=-1.0, max_anchors=case.anchored)

    @torch.no_grad()
    def forward() -> Any:
        return model(**arguments, logits_to_keep=1).logits

    def generate() -> Tensor:
        return model.generate(**arguments, max_new_tokens=generated, min_new_tokens=generated, do_sample=False)

    for name, call in {"forward": forward, "generate": generate}.items():
        plain = timing.prepare_long(call, on.device, eager=True)
        take = timing.Take(partial(attached, model, config, plain), plain.method)
        found = timing.pairs(plain, {"attached": take}, count)["attached"]
        row = {"model": spec.name, **case.describe(), "measure": f"attached {name}", "pairs": count}
        row |= {"method": plain.method, "new_tokens": 1 if name == "forward" else generated}
        row = on.add({**row, **found.describe(name)})
        print(f"{spec.name:<18}B={case.batch:<3}whole {name}: {ratio(row, name)}", flush=True)


def attached(model: Any, config: attanchor_vlm.AttAnchorConfig, take: timing.Take) -> float:
    """Seconds of a call while anchors are attached."""
    attanchor_vlm.attach(model, config)
    try:
        return take.seconds()
    finally:
        attanchor_vlm.detach(model)


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


def add_options(parser: argparse.ArgumentParser) -> None:
    options.device(parser)
    options.output(parser, "overhead")
    options.dtype(parser)
    parser.add_argument("--models", type=options.names(models.SPECS), help="names, with commas; default: all four")
    parser.add_argument("--batches", type=options.numbers, help="default: 1,8, on a CPU 1")
    parser.add_argument(
        "--keep", type=options.shares, default=KEEP if CAN_KEEP else (), help="shares of the image tokens (%(default)s)"
    )
    parser.add_argument("--pairs", type=options.number, default=7, help="of each measurement (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="whole models through `attach` too")
    parser.add_argument("--sweep", action="store_true", help="over image tokens and inserted share instead")
    parser.add_argument("--real-size", action="store_true", help="real sizes on a CPU too (slow)")


def main(given: argparse.Namespace) -> int:
    """Every model and batch; what fails is reported, the rest goes on. Returns 1 if anything failed."""
    if given.keep and not CAN_KEEP:
        print(f"--keep is {','.join(given.keep)}; this merge_sequence has no keep", file=sys.stderr)
        return 2
    on = Run(given.output, given.device, "overhead", given.dtype)
    toy = on.device.type == "cpu" and not given.real_size
    for name in given.models or (SWEEP_MODELS if given.sweep else tuple(models.SPECS)):
        with on.guarded(name):
            _measure_model(on, models.SPECS[name].toy() if toy else models.SPECS[name], toy, given)
    return on.status()


def _measure_model(on: Run, spec: Spec, toy: bool, given: argparse.Namespace) -> None:
    model = models.build(spec, on.device, on.dtype, toy)
    decoder = Decoder(model)
    if given.sweep:
        for image in (16, 48) if toy else SWEEP_IMAGE:
            at = spec._replace(shape=spec.shape._replace(image=image))
            for share in (0.1, 0.3) if toy else SWEEP_SHARES:
                count = max(1, min(round(share * spec.shape.text), spec.shape.text - BEFORE))
                case = Case("merge", at.shape, 1, on.dtype, count, count)
                with on.guarded(f"{spec.name}, M={image}, {count} inserted"):
                    measure(on, at, decoder, case, [Side("anchors")], given.pairs, False, measure="sweep", share=share)
        return
    for batch in given.batches or ((1,) if on.device.type == "cpu" else (1, 8)):
        # Anchors fill the budget exactly, so that no row is padding.
        count = round(0.1 * spec.shape.text)
        case = Case("merge", spec.shape, batch, on.dtype, count, count)
        with on.guarded(f"{spec.name}, B={batch}"):
            measure(on, spec, decoder, case, sides(spec.shape, given.keep), given.pairs)
        if given.whole and spec.attachable:
            with on.guarded(f"{spec.name}, whole, B={batch}"):
                measure_whole(on, spec, model, case, given.pairs)
