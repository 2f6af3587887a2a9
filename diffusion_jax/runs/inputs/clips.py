"""Read a video that a user names: a file, an animated picture, or a folder of frames."""

import itertools
import os
import pathlib
from typing import NamedTuple

from PIL import Image, ImageSequence

from diffusion_jax.data.sources.folder_scan import frames_of
from diffusion_jax.data.sources.video_files import CorruptVideoError, open_video
from diffusion_jax.data.transforms import CorruptImageError, upright
from diffusion_jax.runs.inputs.arrays import read_animation, read_picture

# Files whose frames may have an opacity, which PIL reads.
_ANIMATED = (".gif", ".webp", ".apng")


class Clip(NamedTuple):
    """The frames of a video, with the opacity that they may have.

    fps: frames per second; None for a folder, which does not say it.
    """

    frames: list[Image.Image]
    fps: float | None


def read_clip(path: str | os.PathLike, count: int, *, flag: str = "") -> Clip:
    """Read the first `count` frames of a video, or all of them where there are fewer.

    path: a video of any container (with PyAV), a GIF or another animated picture, or a folder whose
      pictures are frames in the order of their numbers. flag goes before the path in messages.
    Raises FileNotFoundError for what does not exist, ValueError for what is no video and for
    frames of several sizes.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{flag}{path} does not exist")
    if path.is_dir():
        files = frames_of(path)[:count]
        if not files:
            raise ValueError(f"{flag}{path} holds no pictures")
        frames = [read_picture(file, flag=flag) for file in files]
        for file, frame in zip(files, frames, strict=True):
            if frame.size != frames[0].size:
                raise ValueError(
                    f"{flag}{file} has {_pixels(frame)}; it should have {_pixels(frames[0])}, as "
                    f"{files[0].name} has"
                )
        return Clip(frames, None)
    if path.suffix.lower() in _ANIMATED:
        return _read_animated(path, count, flag)
    try:
        with open_video(path) as video:
            return Clip(list(itertools.islice(video.frames, count)), video.fps)
    except CorruptVideoError as error:
        raise ValueError(f"{flag}{path} is no video: {error}") from error


def _pixels(frame: Image.Image) -> str:
    return f"{frame.width} x {frame.height} pixels"


def _read_animated(path: pathlib.Path, count: int, flag: str) -> Clip:
    picture = read_animation(path, flag=flag)
    frames = itertools.islice(ImageSequence.Iterator(picture), count)
    try:
        kept = [upright(frame).convert("RGBA") for frame in frames]
    except CorruptImageError as error:
        raise ValueError(f"{flag}{path} is {error}") from error
    shown = picture.info["duration"] if "duration" in picture.info else 0
    return Clip(kept, 1000.0 / shown if shown else None)
