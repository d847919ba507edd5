"""Videos of rows: the frames as image files, which need nothing, or a file of a video, which PyAV reads."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from pathlib import Path

from PIL import Image

from attanchor_vlm.chat.videos import FPS, Video, differ
from attanchor_vlm.data.images import FORMATS, decoded, size_of, why_not
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
        # A film that PIL knows by name alone (MPEG), or of which it reads the first picture (GIF), is none of its.
        kind = Image.registered_extensions().get(self.files[0].suffix.lower())
        return len(self.files) == 1 and (kind not in FORMATS or kind == "GIF")

    def why_unreadable(self) -> str | None:
        """Why no frame of the file can be decoded, or frames that can be are no video; None if all is well."""
        if not self.is_file:
            sizes = {size_of(path)[::-1] for path in self.files}
            return None if len(sizes) == 1 else f"video {self.files[0]}, …: {differ(sizes)}"
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


def load_video(source: VideoFiles | Video, blank: bool = False) -> Video:
    """The frames of a video: all that are given, or of a file `fps` a second, at most `MOST_FRAMES`, evenly spaced.

    Args:
        blank: As many frames of that size, but empty ones: only the heads of files are read.
    """
    if isinstance(source, Video):
        return source
    if source.is_file:
        return _of_file(source, blank)
    if blank:
        return Video(_empty(size_of(source.files[0])[::-1], len(source.files)), source.fps)
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


def _of_file(source: VideoFiles, blank: bool) -> Video:
    try:
        import av

        with av.open(str(source.files[0])) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or FPS)
            if not (total := stream.frames):  # Matroska and others do not say
                total = sum(1 for _ in container.decode(stream))
                container.seek(0)
            count = max(1, min(MOST_FRAMES, total, round(total / rate * source.fps)))
            chosen = {(2 * number + 1) * total // (2 * count) for number in range(count)}
            if blank:
                frames = _empty((stream.width, stream.height), count)
            else:
                numbered = enumerate(itertools.islice(container.decode(stream), max(chosen) + 1))
                frames = [frame.to_image() for number, frame in numbered if number in chosen]
        return Video(frames, len(frames) / (total / rate))
    except Exception as error:
        raise DataError(source.why_unreadable() or f"video {source.files[0]} cannot be read: {error}") from error


def _empty(size: tuple[int, int], count: int) -> list[Image.Image]:
    return [Image.new("RGB", size)] * count
