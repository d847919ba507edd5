"""Labels from a CLIP-class model: which words of a list every patch of an image looks like (SEA's recipe).

CLIP sees the whole image, stretched to its square, as a grid of patches of its own. What an image token of the trained
model shows is known in pixels (`model.geometry`), so a token takes the labels of the CLIP patches under it by area,
whatever cuts the image into tiles or pools patches in between.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from attanchor_vlm import distributed
from attanchor_vlm.chat.words import read_lines
from attanchor_vlm.data.rows import PLACEHOLDER, Sample, load_image
from attanchor_vlm.errors import SetupError
from attanchor_vlm.model.geometry import patch_boxes
from attanchor_vlm.records import write_atomically, write_json
from attanchor_vlm.training.alignment.captions import label_tokens

CANDIDATES = 5  # words kept for each patch, with their probabilities: SEA draws a patch's label from its best ones
TEMPLATE = "a photo of a {}"  # CLIP's own
_BATCH = 32  # images that CLIP is shown at a time
_FILE, _INDEX = "align-labels.npy", "align-labels.json"


def read_word_list(file: Path) -> list[str]:
    """A word or phrase a line; ``#`` begins a comment."""
    words = list(dict.fromkeys(read_lines(file, "align_words")))
    if not 2 <= len(words) < 65536:
        raise SetupError(
            f"align_words {file} holds {len(words)} words; it should hold two or more, and less than 65536"
        )
    return words


class ClipLabels:
    """Makes the labels of a batch from what CLIP said about its images.

    Args:
        processor: The trained model's own.
        model: A model of the family, for the places of its image tokens; one without weights (`meta`) will do.
        votes: From `clip_votes`.
    """

    per_token = True

    def __init__(self, processor: Any, model: Any, votes: Votes) -> None:
        self.processor, self.model, self.votes = processor, model, votes
        self.tokens = [sorted(label_tokens(processor.tokenizer, word, ())[0]) for word in votes.words]

    def __call__(self, samples: Sequence[Sample], batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`words` (V,) int64 token ids and `right` (T, V) float32 for the T image tokens of the batch."""
        images = [[load_image(one) for one in sample.images] for sample in samples]
        chances: list[dict[int, float]] = []  # of every image token, its words
        for row, sample in enumerate(samples):
            boxes = patch_boxes(self.model, self.processor, batch, row, images)
            of_box: list[dict[int, float]] = [{} for _ in boxes]
            for number, image in enumerate(sample.images):
                kept = self.votes.of(image)
                shown = [index for index, box in enumerate(boxes) if box.image == number and box.pixels is not None]
                if kept is not None and shown:
                    regions = np.array([boxes[index].pixels for index in shown])
                    for index, words in zip(shown, _words_under(kept, regions, images[row][number].size), strict=True):
                        of_box[index] = words
            chances += of_box
        return self._as_tokens(chances, samples)

    def _as_tokens(self, chances: list[dict[int, float]], samples: Sequence[Sample]) -> dict[str, Tensor]:
        labels = sorted({token for words in chances for word in words for token in self.tokens[word]})
        other: set[int] = set()
        for text in {text for sample in samples for _, text in sample.messages}:
            other |= label_tokens(self.processor.tokenizer, text.replace(PLACEHOLDER, " "))[1]
        words = [*labels, *sorted(other - set(labels))]
        column = {token: index for index, token in enumerate(labels)}
        right = np.zeros((len(chances), len(words)), np.float32)
        for row, of_row in enumerate(chances):
            for word, chance in of_row.items():
                for token in self.tokens[word]:
                    right[row, column[token]] = max(right[row, column[token]], chance)
        return {"words": torch.tensor(words, dtype=torch.int64), "right": torch.from_numpy(right)}


def _words_under(kept: np.ndarray, regions: np.ndarray, size: tuple[int, int]) -> list[dict[int, float]]:
    """The words of each region of an image, with the mean of their probabilities over it by area; the best ones.

    Args:
        kept: (G * G, CANDIDATES, 2) of a grid that covers the image.
        regions: (n, 4), x0, y0, x1, y1 in pixels.
        size: Width and height of the image.
    """
    words, place = np.unique(kept[..., 0].astype(np.int64), return_inverse=True)
    table = np.zeros((len(kept), len(words)), np.float32)
    np.maximum.at(table, (np.arange(len(kept))[:, None], place.reshape(kept.shape[:2])), kept[..., 1])
    side = round(len(kept) ** 0.5)
    cells = np.arange(side)
    down, across = (
        np.clip(np.minimum(cells + 1, high[:, None]) - np.maximum(cells, low[:, None]), 0, None)
        for low, high in (
            (regions[:, 1] / size[1] * side, regions[:, 3] / size[1] * side),
            (regions[:, 0] / size[0] * side, regions[:, 2] / size[0] * side),
        )
    )
    area = (down[:, :, None] * across[:, None]).reshape(len(regions), -1)
    means = (area @ table) / area.sum(1, keepdims=True)
    best = np.argsort(-means, axis=1)[:, :CANDIDATES]
    return [
        {int(words[index]): float(row[index]) for index in top if row[index] > 0}
        for row, top in zip(means, best, strict=True)
    ]


# --- What CLIP says about each image, once. --------------------------------------------------------------------------


class Votes:
    """The `CANDIDATES` likeliest words of every CLIP patch of every image: (images, G * G, CANDIDATES, 2) uint16, index
    of a word and probability in 65535ths."""

    def __init__(self, words: Sequence[str], images: Sequence[Path], table: np.ndarray):
        self.words, self.table = list(words), table
        self.rows = {image: row for row, image in enumerate(images)}

    def of(self, image: Path) -> np.ndarray | None:
        """(G * G, CANDIDATES, 2) float32, index and probability, or None for an image that CLIP was not shown."""
        return self.table[self.rows[image]] * np.array([1, 1 / 65535], np.float32) if image in self.rows else None


def clip_votes(path: Path, words: Sequence[str], images: Sequence[Path], folder: Path, progress: bool = True) -> Votes:
    """Show every image to a CLIP-class model, or take what an earlier call for the same ones left in `folder`.

    The patches' embeddings are those of MaskCLIP (arXiv 2112.01071): the last layer's values without its attention,
    since what attention gathers there describes the whole image and no patch.

    Args:
        path: Folder of a CLIP model with its processor.
        words: To choose among, put into `TEMPLATE`.
        images: Files.
        folder: Where ``align-labels.npy`` and ``align-labels.json`` are kept.
    """
    index = {"clip": str(path), "words": list(words), "images": [str(image) for image in images], "template": TEMPLATE}
    key = hashlib.sha256(json.dumps(index, ensure_ascii=False).encode()).hexdigest()
    stored, file = folder / _INDEX, folder / _FILE

    def make() -> None:
        if stored.is_file() and file.is_file() and json.loads(stored.read_text(encoding="utf-8")).get("key") == key:
            return
        stored.unlink(missing_ok=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(file, lambda temporary: _vote(path, words, images, temporary, progress))
        write_json(stored, {"key": key, **index})

    distributed.on_main(make)
    return Votes(words, images, np.load(file, mmap_mode="r"))


@torch.no_grad()
def _vote(path: Path, words: Sequence[str], images: Sequence[Path], file: Path, progress: bool) -> None:
    model, processor = _load(path)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    side = model.config.vision_config.image_size
    texts = processor.tokenizer([TEMPLATE.format(word) for word in words], padding=True, return_tensors="pt")
    known = []
    for start in range(0, len(words), 256):
        part = {name: value[start : start + 256].to(model.device) for name, value in texts.items()}
        known.append(F.normalize(model.text_projection(model.text_model(**part).pooler_output), dim=-1))
    words_ = torch.cat(known)
    candidates = min(CANDIDATES, len(words))
    table = None
    for start in tqdm(range(0, len(images), _BATCH), "labelling images", unit="", disable=not progress, leave=False):
        pictures = [
            load_image(image).resize((side, side), Image.Resampling.BICUBIC) for image in images[start:][:_BATCH]
        ]
        pixels = processor.image_processor(pictures, do_resize=False, do_center_crop=False, return_tensors="pt")
        patches = F.normalize(_patch_embeddings(model, pixels["pixel_values"].to(model.device)), dim=-1)
        chances = (model.logit_scale.exp() * patches @ words_.T).float().softmax(-1)
        best = chances.topk(candidates, -1)
        both = torch.stack([best.indices, (best.values * 65535).round().long()], -1).cpu().numpy().astype(np.uint16)
        if table is None:
            shape = (len(images), *both.shape[1:])
            table = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint16, shape=shape)
        table[start : start + len(both)] = both
    assert table is not None
    table.flush()


def _load(path: Path) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoProcessor

    if not path.is_dir():
        raise SetupError(f"align_clip {path} is not a folder; give the folder of a saved CLIP model with its processor")
    try:
        model = AutoModel.from_pretrained(path, trust_remote_code=False)
        processor = AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise SetupError(f"align_clip {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    parts = ("visual_projection", "text_projection", "text_model", "logit_scale")
    missing = [name for name in parts if not hasattr(model, name)]
    if missing or not hasattr(getattr(model, "vision_model", None), "post_layernorm"):
        raise SetupError(
            f"align_clip {path} holds a {type(model).__name__}, whose patches and texts have no space in common; it "
            "should be a CLIP-class model (CLIPModel)"
        )
    return model, processor


def _patch_embeddings(model: Any, pixels: Tensor) -> Tensor:
    """(n, G * G, d) of every patch, in the space of the text embeddings."""
    vision = model.vision_model
    hidden = vision(pixels, output_hidden_states=True).hidden_states[-2]
    last = vision.encoder.layers[-1]
    values = last.self_attn.out_proj(last.self_attn.v_proj(last.layer_norm1(hidden)))
    return model.visual_projection(vision.post_layernorm(values[:, 1:]))
