"""Read the frames of a video file: upright, with square pixels, at a constant frame rate.

PyAV, the package `av`, decodes; it brings FFmpeg, and with it every container.
"""

import contextlib
import math
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from diffusion_jax.data.sources.packages import require_packages

# A video whose frame rate is below this share of the one that is asked for would repeat frames.
_LEAST_SHARE = 0.9
# Playlists may not make FFmpeg open other files or addresses.
_ALONE = {"protocol_whitelist": "pipe"}
# Seconds between two frames after which the time stamps are taken for damaged.
_LONGEST_PAUSE = 60
# Counter-clockwise turns in degrees -> what Pillow calls them.
_TURNS = {
    90: Image.Transpose.ROTATE_90,
    180: Image.Transpose.ROTATE_180,
    270: Image.Transpose.ROTATE_270,
}


class CorruptVideoError(ValueError):
    """A file that cannot be read as a video; the caller says which file it was."""


class Video(NamedTuple):
    """An open video. fps: frames per second of `frames`, which yields pictures in mode RGB."""

    fps: float
    frames: Iterator[Image.Image]


@contextlib.contextmanager
def open_video(
    path: Path, *, fps: float | None = None, short_side: int | None = None
) -> Iterator[Video]:
    """Open a video file, to read its frames one after the other without keeping any.

    The frames are what a player shows: turned as the file says (phones), stretched when its pixels
    are not square, and each at its time, so that a variable frame rate becomes constant.

    Args:
        path: a file of any format that FFmpeg reads.
        fps: frames per second; each of them is the frame of the file that is nearest in time, or
            the last before it. None takes the average frame rate of the file.
        short_side: frames are made smaller until their short side has at most so many pixels.

    Raises:
        ModuleNotFoundError: PyAV is not installed.
        CorruptVideoError: no video can be read in the file, or its frame rate is below fps; also
            while iterating over the frames.
        OSError: the file cannot be opened.
    """
    require_packages("video_folder", {"av": "av"})
    import av

    with path.open("rb") as file, _in_words(), av.open(file, options=_ALONE) as container:
        if not container.streams.video:
            raise CorruptVideoError("it has no video stream")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        rate = stream.average_rate or stream.guessed_rate or stream.base_rate
        if not rate:
            raise CorruptVideoError("it says no frame rate")
        own = _fraction(rate)
        rate = own if fps is None else Fraction(fps).limit_denominator(10_000)
        if own < rate * _LEAST_SHARE:
            raise CorruptVideoError(
                f"it has {float(own):.4g} frames per second, fps = {fps:g} asks for more"
            )
        timed = resampled(_timed(container, stream, own), rate, 1 / own)
        ratio = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
        shape = _fraction(ratio) if ratio else Fraction(1)
        frames = (_picture(frame, shape, short_side) for frame in timed)
        yield Video(float(rate), _reading(frames))


def count_said(path: Path) -> int | None:
    """Read how many frames the header of a video file says it has; None where it does not say.

    Raises:
        ModuleNotFoundError, CorruptVideoError, OSError: as open_video.
    """
    require_packages("video_folder", {"av": "av"})
    import av

    with path.open("rb") as file, _in_words(), av.open(file, options=_ALONE) as container:
        streams = container.streams.video
        return streams[0].frames or None if streams else None


def resampled(
    timed: Iterator[tuple[Fraction, Any]], rate: Fraction, period: Fraction
) -> Iterator[Any]:
    """Yield a frame for each of the times 0, 1 / rate, 2 / rate, ... after the first frame.

    It is the nearest of the frames that are less than half a period away, else the last before; so
    jitter of time stamps neither doubles nor drops a frame.

    Args:
        timed: pairs (seconds, frame).
        rate: frames per second.
        period: seconds that the last frame is shown; half of them must be left.

    Raises:
        CorruptVideoError: time stamps jump ahead by a minute or more.
    """
    start, slot, shown, best = None, 0, Fraction(0), None
    for seconds, frame in timed:
        start = seconds if start is None else start
        place = (seconds - start) * rate
        new = math.floor(place + Fraction(1, 2))
        if new - slot > _LONGEST_PAUSE * rate:
            raise CorruptVideoError(f"its time stamps jump to {float(seconds):.4g} seconds")
        for _ in range(new - slot if best is not None else 0):
            yield best
        nearer = new == slot and abs(place - new) < abs(shown - slot)
        if best is None or new > slot or nearer:
            slot, shown, best = new, place, frame
    if best is not None and slot < shown + period * rate / 2:
        yield best


def _timed(container: Any, stream: Any, rate: Fraction) -> Iterator[tuple[Fraction, Any]]:
    """Decode frames with their times; a frame without one follows its predecessor by a period.

    Damaged frames before the first good one are left out: recordings of broadcasts begin with them.
    """
    seconds = None
    for frame in container.decode(stream):
        if frame.is_corrupt and seconds is not None:
            raise CorruptVideoError(f"the frame after {float(seconds):.4g} seconds is damaged")
        if frame.is_corrupt:
            continue
        if frame.pts is not None and frame.time_base:
            seconds = frame.pts * _fraction(frame.time_base)
        else:
            seconds = Fraction(0) if seconds is None else seconds + 1 / rate
        yield seconds, frame


def _fraction(ratio: Any) -> Fraction:
    """Copy a ratio, for which PyAV has its own type."""
    return Fraction(ratio.numerator, ratio.denominator)


def _picture(frame: Any, shape: Fraction, short_side: int | None) -> Image.Image:
    """Make an upright picture of square pixels. shape: width / height of a pixel of the file."""
    picture = frame.to_image()
    width, height = picture.width * max(shape, 1), picture.height * max(1 / shape, 1)
    factor = min(1, Fraction(short_side or 10**9) / min(width, height))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    turn = round(frame.rotation / 90) * 90 % 360
    return picture.transpose(_TURNS[turn]) if turn in _TURNS else picture


def _reading(frames: Iterator[Image.Image]) -> Iterator[Image.Image]:
    with _in_words():
        yield from frames


@contextlib.contextmanager
def _in_words() -> Iterator[None]:
    """Turn what FFmpeg raises into CorruptVideoError."""
    import av

    try:
        yield
    except (av.FFmpegError, OSError) as error:
        why = error.strerror if error.strerror else type(error).__name__
        raise CorruptVideoError(f"not a readable video ({why})") from error
