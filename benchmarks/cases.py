"""What is measured: the models' shapes, the least bytes each operator must move, and whether a result is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import AnchoredSequence, build_sequence, merge_sequence, ops
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import BAND
from attanchor_kernels.testing.inputs import SHAPES, TAU, Shape, merge_form

TOY = Shape("toy", 36, 10, 128)
SHAPE_OF = {shape.name: shape for shape in (*SHAPES, TOY)}
BATCHES = (1, 4, 8, 32, 64)
MAX_ANCHORS = 8
BEFORE = 5  # text tokens in front of the image in a prompt
OPERATIONS = ("forward", "backward", "merge")


class Case(NamedTuple):
    """One operation at one size."""

    operation: str  # "forward" (build_sequence), "backward" (of it), "merge" (merge_sequence)
    shape: Shape
    batch: int
    dtype: torch.dtype = torch.bfloat16
    anchored: int = 5  # text tokens that are inserted in each sample: about 10 % of 50
    max_anchors: int = MAX_ANCHORS

    @property
    def capacity(self) -> int:
        return self.shape.image + self.shape.text + self.max_anchors

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.operation}, {self.shape.name}, B={self.batch}"

    @property
    def row_bytes(self) -> int:
        return self.shape.hidden * self.dtype.itemsize

    @property
    def read_bytes(self) -> int:
        """Bytes that must be read: every input row once; in backward the gradient of every real output row."""
        rows = self.shape.image + self.shape.text
        return self.batch * self.row_bytes * (rows + (self.anchored if self.operation == "backward" else 0))

    @property
    def written_bytes(self) -> int:
        """Bytes that must be written: every output row once, padding up to the capacity included."""
        rows = self.shape.image + self.shape.text if self.operation == "backward" else self.capacity
        return self.batch * self.row_bytes * rows

    @property
    def least_bytes(self) -> int:
        return self.read_bytes + self.written_bytes

    def describe(self) -> dict:
        """The part of a row that says what was measured."""
        return {
            "operation": self.operation,
            "shape": self.shape.name,
            "image": self.shape.image,
            "text": self.shape.text,
            "hidden": self.shape.hidden,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_anchors": self.max_anchors,
            "inserted": self.anchored,
            "bytes": self.least_bytes,
        }


class Inputs(NamedTuple):
    """Fresh random tensors of a case; `grad`, `source` and `places` only for backward."""

    image: Tensor  # (B, M, D), merge: (B*M, D)
    text: Tensor  # (B, N, D), merge: (B, S, D)
    roles: Tensor | None = None
    position_ids: Tensor | None = None
    grad: Tensor | None = None
    source: Tensor | None = None
    places: Tensor | None = None


def make_inputs(case: Case, device: torch.device, seed: int) -> Inputs:
    """The same for the same seed on the same device. Qwen's shape comes with its (3, B, S) position ids."""
    image, text = _pair(case, device, seed)
    slots = case.shape.image + case.shape.text
    positions = None
    if case.shape.name.startswith("qwen"):
        positions = torch.arange(slots, device=device).expand(3, case.batch, -1).contiguous()
    if case.operation == "merge":
        text, image, roles = merge_form(image, text, before=BEFORE)
        return Inputs(image, text, roles, positions)
    if case.operation == "forward":
        return Inputs(image, text, position_ids=positions)
    source, places = _plan(case, image, text)
    grad = torch.randn(case.batch, case.capacity, case.shape.hidden, device=device, dtype=torch.float32)
    return Inputs(image, text, None, positions, grad.to(case.dtype), source, places)


def _pair(case: Case, device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Noise, in which the case's share of the text rows is an image row plus noise of the same size: cosine about 0.7.

    Drawn on the device, which for gigabytes saves minutes. In a prompt the text before the image is not matched, so
    only later rows are planted.
    """
    generator = torch.Generator(device).manual_seed(seed)
    chooser = torch.Generator().manual_seed(seed)
    _, m, n, d = case.shape
    image, text = (
        torch.randn(case.batch, rows, d, generator=generator, device=device, dtype=case.dtype) for rows in (m, n)
    )
    orders = [torch.randperm(n - BEFORE, generator=chooser)[: case.anchored] for _ in range(case.batch)]
    movers = (torch.stack(orders) + BEFORE).to(device)
    hosts = torch.randint(m, movers.shape, generator=chooser).to(device)
    samples = torch.arange(case.batch, device=device).unsqueeze(1)
    text[samples, movers] += image[samples, hosts]
    return image, text


def _plan(case: Case, image: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """`source` and `places` of a forward of the same case."""
    problem = Problem(image, text, TAU, max_anchors=case.max_anchors)
    plan = ops.plan(problem, "reference")
    return plan.source, plan.places


def run(case: Case, inputs: Inputs, backend: str) -> tuple[Any, ...]:
    """The operator itself, at capacity, by one backend."""
    options: dict = {"max_anchors": case.max_anchors, "trim": False, "backend": backend}
    if inputs.position_ids is not None:
        options |= {"positions": "inherit", "position_ids": inputs.position_ids}
    if case.operation == "forward":
        return tuple(build_sequence(inputs.image, inputs.text, TAU, **options))[: len(FIELDS)]
    if case.operation == "merge":
        assert inputs.roles is not None
        return tuple(merge_sequence(inputs.text, inputs.image, inputs.roles, TAU, **options))[: len(FIELDS)]
    return torch.ops.attanchor._assemble_backward(
        inputs.grad, inputs.places, inputs.image.shape, inputs.text.shape, True, True, backend
    )


FIELDS = AnchoredSequence._fields[:-1]  # without the relevance of image tokens, which only `keep` asks for


class WrongResult(AssertionError):
    """A figure is not printed for a result that is not right."""


def verify(case: Case, expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    """Hold a result to the reference's: bit for bit, scores within the contract's band.

    Planted matches score far from the threshold and from each other's hosts, so no rounding changes a decision.

    Raises:
        WrongResult: saying the field.
    """
    names = FIELDS if case.operation != "backward" else ("image gradient", "text gradient")
    if case.operation != "backward":
        inserted = expected[4].sum(1)
        if not bool((inserted == case.anchored).all()):
            raise WrongResult(f"{inserted.tolist()} inserted in the reference at {case.label}, not {case.anchored}")
    for name, one, other in zip(names, got, expected, strict=True):
        if not (_scores_agree(one, other) if name == "score" else torch.equal(one, other)):
            raise WrongResult(f"{name} differs from the reference at {case.label}")


def _scores_agree(one: Tensor, other: Tensor) -> bool:
    finite = other.isfinite()
    return torch.equal(one.isfinite(), finite) and bool(((one - other)[finite].abs() <= BAND).all())
