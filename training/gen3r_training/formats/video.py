"""Frames out of a video file: those at given times, or all of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import av
from PIL import Image

from gen3r_training.formats.scene import BadScene, Frame

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The file and its first video stream; what PyAV raises inside becomes a `BadScene`."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise BadScene(f"{path.name} holds no video")
            yield container, container.streams.video[0]
    except (av.FFmpegError, OSError) as error:
        raise BadScene(f"{path.name}: {error.strerror or type(error).__name__}") from error


@dataclass(frozen=True)
class VideoFacts:
    """frames : number of coded pictures. seconds : of the whole. size : width, height."""

    frames: int
    seconds: float
    size: tuple[int, int]


def video_facts(path: Path) -> VideoFacts:
    """What the file says of itself; pictures are counted where it does not say. Raises BadScene."""
    with _opened(path) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        if stream.duration is not None and stream.time_base is not None:
            seconds = float(stream.duration * stream.time_base)
        else:
            seconds = (container.duration or 0) / 1e6
        count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
        return VideoFacts(count, seconds, size)


@dataclass(frozen=True)
class VideoFrames:
    """The frames of a video file that are shown at `times`, or the first `count`, one each.

    times : microseconds from the start of the video, ascending; empty: every frame
    count : number of frames
    """

    path: Path
    count: int
    times: tuple[int, ...] = ()

    def __len__(self) -> int:
        return self.count

    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return video_facts(self.path).size

    def __iter__(self) -> Iterator[Frame]:
        with _opened(self.path) as (container, stream):
            if not self.times:
                for frame in container.decode(stream):
                    yield Frame(frame.to_image())
                return
            yield from self._at_times(container, stream)

    def _at_times(
        self, container: av.container.InputContainer, stream: av.VideoStream
    ) -> Iterator[Frame]:
        base, rate = stream.time_base, stream.average_rate
        if base is None or not rate:
            raise BadScene(f"{self.path.name} gives its frames no times")
        origin = stream.start_time or 0
        # Half the time between two frames, and a millisecond for times rounded by the container.
        tolerance = 0.5e6 / float(rate) + 1e3
        container.seek(origin + int(self.times[0] / 1e6 / base), stream=stream, backward=True)
        decoded = (
            (float((frame.pts - origin) * base) * 1e6, frame)
            for frame in container.decode(stream)
            if frame.pts is not None
        )
        last = next(decoded, None)
        following = next(decoded, None)
        for time in self.times:
            while (
                last is not None
                and following is not None
                and abs(following[0] - time) <= abs(last[0] - time)
            ):
                last, following = following, next(decoded, None)
            if last is None or abs(last[0] - time) > tolerance:
                raise BadScene(f"{self.path.name} has no frame at {time / 1e6:.6f} s")
            image: Image.Image = last[1].to_image()
            yield Frame(image)
