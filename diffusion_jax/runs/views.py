"""Videos of a moving object from several sides, drawn window by window as SV4D's scripts do.

Pixels are float32 in [-1, 1]: a video [t h w 3] from the first side, new views [t v h w 3].
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.frames import FRAME, NOISE_LEVEL
from diffusion_jax.models.conditioning.routing import IMAGE_ONLY, MOTION, VIEWS
from diffusion_jax.randomness import sample_keys, seed_key
from diffusion_jax.runs.orbits import Orbit
from diffusion_jax.types import PyTree

# Inputs of the angles of each frame, in radians.
POLAR, AZIMUTH = "polar_rad", "azimuth_rad"
# Views of the scripts in degrees from the given one, by the number of new views.
AZIMUTHS = {4: (0, 60, 120, 180, 240), 8: (0, 30, 75, 120, 165, 210, 255, 300, 330)}
# The views of an orbit of SV3D, the picture's first, that SV4D goes on from.
OF_ORBIT = (2, 5, 7, 9, 12, 14, 16, 19)


# (motion [T h w 3], views [v h w 3], *, known, number, from_end=None) -> [T v h w 3], views of T
# times.
# motion: the given video at these times. views: the new views at the first of them; known says
# whether they are drawn already. number: of this call, for its noise. from_end: the views at the
# last of the times, for steps that go back in time, or None.
Draw = Callable[..., np.ndarray]


def relative_angles(elevations: float | Sequence[float], azimuths: Sequence[float | int]) -> Orbit:
    """Make the angles of new views of degrees; the first of each belongs to the given view.

    Source: generative-models, simple_video_sample_4d2.py.
    Raises ValueError when there are not as many of one as of the other.
    """
    around = np.deg2rad(np.asarray(azimuths, np.float64))
    above = np.broadcast_to(np.asarray(elevations, np.float64), np.shape(elevations) or (1,))
    above = np.repeat(above, len(around)) if len(above) == 1 else above
    if len(above) != len(around):
        raise ValueError(f"there are {len(above)} elevations and {len(around)} azimuths")
    polars, turn = np.deg2rad(90.0 - above), 2.0 * np.pi
    angles = ((polars - polars[0] + np.pi / 2) % turn, (around - around[0]) % turn)
    return Orbit(*(angle[1:].astype(np.float32) for angle in angles))


def by_windows(
    draw: Draw, video: np.ndarray, times: int, num_views: int, *, overlap: int = 0
) -> np.ndarray:
    """Draw windows of `times` frames one after the other: SV4D 2.

    The first knows no new view; each other one begins with views that are drawn already. overlap:
    how many times neighbours share; 0 shares only what the last window, moved to fit, has to.
    Raises ValueError for a video that is shorter than a window.
    """
    _check_length(video, times)
    drawn: list[np.ndarray] = [np.zeros((num_views, *video.shape[1:]), np.float32)] * len(video)
    starts = range(0, len(video) - overlap, times - overlap)
    for number, start in enumerate(starts):
        first = min(start, len(video) - times)
        known = first != 0
        window = draw(video[first : first + times], drawn[first], known=known, number=number)
        drawn[first : first + times] = list(window)
    return np.stack(drawn)


def by_anchors(draw: Draw, video: np.ndarray, times: int, first_views: np.ndarray) -> np.ndarray:
    """Draw every (times - 1)-th frame first, then what lies between from both ends: SV4D.

    first_views: [v h w 3], the new views at the first frame, from SV3D.
    Raises ValueError unless the video has 1 + times (times - 1) frames, 21 for times = 5.
    """
    wanted = 1 + times * (times - 1)
    if len(video) != wanted:
        raise ValueError(f"the video has {len(video)} frames; it should have {wanted}")
    anchors = np.arange(times - 1, len(video), times - 1)
    drawn: list[np.ndarray] = [first_views] * len(video)
    for time, views in zip(anchors, draw(video[anchors], first_views, known=True, number=0),
                           strict=True):  # fmt: skip
        drawn[time] = views
    for number, start in enumerate(range(0, len(video) - 1, times - 1), 1):
        end = start + times
        ends = {"known": True, "number": number, "from_end": drawn[end - 1]}
        drawn[start:end] = list(draw(video[start:end], drawn[start], **ends))
    return np.stack(drawn)


def views_of_orbit(orbit: np.ndarray) -> np.ndarray:
    """Take SV4D's first views [8 h w 3] out of an orbit [21 h w 3], whose last is the picture."""
    if len(orbit) != 21:
        raise ValueError(f"the orbit has {len(orbit)} frames; it should have 21")
    return np.roll(orbit, 1, axis=0)[list(OF_ORBIT)]


def drawer(
    experiment: Experiment,
    params: PyTree,
    frozen: PyTree,
    times: int,
    angles: Orbit,
    *,
    seed: int = 0,
    **options: Any,
) -> Draw:
    """Make the Draw of a loaded model of several views; options go to its sample_fn."""
    num_views = len(angles.polars)
    frames = times * num_views
    rows = {
        POLAR: np.tile(angles.polars, times)[None, :, None],
        AZIMUTH: np.tile(angles.azimuths, times)[None, :, None],
        NOISE_LEVEL: np.zeros((1, 1), np.float32),
    }

    def inputs(motion: np.ndarray, views: np.ndarray, known: bool) -> dict[str, np.ndarray]:
        own = {FRAME: motion[None], MOTION: motion[None], VIEWS: views[None]}
        return {**rows, **own, IMAGE_ONLY: np.full((1, frames), float(known), np.float32)}

    def draw(
        motion: np.ndarray,
        views: np.ndarray,
        *,
        known: bool,
        number: int,
        from_end: np.ndarray | None = None,
    ) -> np.ndarray:
        back = None if from_end is None else inputs(motion[::-1], from_end, known)
        found = experiment.sample_fn(
            params,
            frozen,
            inputs(motion, views, known),
            sample_keys(seed_key(seed), jnp.asarray([number])),
            size=motion.shape[1:3],
            num_frames=frames,
            backward=back,
            **options,
        )
        pixels = np.clip(np.asarray(found.x)[0], -1.0, 1.0)
        return pixels.reshape(times, num_views, *motion.shape[1:])

    if experiment.network.num_frames != frames:
        raise ValueError(
            f"{num_views} views of {times} times are {frames} frames; this model draws "
            f"{experiment.network.num_frames}"
        )
    return draw


def _check_length(video: np.ndarray, times: int) -> None:
    if len(video) < times:
        raise ValueError(f"the video has {len(video)} frames; it should have at least {times}")
