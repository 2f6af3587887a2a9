"""Read a video that a user names: a file, an animated picture, or a folder of frames."""

import itertools
import os
import pathlib
from typing import NamedTuple

from PIL import Image, ImageSequence

from diffusion_jax.data.sources.folder_scan import SUFFIXES
from diffusion_jax.data.sources.video_files import CorruptVideoError, open_video
from diffusion_jax.data.transforms import CorruptImageError, upright
from diffusion_jax.runs.inputs import read_animation, read_picture

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
    pictures are frames in the order of their names. flag goes before the path in messages.
    Raises FileNotFoundError for what does not exist, ValueError for what is no video.
    """
    path = pathlib.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{flag}{path} does not exist")
    if path.is_dir():
        names = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES)
        if not names:
            raise ValueError(f"{flag}{path} holds no pictures")
        return Clip([read_picture(name, flag=flag) for name in names[:count]], None)
    if path.suffix.lower() in _ANIMATED:
        return _read_animated(path, count, flag)
    try:
        with open_video(path) as video:
            return Clip(list(itertools.islice(video.frames, count)), video.fps)
    except CorruptVideoError as error:
        raise ValueError(f"{flag}{path} is no video: {error}") from error


def _read_animated(path: pathlib.Path, count: int, flag: str) -> Clip:
    picture = read_animation(path, flag=flag)
    frames = itertools.islice(ImageSequence.Iterator(picture), count)
    try:
        kept = [upright(frame).convert("RGBA") for frame in frames]
    except CorruptImageError as error:
        raise ValueError(f"{flag}{path} is {error}") from error
    shown = picture.info["duration"] if "duration" in picture.info else 0
    return Clip(kept, 1000.0 / shown if shown else None)
