"""The one normal form that every backend works on.

`build_sequence` and `merge_sequence` differ only in how a sample's S *slots* (the rows of the plain concatenation) are
described: by masks over `[image; text]`, or by a role per slot. Everything after that is the same.
"""

from __future__ import annotations

from enum import IntEnum
from typing import NamedTuple

import torch
from torch import Tensor


class Role(IntEnum):
    """What a slot of a prompt is: the values of `roles` (`merge_sequence`).

    Write ``roles.eq(Role.IMAGE)``: under torch.compile (2.13) ``roles == Role.IMAGE`` is False, whatever `roles` holds.
    """

    PADDING = 0
    TEXT = 1
    IMAGE = 2  # image placeholder
    ANCHOR_TEXT = 3  # text that takes part in matching
    SILENT_IMAGE = 4  # image placeholder that takes no part in it, such as a newline row


class Problem(NamedTuple):
    """Validated, batched inputs. `roles is None` means the build form: image (B, M, D), text (B, N, D), S = M + N.

    In the merge form image is (T, D), the features of the whole batch in row-major order of the placeholders, and text
    is (B, S, D).
    """

    image: Tensor
    text: Tensor
    tau: float
    roles: Tensor | None = None  # (B, S) uint8
    turn: Tensor | None = None  # (B, S) int32
    image_mask: Tensor | None = None  # (B, M) bool, None = all real
    text_mask: Tensor | None = None  # (B, N) bool, None = all real
    anchor_mask: Tensor | None = None  # (B, N) bool, None = every real text token
    max_anchors: int | None = None
    image_into_text: bool = False
    inherit: bool = False  # positions="inherit"
    position_ids: Tensor | None = None  # (P, B, S) int64, only with inherit
    pad_left: bool = False
    # Dropping image tokens. Counts below 0, and cells beyond the number of `images`, are errors on the CPU alone:
    # elsewhere such a count is 0, such a cell none.
    keep: int | None = None  # image tokens of a sample that stay
    keep_each: Tensor | None = None  # (B,) int32, the same for each sample; merge form, excludes `keep`
    salience: Tensor | None = None  # (B, M) float32, in the merge form (T,): what ranks images, else relevance
    cells: Tensor | None = None  # (B, M) int32, in the merge form (T,): their cells, below `images`; negative: in none
    tau_tensor: Tensor | None = None  # 0-dim float32 on the device; where given, `tau` is ignored

    @property
    def drops(self) -> bool:
        """Whether image tokens may be left out."""
        return self.keep is not None or self.keep_each is not None

    @property
    def merges(self) -> bool:
        return self.roles is not None

    @property
    def batch(self) -> int:
        return self.text.shape[0]

    @property
    def slots(self) -> int:
        """S, the number of rows of one sample of the plain concatenation."""
        return self.text.shape[1] + (0 if self.roles is not None else self.image.shape[1])

    @property
    def movers(self) -> int:
        """Length of `host` and `score`: S in the merge form, N or M in the build form."""
        return (self.image if self.image_into_text and self.roles is None else self.text).shape[1]

    @property
    def mover_offset(self) -> int:
        """Slot of mover 0."""
        return 0 if self.merges or self.image_into_text else self.image.shape[1]

    @property
    def host_offset(self) -> int:
        """Slot of host 0, as `host` counts them."""
        return self.image.shape[1] if self.image_into_text and not self.merges else 0

    @property
    def images(self) -> int:
        """Most image tokens of a sample, and the length of `relevance`: S in the merge form, M in the build form."""
        return self.slots if self.merges else self.image.shape[1]

    @property
    def capacity(self) -> int:
        copies = self.movers if self.max_anchors is None else self.max_anchors
        if self.keep is None or self.merges:  # how many images a prompt has only its roles say
            return self.slots + copies
        if self.max_anchors is None and not self.image_into_text:
            copies = torch.sym_min(self.keep, copies)
        return self.text.shape[1] + torch.sym_min(self.keep, self.images) + copies

    @property
    def hidden(self) -> int:
        return self.text.shape[2]


class Plan(NamedTuple):
    """Where every output row comes from, at capacity C; fields as in `AnchoredSequence`, positions always with P axis.

    `relevance` is what survivors are ranked by in the absence of `salience`: float32 values, equal ones by index.

    `places` (B, 3, S) int32 is the inverse of `source`: the output row of each slot's original (-1 = masked out, or
    dropped), the output row of its copy (-1 = none), and the feature row that an image slot holds, counted over the
    batch (-1 = a text slot; T or more = a placeholder for which there is no feature).
    """

    position_ids: Tensor  # (P, B, C) int64
    attention_mask: Tensor  # (B, C) int64
    source: Tensor  # (B, C) int64
    is_anchor: Tensor  # (B, C) bool
    host: Tensor  # (B, movers) int64
    score: Tensor  # (B, movers) float32
    relevance: Tensor  # (B, images) float32; (B, 0) unless the problem drops
    places: Tensor  # (B, 3, S) int32

    @classmethod
    def empty(cls, problem: Problem, length: int | torch.SymInt | None = None) -> Plan:
        """Of the right shapes and dtypes on the problem's device, unwritten; `length` in place of the capacity."""
        batch, movers, device = problem.batch, problem.movers, problem.text.device
        rows = batch, problem.capacity if length is None else length
        axes = 1 if problem.position_ids is None else problem.position_ids.shape[0]
        return cls(
            position_ids=torch.empty((axes, *rows), dtype=torch.int64, device=device),
            attention_mask=torch.empty(rows, dtype=torch.int64, device=device),
            source=torch.empty(rows, dtype=torch.int64, device=device),
            is_anchor=torch.empty(rows, dtype=torch.bool, device=device),
            host=torch.empty((batch, movers), dtype=torch.int64, device=device),
            score=torch.empty((batch, movers), dtype=torch.float32, device=device),
            relevance=torch.empty((batch, problem.images if problem.drops else 0), dtype=torch.float32, device=device),
            places=torch.empty((batch, 3, problem.slots), dtype=torch.int32, device=device),
        )
