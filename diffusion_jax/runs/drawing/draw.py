"""What a Pipeline draws, in device calls of one size, and what is done to it afterwards."""

import functools
import warnings
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from diffusion_jax.data.progress import log_progress
from diffusion_jax.experiment import Experiment
from diffusion_jax.runs.drawing.watched import OnStep, draw_watched
from diffusion_jax.runs.inputs.arrays import Whole, whole_number
from diffusion_jax.runs.inputs.seeds import Seeds
from diffusion_jax.types import PyTree
from diffusion_jax.wording import counted


class NonFiniteWarning(RuntimeWarning):
    """Drawn images hold values that are not finite numbers."""


def rows_of_call(experiment: Experiment, count: int, batch_size: Whole | None) -> int:
    """Return how many of `count` images a device call takes; ValueError for none.

    batch_size: None is 64 images or one video.
    """
    if batch_size is None:
        batch_size = 64 if experiment.network.num_frames is None else 1
    batch_size = whole_number("batch_size", batch_size)
    if batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} should be at least 1")
    return experiment.round_up(min(batch_size, count))


def draw_rows(
    experiment: Experiment,
    params: PyTree,
    frozen: PyTree,
    arrays: Mapping[str, Any],
    count: int,
    seeds: Seeds,
    batch_size: Whole | None,
    on_step: OnStep | None = None,
    **options: Any,
) -> np.ndarray:
    """Sample `count` images in calls of one size, the last one padded -> float32 x.

    arrays: what sample_fn takes by rows, with an image in uint8. seeds: of the images. options:
    what it takes besides.
    """
    if "image" in arrays:
        arrays = {**arrays, "image": arrays["image"].astype(np.float32) / 127.5 - 1.0}
    seeds.check(count, arrays)
    rows_at_once = rows_of_call(experiment, count, batch_size)
    drawn = []
    starts = range(0, count, rows_at_once)
    for start in log_progress(starts, count, "drawing", size=lambda _: rows_at_once):
        rows = np.minimum(np.arange(start, start + rows_at_once), count - 1)
        chosen = jax.tree.map(lambda value, rows=rows: value[rows], dict(arrays))
        draw = functools.partial(
            experiment.sample_fn,
            params,
            frozen,
            keys=seeds.keys(rows),
            **seeds.varied(rows),
            **chosen,
            **options,
        )
        if on_step is None:
            samples = draw()
        else:
            number, rounds = start // rows_at_once, -(-count // rows_at_once)
            samples = draw_watched(draw, on_step, number, rounds)
        drawn.append(jax.device_get(samples.x)[: count - start])
    return np.concatenate(drawn)


def warn_of_non_finite(drawn: np.ndarray) -> None:
    """Warn the caller of the caller when drawn images hold NaN or infinity, and name them."""
    bad = np.flatnonzero(~np.isfinite(drawn).reshape(len(drawn), -1).all(1))
    if bad.size:
        named = ", ".join(map(str, bad[:10])) + (", ..." if bad.size > 10 else "")
        images = f"of {counted(len(drawn), 'image', 'images')}"
        holding = counted(bad.size, f"{images} holds", f"{images} hold")
        message = f"{holding} NaN or infinity: {named}"
        warnings.warn(message, NonFiniteWarning, stacklevel=3)
