"""What `attanchor build-small-vlm` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attanchor_lab.photographs.config import FOLDER
from attanchor_vlm.settings import REQUIRED, check_values, setting


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """What `attanchor build-small-vlm` makes, and how.

    Raises:
        ValueError: naming the setting, what it is and what it should be.
    """

    output: Path = setting(REQUIRED, "Folder for model and processor; should not exist.")
    pixels: int = setting(448, "Side of the images: 448 are 49 tokens, 896 are 196.", at_least=32)
    world: Path | None = setting(
        None, "Stage 1: a folder of `attanchor photographs`, whose held-out concepts it leaves out."
    )
    stamps: Path = setting(FOLDER, "Folder of the stamps that stage 1 shows.", needs="world")
    steps: int = setting(120, "Steps of stage 1.", above=0, needs="world")
    batch_size: int = setting(4, "Scenes a step.", above=0)
    lr: float = setting(1e-3, "Learning rate of stage 1.", above=0)
    align_weight: float | None = setting(None, "Also align patches with the answers' words: weight.", at_least=0)
    seed: int = setting(0, "For order and adapters.", at_least=0, below=2**32)

    def __post_init__(self) -> None:
        check_values(self)
