"""Images that a caller gives -> what a model denoises, and back."""

from typing import Any

import jax
import numpy as np

from diffusion_jax.experiment import Experiment
from diffusion_jax.experiment.network.coding import Code
from diffusion_jax.runs.drawing.draw import rows_of_call
from diffusion_jax.runs.inputs.arrays import Whole, as_floats, as_rows
from diffusion_jax.train.pictures import to_pixels
from diffusion_jax.types import PyTree


def encode_images(
    experiment: Experiment, frozen: PyTree, images: Any, batch_size: Whole | None
) -> np.ndarray:
    """Encode images; see Pipeline.encode."""
    stage = experiment.network.first_stage
    rows = as_rows("images", images, None, ("H", "W", experiment.data.image_shape[-1]))
    factor = 1 if stage is None else stage.factor
    height, width = rows.shape[1:3]
    if height % factor or width % factor:
        raise ValueError(
            f"images are {height} x {width} pixels; both sides should be multiples of {factor}"
        )
    pixels = rows.astype(np.float32) / 127.5 - 1.0
    return _in_calls(experiment, experiment.drawing.coders.encode, frozen, pixels, batch_size)


def decode_latents(
    experiment: Experiment, frozen: PyTree, latents: Any, batch_size: Whole | None
) -> np.ndarray:
    """Decode what the network denoises; see Pipeline.decode."""
    channels, shape = experiment.network.image_shape[-1], np.shape(latents)
    if len(shape) != 4 or shape[-1] != channels or 0 in shape:
        raise ValueError(f"latents has shape {shape}; it should be (B, h, w, {channels})")
    rows = as_floats("latents", latents, shape)
    decode = experiment.drawing.coders.decode
    return to_pixels(_in_calls(experiment, decode, frozen, rows, batch_size))


def _in_calls(
    experiment: Experiment, code: Code, frozen: PyTree, rows: np.ndarray, batch_size: Whole | None
) -> np.ndarray:
    """Call with rows of one number, the last ones padded -> float32."""
    rows_at_once = rows_of_call(experiment, len(rows), batch_size)
    done = []
    for start in range(0, len(rows), rows_at_once):
        numbers = np.minimum(np.arange(start, start + rows_at_once), len(rows) - 1)
        done.append(jax.device_get(code(frozen, rows[numbers]))[: len(rows) - start])
    return np.concatenate(done)
