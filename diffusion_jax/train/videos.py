"""Write clips for people: MP4, GIF, contact sheets and single frames, by the name of the file."""

import importlib
import importlib.util
import math
import pathlib
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.data.whole_files import whole_file
from diffusion_jax.train.pictures import image_grid, save_png

# GIF counts in hundredths of a second, and browsers slow down what is faster than two of them.
_GIF_UNIT, _GIF_LEAST = 100, 2


def save_clip(path: pathlib.Path, clip: np.ndarray, *, fps: float) -> pathlib.Path:
    """Write a clip in the format that its name says, as a whole or not at all, and return its path.

    Args:
        path: .mp4 (H.264; needs PyAV), .gif, .png for a contact sheet that is read row by row, or
            without an ending a folder of frames 00000.png, 00001.png, ...
        clip: uint8 [t h w c], c 1 or 3.
        fps: frames per second, which .png and folders do not need.

    Raises:
        ValueError: another ending, another shape or type, or fps that is not above 0.
        ModuleNotFoundError: .mp4 without PyAV.
    """
    if path.suffix not in WRITERS:
        known = ", ".join(suffix or "no ending" for suffix in WRITERS)
        raise ValueError(f"{path} ends in {path.suffix!r}; choose from {known}")
    if clip.ndim != 4 or clip.shape[-1] not in (1, 3) or 0 in clip.shape or clip.dtype != np.uint8:
        raise ValueError(
            f"a clip of {clip.dtype} and shape {clip.shape} should be uint8 [t, h, w, 1 or 3]"
        )
    if not 0 < fps < math.inf:
        raise ValueError(f"fps = {fps} should be above 0")
    path.parent.mkdir(parents=True, exist_ok=True)
    WRITERS[path.suffix](path, clip, fps)
    return path


def _save_mp4(path: pathlib.Path, clip: np.ndarray, fps: float) -> None:
    """Write H.264 with 4:2:0 colours, which every player shows, and repeat an odd last row."""
    if importlib.util.find_spec("av") is None:
        raise ModuleNotFoundError(
            f"writing {path.name} needs av: pip install av; .gif and .png do not need it"
        )
    av: Any = importlib.import_module("av")
    _, height, width, _ = clip.shape
    clip = np.pad(clip, ((0, 0), (0, height % 2), (0, width % 2), (0, 0)), mode="edge")
    with whole_file(path) as partial, av.open(str(partial), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = clip.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
        for pixels in clip:
            rgb = np.broadcast_to(pixels, (*pixels.shape[:2], 3))
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def _save_gif(path: pathlib.Path, clip: np.ndarray, fps: float) -> None:
    """Write an endless GIF in which each frame has 256 colours of its own."""
    ends = [max(round(_GIF_UNIT * k / fps), _GIF_LEAST * k) for k in range(len(clip) + 1)]
    pictures = [Image.fromarray(f[..., 0] if f.shape[-1] == 1 else f).quantize() for f in clip]
    with whole_file(path) as partial:
        pictures[0].save(
            partial,
            "gif",
            save_all=True,
            append_images=pictures[1:],
            duration=[1000 // _GIF_UNIT * int(d) for d in np.diff(ends)],
            loop=0,
        )


def _save_sheet(path: pathlib.Path, clip: np.ndarray, fps: float) -> None:
    del fps
    save_png(path, image_grid(clip, columns=math.ceil(math.sqrt(len(clip)))))


def _save_frames(path: pathlib.Path, clip: np.ndarray, fps: float) -> None:
    del fps
    path.mkdir(exist_ok=True)
    for number, frame in enumerate(clip):
        save_png(path / f"{number:05d}.png", frame)


# Ending -> writer of (path, uint8 [t h w c], frames per second).
WRITERS: dict[str, Callable[[pathlib.Path, np.ndarray, float], None]] = {
    ".mp4": _save_mp4,
    ".gif": _save_gif,
    ".png": _save_sheet,
    "": _save_frames,
}
