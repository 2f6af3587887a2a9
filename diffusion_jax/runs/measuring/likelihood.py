"""Bits per dimension of a pixel model: an upper bound for each of some images of a split."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_jax.data.batches import Batches
from diffusion_jax.devices.arrays import put
from diffusion_jax.devices.mesh import batch_sharding, batch_shards, on_mesh, replicated
from diffusion_jax.diffusion.vlb import bits_per_dim
from diffusion_jax.experiment.experiment import Experiment
from diffusion_jax.randomness import Stream, sample_keys, stream_key
from diffusion_jax.types import PyTree


def has_likelihood(experiment: Experiment) -> bool:
    """Tell whether bits per dimension are defined: pixels, and a network on the timesteps."""
    drawing = experiment.task.drawing
    if drawing is None or drawing.network.first_stage is not None:
        return False
    return drawing.noise.on_timesteps


def build_bits(
    experiment: Experiment, frozen: PyTree, batches: Batches, count: int
) -> Callable[[PyTree], np.ndarray]:
    """Make bits(params) -> [n]: bounds on the bits per dimension of the first `count` images.

    One evaluation of the network for each image and timestep, with its own conditions, on noise
    that is always the same: two calls differ by the weights alone.
    Source: Ho et al. 2020, equation 5.
    """
    network, noise, mesh = experiment.network, experiment.drawing.noise, experiment.mesh

    @functools.partial(jax.jit, out_shardings=replicated(mesh))
    @functools.partial(on_mesh, mesh)
    def bound(params: PyTree, frozen: PyTree, batch: dict[str, jax.Array], keys: jax.Array) -> Any:
        params, frozen = experiment.drawing.whole(params, frozen)
        conditioning = network.embed(params, frozen, network.with_conditioning_frame(batch, keys))
        found = bits_per_dim(
            frozen["schedule"],
            lambda x, t: network.apply(params, x, t, conditioning),
            batch["image"],
            keys,
            parameterization=noise.parameterization,
        )
        return found.total

    names = ("image", *sorted({e.input_key for e in network.embedders.values()}))
    key = stream_key(experiment.seed, Stream.LIKELIHOOD)

    def bits(params: PyTree) -> np.ndarray:
        found: list[float] = []
        for batch in batches.iterate(0):
            real = np.flatnonzero(batch["weight"])[: count - len(found)]
            keys = sample_keys(key, jnp.arange(len(found), len(found) + len(real)))
            rows = np.pad(np.arange(len(real)), (0, -len(real) % batch_shards(mesh)), mode="edge")
            given = [name for name in names if name in batch]
            chosen = {name: np.asarray(batch[name])[real[rows]] for name in given}
            arguments = put((chosen, keys[rows]), batch_sharding(mesh))
            found += np.asarray(bound(params, frozen, *arguments))[: len(real)].tolist()
            if len(found) >= count:
                break
        return np.asarray(found)

    return bits
