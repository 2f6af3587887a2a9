"""A camera that circles an object: its angles, and the object alone on white."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.data.transforms import RESIZE_FILTERS, upright
from diffusion_jax.experiment.network.cameras import Orbit, orbit_angles

# The mean of the colours of a pixel above which it is background, where frames have no opacity.
_WHITE = 250


def orbit(
    num_frames: int,
    elevations: float | Sequence[float] = 10.0,
    azimuths: Sequence[float] | None = None,
) -> Orbit:
    """Make the angles of SV3D of degrees, which count from the last frame.

    elevations: above the horizon, one or one for each frame. azimuths: one for each frame; by
      default they go once around, evenly. All but the last are sorted.
    Raises ValueError for another number of angles and for angles that are not finite.
    Source: generative-models, simple_video_sample.py.
    """
    if azimuths is None:
        azimuths = np.linspace(0.0, 360.0, num_frames + 1)[1:].tolist()
    around = _angles("azimuths", azimuths, num_frames)
    angles = orbit_angles(_angles("elevations", elevations, num_frames), around)
    angles.azimuths[:-1].sort()
    return angles


def object_on_white(
    picture: Image.Image | np.ndarray, size: tuple[int, int], share: float | None = None
) -> np.ndarray:
    """Centre what is opaque in a picture on a white square: uint8 [*size, 3].

    picture: with an opacity; without one, or where all is opaque, the whole picture counts as the
      object. share: how much of the square's side the object takes, in (0, 1]; None keeps it as
      large as it is in a picture of that width, if it fits.
    Source: generative-models, simple_video_sample.py, image_frame_ratio (which stops where the
    object is higher than the picture is wide).
    """
    if share is not None and not 0.0 < share <= 1.0:
        raise ValueError(f"share = {share!r} should be above 0 and at most 1")
    rgba = _rgba(picture)
    rows, columns = (np.flatnonzero(rgba[..., 3].any(axis)) for axis in (1, 0))
    if not rows.size:
        raise ValueError("the picture is wholly transparent: it shows no object")
    part = rgba[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    largest = max(part.shape[:2])
    side = max(rgba.shape[1], largest) if share is None else int(largest / share)
    return _on_white(part, side, size)


def objects_on_white(
    pictures: Sequence[Image.Image | np.ndarray] | np.ndarray, size: tuple[int, int], share: float
) -> np.ndarray:
    """Cut the same square out of all frames of a video, on white: uint8 [t *size 3].

    The square has the pictures' middle and is as small as all objects of the video allow; share
    says how much of its side they take, in (0, 1].
    pictures: of one size. What is not transparent is the object; without an opacity, what is
      darker than white.
    Source: generative-models, sv4d_helpers.py, preprocess_video.
    """
    frames = [_rgba(picture) for picture in pictures]
    height, width = frames[0].shape[:2]
    for number, frame in enumerate(frames):
        if frame.shape[:2] != (height, width):
            raise ValueError(
                f"frame {number} of the video has {frame.shape[1]} x {frame.shape[0]} pixels; it "
                f"should have {width} x {height}, as the first one has"
            )
    masks = [_shows_object(frame) for frame in frames]
    rows, columns = (np.flatnonzero(np.any(masks, axis=(0, axis))) for axis in (2, 1))
    if not rows.size:
        raise ValueError("the video is wholly white or transparent: it shows no object")
    middle = (height // 2, width // 2)
    ends = ((rows[0], rows[-1] + 1), (columns[0], columns[-1] + 1))
    half = max(abs(int(end) - own) for own, both in zip(middle, ends, strict=True) for end in both)
    top, left = (max(0, own - half) for own in middle)
    parts = [frame[top : middle[0] + half, left : middle[1] + half] for frame in frames]
    return np.stack([_on_white(part, int(2 * half / share), size) for part in parts])


def _shows_object(rgba: np.ndarray) -> np.ndarray:
    if rgba[..., 3].min() < 255:
        return rgba[..., 3] > 0
    return rgba[..., :3].mean(-1) <= _WHITE


def _on_white(part: np.ndarray, side: int, size: tuple[int, int]) -> np.ndarray:
    """Put the pixels [h w 4] of an object in the middle of a white square: uint8 [*size 3]."""
    height, width = part.shape[:2]
    square = np.zeros((side, side, 4), np.uint8)
    top, left = side // 2 - height // 2, side // 2 - width // 2
    top, left = min(top, side - height), min(left, side - width)
    square[top : top + height, left : left + width] = part
    resized = Image.fromarray(square).resize((size[1], size[0]), RESIZE_FILTERS["lanczos"])
    colours = np.asarray(resized).astype(np.float32) / 255.0
    alpha = colours[..., 3:]
    return np.rint(255.0 * (colours[..., :3] * alpha + 1.0 - alpha)).astype(np.uint8)


def _rgba(picture: Image.Image | np.ndarray) -> np.ndarray:
    """Read a picture upright, of 8 or 16 bits: uint8 [h w 4]."""
    return np.asarray(upright(picture).convert("RGBA"))


def _angles(name: str, degrees: Any, num_frames: int) -> np.ndarray:
    values = np.asarray(degrees, np.float64)
    if values.ndim == 0:
        values = np.full(num_frames, values)
    if values.shape != (num_frames,):
        raise ValueError(f"{name} has {values.size} angles; it should have {num_frames}")
    if not np.all(np.isfinite(values)):
        raise ValueError(f"{name} = {degrees!r} should be finite numbers")
    return values
