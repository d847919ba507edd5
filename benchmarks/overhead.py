"""What anchors cost in whole models, and what dropping image tokens saves: construction, prefill, cache, memory.

The language model is that of the model's own class, at its real size with random weights. It is fed the plain prompt
and the prompts that `merge_sequence` makes of it, each timed beside the plain one by turns: rows hold the median of the
ratios and their quartiles. On a GPU a call is one CUDA graph where it can be captured (`method` in the row says so), so
that launches from Python hide nothing. The vision tower, the same on all sides, is left out of what the cost is
compared with; with --whole, models that `attach` serves are also run whole and eagerly, as a user would.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import attanchor_vlm
from attanchor_kernels.testing.inputs import Shape
from benchmarks import models, options, timing
from benchmarks.baselines import plain_merge
from benchmarks.cases import BEFORE, Case, Inputs, WrongResult, make_sets, run, verify
from benchmarks.models import Decoder, Spec
from benchmarks.rows import Row, Run, ratio

SWEEP_IMAGE = (576, 1152, 2304, 4608, 9216)
SWEEP_SHARES = (0.02, 0.1, 0.3, 0.9)
SWEEP_MODELS = ("tinyllava-1b", "llava-7b")
KEEP = ("1/2", "1/3", "1/9")
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
    embeds, positions = run(case, inputs, backend, trim=True, keep=side.keep)[:2]
    return Prompt(embeds, None if inputs.position_ids is None else positions)


def measure(
    on: Run, spec: Spec, decoder: Decoder, case: Case, chosen: list[Side], count: int, decode: bool = True, **more: Any
) -> None:
    """Store a row for the plain prompt and one for each side: construction, prefill and, with `decode`, one new token.

    Raises:
        WrongResult: `merge_sequence` differs from the reference.
    """
    sets = make_sets(case, on.device)
    verify(case, run(case, sets[0], "reference"), run(case, sets[0], "auto"))  # counts the anchors too
    plain = Prompt(plain_merge(sets[0]), sets[0].position_ids)
    length = plain.embeds.shape[1]
    described = case.describe("operation", "image", "text", "hidden", "batch", "dtype", "max_anchors")

    def store(side: str, prompt: Prompt, peak: int | None, row: Row) -> None:
        tokens = prompt.embeds.shape[1]
        flops = spec.language.prefill_flops(tokens) / spec.language.prefill_flops(length)
        row = {"model": spec.name, **described, **more, "side": side, "length": tokens, **row}
        row |= {"flops_ratio": round(flops, 4), "kv_bytes": case.batch * spec.language.cache_bytes(tokens, case.dtype)}
        _say(on.add({**row, "peak_bytes": peak}))

    decoder.filled_cache(*plain, ROOM)  # what is made once is no side's memory
    peak, plain_cache = timing.peak_of(partial(decoder.filled_cache, *plain, ROOM), on.device)
    store("plain", plain, peak, {})
    for side in chosen:  # one after the other, since two graphs with their caches fit where all do not
        prompt = merged(case, side, sets[0])
        # Rows may differ: rounding changes which of two equally relevant image tokens stays.
        if prompt.embeds.shape != merged(case, side, sets[0], "reference").embeds.shape:
            raise WrongResult(f"{side.name} is not as long as the reference's at {case.label}")
        peak, cache = timing.peak_of(partial(decoder.filled_cache, *prompt, ROOM), on.device)
        prefills = [partial(decoder.prefill, *one) for one in (plain, prompt)]
        steps = [_step(decoder, plain, plain_cache), _step(decoder, prompt, cache)]
        parts = {
            "construction": _construction(on, case, side, sets),
            **({} if on.device.type == "cpu" else {"device_construction": _construction(on, case, None, sets)}),
            "prefill": _pairs(on, prefills, count, warm=True),
            **({"step": _pairs(on, steps, count)} if decode else {}),
        }
        row = {"inserted": case.anchored, "keep": side.keep, "pairs": count, "method": parts["prefill"].method}
        for part, found in parts.items():
            row |= found.describe(part)
        store(side.name, prompt, peak, row)
        del cache, steps
        on.release()


def _construction(on: Run, case: Case, side: Side | None, sets: list[Inputs]) -> timing.Pairs:
    """`merge_sequence` beside the merge that it replaces, over rotated inputs: eagerly, as `attach` runs it.

    Without a side, of anchors alone: at capacity and, on a GPU, in a graph, which is device time.
    """
    make: Callable[[Inputs], Any] = partial(run, case, backend="auto") if side is None else partial(merged, case, side)
    timing.forget_captures(on.device)
    takes = [
        timing.prepare([partial(call, inputs) for inputs in sets], on.device, eager=side is not None)
        for call in (plain_merge, make)
    ]
    return timing.pairs(takes[0], takes[1], CONSTRUCTIONS)


def _pairs(on: Run, calls: Sequence[Callable[[], Any]], count: int, warm: bool = False) -> timing.Pairs:
    takes = [timing.prepare_long(call, on.device, warm=warm) for call in calls]
    return timing.pairs(takes[0], takes[1], count)


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


def measure_whole(on: Run, spec: Spec, model: Any, case: Case, chosen: list[Side], count: int) -> None:
    """The whole model, vision tower and all, eagerly through `attach`: a forward, and a short generation.

    Random weights have no meaning to match: the best-scoring tokens are inserted, as many as usual.
    """
    arguments = whole_prompt(on.device, on.dtype, spec, model, case.batch)
    generated = min(GENERATED, spec.shape.text // 2)

    @torch.no_grad()
    def forward() -> Any:
        return model(**arguments, logits_to_keep=1).logits

    def generate() -> Tensor:
        return model.generate(**arguments, max_new_tokens=generated, min_new_tokens=generated, do_sample=False)

    for name, call in {"forward": forward, "generate": generate}.items():
        plain = timing.prepare_long(call, on.device, eager=True)
        for side in chosen:
            config = attanchor_vlm.AttAnchorConfig(tau=-1.0, max_anchors=case.anchored, keep=side.keep)
            found = timing.pairs(plain, plain._replace(seconds=partial(attached, model, config, plain)), count)
            row = {"model": spec.name, **case.describe(), "measure": f"attached {name}"}
            row |= {"side": side.name, "keep": side.keep, "pairs": count}
            row |= {"method": plain.method, "new_tokens": 1 if name == "forward" else generated}
            row = on.add({**row, **found.describe(name)})
            print(f"{spec.name:<18}B={case.batch:<3}{side.name:<10}whole {name}: {ratio(row, name)}", flush=True)


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
    options.common(parser, "overhead")
    parser.add_argument("--models", type=options.names(models.SPECS), help="names, with commas; default: all")
    parser.add_argument("--batches", type=options.numbers, help="default: 1,8, on a CPU 1")
    parser.add_argument("--keep", type=options.shares, default=KEEP, help="shares of the image tokens (%(default)s)")
    parser.add_argument("--pairs", type=options.number, default=7, help="of each measurement (default: %(default)s)")
    parser.add_argument("--whole", action="store_true", help="whole models through `attach` too")
    parser.add_argument("--sweep", action="store_true", help="over image tokens and inserted share instead")
    parser.add_argument("--real-size", action="store_true", help="real sizes on a CPU too (slow)")


def main(given: argparse.Namespace) -> int:
    """Every model and batch; what fails is reported, the rest goes on. Returns 1 if anything failed."""
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
        images, shares = ((16, 48), (0.1, 0.3)) if toy else (SWEEP_IMAGE, SWEEP_SHARES)
        for image, share in itertools.product(images, shares):
            at = spec._replace(shape=spec.shape._replace(image=image))
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
                measure_whole(on, spec, model, case, sides(spec.shape, given.keep), given.pairs)
