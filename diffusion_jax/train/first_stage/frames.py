"""Clips of video as batches of their frames: the loss of a first stage judges images."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from einops import rearrange, repeat
from jaxtyping import Array

from diffusion_jax.devices.placement import by_sample
from diffusion_jax.models.conditioning.routing import IMAGE_ONLY
from diffusion_jax.types import Batch


def frames_of(batch: Batch) -> Batch:
    """Make of a batch of clips the batch of all their frames, in which clips follow each other.

    "image" [b t h w c] -> [(b t) h w c]. A frame has the "weight" of its clip, and "stills" of
    image_only_indicator [b t].
    """
    image = batch["image"]
    frames: dict[str, Array] = {"image": by_sample(rearrange(image, "b t h w c -> (b t) h w c"))}
    if "weight" in batch:
        frames["weight"] = repeat(batch["weight"], "b -> (b t)", t=image.shape[1])
    if IMAGE_ONLY in batch:
        frames["stills"] = jnp.reshape(batch[IMAGE_ONLY], -1)
    return frames


def on_frames(step: Callable[..., Any], place: int) -> Callable[..., Any]:
    """Let a step see the clips of its batch, the argument in a place from 0 on, as frames."""

    @functools.wraps(step)
    def seen(*arguments: Any) -> Any:
        return step(*arguments[:place], frames_of(arguments[place]), *arguments[place + 1 :])

    return seen
