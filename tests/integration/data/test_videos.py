"""Rows with videos: their frames as image files, or a file that PyAV reads; every bad one is found before training."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from attanchor_vlm.chat import encode
from attanchor_vlm.chat.videos import Video, processor_arguments
from attanchor_vlm.data.rows import parts, read_rows, samples, split_rows
from attanchor_vlm.data.videos import MOST_FRAMES, VideoFiles, load_video
from attanchor_vlm.errors import DataError


@pytest.fixture
def folder(tmp_path):
    for number in range(4):
        Image.new("RGB", (30, 20), (60 * number, 0, 0)).save(tmp_path / f"{number}.png")
    Image.new("RGB", (20, 20)).save(tmp_path / "small.png")
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    return tmp_path


def row(question="<video>\nWhat?", **more):
    return {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": "a cat"}], **more}


def read(folder, *rows, **options):
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    return read_rows(folder / "rows.json", folder, **options)


def test_a_video_is_its_frames_or_one_of_several(folder):
    frames = ["0.png", "1.png"]
    content = [{"type": "video"}, {"type": "text", "text": "And?"}]
    trl = {
        "videos": [frames],
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "b"}],
    }
    both = row("<image> a <video> b <video>", image="2.png", videos=[frames, ["2.png", "3.png"]])
    rows, _ = read(folder, row(video=frames, fps=4), both, trl)
    first = VideoFiles((folder / "0.png", folder / "1.png"), 4.0)
    assert rows[0].videos == (first,)
    assert [len(one.videos) for one in rows] == [1, 2, 1]
    assert rows[1].images == (folder / "2.png",)
    assert rows[2].messages[0] == ("user", "<video>\nAnd?")
    video = load_video(first)
    assert [frame.getpixel((0, 0))[0] for frame in video.frames] == [0, 60]
    assert video.fps == 4
    assert parts(both["conversations"][0]["value"]) == [
        {"type": "image"},
        {"type": "text", "text": "a"},
        {"type": "video"},
        {"type": "text", "text": "b"},
        {"type": "video"},
    ]


def test_every_turn_has_the_videos_in_front_of_it(folder):
    turns = [("human", "<video>\nWhat?"), ("gpt", "a"), ("human", "<video>\nAnd?"), ("gpt", "b")]
    long = {"conversations": [{"from": who, "value": said} for who, said in turns], "videos": [["0.png"], ["1.png"]]}
    rows, _ = read(folder, long)
    assert [len(one.videos) for one in samples(rows, "each")] == [1, 2]


def test_the_split_keeps_every_video_on_one_side(folder):
    rows, _ = read(folder, *[row(video=[f"{number % 3}.png"]) for number in range(12)])
    train, val = split_rows(rows, 0.3, 0)
    assert not {video for one in train for video in one.videos} & {video for one in val for video in one.videos}


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row(), "1 <video> placeholder for 0 videos"),
        (row("What?", video=["0.png"]), "0 <video> placeholders for 1 video"),
        (row(video=["9.png"]), "9.png does not exist"),
        (row(video=[]), '"video" is an empty list'),
        (row(video=[7]), '"video" is 7'),
        (row(video=["0.png", "small.png"]), "sizes .* they should have one size"),
        (row(video=["0.png"], fps=0), '"fps" is 0; it should be a number above 0'),
        (row(video="broken.mp4"), "broken.mp4 (cannot be read|is a file that PyAV would read)"),
        (row(video=["0.png", "broken.mp4"]), "broken.mp4 is not an image that can be read"),
    ],
)
def test_a_bad_row_is_named(folder, bad, reason):
    with pytest.raises(DataError, match=rf"row 2: .*{reason}"):
        read(folder, row(video=["0.png"]), bad)
    assert [one.number for one in read(folder, row(video=["0.png"]), bad, skip_bad=True)[0]] == [1]


def test_frames_of_several_sizes_are_no_video(folder):
    with pytest.raises(DataError, match=r"sizes \[\(20, 20\), \(30, 20\)\]; they should have one size"):
        load_video(VideoFiles((folder / "0.png", folder / "small.png")))


def test_a_file_needs_pyav_and_its_frames_do_not(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"PyAV would read, which is not installed: pip install av, or give .* frames"):
        read(folder, row(video="broken.mp4"))
    assert len(read(folder, row(video=["0.png"]))[0]) == 1


@pytest.mark.parametrize(
    ("kind", "codec", "seconds", "count"),
    [
        ("mp4", "mpeg4", 2, 4),
        ("mp4", "mpeg4", 40, MOST_FRAMES),
        ("mkv", "mpeg4", 2, 4),  # does not say how many frames it has
        ("mpg", "mpeg2video", 2, 4),  # an image by its name, to PIL
    ],
)
def test_frames_of_a_file_are_evenly_spaced(folder, kind, codec, seconds, count):
    av = pytest.importorskip("av")
    rate = 25 if kind == "mpg" else 10
    with av.open(str(folder / f"clip.{kind}"), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
        for number in range(rate * seconds):
            pixels = np.full((32, 32, 3), 250 * number // (rate * seconds), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    rows, _ = read(folder, row(video=f"clip.{kind}", fps=None))
    video = load_video(rows[0].videos[0])
    assert len(video.frames) == count
    assert video.fps == pytest.approx(count / seconds)
    shades = [frame.getpixel((5, 5))[0] for frame in video.frames]
    assert shades == pytest.approx([250 * (number + 0.5) / count for number in range(count)], abs=8)


def test_processors_are_told_the_times_of_frames():
    frames = [Image.new("RGB", (30, 20))] * 3
    given = processor_arguments([Video(frames, 2.0)])
    assert given["videos"] == [frames]
    assert given["do_sample_frames"] is False
    told = given["video_metadata"][0]
    assert (told["frames_indices"], told["fps"], told["duration"]) == ([0, 1, 2], 2.0, 1.5)
    assert processor_arguments([]) == {}


def test_a_conversation_has_a_video_for_each_part():
    chat = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What?"}]}]
    processor = SimpleNamespace(tokenizer=SimpleNamespace(is_fast=True), chat_template="x")
    with pytest.raises(ValueError, match="conversation 0 has 1 video parts and 0 videos"):
        encode.encode_chat(processor, [chat], videos=[[]])
    with pytest.raises(TypeError, match="a video that is str; it should be a Video"):
        encode.encode_chat(processor, [chat], videos=[["clip.mp4"]])
    with pytest.raises(ValueError, match="fps is 0; it should be above 0"):
        Video([Image.new("RGB", (2, 2))], 0)
