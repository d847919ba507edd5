"""Images with their anchors: each anchor's text and score at the patch that it was copied behind.

Sizes on the page are in inches, so that labels keep apart whatever the images' shapes are.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.patches import Rectangle
from PIL import Image

from attanchor_vlm.figures import PALETTE, fonts, save
from attanchor_vlm.inference.explain import Anchored, Match, has_tiles
from attanchor_vlm.model.geometry import Box

_GREY, _VEIL = "#b8bec6", 0.72

_MARGIN, _GAP, _SUPTITLE, _TITLE = 0.25, 0.35, 0.5, 0.26  # inches; of a title, for each of its lines
_IMAGE_WIDTH, _IMAGE_HEIGHT, _ONE_OF_SEVERAL, _MOST_HEIGHT = 8.0, 3.9, 3.1, 6.0
_LABEL, _MOST_LABELS = 0.265, 36  # height of one, number beside an image
_BAR, _BARS, _MOST_BARS = 0.2, 3.8, 44  # height of one, width of all, number
_LETTER = 0.083  # width of one, about


@dataclass(frozen=True)
class _Panel:
    """One image on the page: `scale` is inches per pixel, `height` that of image or labels, whichever is more."""

    index: int
    labels: Sequence[int]  # patches with anchors
    scale: float
    width: float
    height: float


def anchor_picture(path: Path, examples: Sequence[Anchored], tau: float, title: str) -> None:
    """A row for each example: its images with patches and anchors, and every token's best cosine beside tau.

    What the model does not see of an image (cropped away, or dropped) is dimmed. In images of several tiles, tiles have
    a dotted border, and an anchor in the view of the whole image has a dashed one.

    Args:
        path: A .png, .pdf or .svg; written whole or not at all.
        tau: The threshold; a line in the diagram of the scores.
    """
    with plt.rc_context({"font.family": fonts()}):
        save(_page(examples, tau, title), path)


def _page(examples: Sequence[Anchored], tau: float, title: str) -> plt.Figure:
    panels = [[_panel(example, index) for index in _shown(example)] for example in examples]
    labels = max(
        (len(_label(one, m.patch)) for one in examples for m in one.matches if m.patch is not None), default=20
    )
    left = max((panel.width for own in panels for panel in own), default=0.0) + 0.6 + _LETTER * labels
    words = 0.35 + _LETTER * max((len(_short(m.text, 18)) for one in examples for m in one.matches), default=0)
    width = _MARGIN + left + words + _BARS + _MARGIN
    titles = [_title(example, width) for example in examples]
    bodies = [
        max(sum(panel.height for panel in own) + _GAP * (len(own) - 1), _BAR * len(_most_telling(one.matches)))
        for own, one in zip(panels, examples, strict=True)
    ]
    heads = [
        _TITLE * (1 + text.count("\n")) + (0.28 if len(one.images) > 1 else 0.12)  # images in a row have names
        for text, one in zip(titles, examples, strict=True)
    ]
    feet = 0.55  # the diagram's axis
    height = _SUPTITLE + sum(bodies) + sum(heads) + feet * len(examples) + _MARGIN

    figure = plt.figure(figsize=(width, height))

    def axes(x: float, y: float, w: float, h: float) -> Axes:
        """At inches from the left and from the top."""
        return figure.add_axes((x / width, 1 - (y + h) / height, w / width, h / height))

    figure.text(_MARGIN / width, 1 - 0.3 / height, _plain(title), fontsize=13, fontweight="bold", va="center")
    top = _SUPTITLE
    for example, own, text, head, body in zip(examples, panels, titles, heads, bodies, strict=True):
        figure.text(_MARGIN / width, 1 - top / height, _plain(text), fontsize=11, va="top", linespacing=1.35)
        top += head
        colours = _colours(example)
        y = top
        for panel in own:
            _draw_image(axes(_MARGIN, y, left, panel.height), example, panel, colours, left)
            y += panel.height + _GAP
        bars = min(body, 2 * _BAR * len(_most_telling(example.matches)))
        _draw_scores(axes(_MARGIN + left + words, top, _BARS, max(bars, 0.3)), example, colours, tau)
        top += body + feet
    return figure


def _shown(example: Anchored) -> list[int]:
    """Every image, and the frames that have an anchor; the first if none has."""
    hosts = {example.boxes[match.patch].image for match in example.matches if match.patch is not None}
    found = [index for index in range(len(example.images)) if index not in example.frames or index in hosts]
    return found or [0]


def _panel(example: Anchored, index: int) -> _Panel:
    image = example.images[index]
    labels = sorted({m.patch for m in example.matches if m.patch is not None and example.boxes[m.patch].image == index})
    lines = _LABEL * (min(len(labels), _MOST_LABELS) + (len(labels) > _MOST_LABELS))
    height = max(_IMAGE_HEIGHT if len(example.images) == 1 else _ONE_OF_SEVERAL, lines)
    scale = min(min(height, _MOST_HEIGHT) / image.height, _IMAGE_WIDTH / image.width)
    return _Panel(index, labels, scale, image.width * scale, max(image.height * scale, lines))


def _title(example: Anchored, width: float) -> str:
    answer = f"  →  {example.answer}" if example.answer else ""
    if example.truth is not None and example.truth != example.answer:
        answer += f"  (wrong; it is {example.truth})"
    text = f"“{example.question}”{answer}"
    lines = textwrap.wrap(text, max(40, int((width - 2 * _MARGIN) / 0.092)), max_lines=6, placeholder=" …")
    return "\n".join(lines) or "“”"


def _plain(text: str) -> str:
    """Dollar signs are no formulas."""
    return text.replace("$", r"\$")


def _colours(example: Anchored) -> dict[int, str]:
    """A colour for every patch with anchors, in reading order."""
    patches = sorted({match.patch for match in example.matches if match.patch is not None})
    return {patch: PALETTE[index % len(PALETTE)] for index, patch in enumerate(patches)}


def _draw_image(axes: Axes, example: Anchored, panel: _Panel, colours: Mapping[int, str], width: float) -> None:
    image = example.images[panel.index]
    boxes = [box for box in example.boxes if box.image == panel.index and box.pixels is not None]
    interpolation = "nearest" if panel.scale * 110 > 1.5 else "antialiased"
    pixels = np.asarray(image.convert("RGB"))
    axes.imshow(pixels, extent=(0, image.width, image.height, 0), interpolation=interpolation, aspect="auto")
    _dim_unseen(axes, image, boxes)
    _dim_dropped(axes, example, panel.index)
    _draw_grid(axes, boxes, panel.scale)
    # Labels stand beside the image, spread so that none covers another, in the order of their patches' heights.
    span = panel.height / panel.scale
    low = (image.height - span) / 2  # of the axes, whose height may exceed the image's
    placed = [patch for patch in panel.labels if example.boxes[patch].pixels is not None]
    placed.sort(key=lambda patch: (_middle(example.boxes[patch])[1], -_middle(example.boxes[patch])[0]))
    shown, more = placed[:_MOST_LABELS], len(placed) - _MOST_LABELS
    wanted = [_middle(example.boxes[patch])[1] - low for patch in shown]
    line, x = _LABEL / panel.scale, image.width + 0.28 / panel.scale
    for patch, y in zip(shown, _spread(wanted, line, span - line * (more > 0)), strict=True):
        _draw_anchor(axes, example, patch, colours[patch], x, low + y, panel.scale)
    note: dict[str, Any] = {"va": "center", "fontsize": 9.5, "color": "#555555"}
    if more > 0:
        axes.text(x, low + span - line / 2, f"and {more} patches more", **note)
    if not shown:
        reason = "no token reaches tau" if not colours else "no anchors in this image"
        axes.text(x, low + span / 2, reason, **note)
    if len(example.images) > 1:
        axes.text(0, -0.1 / panel.scale, example.name(panel.index), **note)
    axes.set_xlim(0, width / panel.scale)
    axes.set_ylim(low + span, low)
    axes.set_axis_off()


def _draw_anchor(axes: Axes, example: Anchored, patch: int, colour: str, x: float, y: float, scale: float) -> None:
    box = example.boxes[patch]
    assert box.pixels is not None
    x0, y0, x1, y1 = box.pixels
    dashes = (0, (2, 1)) if box.tile is None and has_tiles(example, box.image) else "-"
    thick = min(2.4, max(1.2, 10 * min(x1 - x0, y1 - y0) * scale))
    frame: dict[str, Any] = {"fill": False, "clip_on": False}
    axes.add_patch(_rectangle(box.pixels, edgecolor="white", linewidth=thick + 1.6, zorder=3, **frame))
    axes.add_patch(_rectangle(box.pixels, edgecolor=colour, linewidth=thick, linestyle=dashes, zorder=4, **frame))
    line = {"arrowstyle": "-", "color": colour, "linewidth": 1.3, "shrinkA": 0, "shrinkB": 0, "relpos": (0, 0.5)}
    axes.annotate(
        _plain(_label(example, patch)),
        xy=(x1, (y0 + y1) / 2),
        xytext=(x, y),
        va="center",
        fontsize=9.5,
        color="white",
        annotation_clip=False,
        bbox={"boxstyle": "round,pad=0.3", "facecolor": colour, "edgecolor": "none"},
        arrowprops=line,
        zorder=5,
    )


def _label(example: Anchored, patch: int) -> str:
    """What a patch's anchors are called beside the image."""
    words = [f"{_short(match.text, 14)} {_number(match.score, 2)}" for match in example.matches if match.patch == patch]
    text = ", ".join(words[:3]) + (f" +{len(words) - 3}" if len(words) > 3 else "")
    box = example.boxes[patch]
    if box.tile is not None:
        return f"{text}  · tile {box.tile + 1}"
    return f"{text}  · whole view" if has_tiles(example, box.image) else text


def _middle(box: Box) -> tuple[float, float]:
    assert box.pixels is not None
    x0, y0, x1, y1 = box.pixels
    return (x0 + x1) / 2, (y0 + y1) / 2


def _dim_unseen(axes: Axes, image: Image.Image, boxes: Sequence[Box]) -> None:
    """Grey over what no token of the image covers; its tokens cover a rectangle."""
    seen = _around(boxes)
    if seen is None:
        return
    x0, y0, x1, y1 = seen
    width, height = image.size
    for beside in ((0, 0, x0, height), (x1, 0, width, height), (x0, 0, x1, y0), (x0, y1, x1, height)):
        if beside[2] - beside[0] > 0.5 and beside[3] - beside[1] > 0.5:
            axes.add_patch(_rectangle(beside, facecolor="white", alpha=_VEIL, edgecolor="none", zorder=1))


def _dim_dropped(axes: Axes, example: Anchored, index: int) -> None:
    """Grey over the patches that were dropped; of an image with tiles, over those of the tiles."""
    tiled = has_tiles(example, index)
    boxes = [example.boxes[patch] for patch in sorted(example.dropped)]
    places = [box.pixels for box in boxes if box.image == index and box.pixels and (box.tile is not None or not tiled)]
    covers = [_rectangle(place) for place in places]
    axes.add_collection(PatchCollection(covers, facecolor="white", edgecolor="none", alpha=_VEIL, zorder=1))


def _around(boxes: Sequence[Box]) -> tuple[float, float, float, float] | None:
    corners = [box.pixels for box in boxes if box.pixels is not None]
    if not corners:
        return None
    x0, y0, x1, y1 = zip(*corners, strict=True)
    return min(x0), min(y0), max(x1), max(y1)


def _draw_grid(axes: Axes, boxes: Sequence[Box], scale: float) -> None:
    """The patches, of the tiles where there are some, and the borders of tiles."""
    tiles = sorted({box.tile for box in boxes if box.tile is not None})
    grid = [box.pixels for box in boxes if box.pixels is not None and (box.tile is not None or not tiles)]
    if not grid:
        return
    side = float(np.median([min(x1 - x0, y1 - y0) for x0, y0, x1, y1 in grid])) * scale
    look: dict[str, Any] = {"linewidth": 0.25 if side < 0.12 else 0.4, "alpha": 0.35, "zorder": 2}
    cells = [_rectangle(cell) for cell in grid]
    axes.add_collection(PatchCollection(cells, facecolor="none", edgecolor="white", **look))
    for tile in tiles if len(tiles) > 1 else []:
        around = _around([box for box in boxes if box.tile == tile])
        assert around is not None
        axes.add_patch(_rectangle(around, fill=False, edgecolor="white", linewidth=1.6, linestyle=":", zorder=2))


def _rectangle(corners: tuple[float, float, float, float], **look: Any) -> Rectangle:
    x0, y0, x1, y1 = corners
    return Rectangle((x0, y0), x1 - x0, y1 - y0, **look)


def _spread(wanted: Sequence[float], gap: float, end: float) -> list[float]:
    """Positions near the (sorted) wanted ones, at least `gap` apart and, if they fit, within (0, end)."""
    placed: list[float] = []
    for value in wanted:
        placed.append(max(value, placed[-1] + gap) if placed else max(value, gap / 2))
    over = placed[-1] - (end - gap / 2) if placed else 0.0
    if over > 0:
        limit = end - gap / 2
        for index in range(len(placed) - 1, -1, -1):
            placed[index] = min(placed[index], limit)
            limit = placed[index] - gap
    return placed


def _draw_scores(axes: Axes, example: Anchored, colours: Mapping[int, str], tau: float) -> None:
    matches = _most_telling(example.matches)
    rows = np.arange(len(matches))
    scores = [match.score if np.isfinite(match.score) else 0.0 for match in matches]
    bars = [_GREY if match.patch is None else colours[match.patch] for match in matches]
    axes.barh(rows, scores, color=bars, height=0.72)
    low, high = min(0.0, *scores, 0.0), max(*scores, tau if tau < 1 else 0.0, 0.1)
    backing = {"boxstyle": "round,pad=0.1", "facecolor": "white", "edgecolor": "none"}  # tau's line passes behind
    digits = 3 if any(abs(score - tau) < 0.005 for score in scores) else 2
    for row, score in enumerate(scores):
        axes.text(
            max(score, 0) + 0.012 * high,
            row,
            _number(score, digits),
            va="center",
            fontsize=8.5,
            color="#444444",
            bbox=backing,
            zorder=3,
        )
    if tau < 1:
        axes.axvline(tau, color="black", linestyle="--", linewidth=1, zorder=2)
        axes.annotate(
            f"tau {_number(tau, digits)}",
            (tau, 1),
            xycoords=("data", "axes fraction"),
            xytext=(3, 2),
            textcoords="offset points",
            fontsize=9,
        )
    axes.set_yticks(rows, [_plain(_short(match.text, 18)) for match in matches], fontsize=9)
    axes.set_ylim(len(matches) - 0.4, -0.6)
    axes.set_xlim(low, high * 1.16)
    left_out = len(example.matches) - len(matches)
    axes.set_xlabel("best cosine with a patch" + (f" ({left_out} low ones not shown)" if left_out else ""), fontsize=9)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _most_telling(matches: Sequence[Match]) -> list[Match]:
    """All, or of a long prompt the best-scoring ones, in their order."""
    if len(matches) <= _MOST_BARS:
        return list(matches)
    ranked = sorted(range(len(matches)), key=lambda i: (matches[i].patch is None, -matches[i].score, i))
    return [matches[i] for i in sorted(ranked[:_MOST_BARS])]


def _number(value: float, digits: int) -> str:
    return f"{round(value, digits) + 0.0:.{digits}f}"  # plus zero, which makes "-0.00" a "0.00"


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"
