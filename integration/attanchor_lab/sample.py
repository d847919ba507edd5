"""`attanchor sample`: the small model and a little data on disk, so that every other command can be tried offline."""

from __future__ import annotations

import shutil
from pathlib import Path

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava.model import SHIPPED
from attanchor_vlm.records import write_folder

TRAIN_SCENES, TEST_SCENES = 40, 10


def write_sample(output: Path, seed: int = 0) -> list[Path]:
    """Write ``model`` (the small LLaVA with its processor), ``train.json`` and ``test.json`` (LLaVA-Instruct rows about
    rendered scenes) and ``images`` to a new folder, whole or not at all; returns the paths of these four.

    Raises:
        FileExistsError: `output` is there already.
    """
    output = Path(output)
    if output.exists():
        raise FileExistsError(f"output {output} exists; take another folder")

    def write(made: Path) -> None:
        (made / "model").mkdir()
        for file in SHIPPED.iterdir():  # contents alone: an installed package may be read-only
            shutil.copyfile(file, made / "model" / file.name)
        scenes.write_dataset(made, "train", TRAIN_SCENES, seed)
        scenes.write_dataset(made, "test", TEST_SCENES, seed + 1)

    write_folder(output, write)
    return [output / name for name in ("model", "train.json", "test.json", "images")]
