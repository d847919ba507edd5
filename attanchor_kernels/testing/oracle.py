"""The method, one sample and one token at a time, in float64: slow, literal and independent of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attanchor_kernels.problem import ANCHOR_TEXT, IMAGE, SILENT_IMAGE, TEXT, Problem


def cosine(a: Tensor, b: Tensor) -> float:
    """Cosine of two rows with the norms floored at 1e-12, in float64."""
    a, b = a.double(), b.double()
    return float(torch.dot(a, b)) / (max(float(a.norm()), 1e-12) * max(float(b.norm()), 1e-12))


def algorithm_1(image: Tensor, text: Tensor, tau: float) -> list[tuple[str, int]]:
    """AttAnchor Algorithm 1, text into image, for image (M, D) and text (N, D).

    Returns the new sequence as a list of ("image", m), ("anchor", n) and ("text", n).
    """
    copies: dict[int, list[int]] = {}
    for n, word in enumerate(text):
        scores = [cosine(word, patch) for patch in image]
        if not scores or tau >= 1:
            continue
        best = max(range(len(scores)), key=lambda m: (scores[m], -m))
        if scores[best] >= tau:
            copies.setdefault(best, []).append(n)
    sequence: list[tuple[str, int]] = []
    for m in range(len(image)):
        sequence.append(("image", m))
        sequence.extend(("anchor", n) for n in copies.get(m, []))
    return sequence + [("text", n) for n in range(len(text))]


def algorithm_2(image: Tensor, text: Tensor, tau: float) -> list[tuple[str, int]]:
    """AttAnchor Algorithm 2, image into text: the image, then the text with copies of image tokens in it."""
    swapped = algorithm_1(text, image, tau)
    names = {"image": "text", "anchor": "anchor"}
    body = [(names[kind], index) for kind, index in swapped if kind != "text"]
    return [("image", m) for m in range(len(image))] + body


def embed(sequence: list[tuple[str, int]], image: Tensor, text: Tensor, image_into_text: bool = False) -> Tensor:
    """The rows (L, D) that a sequence of `algorithm_1` or `algorithm_2` names."""
    tables = {"image": image, "text": text, "anchor": image if image_into_text else text}
    return torch.stack([tables[kind][index] for kind, index in sequence])


class Sample:
    """One sample of a problem in plain Python lists over its slots, with every cosine between a mover and its hosts."""

    def __init__(self, problem: Problem, index: int) -> None:
        self.problem = problem
        self.index = index
        if problem.roles is not None:
            roles = problem.roles[index].tolist()
            first_feature = int(_placeholders(problem.roles[:index]).sum())
            self._from_roles(roles, first_feature)
        else:
            self._from_masks()
        self.turn = problem.turn[index].tolist() if problem.turn is not None else [0] * problem.slots
        finite = [_finite(row) for row in self.rows]
        movers, hosts = (self.images, self.texts) if problem.image_into_text else (self.texts, self.images)
        self.movers = [slot for slot in movers if finite[slot]]
        self.hosts = [slot for slot in hosts if finite[slot]]
        self.cosines = {
            mover: {
                host: cosine(self.rows[mover], self.rows[host])
                for host in self.hosts
                if self.turn[host] >= self.turn[mover]
            }
            for mover in self.movers
        }

    def _from_masks(self) -> None:
        problem, index = self.problem, self.index
        image, text = problem.image[index], problem.text[index]
        image_count = len(image)

        def bits(mask: Tensor | None, count: int) -> list[bool]:
            return [True] * count if mask is None else mask[index].tolist()

        image_real, text_real = bits(problem.image_mask, image_count), bits(problem.text_mask, len(text))
        matched = bits(problem.anchor_mask, len(text))
        self.rows = [*image, *text]
        self.real = image_real + text_real
        self.images = [m for m in range(image_count) if image_real[m]]
        self.texts = [image_count + n for n in range(len(text)) if text_real[n] and matched[n]]

    def _from_roles(self, roles: list[int], feature: int) -> None:
        self.rows, self.real, self.images, self.texts = [], [], [], []
        for slot, role in enumerate(roles):
            row = self.problem.text[self.index, slot]
            if role in (IMAGE, SILENT_IMAGE):
                missing = feature >= len(self.problem.image)
                row = torch.full_like(row, math.nan) if missing else self.problem.image[feature]
                feature += 1
            self.rows.append(row)
            self.real.append(role in (TEXT, IMAGE, ANCHOR_TEXT, SILENT_IMAGE))
            if role == IMAGE:
                self.images.append(slot)
            elif role == ANCHOR_TEXT:
                self.texts.append(slot)

    def order(self, host_of: dict[int, int]) -> list[tuple[int, int | None]]:
        """The new sequence, given the movers' hosts: (slot copied, host slot or None for an original)."""
        sequence: list[tuple[int, int | None]] = []
        for slot, real in enumerate(self.real):
            if real:
                sequence.append((slot, None))
            sequence.extend((mover, slot) for mover in sorted(host_of) if host_of[mover] == slot)
        return sequence


def _placeholders(roles: Tensor) -> Tensor:
    return (roles == IMAGE) | (roles == SILENT_IMAGE)


def _finite(row: Tensor) -> bool:
    """Whether a row may take part: its squared norm is finite in the accumulation type."""
    wide = row if row.dtype == torch.float64 else row.float()
    return bool(torch.isfinite((wide * wide).sum()))
