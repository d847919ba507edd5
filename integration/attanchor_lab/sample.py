"""`attanchor sample`: the small model and a little data on disk, so that every other command can be tried offline."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava.model import SHIPPED

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
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        made = Path(temporary) / "sample"  # its own permissions are those that a user's mkdir gives
        (made / "model").mkdir(parents=True)
        for file in SHIPPED.iterdir():  # contents alone: an installed package may be read-only
            shutil.copyfile(file, made / "model" / file.name)
        scenes.write_dataset(made, "train", TRAIN_SCENES, seed)
        scenes.write_dataset(made, "test", TEST_SCENES, seed + 1)
        made.replace(output)
    return [output / name for name in ("model", "train.json", "test.json", "images")]
