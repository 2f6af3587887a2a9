"""What a caller gives to a model of videos: the picture that a clip starts from, and numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from PIL import Image

from diffusion_jax.data import transforms
from diffusion_jax.experiment.network.cameras import ORBIT_AZIMUTHS, ORBIT_POLARS
from diffusion_jax.experiment.network.frames import FRAME
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.runs.inputs.arrays import number, whole_number
from diffusion_jax.runs.inputs.conditions import FRAME_NAME, input_name
from diffusion_jax.runs.inputs.orbits import object_on_white, orbit
from diffusion_jax.train.pictures import to_pixels

# Argument of a call -> the input that embedders read, SVD's names for them.
NUMBERS = {"fps": "fps_id", "motion_bucket_id": "motion_bucket_id", "cond_aug": "cond_aug"}

# Of models that read none, as SVD's script has it.
DEFAULT_FPS_ID = (6,)


def clip_conditions(
    network: Network,
    conditions: Any,
    shape: tuple[int, ...],
    numbers: Mapping[str, Any],
) -> Mapping[str, Any]:
    """Make the dict by input that encode_conditions takes for videos.

    conditions: one picture or several, or a dict by input with them as "image". A picture is a PIL
    image or an array [h, w] or [h, w, c] of uint8, with an opacity or without, of any size: see
    ConditioningOptions.frame_fit. For a model with the camera's angles as inputs, the dict may also
    have "elevations" and "azimuths" in degrees, see orbits.orbit.
    shape: (t, h, w, c) of the clip in pixels. numbers: keys of NUMBERS -> number or None.
    Raises ValueError for what is no picture, and for a number that is no input of the model.
    """
    num_frames, height, width, channels = shape
    given = dict(conditions) if isinstance(conditions, Mapping) else {FRAME_NAME: conditions}
    known = {input_name(embedder) for embedder in network.embedders.values()}
    if FRAME_NAME in known:
        if FRAME_NAME not in given or given[FRAME_NAME] is None:
            raise ValueError("this model makes videos of a picture: give one, or one for each")
        fit = _FITS[network.frame_fit]
        given[FRAME_NAME] = as_frames(given[FRAME_NAME], (height, width), channels, fit)
    if ORBIT_POLARS in known:
        degrees = {name: given.pop(name) for name in ("elevations", "azimuths") if name in given}
        angles = orbit(num_frames, **degrees)
        polars, azimuths = angles.polars[:, None], angles.azimuths[:, None]
        given = {ORBIT_POLARS: polars, ORBIT_AZIMUTHS: azimuths} | given
    for argument, value in numbers.items():
        if value is None:
            continue
        if NUMBERS[argument] not in known:
            raise ValueError(f"{argument} = {value!r} does not fit: this model does not read it")
        given[NUMBERS[argument]] = number(argument, value)
    return {name: value for name, value in given.items() if value is not None}


def frame_rate(network: Network, fps: Any) -> float:
    """Find the frames per second that a clip is shown with, of fps as a call of Pipeline has it."""
    defaults = {e.input_key: e.default for e in network.embedders.values() if e.default is not None}
    default = defaults.get(NUMBERS["fps"], DEFAULT_FPS_ID)
    return 1.0 + (float(np.ravel(default)[0]) if fps is None else number("fps", fps))


def check_frames(network: Network, num_frames: Any) -> int | None:
    """Return the number of frames of a clip, the config's when None; None for a model of images."""
    if num_frames is None:
        return network.num_frames
    count = whole_number("num_frames", num_frames)
    if network.num_frames is None:
        raise ValueError(f"num_frames = {count} does not fit: this model draws images")
    if count < 1:
        raise ValueError(f"num_frames = {count} should be at least 1")
    return count


def with_picture(network: Network, clips: np.ndarray, frames: Mapping[str, Any]) -> np.ndarray:
    """Put the picture in the place of the last frame of uint8 clips, where frame_fit says so."""
    if network.frame_fit != "object" or FRAME not in frames:
        return clips
    return np.concatenate([clips[:, :-1], to_pixels(frames[FRAME])[:, None]], axis=1)


def as_frames(
    pictures: Any,
    size: tuple[int, int],
    channels: int,
    fit: Callable[..., np.ndarray],
) -> np.ndarray:
    """Make float32 [n, *size, channels] in [-1, 1] of one picture or several.

    fit: a row of the table of ConditioningOptions.frame_fit.
    """
    is_array = isinstance(pictures, np.ndarray)
    is_one = isinstance(pictures, Image.Image) or (is_array and np.ndim(pictures) < 4)
    several: Any = [pictures] if is_one else pictures
    frames = [fit(picture, size, channels) for picture in several]
    if not frames:
        raise ValueError("the list of pictures is empty")
    return np.stack(frames).astype(np.float32) / 127.5 - 1.0


def covering(picture: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    """Cut the middle out of a picture, as large as it has one of these proportions."""
    pixels = _decoded(picture, channels)
    options: Any = {"image_size": size, "crop": "center", "resize": "bicubic", "pad": 0}
    return transforms.fit(pixels, **options).pixels


def _on_white(picture: Any, size: tuple[int, int], channels: int) -> np.ndarray:
    _decoded(picture, channels)  # raises for what is no picture
    return _decoded(object_on_white(picture, size), channels)


def _decoded(picture: Any, channels: int) -> np.ndarray:
    is_image = isinstance(picture, Image.Image)
    try:
        return transforms.decode(picture if is_image else np.asarray(picture), channels)
    except (transforms.CorruptImageError, TypeError) as error:
        raise ValueError(f"the picture is no image: {error}") from error


# ConditioningOptions.frame_fit -> (picture, (h, w), channels) -> uint8 [h w channels]
_FITS = {"cover": covering, "object": _on_white}
