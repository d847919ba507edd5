"""Videos of rows: the frames as image files, which need nothing, or a file of a video, which PyAV reads."""

from __future__ import annotations

import dataclasses
import importlib.util
from pathlib import Path
from typing import Any

from PIL import Image

from attanchor_vlm.chat.videos import FPS, Video
from attanchor_vlm.data.images import decoded, why_not
from attanchor_vlm.errors import DataError

MOST_FRAMES = 32  # of a file of a video; of a longer one they stand further apart


@dataclasses.dataclass(frozen=True, order=True)
class VideoFiles:
    """A video of a row.

    Attributes:
        files: One file of a video, or the image files of its frames.
        fps: Frames in a second: of those, or to take of the file.
    """

    files: tuple[Path, ...]
    fps: float = FPS

    @property
    def frames(self) -> tuple[Path, ...]:
        """The image files; none if it is a file of a video."""
        return () if self.is_file else self.files

    @property
    def is_file(self) -> bool:
        return len(self.files) == 1 and self.files[0].suffix.lower() not in Image.registered_extensions()

    def why_unreadable(self) -> str | None:
        """Why no frame of the file can be decoded; None if one can, or if the video is its frames."""
        if not self.is_file:
            return None
        path = self.files[0]
        if importlib.util.find_spec("av") is None:
            return (
                f"video {path} is a file that PyAV would read, which is not installed: pip install av, or give the "
                "video as a list of image files, its frames"
            )
        import av

        try:
            with av.open(str(path)) as container:
                next(container.decode(video=0))
        except Exception as error:  # of nearly any kind, if it is damaged
            return f"video {path} cannot be read: {' '.join(str(error).split())}"
        return None


def load_video(source: VideoFiles) -> Video:
    """The frames of a video: all that are given, or of a file `fps` a second, at most `MOST_FRAMES`, evenly spaced.

    Raises:
        DataError: it cannot be read.
    """
    if source.is_file:
        return _of_file(source)
    frames = []
    for path in source.files:
        try:
            frames.append(decoded(path))
        except Exception as error:
            raise DataError(f"frame {path} {why_not(error)}") from error
    try:
        return Video(frames, source.fps)
    except ValueError as error:
        raise DataError(f"video {source.files[0]}, …: {error}") from error


def _of_file(source: VideoFiles) -> Video:
    from transformers.video_utils import load_video as read

    def chosen(metadata: Any, **_: Any) -> list[int]:
        total = metadata.total_num_frames
        count = max(1, min(MOST_FRAMES, total, round(total / (metadata.fps or FPS) * source.fps)))
        return [(2 * number + 1) * total // (2 * count) for number in range(count)]

    try:
        path: Any = str(source.files[0])
        found: Any = read(path, sample_indices_fn=chosen, backend="pyav")
    except Exception as error:
        raise DataError(source.why_unreadable() or f"video {source.files[0]} cannot be read: {error}") from error
    frames, metadata = found
    seconds = metadata.total_num_frames / (metadata.fps or FPS)
    return Video([Image.fromarray(frame) for frame in frames], len(frames) / seconds)
