"""Noise on the way from one seed to another: samples that are alike and not the same."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.samplers.driver import Sampler, initial_noise
from diffusion_jax.randomness import fold_in_all, noise_like
from diffusion_jax.types import Keys, PerSample


class Variation(NamedTuple):
    """The keys of other seeds, one a sample, and how far to go there, [b] in [0, 1]."""

    keys: Keys
    strength: PerSample


def slerp(
    one: Float[Array, "b *shape"], other: Float[Array, "b *shape"], strength: PerSample
) -> Float[Array, "b *shape"]:
    """Go from one to the other, sample by sample, on the great circle between their directions.

    With w the angle between them, the direction is (sin((1 - s) w) a + sin(s w) b) / sin w of the
    unit vectors a and b, and the norm is (1 - s) |one| + s |other|: noise stays as strong as
    noise is, which it would not on the straight line. Where they are parallel it is that line.
    Source: Shoemake 1985, "Animating Rotation with Quaternion Curves".
    """

    def of_sample(one: Array, other: Array, s: Array) -> Array:
        norms = [jnp.maximum(jnp.linalg.norm(x.ravel()), 1e-20) for x in (one, other)]
        a, b = one / norms[0], other / norms[1]
        angle = jnp.arccos(jnp.clip(jnp.sum(a * b), -1.0, 1.0))
        parallel = jnp.sin(angle) < 1e-6
        sine = jnp.where(parallel, 1.0, jnp.sin(angle))
        weights = (jnp.sin(x * angle) / sine for x in (1.0 - s, s))
        shares = [jnp.where(parallel, x, w) for x, w in zip((1.0 - s, s), weights, strict=True)]
        return ((1.0 - s) * norms[0] + s * norms[1]) * (shares[0] * a + shares[1] * b)

    return jax.vmap(of_sample)(one, other, strength)


def varied_start(
    keys: Keys, variation: Variation, shape: tuple[int, ...]
) -> Float[Array, "b *shape"]:
    """Draw the noise that sampling starts from, between the one of keys and of the others."""
    noises = initial_noise(keys, shape), initial_noise(variation.keys, shape)
    return slerp(*noises, variation.strength)


def varied_steps(
    sampler: Sampler, keys: Keys, variation: Variation, shape: tuple[int, ...]
) -> Float[Array, "S b *shape"] | None:
    """Draw the noise of every step in the same way; None for a sampler that uses none."""
    if not sampler.stochastic:
        return None
    numbers = np.arange(sampler.num_steps, dtype=np.uint32) + np.uint32(sampler.first_step)

    def of_step(number: Array) -> Array:
        one, other = (noise_like(fold_in_all(k, number), shape) for k in (keys, variation.keys))
        return slerp(one, other, variation.strength)

    return jax.lax.map(of_step, jnp.asarray(numbers))
