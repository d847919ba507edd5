"""The method, one sample and one token at a time, in float64: slow, literal and independent of the reference."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attanchor_kernels.problem import Problem, Role


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
        self.tau = problem.tau if problem.tau_tensor is None else float(problem.tau_tensor)
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
        self.silent: list[int] = []
        self.feature_of = {m: index * image_count + m for m in range(image_count)}
        self.real = image_real + text_real
        self.images = [m for m in range(image_count) if image_real[m]]
        self.texts = [image_count + n for n in range(len(text)) if text_real[n] and matched[n]]

    def _from_roles(self, roles: list[int], feature: int) -> None:
        self.rows, self.real, self.images, self.texts, self.silent = [], [], [], [], []
        self.feature_of = {}
        for slot, role in enumerate(roles):
            row = self.problem.text[self.index, slot]
            if role in (Role.IMAGE, Role.SILENT_IMAGE):
                missing = feature >= len(self.problem.image)
                row = torch.full_like(row, math.nan) if missing else self.problem.image[feature]
                self.feature_of[slot] = feature
                feature += 1
            self.rows.append(row)
            self.real.append(role in (Role.TEXT, Role.IMAGE, Role.ANCHOR_TEXT, Role.SILENT_IMAGE))
            if role == Role.IMAGE:
                self.images.append(slot)
            elif role == Role.ANCHOR_TEXT:
                self.texts.append(slot)
            elif role == Role.SILENT_IMAGE:
                self.silent.append(slot)

    @property
    def keep(self) -> int | None:
        """How many image tokens stay; None = all."""
        each = self.problem.keep_each
        return self.problem.keep if each is None else int(each[self.index])

    @property
    def budget(self) -> int:
        """Most copies."""
        limits = [self.problem.max_anchors, None if self.problem.image_into_text else self.keep]
        return min((limit for limit in limits if limit is not None), default=len(self.real))

    def candidates_of(self, image: int) -> dict[int, float]:
        """The cosine of an image slot with every text slot that takes part and may use it."""
        if self.problem.image_into_text:
            return self.cosines.get(image, {})
        return {mover: cosines[image] for mover, cosines in self.cosines.items() if image in cosines}

    def survivors(self, relevance: list[float], host_of: dict[int, int]) -> set[int]:
        """The slots whose originals stay, given the relevance of each image slot and the movers' hosts."""
        stays = {slot for slot, real in enumerate(self.real) if real}
        if self.keep is None:
            return stays
        priority = {slot: relevance[slot] for slot in self.images}
        if self.problem.salience is not None:
            priority = {slot: self._of_feature(self.problem.salience, slot, -math.inf) for slot in self.images}
        priority = {slot: -math.inf if math.isnan(value) else value for slot, value in priority.items()}
        ranked = sorted(self.images, key=lambda slot: (-priority[slot], slot))

        chosen = [] if self.problem.image_into_text else [slot for slot in ranked if slot in host_of.values()]
        if self.problem.cells is not None:
            cell = {slot: int(self._of_feature(self.problem.cells, slot, -1)) for slot in self.images}
            held = {cell[slot] for slot in chosen}
            for slot in ranked:
                if cell[slot] >= 0 and cell[slot] not in held:
                    chosen.append(slot)
                    held.add(cell[slot])
        chosen += [slot for slot in ranked if slot not in chosen]
        dropped = set(chosen[self.keep :])

        for newline in self.silent:
            before = newline
            while before - 1 in priority:
                before -= 1
            run = set(range(before, newline))
            if run and run <= dropped:
                stays.remove(newline)
        return stays - dropped

    def _of_feature(self, values: Tensor, slot: int, missing: float) -> float:
        feature = self.feature_of[slot]
        return float(values.flatten()[feature]) if feature < values.numel() else missing

    def order(self, host_of: dict[int, int], stays: set[int]) -> list[tuple[int, int | None]]:
        """The new sequence, given the movers' hosts and who stays: (slot copied, host slot or None for an original)."""
        sequence: list[tuple[int, int | None]] = []
        for slot in range(len(self.real)):
            if slot in stays:
                sequence.append((slot, None))
            sequence.extend((mover, slot) for mover in sorted(host_of) if host_of[mover] == slot)
        return sequence


def _placeholders(roles: Tensor) -> Tensor:
    return roles.eq(Role.IMAGE) | roles.eq(Role.SILENT_IMAGE)


def _finite(row: Tensor) -> bool:
    """Whether a row may take part: its squared norm is finite in the accumulation type."""
    wide = row if row.dtype == torch.float64 else row.float()
    return bool(torch.isfinite((wide * wide).sum()))
