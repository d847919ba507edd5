"""What `attanchor photographs` is told."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attanchor_lab.photographs.wordings import KINDS
from attanchor_vlm.settings import REQUIRED, check_values, setting

FOLDER = Path("/usr/share/tuxpaint/stamps")  # where Debian's package puts them


@dataclass(frozen=True, kw_only=True)
class PhotographConfig:
    """What `attanchor photographs` writes.

    Raises:
        ValueError: naming the setting, what it is and what it should be.
    """

    output: Path = setting(REQUIRED, "Folder for rows and images; should not exist.")
    seed: int = setting(0, "For concepts, wordings, scenes and questions.", at_least=0)
    scenes: int = setting(1000, "Scenes to train on.", at_least=1)
    test_scenes: int = setting(200, "Scenes of each split of the test.", at_least=1)
    concepts: int | None = setting(None, "So many concepts, drawn by the seed; by default all there are.", at_least=10)
    held_out: float = setting(0.2, "Share of the concepts that training never sees.", above=0, below=1)
    pixels: int = setting(448, "Of a side of the images.", at_least=32)
    least: int = setting(3, "Fewest things in a scene.", at_least=1)
    most: int = setting(4, "Most things in a scene, one a corner.", at_least=1, below=5)
    noise: float = setting(0.03, "Standard deviation of the pixels, of a range of 1.", at_least=0)
    blur: float = setting(0.0, "Standard deviation in pixels of an image of 336.", at_least=0)
    kinds: tuple[str, ...] = setting(KINDS, "Of questions, with commas between; or all.", all_of=KINDS)
    stamps: Path = setting(FOLDER, "Folder of the stamps: .png with alpha, captions in .txt files beside them.")

    def __post_init__(self) -> None:
        check_values(self)
        if not self.kinds or set(self.kinds) - set(KINDS):
            raise ValueError(f"kinds is {', '.join(self.kinds) or 'empty'}; it should be some of {', '.join(KINDS)}")
        if self.least > self.most:
            raise ValueError(f"least is {self.least}; it should be at most most, {self.most}")
