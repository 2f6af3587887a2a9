"""How good are clips? Errors against what really follows, and distances to the training clips.

All clips are uint8 [n t h w c], and all errors are root mean squares in grey levels, 0 to 255.
"""

from typing import NamedTuple

import numpy as np

from diffusion_jax.data.motion import motion_bucket, motion_speed
from diffusion_jax.metrics import neighbours


class NextFrames(NamedTuple):
    """Errors of the frames after the first, against the clips that really follow it.

    samples: of the model. copied: of the first frame, held for the whole clip. shuffled: of the
    same samples with their frames after the first in another order. A model that knows nothing of
    motion is no better than copied, one whose motion has no direction no better than shuffled.
    """

    samples: float
    copied: float
    shuffled: float


class Distances(NamedTuple):
    """Mean distances to the nearest training clip: of samples, and of clips of another split.

    A model that repeats its training clips is much nearer than unseen clips are.
    """

    samples: float
    unseen: float


def next_frames(samples: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> NextFrames:
    """Compare samples with the true clips that begin with the same frames."""
    rng = np.random.default_rng(seed)
    copied = np.broadcast_to(truth[:, :1], truth.shape)
    order = np.stack([1 + rng.permutation(truth.shape[1] - 1) for _ in truth])
    shuffled = np.take_along_axis(samples, order[:, :, None, None, None], axis=1)
    later = truth[:, 1:]
    return NextFrames(rms(samples[:, 1:], later), rms(copied[:, 1:], later), rms(shuffled, later))


def frame_errors(samples: np.ndarray, truth: np.ndarray) -> list[float]:
    """List the error of each frame: it should grow along the clip and begin near 0."""
    return [rms(samples[:, t], truth[:, t]) for t in range(truth.shape[1])]


def mean_bucket(clips: np.ndarray, fps: float) -> float:
    """Measure the mean motion bucket of clips, to be compared with the one that was asked for."""
    return float(np.mean([motion_bucket(motion_speed(clip, fps)) for clip in clips]))


def training_distances(samples: np.ndarray, unseen: np.ndarray, training: np.ndarray) -> Distances:
    """Find how near samples, and clips that training never saw, are to training clips."""
    return Distances(*(float(nearest(clips, training)[0].mean()) for clips in (samples, unseen)))


def nearest(clips: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest training clip of each clip -> (distances [n], their places [n])."""
    queries, rows = (x.reshape(len(x), -1).astype(np.float64) for x in (clips, training))
    found = neighbours.nearest(queries, rows)
    return np.sqrt(found.squares / rows.shape[1]), found.places


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference of two arrays of uint8."""
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))
