"""Videos of a moving object from several sides, drawn window by window as SV4D's scripts do.

Pixels are float32 in [-1, 1]: a video [t h w 3] from the first side, new views [t v h w 3].
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.experiment.network.cameras import VIEW_AZIMUTHS, VIEW_POLARS, Orbit, view_angles
from diffusion_jax.experiment.network.frames import FRAME, NOISE_LEVEL
from diffusion_jax.experiment.network.network import Network
from diffusion_jax.models.conditioning.routing import IMAGE_ONLY, MOTION, VIEWS
from diffusion_jax.randomness import sample_keys, seed_key
from diffusion_jax.runs.inputs.frames import as_frames, covering
from diffusion_jax.runs.inputs.orbits import objects_on_white, orbit
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted

# What a user gives: the video, for SV4D an orbit of SV3D around its first frame, and degrees.
VIDEO, ORBIT = "video", "orbit"
GIVEN = (VIDEO, ORBIT, "elevations", "azimuths")
# Frames of the videos and of the orbits in the scripts.
NUM_FRAMES = 21
# Views of the scripts in degrees from the given one, by the number of new views.
AZIMUTHS = {4: (0, 60, 120, 180, 240), 8: (0, 30, 75, 120, 165, 210, 255, 300, 330)}


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
    around = np.asarray(azimuths, np.float64)
    above = np.broadcast_to(np.asarray(elevations, np.float64), np.shape(elevations) or (1,))
    above = np.repeat(above, len(around)) if len(above) == 1 else above
    if len(above) != len(around):
        raise ValueError(f"there are {len(above)} elevations and {len(around)} azimuths")
    for name, angles in (("elevations", elevations), ("azimuths", azimuths)):
        if not np.all(np.isfinite(angles)):
            raise ValueError(f"{name} = {angles!r} should be finite numbers")
    return view_angles(above, around, absolute=False)


def by_windows(draw: Draw, video: np.ndarray, times: int, num_views: int) -> np.ndarray:
    """Draw windows of `times` frames one after the other: SV4D 2.

    The first knows no new view; each other one begins with the views at the last time of the one
    before it. The last one is moved to end with the video.
    Raises ValueError for a video that is shorter than a window.
    """
    _check_length(video, times)
    drawn: list[np.ndarray] = [np.zeros((num_views, *video.shape[1:]), np.float32)] * len(video)
    for number, start in enumerate(range(0, max(1, len(video) - 1), max(1, times - 1))):
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
    _check_anchors(video, times)
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


def views_of_orbit(orbit: np.ndarray, num_views: int = 8) -> np.ndarray:
    """Take SV4D's first views [v ...] out of an orbit [21 ...], whose last is the picture.

    They lie evenly on the orbit, as far as it has frames there.
    """
    if len(orbit) != NUM_FRAMES:
        raise ValueError(f"the orbit has {len(orbit)} frames; it should have {NUM_FRAMES}")
    return orbit[np.rint(np.linspace(0, NUM_FRAMES, num_views + 2)[1:-1]).astype(int) - 1]


def used_frames(network: Network, num_frames: int | None = None) -> int:
    """Tell how many frames are used of a video, at most; num_frames is what a user asks for.

    Raises ValueError where the model draws another number.
    """
    if network.first_views == "drawn":
        return NUM_FRAMES if num_frames is None else num_frames
    wanted = _length_with_anchors(_times(network))
    if num_frames not in (None, wanted):
        raise ValueError(f"num_frames = {num_frames} should be {wanted} for this model")
    return wanted


def prepared_video(
    network: Network, frames: Sequence[Any] | np.ndarray, size: tuple[int, int]
) -> np.ndarray:
    """Put the object of all frames on white, as large as training had it: uint8 [t *size 3].

    Raises ValueError for fewer frames than the model needs, of several sizes or without an object.
    """
    check = _check_length if network.first_views == "drawn" else _check_anchors
    check(frames, _times(network))
    share = 1.0 if network.object_share is None else network.object_share
    return objects_on_white(frames, size, share)


def draw_views(
    experiment: Experiment,
    params: PyTree,
    frozen: PyTree,
    conditions: Any,
    *,
    size: tuple[int, int],
    num_frames: int | None = None,
    **options: Any,
) -> np.ndarray:
    """Draw a video from all other sides: [v t h w 3], a clip for each new view.

    conditions: the video, PIL images or an array [t h w c] of uint8, with an opacity or without;
      or a dict with it as "video". Beside it the dict may have "elevations" and "azimuths" in
      degrees: of the given view and all new ones, or, for a model whose first_views is "orbit", of
      the frames of the "orbit" [21 h w 3] of SV3D, which that model needs.
    size: (height, width) in pixels. num_frames: see used_frames. options: of `drawer`.
    Raises ValueError for what is missing, left over or has another length.
    """
    network = experiment.network
    given = dict(conditions) if isinstance(conditions, Mapping) else {VIDEO: conditions}
    takes_orbit = network.first_views == "orbit"
    known = [name for name in GIVEN if takes_orbit or name != ORBIT]
    for name in given:
        if name not in known:
            raise ValueError(f"conditions[{name!r}] is no input; choose from {', '.join(known)}")
    for name in (VIDEO, ORBIT) if takes_orbit else (VIDEO,):
        if name not in given or given[name] is None:
            raise ValueError(f"this model makes views of a video: it needs conditions[{name!r}]")
    count, times = used_frames(network, num_frames), _times(network)
    num_views = _views(network)
    video = prepared_video(network, given[VIDEO][:count], size).astype(np.float32) / 127.5 - 1.0
    angles = {name: given[name] for name in GIVEN[2:] if name in given}
    if takes_orbit:
        pictures = as_frames(given[ORBIT], size, 3, covering)
        around = orbit(NUM_FRAMES, **angles)
        angles = Orbit(*(views_of_orbit(own, num_views) for own in around))
        draw = drawer(experiment, params, frozen, times, angles, **options)
        drawn = by_anchors(draw, video, times, views_of_orbit(pictures, num_views))
    else:
        default = {"elevations": 0.0, "azimuths": _default_azimuths(num_views)}
        angles = relative_angles(**default | angles)
        draw = drawer(experiment, params, frozen, times, angles, **options)
        drawn = by_windows(draw, video, times, num_views)
    return np.moveaxis(drawn, 1, 0)


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
        VIEW_POLARS: np.tile(angles.polars, times)[None, :, None],
        VIEW_AZIMUTHS: np.tile(angles.azimuths, times)[None, :, None],
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
        new = _views(experiment.network)
        raise ValueError(
            f"azimuths has {counted(num_views + 1, 'angle', 'angles')}; it should have {new + 1}, "
            f"the given view's and then {new} new ones"
        )
    return draw


def _views(network: Network) -> int:
    assert network.num_views is not None
    return network.num_views


def _times(network: Network) -> int:
    assert network.num_frames is not None
    return network.num_frames // _views(network)


def _length_with_anchors(times: int) -> int:
    return 1 + times * (times - 1)


def _default_azimuths(num_views: int) -> tuple[float, ...]:
    if num_views in AZIMUTHS:
        return AZIMUTHS[num_views]
    return tuple(360.0 * view / (num_views + 1) for view in range(num_views + 1))


def _check_length(video: Sequence[Any] | np.ndarray, times: int) -> None:
    if len(video) < times:
        raise ValueError(f"{_has_frames(video)}; it should have at least {times}")


def _check_anchors(video: Sequence[Any] | np.ndarray, times: int) -> None:
    wanted = _length_with_anchors(times)
    if len(video) != wanted:
        raise ValueError(f"{_has_frames(video)}; it should have {wanted}")


def _has_frames(video: Sequence[Any] | np.ndarray) -> str:
    return f"the video has {counted(len(video), 'frame', 'frames')}"


def check_unset(options: Mapping[str, Any], is_whole: bool) -> None:
    """Raise ValueError for options that a model of several views does not have."""
    for name in (name for name, value in options.items() if value is not None):
        raise ValueError(f"{name} does not fit: this model draws views of a video")
    if not is_whole:
        raise ValueError("this model draws views of a video with all steps, as pixels")
