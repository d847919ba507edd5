"""Does a result keep the contract? Decisions are held to the oracle outside the band, everything else bit for bit."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attanchor_kernels.api import AnchoredSequence
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.oracle import Sample

BAND = 2e-5  # implementations may differ where two cosines, or a cosine and tau, are closer than this


def assert_keeps_contract(result: AnchoredSequence, problem: Problem, *, trimmed: bool) -> None:
    """Hold every field of a batched result, positions with their P axis, to the contract.

    Raises:
        AssertionError: saying the sample, the field and what was expected.
    """
    samples = [Sample(problem, index) for index in range(problem.batch)]
    orders = []
    for sample in samples:
        host_of = _check_decisions(result, sample)
        relevance = _check_relevance(result, sample)
        orders.append(sample.order(host_of, sample.survivors(relevance, host_of)))
    longest = max(map(len, orders), default=0)
    length = longest if trimmed else problem.capacity
    _same("length", result.source.shape, (problem.batch, length))
    for sample, order in zip(samples, orders, strict=True):
        _check_layout(result, sample, order, length)


def assert_same_fields(got: AnchoredSequence, expected: AnchoredSequence) -> None:
    """Two results are equal in every field, bit for bit; a NaN equals any other.

    Raises:
        AssertionError: naming the field.
    """
    for name, one, other in zip(AnchoredSequence._fields, got, expected, strict=True):
        if one is None or other is None:
            assert one is other, f"{name} is there in one of the two alone"
            continue
        _same(f"shape of {name}", one.shape, other.shape)
        if one.is_floating_point():
            assert torch.equal(one.isnan(), other.isnan()), name
            one, other = (field.masked_fill(field.isnan(), 0) for field in (one, other))
        assert torch.equal(one, other), name


def _check_decisions(result: AnchoredSequence, sample: Sample) -> dict[int, int]:
    """Scores, hosts, threshold and budget of one sample; returns the host slot of every inserted mover."""
    problem, at = sample.problem, sample.index
    scores, hosts = result.score[at].tolist(), result.host[at].tolist()
    host_of: dict[int, int] = {}
    eligible: dict[int, float] = {}
    for mover in range(len(scores)):
        slot, where = mover + problem.mover_offset, f"sample {at}, mover {mover}"
        candidates = sample.cosines.get(slot, {})
        best = max(candidates.values(), default=-math.inf)
        if not candidates:
            _same(f"{where}: score", scores[mover], -math.inf)
            _same(f"{where}: host", hosts[mover], -1)
            continue
        assert abs(scores[mover] - best) <= BAND, f"{where}: score is {scores[mover]}, best cosine is {best}"
        if not sample.rows[slot].any():
            _same(f"{where}: score of a zero row", scores[mover], 0.0)
        if sample.tau < 1 and scores[mover] >= sample.tau - BAND:
            eligible[slot] = scores[mover]
        if hosts[mover] < 0:
            continue
        host = hosts[mover] + problem.host_offset
        assert host in candidates, f"{where}: host slot {host} is no candidate"
        assert candidates[host] >= best - BAND, f"{where}: cosine at its host is {candidates[host]}, best is {best}"
        _assert_lowest_twin(sample, candidates, host, where)
        assert best >= sample.tau - BAND, f"{where}: inserted at {best}, tau is {sample.tau}"
        assert sample.tau < 1, f"{where}: inserted, though tau is {sample.tau}"
        host_of[slot] = host
    _check_budget(sample, eligible, host_of)
    return host_of


def _assert_lowest_twin(sample: Sample, candidates: dict[int, float], host: int, where: str) -> None:
    """No candidate below the host is bit-identical to it; of several zero cosines the first is taken."""
    row = sample.rows[host]
    for other in candidates:
        if other < host:
            assert not torch.equal(sample.rows[other], row), f"{where}: host {host} equals the earlier {other}"
            both_zero = not sample.rows[other].any() and not row.any()
            assert not both_zero, f"{where}: host {host} and the earlier {other} are both zero"


def _check_budget(sample: Sample, eligible: dict[int, float], host_of: dict[int, int]) -> None:
    at, budget = sample.index, sample.budget
    certain = {slot for slot, score in eligible.items() if score > sample.tau + BAND}
    assert len(host_of) <= budget, f"sample {at}: {len(host_of)} inserted, the budget is {budget}"
    assert len(host_of) >= min(budget, len(certain)), f"sample {at}: {len(host_of)} inserted of {len(certain)}"
    left_out = [slot for slot in eligible if slot not in host_of]
    for out in left_out:
        # What is left out is certain only where the budget was used up by better movers, or by equal earlier ones.
        if out in certain and len(host_of) < budget:
            raise AssertionError(f"sample {at}: mover slot {out} scores {eligible[out]} and is left out")
        for kept in host_of:
            assert eligible[kept] >= eligible[out] - BAND or out not in certain, (
                f"sample {at}: slot {kept} at {eligible[kept]} is kept, slot {out} at {eligible[out]} is not"
            )
            twins = torch.equal(sample.rows[kept], sample.rows[out]) and sample.turn[kept] == sample.turn[out]
            assert not (twins and kept > out), f"sample {at}: of the equal slots {out} and {kept} the later is kept"


def _check_relevance(result: AnchoredSequence, sample: Sample) -> list[float]:
    """What each image token of one sample is ranked by, as reported: it decides who stays, beyond rounding too."""
    if not sample.problem.drops:
        assert result.relevance is None or result.relevance.shape[1] == 0, "relevance is given without keep"
        return []
    assert result.relevance is not None, "relevance is missing"
    relevance = result.relevance[sample.index].tolist()
    _same("length of relevance", len(relevance), sample.problem.images)
    finite: dict[int, float] = {}
    for slot, value in enumerate(relevance):
        where = f"sample {sample.index}, slot {slot}: relevance"
        candidates = sample.candidates_of(slot)
        if not candidates:
            _same(where, value, -math.inf)
            continue
        best = max(candidates.values())
        assert abs(value - best) <= BAND, f"{where} is {value}, best cosine is {best}"
        if not sample.rows[slot].any():
            _same(f"{where} of a zero row", value, 0.0)
        for other, its in finite.items():
            if torch.equal(sample.rows[other], sample.rows[slot]) and sample.turn[other] == sample.turn[slot]:
                _same(f"{where}, that of its twin {other}", value, its)
        finite[slot] = value
    return relevance


def _check_layout(result: AnchoredSequence, sample: Sample, order: list, length: int) -> None:
    """Everything that follows from the hosts, exactly."""
    problem, at = sample.problem, sample.index
    pad = length - len(order)
    first = pad if problem.pad_left else 0

    def padded(values: list, filler) -> list:
        fill = [filler] * pad
        return fill + values if problem.pad_left else values + fill

    _same(f"sample {at}: source", result.source[at].tolist(), padded([slot for slot, _ in order], -1))
    _same(f"sample {at}: is_anchor", result.is_anchor[at].tolist(), padded([h is not None for _, h in order], False))
    _same(f"sample {at}: attention_mask", result.attention_mask[at].tolist(), padded([1] * len(order), 0))
    for axis, positions in enumerate(result.position_ids):
        expected = _expected_positions(sample, order, axis)
        _same(f"sample {at}: position_ids", positions[at].tolist(), padded(expected, 0))
    if result.embeds is None:
        return
    rows = result.embeds[at]
    for place, (slot, _) in enumerate(order):
        _same_bits(f"sample {at}: row {place}", rows[first + place], sample.rows[slot])
    padding = rows[:first] if problem.pad_left else rows[len(order) :]
    _same_bits(f"sample {at}: padding", padding, torch.zeros_like(padding))


def _expected_positions(sample: Sample, order: list, axis: int) -> list[int]:
    problem = sample.problem
    if not problem.inherit:
        return list(range(len(order)))
    if problem.position_ids is not None:
        plain = problem.position_ids[axis, sample.index].tolist()
    else:
        counts = torch.tensor(sample.real, dtype=torch.int64).cumsum(0) - 1
        plain = counts.tolist()
    return [plain[slot if host is None else host] for slot, host in order]


def _same(what: str, got, expected) -> None:
    assert got == expected, f"{what} is {got}, expected {expected}"


def _same_bits(what: str, got: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, but for the payload of a NaN that stands for a feature that is not there."""
    same = torch.equal(got.view(torch.uint8), expected.to(got.device).contiguous().view(torch.uint8))
    assert same or (got.isnan().all() and expected.isnan().all()), f"{what} is {got}, expected {expected}"
