"""Whatever a file of rows, an image, an adapter or a checkpoint holds: it is read, or refused by one error of ours."""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import shutil
import sys
import warnings

import numpy as np
import pytest
import tqdm.std
from chats import processor_of
from hypothesis import assume, example, given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from PIL import ExifTags, Image
from safetensors.torch import load_file, save_file
from strategies import LONGER, examples
from tiny import tiny_llava

from attanchor_lab.small_llava.model import SHIPPED
from attanchor_vlm import AttAnchorConfig, load_settings
from attanchor_vlm.data.dataset import accept_all
from attanchor_vlm.data.lengths import RowLengths, check_texts
from attanchor_vlm.data.rows import load_image, read_rows
from attanchor_vlm.data.stream import SampleStream
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.inference.ask_file import read_questions
from attanchor_vlm.model.load import load_pretrained, with_adapter

WORDS = ["<image>", "<image><image>", "human", "gpt", "a.png", "../a.png", "/etc/passwd"]
TEXTS = st.text(max_size=8) | st.sampled_from([*WORDS, "\ud800", "\u2028", "a\0b", "{{7*7}}"])
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | TEXTS
JSON = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=6
)
ROW = {
    "id": "1",
    "image": "a.png",
    "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}],
}
MESSAGES = {
    "images": ["a.png"],
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ],
}


@st.composite
def altered(draw, whole):
    """JSON like `whole`, with one to three places of it replaced, left out or doubled."""
    value = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        at, parent, key = value, None, None
        while isinstance(at, (dict, list)) and at and (parent is None or draw(st.booleans())):
            parent, key = at, draw(st.sampled_from(sorted(at)) if isinstance(at, dict) else st.integers(0, len(at) - 1))
            at = parent[key]
        if parent is None:
            return draw(JSON)
        how = draw(st.sampled_from(["replace", "replace", "drop", "double"]))
        if how == "replace":
            parent[key] = draw(JSON)
        elif how == "drop":
            del parent[key]
        elif isinstance(parent, list):
            parent.append(at)
        else:
            parent[draw(TEXTS)] = at
    return value


@contextlib.contextmanager
def naming(file, error):
    """Nothing is raised but `error`, which names the file."""
    try:
        yield
    except error as raised:
        if str(file) not in str(raised):
            raise AssertionError(f"{file} is not named") from raised


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    Image.new("RGB", (8, 8)).save(folder / "a.png")
    return folder


DEEP = "[" * 9_000  # beyond what Python nests
LONG = '[{"id": ' + "9" * 5000 + "}]"  # beyond the digits that it reads


@given(
    text=st.lists(altered(ROW) | altered(MESSAGES), max_size=3).map(json.dumps) | st.text(max_size=30),
    lines=st.booleans(),
)
@example(text=DEEP, lines=False)
@example(text=DEEP, lines=True)
@example(text=LONG, lines=False)
@example(text=LONG, lines=True)
@examples(80)
def test_rows(tried, folder, text, lines):
    """Files of rows, altered."""
    tried()
    file = folder / ("rows.jsonl" if lines else "rows.json")
    if lines and text.startswith("[") and text.endswith("]"):
        text = text[1:-1]
    file.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (read_rows, lambda file, images: read_questions(file, images)):
        with naming(file, DataError):
            read(file, folder)


def test_many_rows(tried, resident, folder, tmp_path, capsys, monkeypatch):
    """Rows of a file of a million, read with progress, and as a stream in level memory."""
    count, file, text = 10**6 if LONGER > 1 else 2000, tmp_path / "rows.jsonl", {**ROW, "image": None}
    text["conversations"] = [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "A cat."}]
    with file.open("w") as lines:
        for _ in range(count // 1000):
            lines.write(f"{json.dumps(ROW)}\n" + f"{json.dumps(text)}\n" * 999)
    before = resident()
    rows, bad = read_rows(file, folder, progress=True)
    assert (len(rows), bad) == (count, [])
    assert resident() - before < 2**26 + 2500 * count
    assert "checking rows: 0 [" in (shown := capsys.readouterr().err)  # before there is anything to count
    assert f"| 0/{count} [" in shown
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(tqdm.std, "time", itertools.count(step=3).__next__)  # what takes longer than two seconds
    check_texts(file, rows[:2000], RowLengths(processor_of("bytes-chatml")), None)
    assert "checking texts:  50%" in capsys.readouterr().err
    if LONGER > 1:
        del rows
        stream, sizes = (
            SampleStream([file], folder, "each", accept_all, False, tmp_path / "no", 0, 100, 1, passes=1),
            [],
        )
        for number, _ in enumerate(stream):
            sizes += [resident()] * (number % (count // 10) == 0)
        assert number + 1 == count
        assert sizes[-1] - sizes[1] < 2**24
    tried(count)


def _picture(kind: str) -> bytes:
    file, image = io.BytesIO(), Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 31, 3), dtype=np.uint8))
    notes = Image.Exif()
    notes[ExifTags.Base.Orientation] = 6
    image.save(file, kind, **({"exif": notes} if kind in ("JPEG", "PNG", "WEBP") else {}))
    return file.getvalue()


PICTURES = {kind: _picture(kind) for kind in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM")}


@st.composite
def damaged(draw):
    whole = bytearray(PICTURES[draw(st.sampled_from(sorted(PICTURES)))])
    for _ in range(draw(st.integers(0, 4))):
        whole[draw(st.integers(0, min(len(whole), 200) - 1 if draw(st.booleans()) else len(whole) - 1))] = draw(
            st.integers(0, 255)
        )
    return bytes(whole[: draw(st.integers(0, len(whole)))]) if draw(st.booleans()) else bytes(whole)


@given(content=damaged() | st.binary(max_size=64))
@examples(150)
def test_images(tried, folder, content):
    """Images, damaged."""
    tried()
    assume(_pixels(content) < 10**7)  # a head that promises gigabytes is a case of its own
    file = folder / "damaged.png"
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for source in (file, content):
            try:
                image = load_image(source)
            except DataError:
                continue
            assert image.mode == "RGB"
            assert min(image.size) > 0


def _pixels(content: bytes) -> int:
    try:
        with Image.open(io.BytesIO(content)) as image:
            return image.width * image.height
    except Exception:
        return 0


@given(value=altered(AttAnchorConfig(tau=0.3, keep=0.5).to_dict()) | st.text(max_size=20))
@example(value=DEEP)
@example(value=LONG)
@examples(100)
def test_settings_of_an_adapter(tried, folder, value):
    """Settings of an adapter, altered."""
    tried()
    file = folder / "attanchor.json"
    file.write_bytes((value if isinstance(value, str) else json.dumps(value)).encode("utf-8", "surrogatepass"))
    with naming(file, ValueError):
        assert isinstance(load_settings(folder), AttAnchorConfig)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    config = LoraConfig(r=2, target_modules=["q_proj"], base_model_name_or_path="base")
    get_peft_model(tiny_llava(), config).save_pretrained(folder)
    return folder


@given(data=st.data())
@examples(20)
def test_adapters(tried, adapter, tmp_path, data):
    """Adapters' files, altered."""
    tried()
    folder = tmp_path / "adapter"
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text())
    if data.draw(st.booleans()):
        name = data.draw(st.sampled_from(sorted(config)))
        text = json.dumps({**config, name: data.draw(JSON)})
    else:
        text = data.draw(st.sampled_from([DEEP, LONG, "", "{}", "[]", "null", json.dumps({**config, "r": 10**7})]))
    file.write_text(text)
    if data.draw(st.integers(0, 3)) == 0:
        weights = folder / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[data.draw(st.integers(0, 40))] = data.draw(st.integers(0, 255))
        weights.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with naming(folder, SetupError):
            with_adapter(tiny_llava(), "base", folder)


@given(data=st.data())
@examples(6)
def test_checkpoints(tried, tmp_path, data):
    """Checkpoints: weights gone, surplus or NaN, files damaged, settings altered."""
    tried()
    folder = tmp_path / "model"
    shutil.copytree(SHIPPED, folder, dirs_exist_ok=True)
    weights = folder / "model.safetensors"
    tensors, is_whole = load_file(weights), False
    name = data.draw(st.sampled_from(sorted(tensors)))
    match data.draw(st.sampled_from(["gone", "surplus", "nan", "damaged", "settings"])):
        case "gone":
            del tensors[name]
            save_file(tensors, weights, {"format": "pt"})
        case "surplus":
            save_file({**tensors, "nobody": tensors[name].clone()}, weights, {"format": "pt"})
            is_whole = True
        case "nan":
            tensors[name].view(-1)[-1] = float("nan")
            save_file(tensors, weights, {"format": "pt"})
        case "damaged":
            content = weights.read_bytes()
            weights.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
        case "settings":
            file = folder / data.draw(st.sampled_from(["config.json", "processor_config.json", "tokenizer.json"]))
            file.write_text(json.dumps(data.draw(altered(json.loads(file.read_text())))))
            is_whole = None  # what is left of it may be a model
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            load_pretrained(str(folder))
        except SetupError as error:
            if is_whole or str(folder) not in str(error):
                raise AssertionError(f"{folder} is refused, or not named") from error
        else:
            assert is_whole is not False, "a model that is not whole is loaded"
