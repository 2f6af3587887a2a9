"""Random numbers for single samples."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.types import Keys


def noise_like(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Draw standard normal float32 noise, one array of `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
