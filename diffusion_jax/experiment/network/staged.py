"""Inputs of embedders that are given in pixels and enter beside what is denoised, as cells."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array

from diffusion_jax.experiment.config.binding import ConfigError
from diffusion_jax.experiment.first_stage.frozen import FirstStage
from diffusion_jax.models.conditioning.conditioner import Embedder
from diffusion_jax.types import Batch, PyTree

# The inputs that callers and data give to them: a mask is 1 where its image is kept, a masked image
# is 0 elsewhere, and the original is the image that an edit begins with.
MASK, MASKED_IMAGE, ORIGINAL = "mask", "masked_image", "original_image"


def staged_inputs(embedders: Mapping[str, Embedder]) -> set[str]:
    """Name the inputs that are given in pixels."""
    return {e.input_key for e in embedders.values() if e.staged is not None}


def staged_columns(embedders: Mapping[str, Embedder]) -> tuple[str, ...]:
    """Name the images that the data have to hold, because no masks make them."""
    return tuple(sorted(staged_inputs(embedders) - {MASK, MASKED_IMAGE}))


def with_channels(
    embedders: Mapping[str, Embedder], image_shape: tuple[int, int, int], num_frames: int | None
) -> dict[str, Embedder]:
    """Give embedders of staged inputs the channels of what they join to the network's input.

    image_shape: of what is denoised. Raises ConfigError for a network of videos.
    """
    found = dict(embedders)
    for name, embedder in embedders.items():
        if embedder.staged is not None and num_frames is not None:
            raise ConfigError(
                f"config.conditioning.embedders.{name} is for images, and "
                f"config.data.batches.num_frames = {num_frames} makes clips of video"
            )
        if embedder.staged is not None:
            channels = 1 if embedder.staged == "hole" else image_shape[-1]
            found[name] = embedder._replace(channels=channels)
    return found


def example_pixels(
    embedder: Embedder, size: int, image_shape: tuple[int, int, int], stage: FirstStage | None
) -> Array:
    """Zeros of the shape that the input of `size` samples has in a batch, in pixels."""
    factor = 1 if stage is None else stage.factor
    channels = image_shape[-1] if stage is None else stage.image_shape[-1]
    channels = 1 if embedder.staged == "hole" else channels
    return jnp.zeros((size, factor * image_shape[0], factor * image_shape[1], channels))


def in_cells(
    embedders: Mapping[str, Embedder], stage: FirstStage | None, frozen: PyTree, batch: Batch
) -> Batch:
    """Replace the inputs that are given in pixels by what their embedders join to x.

    See Embedder.staged. Without a first stage, cells are pixels. An input that is missing is left
    to the embedder to name.
    """
    made = {
        e.input_key: _in_cells(e, stage, frozen, jnp.asarray(batch[e.input_key]))
        for e in embedders.values()
        if e.staged is not None and e.input_key in batch
    }
    return {**batch, **made} if made else batch


def _in_cells(embedder: Embedder, stage: FirstStage | None, frozen: Any, value: Array) -> Array:
    factor = 1 if stage is None else stage.factor
    if embedder.staged == "hole":
        return 1.0 - value[:, ::factor, ::factor]
    if stage is None:
        return value
    latents = stage.encode(frozen["first_stage"], value, None)
    return latents if embedder.staged == "mode" else frozen["scale_factor"] * latents
