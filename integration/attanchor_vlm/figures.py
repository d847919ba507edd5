"""What the package's figures share: colours, fonts, and how they reach the disk."""

from __future__ import annotations

import warnings
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # no display is needed, and none is looked for

from matplotlib import font_manager
from matplotlib import pyplot as plt

from attanchor_vlm.records import write_atomically

PALETTE = ("#d62728", "#1f77b4", "#2ca02c", "#e07b00", "#9467bd", "#0e8f9e", "#d6449f", "#8c564b", "#6b7a0f", "#3f4fa3")


def save(figure: plt.Figure, path: Path) -> None:
    """Write a figure, whole or not at all, and free it. Letters that no installed font has become boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        try:
            write_atomically(path, lambda temporary: figure.savefig(temporary, dpi=110))
        finally:
            plt.close(figure)


def fonts() -> list[str]:
    """matplotlib's own font, and behind it those for other scripts that are installed."""
    wide = (
        "Noto Sans CJK",
        "Source Han Sans",
        "WenQuanYi",
        "Microsoft YaHei",
        "PingFang",
        "Arial Unicode",
        "Noto Sans",
    )
    installed = sorted(font_manager.get_font_names())
    return ["DejaVu Sans", *(name for start in wide for name in installed if name.startswith(start))]
