"""Where cameras are: from degrees of each frame to the angles and views that embedders read."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import numpy as np

from diffusion_jax.data.sources.cameras import AZIMUTHS, ELEVATIONS
from diffusion_jax.data.views import GIVEN_VIEW
from diffusion_jax.experiment.network.frames import FRAME
from diffusion_jax.models.conditioning.routing import IMAGE_ONLY, MOTION, VIEWS

# Inputs of the angles in radians: of SV3D, whose frames are an orbit, and of SV4D, whose frames
# show several views of each time.
ORBIT_POLARS, ORBIT_AZIMUTHS = "polars_rad", "azimuths_rad"
VIEW_POLARS, VIEW_AZIMUTHS = "polar_rad", "azimuth_rad"


class Orbit(NamedTuple):
    """Where the camera is in each frame, float32 radians [..., n].

    polars: from the upright axis down to the camera. azimuths: around that axis, from the camera of
    the picture or video that is given.
    """

    polars: np.ndarray
    azimuths: np.ndarray


def orbit_angles(elevations: Any, azimuths: Any) -> Orbit:
    """Make SV3D's angles of degrees [..., t]; the last frame is the picture that is given.

    Source: generative-models, simple_video_sample.py.
    """
    above, around = np.asarray(elevations, np.float64), np.asarray(azimuths, np.float64)
    return _radians(90.0 - above, around - around[..., -1:])


def view_angles(elevations: Any, azimuths: Any, *, absolute: bool) -> Orbit:
    """Make SV4D's angles of degrees [..., 1 + v]; the first view is the one that is given.

    The result has the v others. absolute: whether polars count from the upright axis, as SV4D has
    them, or, as SV4D 2 does, from the given view, whose own polar is then pi / 2.
    Source: generative-models, simple_video_sample_4d.py and simple_video_sample_4d2.py.
    """
    above, around = np.asarray(elevations, np.float64), np.asarray(azimuths, np.float64)
    below = 90.0 - above if absolute else (above[..., :1] - above + 90.0) % 360.0
    return _radians(below[..., 1:], (around - around[..., :1])[..., 1:])


def _radians(polars: np.ndarray, azimuths: np.ndarray) -> Orbit:
    angles = (np.deg2rad(polars), np.deg2rad(azimuths % 360.0))
    return Orbit(*(angle.astype(np.float32) for angle in angles))


def degrees_read(read: Collection[str]) -> tuple[str, ...]:
    """Name the numbers of frames that the data need, where embedders read angles of cameras."""
    angles = {ORBIT_POLARS, ORBIT_AZIMUTHS, VIEW_POLARS, VIEW_AZIMUTHS}
    return (ELEVATIONS, AZIMUTHS) if angles.intersection(read) else ()


def with_cameras(
    batch: Mapping[str, Any], num_views: int | None, *, absolute: bool
) -> dict[str, Any]:
    """Add to a host batch the angles of its frames, and what a network sees of the given view.

    Of several views, "image" has num_views of each time; what is given are the first view at all
    times and the others at the first time, which are known: IMAGE_ONLY is 1. absolute: see
    view_angles. What the batch has already stays, and what it lacks makes nothing.
    """
    made: dict[str, Any] = {}
    if ELEVATIONS in batch and AZIMUTHS in batch:
        above, around = batch[ELEVATIONS][..., 0], batch[AZIMUTHS][..., 0]
        made = _angles(above, around, num_views, absolute)
    if num_views is not None and GIVEN_VIEW in batch:
        given, others = batch[GIVEN_VIEW], batch["image"]
        made |= {FRAME: given, MOTION: given, VIEWS: others[:, :num_views]}
        made[IMAGE_ONLY] = np.ones(others.shape[:2], np.float32)
    return {**made, **batch}


def _angles(
    elevations: np.ndarray, azimuths: np.ndarray, num_views: int | None, absolute: bool
) -> dict[str, Any]:
    if num_views is None:
        names, found = (ORBIT_POLARS, ORBIT_AZIMUTHS), orbit_angles(elevations, azimuths)
    else:
        by_time = (len(azimuths), -1, 1 + num_views)
        names = (VIEW_POLARS, VIEW_AZIMUTHS)
        found = view_angles(
            elevations.reshape(by_time), azimuths.reshape(by_time), absolute=absolute
        )
    rows = (angle.reshape(len(azimuths), -1, 1) for angle in found)
    return dict(zip(names, rows, strict=True))
