"""Stand-ins for the stamps of Debian's package: one coloured disc for every concept."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

CONCEPTS = {
    "animals/mammals": ("lion", "tiger", "bear", "mouse", "fox", "otter"),
    "food/fruit": ("mango", "pear", "plum", "lemon", "fig", "lime"),
    "household": ("mug", "kettle", "saw", "hammer", "key", "spade"),
}
COLOURED = {"pear": "yellow", "lemon": "yellow", "plum": "purple", "mug": "red", "key": "black", "fig": "brown"}


def write_stamps(folder: Path) -> Path:
    """Two stamps of every concept, with the captions that the package's have."""
    for theme, names in CONCEPTS.items():
        (folder / theme).mkdir(parents=True, exist_ok=True)
        for number, name in enumerate(names):
            for twin in range(2):
                image = Image.new("RGBA", (64, 48 + 8 * twin))
                ImageDraw.Draw(image).ellipse((4, 4, 58, 44), fill=(40 * number, 90 + 60 * twin, 200, 255))
                image.save(folder / theme / f"{name}-{twin}.png")
                said = f"{COLOURED[name]} {name}" if name in COLOURED else name
                caption = f"{'An' if said[0] in 'aeiou' else 'A'} {said}, on its own.\nes.utf8=Nada."
                (folder / theme / f"{name}-{twin}.txt").write_text(caption, encoding="utf-8")
    return folder
