"""Streams: every row once a pass whoever reads it, checked as it comes, and the same after a resume."""

from __future__ import annotations

import itertools
import json
import sys

import pytest
import torch
import training_toy
from PIL import Image
from training_toy import before_every_loss, logged

from attanchor_lab.scenes import dataset as scenes
from attanchor_lab.small_llava import model as small_llava
from attanchor_vlm.data import dataset as train_data
from attanchor_vlm.data import rows as data
from attanchor_vlm.data import stream
from attanchor_vlm.data.videos import load_video
from attanchor_vlm.errors import DataError, SetupError
from attanchor_vlm.training import checkpoints
from attanchor_vlm.training import run as train


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """The rows of some scenes as one JSON list, four .jsonl shards, and a parquet file with the images inside."""
    folder = tmp_path_factory.mktemp("world")
    scenes.write_dataset(folder, "train", 8, seed=0)
    rows = json.loads((folder / "train.json").read_text())
    (folder / "shards").mkdir()
    for shard in range(4):
        lines = [json.dumps(row) for row in rows[shard::4]]
        (folder / "shards" / f"{shard}.jsonl").write_text("\n".join(lines) + "\n\n")
    write_parquet(folder / "rows.parquet", rows, folder / "images")
    return folder


def write_parquet(path, rows, images):
    """In TRL's form, as llava-instruct-mix-vsft is published."""
    import pyarrow
    from pyarrow import parquet

    table = []
    for row in rows:
        messages = []
        for turn in row["conversations"]:
            text = {"type": "text", "text": turn["value"].replace("<image>", "").strip()}
            content = [{"type": "image", "text": None}, text] if "<image>" in turn["value"] else [text]
            messages.append({"role": "user" if turn["from"] == "human" else "assistant", "content": content})
        image = {"bytes": (images / row["image"]).read_bytes(), "path": row["image"]}
        table.append({"messages": messages, "images": [image]})
    parquet.write_table(pyarrow.Table.from_pylist(table), path, row_group_size=10)


CLIP = [{"from": "human", "value": "<video>\nWhat happens?"}, {"from": "gpt", "value": "Nothing."}]


def make(world, tmp_path, files=None, **changes):
    options = {
        "files": files or sorted((world / "shards").iterdir()),
        "images": world / "images",
        "turns": "each",
        "refuse": train_data.accept_all,
        "skip_bad": False,
        "listed": tmp_path / "skipped.jsonl",
        "seed": 0,
        "buffer_size": 20,
        "batch_size": 4,
    }
    return stream.SampleStream(**{**options, **changes})


def texts(found):
    return [sample.messages for sample in found]


def everything(world):
    rows, _ = data.read_rows(world / "train.json", world / "images")
    return texts(data.samples(rows, "each"))


def first(made, count):
    return [sample for sample, _ in zip(made, range(count), strict=False)]


def test_a_pass_has_every_sample_once_in_another_order_each_time(world, tmp_path):
    expected = everything(world)
    made = make(world, tmp_path)
    two = texts(first(made, 2 * len(expected)))
    once, again = two[: len(expected)], two[len(expected) :]
    assert sorted(once) == sorted(again) == sorted(expected)
    assert once != expected
    assert once != again
    assert texts(first(make(world, tmp_path), len(expected))) == once
    assert texts(first(make(world, tmp_path, seed=1), len(expected))) != once
    assert all(isinstance(image, Image.Image) for sample in first(made, 3) for image in sample.images)


def test_a_stream_needs_no_cache(world, tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(world / "train.json" / "no-folder"))
    assert len(first(make(world, tmp_path), 3)) == 3


@pytest.mark.parametrize("processes", [2, 3])  # four shards divide evenly among two, not among three
def test_processes_share_a_pass(world, tmp_path, monkeypatch, processes):
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    parts = []
    for rank in range(processes):
        monkeypatch.setenv("RANK", str(rank))
        made = make(world, tmp_path)
        assert made.shards_here == (2 if processes == 2 else 4)
        parts.append(texts(made.from_start(passes=1)))
    assert sorted(itertools.chain(*parts)) == sorted(everything(world))
    assert max(map(len, parts)) - min(map(len, parts)) <= 4


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_resumed_stream_goes_on_behind_the_batches_that_were_taken(world, tmp_path, workers):
    def batches(made, count):
        loader = stream.StreamLoader(made, batch_size=4, collate_fn=texts, num_workers=workers)
        return [batch for batch, _ in zip(loader, range(count), strict=False)]

    whole = batches(make(world, tmp_path), 40)  # more than a pass
    assert sum(map(len, whole[:-10])) > len(everything(world))
    for taken in (1, 7, 33):
        made = make(world, tmp_path)
        made.taken = taken
        assert batches(made, 40 - taken) == whole[taken:]


def test_rows_that_a_resumed_stream_passes_over_are_not_decoded(world, tmp_path, monkeypatch):
    decoded = []
    monkeypatch.setattr(stream, "load_image", lambda image: decoded.append(image) or data.load_image(image))
    made = make(world, tmp_path, turns="all")
    made.taken = 5
    next(iter(made))
    assert len(decoded) == 1


def test_bad_rows_are_left_out_listed_once_and_left_out_again(world, tmp_path):
    shard = tmp_path / "bad.jsonl"
    good = (world / "shards" / "0.jsonl").read_text().splitlines()[:6]
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    unreadable = json.dumps({**json.loads(good[0]), "image": str(broken)})
    film = tmp_path / "film.mp4"
    film.write_bytes(b"no video")
    unplayable = json.dumps({"video": str(film), "conversations": CLIP})
    bad = [unreadable, '{"image": "x.png"}', unplayable]
    shard.write_text("\n".join([good[0], "{", *good[1:3], *bad, *good[3:]]) + "\n")
    rows = [json.loads(line) for line in good]
    made = make(world, tmp_path, files=[shard], skip_bad=True)
    count = sum(len(row["conversations"]) // 2 for row in rows)
    once = texts(first(made, 3 * count))
    listed = stream.read_listed(tmp_path / "skipped.jsonl")
    assert sorted(one["row"] for one in listed) == [2, 5, 6, 7]
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 4  # of three passes
    reasons = {one["row"]: one["reason"] for one in listed}
    assert "not valid JSON" in reasons[2]
    assert "broken.png" in reasons[5]
    assert '"conversations" is missing' in reasons[6]
    assert "film.mp4" in reasons[7]
    # A row that was bad stays out though it has been mended since: otherwise all behind it would move.
    Image.new("RGB", (8, 8)).save(broken)
    with (tmp_path / "skipped.jsonl").open("a") as file:
        file.write('{"file": "cut sho')
    made.taken = 2
    assert texts(first(made, 3 * count - 8)) == once[8:]

    with pytest.raises(DataError, match=r"bad.jsonl, row [2567]: .*\nmend the row, or leave bad rows out"):
        list(make(world, tmp_path, files=[shard], listed=tmp_path / "none.jsonl").from_start(passes=1))
    shard.write_text("{\n[]\n")
    with pytest.raises(DataError, match="has no usable row for process 0; the bad ones are listed in"):
        next(iter(make(world, tmp_path, files=[shard], skip_bad=True, listed=tmp_path / "all.jsonl")))


def test_frames_of_a_stream_are_decoded_where_its_rows_are_checked(world, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "frame.png")
    shard = tmp_path / "clips.jsonl"
    shard.write_text(json.dumps({"video": ["frame.png"] * 2, "fps": 4, "conversations": CLIP}) + "\n")
    (sample,) = make(world, tmp_path, files=[shard], images=tmp_path).from_start(passes=1)
    (tmp_path / "frame.png").unlink()
    video = load_video(sample.videos[0])
    assert ([frame.size for frame in video.frames], video.fps) == ([(8, 8)] * 2, 4)


def test_parquet_holds_the_same_rows(world, tmp_path):
    made = make(world, tmp_path, files=[world / "rows.parquet"], images=None)
    found = list(made.from_start(passes=1))
    assert sorted(texts(found)) == sorted(everything(world))
    assert found[0].images[0].mode == "RGB"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "audio"}], "has a part {'type': 'audio'}"),
        (7, 'should be an object with "role" and "content"'),
        ([{"type": "text", "text": "no image"}], "0 <image> placeholders for 1 image"),
    ],
)
def test_bad_rows_of_trl_s_form_are_named(content, reason):
    row = {"images": [{"bytes": b"x"}], "messages": [{"role": "user", "content": content}]}
    row["messages"].append({"role": "assistant", "content": "yes"})
    with pytest.raises(ValueError, match=reason.replace("{", r"\{")):
        data.check_row(1, row, None)


def test_a_file_name_without_a_folder_is_refused():
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "yes"}]
    with pytest.raises(ValueError, match=r"image a.png is a file, and no folder of images is given \(--images\)"):
        data.check_row(1, {"image": "a.png", "conversations": turns}, None)


def test_what_cannot_be_streamed_is_said(world, tmp_path, monkeypatch):
    with pytest.raises(DataError, match="cannot be read: No such file"):
        stream.shards_of(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds no \.jsonl or \.parquet file"):
        stream.shards_of(tmp_path)
    with pytest.raises(DataError, match=r"train\.json cannot be read as a stream; it should be a \.jsonl file"):
        stream.shards_of(world / "train.json")
    with pytest.raises(DataError, match="is a folder, which is read as a stream; give --stream"):
        data.read_rows(world / "shards", world / "images")
    damaged = tmp_path / "a.parquet"
    damaged.write_bytes((world / "rows.parquet").read_bytes()[:500])
    with pytest.raises(DataError, match=r"a\.parquet cannot be read: "):
        stream.check_first_rows([damaged], None, skip_bad=True)
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match=r"empty\.jsonl has no row"):
        stream.check_first_rows([tmp_path / "empty.jsonl"], None, skip_bad=True)
    with pytest.raises(DataError, match=r"0\.jsonl, row 1: image .* does not exist"):
        stream.check_first_rows([world / "shards" / "0.jsonl"], tmp_path, skip_bad=False)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SetupError, match="--stream needs the package datasets: `pip install datasets`"):
        stream.shards_of(world / "shards")


# --- Training. -------------------------------------------------------------------------------------------------------


def settings(world, output, **more):
    of_stream = {"data": world / "shards", "val_data": None, "stream": True, "tau": 0.3}
    return training_toy.settings(world, output, **{**of_stream, **more})


def run(world, output, **more):
    return train.run(settings(world, output, **more), say=lambda line: None, progress=False)


def test_a_run_on_a_stream_resumes_to_the_same_losses(world, tmp_path):
    options = {"accumulation": 2, "workers": 1, "fraction": 0.2, "hold_fraction": "quantile", "scheduler": "constant"}
    whole = run(world, tmp_path / "whole", **options)
    run(world, tmp_path / "parts", **options, max_steps=3)
    parts = run(world, tmp_path / "parts", **options, resume=True)
    assert logged(parts.log, "loss", "tau") == pytest.approx(logged(whole.log, "loss", "tau"), rel=1e-6)
    with pytest.raises(SetupError, match="workers was 1 and is 0"):  # which decide on the order
        run(world, tmp_path / "parts", **{**options, "workers": 0}, resume=True, max_steps=9)


def test_a_run_counts_the_rows_that_it_leaves_out(world, tmp_path):
    shard = tmp_path / "rows.jsonl"
    shard.write_text((world / "shards" / "0.jsonl").read_text() + "{\n[]\n")
    said: list[str] = []
    chosen = settings(world, tmp_path / "run", data=shard, skip_bad=True, batch_size=16, max_steps=4, eval_steps=4)
    result = train.run(chosen, said.append, progress=False)
    assert result.skipped == 2
    assert json.loads((tmp_path / "run" / "run.json").read_text())["result"]["skipped_rows"] == 2
    assert f"2 bad rows left out, listed in {tmp_path / 'run' / 'skipped.jsonl'}" in said


def test_a_bad_row_ends_a_run_in_one_line_with_its_checkpoint_whole(world, tmp_path):
    shard = tmp_path / "rows.jsonl"
    shard.write_text((world / "shards" / "0.jsonl").read_text() + "{\n")
    with pytest.raises(DataError) as caught:
        run(world, tmp_path / "run", data=shard, batch_size=16, workers=1, eval_steps=1, max_steps=5)
    assert "rows.jsonl, row " in str(caught.value)
    assert "Traceback" not in str(caught.value)
    left = train.complete_checkpoints(tmp_path / "run")
    if left:
        assert f"{left[-1].name} is whole" in str(caught.value)
    assert not (tmp_path / "run" / "adapter_config.json").exists()
    assert all(checkpoints.read_state(path) for path in left)


# --- Batches of like lengths, of rows in memory. ---------------------------------------------------------------------


def test_lengths_are_those_of_the_batches(world):
    from attanchor_vlm.data.batches import Collator
    from attanchor_vlm.data.lengths import RowLengths, sample_lengths

    processor = small_llava.build_processor()
    rows, _ = data.read_rows(world / "train.json", world / "images")
    some = list(data.samples(rows[:12], "all"))
    lengths = sample_lengths(some, RowLengths(processor, "all"))
    real = [int(Collator(processor, "all")([sample])["attention_mask"].sum()) for sample in some]
    assert max(abs(true - length) for true, length in zip(real, lengths, strict=True)) <= 4


def test_grouping_by_length_pads_less_and_resumes(world, tmp_path, monkeypatch):
    seen: list[list[int]] = []
    before_every_loss(lambda _, inputs: seen.append(inputs["attention_mask"].sum(-1).tolist()), monkeypatch)
    mixed = tmp_path / "mixed.json"
    rows = json.loads((world / "train.json").read_text())[:36]
    for index, row in enumerate(rows):
        row["conversations"][0]["value"] += " please" * (8 * (index % 3))
    mixed.write_text(json.dumps(rows))
    options = {"data": mixed, "stream": False, "val_fraction": 0, "batch_size": 4, "max_steps": 9, "eval_steps": 5}
    options |= {"scheduler": "constant", "group_by_length": True}
    whole = run(world, tmp_path / "whole", **options)
    order = list(seen)
    lengths = sorted(length for batch in order for length in batch)
    assert len(lengths) == 36
    assert len(set(lengths)) > 3
    generator = torch.Generator().manual_seed(0)
    random = torch.tensor(lengths)[torch.randperm(36, generator=generator)].view(9, 4).tolist()

    def padding(batches):
        return sum(max(batch) - length for batch in batches for length in batch)

    assert padding(order) < 0.6 * padding(random)
    seen.clear()
    run(world, tmp_path / "parts", **{**options, "max_steps": 5})
    again = run(world, tmp_path / "parts", **options, resume=True)
    assert seen == order
    assert logged(again.log, "loss") == pytest.approx(logged(whole.log, "loss"), rel=1e-6)


def test_the_sampler_s_order_is_that_of_seed_and_epoch():
    from attanchor_vlm.training.trainer import LengthGroupedSampler

    lengths = torch.randint(1, 99, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, batch=8, seed=3)
    torch.rand(3)  # the global generator has no say
    once = list(sampler)
    assert sorted(once) == list(range(200))
    assert list(sampler) == once
    sampler.set_epoch(1)
    assert list(sampler) != once
