"""What is measured: the models' shapes, the least bytes each operator must move, and whether a result is right."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from attanchor_kernels import AnchoredSequence, backends, build_sequence, merge_sequence, ops
from attanchor_kernels.problem import Problem
from attanchor_kernels.testing.contract import BAND
from attanchor_kernels.testing.inputs import SHAPES, TAU, Shape, merge_form
from benchmarks import timing

TOY = Shape("toy", 36, 10, 128)
SHAPE_OF = {shape.name: shape for shape in (*SHAPES, TOY)}
BATCHES = (1, 4, 8, 32, 64)
MAX_ANCHORS = 8
BEFORE = 5  # text tokens in front of the image in a prompt
OPERATIONS = ("forward", "backward", "merge", "drop")


class Case(NamedTuple):
    """One operation at one size."""

    # "forward" (build_sequence), "backward" (of it), "drop" (forward that keeps a third of the image tokens), "merge"
    operation: str
    shape: Shape
    batch: int
    dtype: torch.dtype = torch.bfloat16
    anchored: int = 5  # text tokens that are inserted in each sample: about 10 % of 50
    max_anchors: int = MAX_ANCHORS

    @property
    def keep(self) -> int | None:
        return round(self.shape.image / 3) if self.operation == "drop" else None

    @property
    def capacity(self) -> int:
        return (self.keep or self.shape.image) + self.shape.text + self.max_anchors

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

    def describe(self, *only: str) -> dict:
        """The part of a row that says what was measured, or these keys of it."""
        described = {
            "operation": self.operation,
            "shape": self.shape.name,
            "image": self.shape.image,
            "text": self.shape.text,
            "hidden": self.shape.hidden,
            "batch": self.batch,
            "dtype": str(self.dtype).removeprefix("torch."),
            "max_anchors": self.max_anchors,
            "inserted": self.anchored,
            **({} if self.keep is None else {"keep": self.keep}),
            "bytes": self.least_bytes,
        }
        return {key: described[key] for key in only} or described


class Inputs(NamedTuple):
    """Fresh random tensors of a case; `grad`, `source` and `places` only for backward."""

    image: Tensor  # (B, M, D), merge: (B*M, D)
    text: Tensor  # (B, N, D), merge: (B, S, D)
    roles: Tensor | None = None
    position_ids: Tensor | None = None
    salience: Tensor | None = None  # (B, M) for "drop"
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
    if case.operation in ("forward", "drop"):
        # Random ranks, since no rounding may change who stays.
        salience = torch.rand(image.shape[:2], device=device) if case.operation == "drop" else None
        return Inputs(image, text, position_ids=positions, salience=salience)
    plan = ops.plan(problem_of(case, Inputs(image, text)), "reference")
    grad = torch.randn(case.batch, case.capacity, case.shape.hidden, device=device, dtype=torch.float32)
    return Inputs(image, text, None, positions, None, grad.to(case.dtype), plan.source, plan.places)


def make_sets(case: Case, device: torch.device) -> list[Inputs]:
    """As many different inputs as make every call meet a cold cache, when calls take them by turns."""
    return [make_inputs(case, device, seed) for seed in range(timing.rotation(case.least_bytes, device))]


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


def kernel_backends(device: torch.device) -> list[str]:
    """The backends that are measured against the floor: on a GPU the kernels, on a CPU the reference."""
    if device.type == "cpu":
        return ["reference"]
    return [name for name in ("cuda", "triton") if backends.why_not(name, device.type) is None]


def problem_of(case: Case, inputs: Inputs) -> Problem:
    """What the operator of a forward or a merge hands to its backend."""
    options: dict = {"max_anchors": case.max_anchors, "roles": inputs.roles, "keep": case.keep}
    options["salience"] = inputs.salience
    if inputs.position_ids is not None:
        options |= {"inherit": True, "position_ids": inputs.position_ids}
    return Problem(inputs.image, inputs.text, TAU, **options)


def launched(backend: str, case: Case, inputs: Inputs, tuning: Any = None) -> dict[str, Any]:
    """How the CUDA backend cuts a forward or a merge into tiles and what the device runs at once, for a row."""
    if backend != "cuda" or inputs.image.device.type != "cuda" or case.operation == "backward":
        return {}
    from attanchor_kernels.backends.cuda import launch

    found = launch.launched(problem_of(case, inputs), tuning=tuning)
    return {} if found is None else {"launched": found._asdict()}


def run(case: Case, inputs: Inputs, backend: str, trim: bool = False, keep: int | None = None) -> tuple[Any, ...]:
    """The operator itself, by one backend: at capacity, or as it is called without options.

    Args:
        keep: Image tokens that stay of each image, where the case does not say it.
    """
    options: dict = {"max_anchors": case.max_anchors, "trim": trim, "keep": keep or case.keep, "backend": backend}
    if inputs.position_ids is not None:
        options |= {"positions": "inherit", "position_ids": inputs.position_ids}
    if case.operation in ("forward", "drop"):
        options |= {"salience": inputs.salience}
        return tuple(build_sequence(inputs.image, inputs.text, TAU, **options))[: len(names_of(case))]
    if case.operation == "merge":
        assert inputs.roles is not None
        return tuple(merge_sequence(inputs.text, inputs.image, inputs.roles, TAU, **options))[: len(names_of(case))]
    return torch.ops.attanchor._assemble_backward(
        inputs.grad, inputs.places, inputs.image.shape, inputs.text.shape, True, True, backend
    )


def names_of(case: Case) -> tuple[str, ...]:
    """What an operation returns. Without `keep` there is no relevance of image tokens."""
    if case.operation == "backward":
        return "image gradient", "text gradient"
    return AnchoredSequence._fields if case.keep is not None else AnchoredSequence._fields[:-1]


class WrongResult(AssertionError):
    """A figure is not printed for a result that is not right."""


def verify(case: Case, expected: tuple[Tensor, ...], got: tuple[Tensor, ...]) -> None:
    """Hold a result to the reference's: bit for bit, scores within the contract's band.

    Planted matches score far from the threshold and from each other's hosts, so no rounding changes a decision.

    Raises:
        WrongResult: saying the field.
    """
    if case.operation != "backward":
        inserted = expected[4].sum(1)
        if not bool((inserted == case.anchored).all()):
            raise WrongResult(f"{inserted.tolist()} inserted in the reference at {case.label}, not {case.anchored}")
    for name, one, other in zip(names_of(case), got, expected, strict=True):
        if not (_scores_agree(one, other) if name in ("score", "relevance") else torch.equal(one, other)):
            raise WrongResult(f"{name} differs from the reference at {case.label}")


def _scores_agree(one: Tensor, other: Tensor) -> bool:
    finite = other.isfinite()
    return torch.equal(one.isfinite(), finite) and bool(((one - other)[finite].abs() <= BAND).all())
