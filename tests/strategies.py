"""Random problems for hypothesis: every option, ragged masks, twins, zero and non-finite rows, any strides."""

from __future__ import annotations

import math
import os

import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from attanchor_kernels.testing.inputs import random_roles

TAUS = [-math.inf, -1.0, -0.3, 0.0, 0.1, 0.3, 0.9, 1.0, math.inf]
KERNEL_DTYPES = [torch.float32, torch.float16, torch.bfloat16]


LONGER = int(os.environ.get("ATTANCHOR_TEST_LONGER", "1"))


def examples(count: int) -> settings:
    """As many examples of a property in the suite, ATTANCHOR_TEST_LONGER times as many in a long run."""
    return settings(max_examples=LONGER * count)


def _rows(draw, generator: torch.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Random rows; some are zero, non-finite, or bit-identical twins of others."""
    rows = torch.randn(shape, generator=generator, dtype=torch.float64)
    flat = rows.view(-1, shape[-1])
    for _ in range(draw(st.integers(0, 3)) if len(flat) else 0):
        row = draw(st.integers(0, len(flat) - 1))
        kind = draw(st.sampled_from(["zero", "twin", "nan", "inf", "huge", "tiny"]))
        if kind == "twin":
            flat[row] = flat[draw(st.integers(0, len(flat) - 1))]
        elif shape[-1]:
            column = draw(st.integers(0, shape[-1] - 1))
            values = {"nan": math.nan, "inf": -math.inf, "huge": 1e30}
            if kind in values:
                flat[row, column] = values[kind]
            else:
                flat[row] *= 0 if kind == "zero" else 1e-4
    return _restrided(draw, rows.to(dtype))


def _restrided(draw, rows: Tensor) -> Tensor:
    """The same values, possibly as a view with gaps or with the last axis not the innermost."""
    layout = draw(st.sampled_from(["contiguous", "contiguous", "gaps", "transposed"]))
    if layout == "gaps":
        wide = torch.full((*rows.shape[:-1], rows.shape[-1] + 3), math.nan, dtype=rows.dtype)
        wide[..., 1:-2] = rows
        return wide[..., 1:-2]
    if layout == "transposed":
        return rows.mT.contiguous().mT
    return rows


def _options(draw, movers: int, axes_shape: tuple[int, int], generator: torch.Generator, tensors: bool) -> dict:
    positions = draw(st.sampled_from(["sequential", "inherit"]))
    given_positions = positions == "inherit" and draw(st.booleans())
    axes = draw(st.sampled_from([None, 1, 3]))
    shape = axes_shape if axes is None else (axes, *axes_shape)
    taus = st.sampled_from(TAUS)
    if tensors:
        taus |= st.sampled_from([*TAUS, math.nan]).map(torch.tensor)
    return {
        "tau": draw(taus),
        "max_anchors": draw(st.none() | st.integers(0, movers + 2)),
        "direction": draw(st.sampled_from(["text_into_image", "image_into_text"])),
        "positions": positions,
        "position_ids": torch.randint(0, 99, shape, generator=generator) if given_positions else None,
        "padding_side": draw(st.sampled_from(["right", "left"])),
    }


def _mask(draw, generator: torch.Generator, shape: tuple[int, int]) -> Tensor | None:
    kind = draw(st.sampled_from(["none", "ragged", "all", "nothing"]))
    if kind == "none":
        return None
    share = {"ragged": 0.6, "all": 2.0, "nothing": -1.0}[kind]
    return torch.rand(shape, generator=generator) < share


def _dropping(draw, generator: torch.Generator, of_images: tuple[int, ...], most: int, batch: int | None) -> dict:
    """Who stays, half of the time by some rule; with a `batch`, counts may differ from sample to sample."""
    if draw(st.booleans()):
        return {}
    keep = draw(st.integers(0, most + 1))
    if batch is not None and draw(st.booleans()):
        keep = torch.randint(0, most + 2, (batch,), generator=generator, dtype=torch.int32)
    salience = cells = None
    if draw(st.booleans()):  # few values, so that many are equal
        values = torch.tensor([-math.inf, math.nan, -1.0, 0.0, 0.5, 0.5, 2.0, math.inf])
        salience = values[torch.randint(len(values), of_images, generator=generator)]
    if draw(st.booleans()):
        cells = torch.randint(-1, max(1, min(5, most)), of_images, generator=generator, dtype=torch.int32)
    return {"keep": keep, "salience": salience, "cells": cells}


@st.composite
def build_arguments(draw, dtypes, most: int = 12, drops: bool = False, tau_tensors: bool = False) -> dict:
    """Keyword arguments of `build_sequence`, batched; `drops` also draws `keep`, `tau_tensors` a tensor tau."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch, image, text = draw(st.integers(0, 3)), draw(st.integers(0, most)), draw(st.integers(0, most))
    hidden = draw(st.sampled_from([1, 3, 8, 17, 40]))
    return {
        "img": _rows(draw, generator, (batch, image, hidden), dtype),
        "txt": _rows(draw, generator, (batch, text, hidden), dtype),
        "img_mask": _mask(draw, generator, (batch, image)),
        "txt_mask": _mask(draw, generator, (batch, text)),
        "anchor_mask": _mask(draw, generator, (batch, text)),
        **_options(draw, max(image, text), (batch, image + text), generator, tau_tensors),
        **(_dropping(draw, generator, (batch, image), image, None) if drops else {}),
    }


def _roles(draw, batch: int, slots: int, generator: torch.Generator) -> Tensor:
    """(B, S) roles in no order at all, or pictures: rows of image tokens with a newline behind each."""
    roles = random_roles(batch, slots, generator)
    width = draw(st.sampled_from([0, 0, 1, 2, 4]))
    if width:
        picture = torch.rand(batch, slots, generator=generator) < 0.8
        newline = torch.arange(slots) % (width + 1) == width
        roles = torch.where(picture, torch.where(newline, 4, 2).to(torch.uint8), roles)
    return roles


@st.composite
def merge_arguments(draw, dtypes, most: int = 18, drops: bool = False, tau_tensors: bool = False) -> dict:
    """Keyword arguments of `merge_sequence` and `plan_sequence`, batched; as `build_arguments`."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from(dtypes))
    batch, slots = draw(st.integers(0, 3)), draw(st.integers(0, most))
    hidden = draw(st.sampled_from([1, 3, 8, 17, 40]))
    roles = _roles(draw, batch, slots, generator)
    features = int(((roles == 2) | (roles == 4)).sum())
    turn = torch.randint(0, 3, (batch, slots), generator=generator, dtype=torch.int32).sort(1).values
    return {
        "text_embeds": _rows(draw, generator, (batch, slots, hidden), dtype),
        "image_embeds": _rows(draw, generator, (features, hidden), dtype),
        "roles": roles,
        "turn": turn if draw(st.booleans()) else None,
        **_options(draw, slots, (batch, slots), generator, tau_tensors),
        **(_dropping(draw, generator, (features,), slots, batch) if drops else {}),
    }
