"""The shape of a clip, and the frame that conditions it."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.diffusion.ddpm import expand
from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.models.conditioning.routing import VIEWS
from diffusion_jax.randomness import SamplerStream, fold_in_all, noise_like
from diffusion_jax.types import Batch, Keys

# See types.Predict; a third argument is the row of a step.
Predict = Callable[..., Array]

# What embedders read of the conditioning frame: the frame, the frame with noise, and the standard
# deviation of that noise. generative-models has the same names.
FRAME, NOISED_FRAME, NOISE_LEVEL = "cond_frames_without_noise", "cond_frames", "cond_aug"
FRAME_INPUTS = (FRAME, NOISED_FRAME, NOISE_LEVEL)


def with_frames(num_frames: int | None, image_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a clip of so many images; None is the shape of one image."""
    return image_shape if num_frames is None else (num_frames, *image_shape)


def check_lengths(embedders: Mapping[str, Embedder], num_frames: int) -> None:
    """Raise ConfigError for an embedder of clips of another length than the data's.

    Of several views, a clip has as many frames as times and views together.
    """
    length = f"config.data.batches.num_frames = {num_frames}"
    views = next((e.frames for e in embedders.values() if e.input_key == VIEWS), None)
    for name, e in embedders.items():
        path = f"config.conditioning.embedders.{name}.frames"
        has_rows = e.is_numbers and e.entry == "vector" and len(e.shape) == 2
        if has_rows and not e.is_of_frames(num_frames):
            raise ConfigError(
                f"{path} = {e.shape[0]} should be {length}: it reads numbers of each frame"
            )
        if views is None or e.frames is None or e.input_key == VIEWS:
            continue
        if e.frames * views != num_frames:
            raise ConfigError(
                f"{length} should be {e.frames * views}, because {path} = {e.frames} times are "
                f"seen from {views} views"
            )


def alternating(forward: Predict, backward: Predict, times: int) -> Predict:
    """Predict frames x [b (t v) h w c] forwards at odd steps, and at even ones back in time.

    forward, backward: predictions for what conditions the t times in their order and in reverse;
    either takes a third argument where the rows of a step hold a scale. The result takes rows
    {"forward": bool, "scale": row or None}.
    Source: Xie et al. 2024, "SV4D", section 4.3.
    """

    def reversed_(x: Array) -> Array:
        return x.reshape(x.shape[0], times, -1, *x.shape[2:])[:, ::-1].reshape(x.shape)

    def predict(x: Array, level: Array, row: Any) -> Array:
        more = () if row["scale"] is None else (row["scale"],)
        return jax.lax.cond(
            row["forward"],
            lambda: forward(x, level, *more),
            lambda: reversed_(backward(reversed_(x), level, *more)),
        )

    return predict


def frame_of(batch: Mapping[str, Any], place: int) -> Any:
    """Take the picture that conditions each clip: batch[FRAME], or else one frame of its clip."""
    return batch[FRAME] if FRAME in batch else batch["image"][:, place]


def add_frame(batch: Batch, keys: Keys, frame_noise: tuple[float, float], place: int = 0) -> Batch:
    """Add the conditioning frame of each clip to a batch: as it is, with noise, and how much.

    place: of the frame in the clip, see frame_of; it is [b h w c], or [b t h w c] where it is a
    video. The standard deviation sigma of its noise is batch[NOISE_LEVEL] [b 1], or else drawn for
    each sample: ln(sigma) ~ N(mean, std^2) with frame_noise = (mean, std). Sample i depends on
    keys[i] alone.
    Source: Blattmann et al. 2023, "Stable Video Diffusion"; generative-models, cond_aug.
    """
    frame = frame_of(batch, place)
    keys = jax.vmap(jax.random.split)(fold_in_all(keys, SamplerStream.CONDITIONING_FRAME))
    if NOISE_LEVEL in batch:
        sigma = jnp.asarray(batch[NOISE_LEVEL], jnp.float32)
    else:
        mean, std = frame_noise
        sigma = jnp.exp(mean + std * noise_like(keys[:, 0], (1,)))
    noised = frame + expand(sigma[:, 0], frame) * noise_like(keys[:, 1], frame.shape[1:])
    return {**batch, FRAME: frame, NOISED_FRAME: noised, NOISE_LEVEL: sigma}
