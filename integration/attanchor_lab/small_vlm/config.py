"""What `attanchor build-small-vlm` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attanchor_vlm.settings import REQUIRED, check_values, setting


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What `attanchor build-small-vlm` makes, and how.

    Raises:
        ValueError: naming the setting, what it is and what it should be.
    """

    output: Path = setting(REQUIRED, "Folder for model and processor; should not exist.")
    pixels: int = setting(224, "Side of the images: 224 are 49 tokens, 448 are 196.", at_least=32)
    captions: Path | None = setting(None, "Stage 1: rows of captions, as `attanchor photographs` writes them.")
    images: Path | None = setting(None, "The folder of their images.", needs="captions")
    steps: int | None = setting(None, "Steps of stage 1, in place of one pass.", above=0, needs="captions")
    batch_size: int = setting(8, "Captions a step.", above=0)
    lr: float = setting(1e-3, "Learning rate of stage 1.", above=0)
    align_weight: float | None = setting(None, "Also align patches with the captions' words: weight.", at_least=0)
    seed: int = setting(0, "For order and adapters.", at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check_values(self)
        if self.captions is not None and self.images is None:
            raise ValueError("captions are given, but no images; name the folder that their images are in")
