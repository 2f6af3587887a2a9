"""How good are the clips of a run, and how fast is a step, here and in diffusers?

python benchmarks/video.py --workdir=RUN [--n=64] [--step=500]    # against what really follows
python benchmarks/video.py --peer_python=PYTHON       # speed and memory, see video_speed.py

The run draws clips that begin with the first frames of the test split, with their frame rate and
motion. All clips are uint8 [n t h w c], and all errors are root mean squares in grey levels, 0 to
255. The Frechet video distances of --fvd clips take some minutes on a CPU; --fvd=0 leaves them out.
--gif=FILE.gif shows the first ten clips.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import video_speed

from diffusion_jax.data.motion import motion_bucket, motion_speed
from diffusion_jax.experiment.scoring import make_extractor
from diffusion_jax.metrics.distances import frechet
from diffusion_jax.metrics.neighbours import nearest as nearest_rows
from diffusion_jax.metrics.statistics import moments
from diffusion_jax.models.features import i3d
from diffusion_jax.pipeline import Pipeline
from diffusion_jax.runs.inputs.frames import frame_rate
from diffusion_jax.train.pictures import to_pixels
from diffusion_jax.train.videos import save_clip

# Two black pixels between clips that are shown beside each other.
BORDER = ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0))


class NextFrames(NamedTuple):
    """Errors of the frames after the first, against the clips that really follow it.

    samples: of the model. copied: of the first frame, held for the whole clip. shuffled: of the
    same samples with their frames after the first in another order. A model that knows nothing of
    motion is no better than copied, one whose motion has no direction no better than shuffled.
    """

    samples: float
    copied: float
    shuffled: float


class Neighbours(NamedTuple):
    """Mean distances to the nearest training clip: of samples, and of clips of another split.

    A model that repeats its training clips is much nearer than unseen clips are.
    """

    samples: float
    unseen: float


def next_frames(samples: np.ndarray, truth: np.ndarray, *, seed: int = 0) -> NextFrames:
    """Compare samples with the true clips that begin with the same frames."""
    clips = (samples, copied(truth), shuffled(samples, seed))
    return NextFrames(*(rms(own[:, 1:], truth[:, 1:]) for own in clips))


def copied(truth: np.ndarray) -> np.ndarray:
    """Hold the first frame for the whole clip."""
    return np.broadcast_to(truth[:, :1], truth.shape)


def shuffled(samples: np.ndarray, seed: int = 0) -> np.ndarray:
    """Put the frames after the first in another order, one of its own for each clip."""
    rng = np.random.default_rng(seed)
    order = [[0, *(1 + rng.permutation(samples.shape[1] - 1))] for _ in samples]
    return np.take_along_axis(samples, np.asarray(order, np.int64)[:, :, None, None, None], axis=1)


def video_distances(sets: Mapping[str, np.ndarray], truth: np.ndarray) -> dict[str, float]:
    """Compute the Frechet video distance (FVD) of sets of clips to the true ones.

    I3D needs 9 frames, so every frame of a shorter clip is repeated equally often. Distances of so
    few clips are too large, all about equally: compare them with each other, and with no paper.
    """
    extractor, times = make_extractor(i3d.NAME), -(-i3d.MIN_FRAMES // truth.shape[1])
    features, stream = jax.jit(extractor.features), moments()

    def seen(clips: np.ndarray) -> Any:
        state = stream.init()
        for number, clip in enumerate(clips):
            rgb = np.broadcast_to(clip, (*clip.shape[:-1], 3))
            frames = np.repeat(rgb, times, axis=0)[None].astype(np.float32)
            found = np.asarray(features(extractor.params, frames))
            state = stream.update(state, found, np.asarray([number]))
        return stream.result(state)

    wanted = seen(truth)
    return {name: frechet(seen(clips), wanted) for name, clips in sets.items()}


def frame_errors(samples: np.ndarray, truth: np.ndarray) -> list[float]:
    """List the error of each frame: it should grow along the clip and begin near 0."""
    return [rms(samples[:, t], truth[:, t]) for t in range(truth.shape[1])]


def mean_bucket(clips: np.ndarray, fps: float) -> float:
    """Measure the mean motion bucket of clips, to be compared with the one that was asked for."""
    return float(np.mean([motion_bucket(motion_speed(clip, fps)) for clip in clips]))


def neighbours(samples: np.ndarray, unseen: np.ndarray, training: np.ndarray) -> Neighbours:
    """Find how near samples, and clips that training never saw, are to training clips."""
    return Neighbours(*(float(nearest(clips, training)[0].mean()) for clips in (samples, unseen)))


def nearest(clips: np.ndarray, training: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find the nearest training clip of each clip -> (distances [n], their places [n])."""
    queries, rows = (x.reshape(len(x), -1).astype(np.float64) for x in (clips, training))
    found = nearest_rows(queries, rows)
    return np.sqrt(found.squares / rows.shape[1]), found.places


def above_each_other(truth: np.ndarray, samples: np.ndarray) -> np.ndarray:
    """Lay clips of the test split in a row, samples below the true ones -> uint8 [t h w 3]."""
    rows = [np.concatenate(list(np.pad(c, BORDER)), axis=2) for c in (truth, samples)]
    frames = np.concatenate(rows, axis=1).repeat(3, axis=1).repeat(3, axis=2)
    return np.broadcast_to(frames, (*frames.shape[:-1], 3))


def rms(a: np.ndarray, b: np.ndarray) -> float:
    """Root of the mean squared difference of two arrays of uint8."""
    return float(np.sqrt(np.mean((a.astype(np.float64) - b) ** 2)))


def main(argv: list[str] | None = None) -> Any:
    """Score the clips of a run, or without --workdir compare speeds; returns what was printed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workdir", help="folder of a run")
    parser.add_argument("--n", type=int, default=64, help="clips of the test split")
    parser.add_argument("--step", type=int, help="checkpoint (default: the newest)")
    parser.add_argument("--fvd", type=int, default=32, help="clips for Frechet video distances")
    parser.add_argument("--steps", type=int, help="sampling steps (default: the config's)")
    parser.add_argument("--gif", type=Path, help="write ten true clips above their samples")
    arguments, rest = parser.parse_known_args(argv)
    if arguments.workdir is None:
        return video_speed.main(rest)
    pipe = Pipeline.from_workdir(arguments.workdir, step=arguments.step)
    batch = clips_of(pipe, "test", arguments.n)
    truth = to_pixels(batch.pop("image"))
    conditions = {"image": truth[:, 0], **batch}
    samples = pipe(conditions, num_steps=arguments.steps, batch_size=8)
    fps = frame_rate(pipe.experiment.network, None)
    if arguments.gif is not None:
        save_clip(arguments.gif, above_each_other(truth[:10], samples[:10]), fps=fps)
    training = to_pixels(clips_of(pipe, "train", 8 * arguments.n)["image"])
    found = {
        "next frames": next_frames(samples, truth),
        "errors of each frame": [round(error, 1) for error in frame_errors(samples, truth)],
        "motion bucket": (mean_bucket(samples, fps), mean_bucket(truth, fps)),
        "nearest training clips": neighbours(samples, truth, training),
    }
    if arguments.fvd:
        few, real = samples[: arguments.fvd], truth[: arguments.fvd]
        sets = {"samples": few, "copied": copied(real), "shuffled": shuffled(few)}
        found["Frechet video distances"] = video_distances(sets, real)
    print(f"{len(samples)} clips of {arguments.workdir}")
    for name, value in found.items():
        print(f"  {name}: {value}")
    return found


def clips_of(pipe: Pipeline, role: str, count: int) -> dict[str, np.ndarray]:
    """Read the first clips of a split, float32 in [-1, 1], with their conditions."""
    given = ("image", "fps_id", "motion_bucket_id")
    rows: list[dict[str, np.ndarray]] = []
    for batch in pipe.experiment.eval_batches(role).iterate(0):
        real = batch["weight"] > 0
        rows.append({name: batch[name][real] for name in given if name in batch})
        if sum(len(row["image"]) for row in rows) >= count:
            break
    return {name: np.concatenate([row[name] for row in rows])[:count] for name in rows[0]}


if __name__ == "__main__":
    main(sys.argv[1:])
