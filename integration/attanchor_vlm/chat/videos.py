"""Videos as frames: what `encode_chat` takes, and what processors are told of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Any

FPS = 2.0


@dataclasses.dataclass(frozen=True)
class Video:
    """Frames of a video, evenly spaced in time.

    Attributes:
        frames: PIL images of one size, in order.
        fps: How many of them there are in a second.

    Raises:
        ValueError: there is no frame, sizes differ, or `fps` is not above 0.
    """

    frames: Sequence[Any]
    fps: float = FPS

    def __post_init__(self) -> None:
        sizes = {frame.size for frame in self.frames}
        if len(sizes) != 1:
            raise ValueError(differ(sizes))
        if not self.fps > 0:
            raise ValueError(f"fps is {self.fps}; it should be above 0")


def differ(sizes: Collection[tuple[int, int]]) -> str:
    """What is wrong with frames of these (width, height)."""
    return f"the frames of a video have the sizes {sorted(sizes)}; they should have one size"


def processor_arguments(videos: Sequence[Video]) -> dict[str, Any]:
    """What a processor of transformers is given for videos whose frames are chosen; nothing without videos."""
    if not videos:
        return {}
    known = [
        {
            "total_num_frames": len(video.frames),
            "fps": video.fps,
            "width": video.frames[0].width,
            "height": video.frames[0].height,
            "duration": len(video.frames) / video.fps,
            "frames_indices": list(range(len(video.frames))),
        }
        for video in videos
    ]
    return {"videos": [list(video.frames) for video in videos], "video_metadata": known, "do_sample_frames": False}
