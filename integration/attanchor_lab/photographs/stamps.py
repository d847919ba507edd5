"""Cut-out photographs with a name each, read where Debian's package of them lies, and photographs to put them on."""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from attanchor_lab.photographs.config import FOLDER
from attanchor_vlm.errors import SetupError

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "black", "white")
# Folders of drawings, signs and things that nobody would name by their look.
_NO_PHOTOGRAPHS = {"cartoon", "symbols", "toys", "roadsigns", "planets", "moon", "ammunition", "plastic", "monuments"}
_NO_PHOTOGRAPHS |= {"easter", "halloween"}
# Photographs of scikit-image that show nothing which a stamp shows too.
_BACKGROUNDS = ("brick", "grass", "gravel", "rocket", "motorcycle_left", "motorcycle_right", "hubble_deep_field")
_LARGEST = 320  # pixels that a stamp is kept at

# "A Sumatran tiger, resting in the grass." The last word in front of what is said of it is the name.
_CAPTION = re.compile(r"(?:An?|The) (.+?)(?: ?[.,!(—:]| (?:in|with|from|of|at|is|that|used|making|covered) |$)")
# Captions whose last word misleads, by file; None leaves the stamp out.
_NAMES: dict[str, str | None] = {
    "avocado": "avocado", "drumkit": "drum", "garlic": "garlic", "gnu-baby": "gnu", "gnu-baby-stand": "gnu",
    "lettuce": "lettuce", "pizza": "pizza", "redlettuce": "lettuce", "tomato": "tomato",
} | dict.fromkeys((
    "apollo_lander", "beetle", "bradley", "Candy_cane_photo_1", "Candy_cane_photo_2", "candy_cane", "cep", "cep-1",
    "cherimoya", "f22_raptor", "garlics", "German_Christmas_toy", "ginger", "grapes", "hoverfly", "jackolantern_mean",
    "lavender", "lightningbolt", "menorah", "rambutan", "sea_lion", "stethoscope", "thyme", "uk_post_box", "voyager2",
    "xanthia",
))  # fmt: skip
# One name where two would be right for the same thing: a question may deny neither.
_SAME = {
    "basketball": "ball", "birch": "tree", "bull": "cow", "bunny": "rabbit", "butterflyfish": "fish",
    "caribou": "deer", "chick": "chicken", "clownfish": "fish", "daffodil": "flower", "doe": "deer",
    "dolphinfish": "fish", "drake": "duck", "dromedary": "camel", "fedora": "hat", "football": "ball",
    "gander": "goose", "gazania": "flower", "headstone": "gravestone", "hen": "chicken", "iris": "flower",
    "lionfish": "fish", "marigold": "flower", "mountaingoat": "goat", "oak": "tree", "ornament": "ball",
    "orca": "whale", "peahen": "peacock", "petunia": "flower", "ram": "sheep", "rooster": "chicken",
    "rose": "flower", "sailboat": "ship", "seagull": "gull", "sombrero": "hat", "stone": "gravestone",
    "tombstone": "gravestone", "trout": "fish", "wapiti": "deer", "wrasse": "fish",
}  # fmt: skip
_NOT_OF_THAT_COLOUR = {"gnu-stand", "kangaroo", "rhino_black", "whitestar-petunia"}  # what is called so


@dataclass(frozen=True)
class Stamp:
    """A cut-out photograph. `colour` is that of its caption, None where that tells none; `theme` its folder."""

    path: Path
    name: str
    colour: str | None
    theme: str


def find_stamps(folder: Path = FOLDER) -> list[Stamp]:
    """The named photographs under `folder`, in the order of their paths.

    Raises:
        SetupError: there are none.
    """
    found = [stamp for path in sorted(folder.rglob("*.png")) if (stamp := _stamp(path, folder))]
    if not found:
        raise SetupError(f"{folder} holds no stamps: `apt-get install tuxpaint-stamps-default`, or give their folder")
    return found


def _stamp(path: Path, folder: Path) -> Stamp | None:
    folders = path.relative_to(folder).parts[:-1]
    text = path.with_suffix(".txt")
    if _NO_PHOTOGRAPHS & set(folders) or path.stem.endswith("_mirror") or not text.is_file():
        return None
    said = name_of(path.stem, text.read_text(encoding="utf-8").partition("\n")[0])
    return said and Stamp(path, *said, "/".join(folders[:2] if folders[:1] == ("animals",) else folders[:1]))


def name_of(stem: str, caption: str) -> tuple[str, str | None] | None:
    """The concept and the colour that a caption tells of; None where it names no single thing."""
    match = _CAPTION.match(caption)
    if match is None:
        return None
    words = match[1].lower().split()
    name = _NAMES.get(stem, _SAME.get(words[-1], words[-1]))
    if name is None or not name.isalpha() or name in ("pair", "string", "marker"):
        return None
    told = words[0] in COLOURS and len(words) > 1 and words[1] != "and" and stem not in _NOT_OF_THAT_COLOUR
    return name, words[0] if told else None


@functools.cache
def cut_out(path: Path) -> Image.Image:
    """The RGBA photograph without its empty margin."""
    with Image.open(path) as file:
        image = file.convert("RGBA")
    image = image.crop(image.getchannel("A").point(lambda alpha: 255 * (alpha > 32)).getbbox())
    image.thumbnail((_LARGEST, _LARGEST), Image.Resampling.LANCZOS)
    return image


def shipped(name: str) -> list[Path]:
    """The photographs of that name inside scikit-image's package; nothing is downloaded.

    Raises:
        SetupError: it is not installed.
    """
    try:
        import skimage
    except ImportError as error:
        raise SetupError("the photographs come with scikit-image: `pip install scikit-image`") from error
    return sorted((Path(skimage.__file__).parent / "data").glob(f"{name}.*"))


@functools.cache
def photographs() -> tuple[Image.Image, ...]:
    """Scikit-image's photographs that serve as backgrounds.

    Raises:
        SetupError: it is not installed, or ships none of them.
    """
    paths = [path for name in _BACKGROUNDS for path in shipped(name)]
    if not paths:
        raise SetupError("this scikit-image ships no photographs; install another version")
    return tuple(Image.open(path).convert("RGB") for path in paths)


def background(side: int, stamps: Sequence[Stamp], generator: np.random.Generator) -> Image.Image:
    """A square piece of a photograph, or stamps blurred until nothing can be named."""
    if generator.random() < 0.5:
        every = photographs()
        image = every[generator.integers(len(every))]
        size = int(min(image.size) * generator.uniform(0.4, 1))
        left, top = (int(generator.integers(length - size + 1)) for length in image.size)
        return image.crop((left, top, left + size, top + size)).resize((side, side), Image.Resampling.BICUBIC)
    image = Image.new("RGB", (side, side), tuple(generator.integers(40, 216, 3).tolist()))
    for number in generator.integers(len(stamps), size=8):
        stamp = cut_out(stamps[number].path)
        image.paste(stamp, tuple(generator.integers(-side // 4, side, 2).tolist()), stamp)
    return image.filter(ImageFilter.GaussianBlur(side / 14))
