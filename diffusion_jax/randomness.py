"""Where every random number comes from: reserved streams of a seed, and one key for each sample.

Training step n draws from fold_in(key(seed), n). Everything else draws from fold_in with a reserved
number at the top of uint32, which no step reaches, so that nothing repeats the noise of training.
"""

import enum

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Key

from diffusion_jax.types import Keys


class Stream(enum.IntEnum):
    """What draws from the seed of a run besides its training steps."""

    EVALUATION = 2**32 - 1
    INITIALISATION = 2**32 - 2
    LOGGED_SAMPLES = 2**32 - 3
    LOGGED_DIFFUSION = 2**32 - 4
    LATENT_SCALE = 2**32 - 5
    LIKELIHOOD = 2**32 - 6
    SCORED_SAMPLES = 2**32 - 7
    LEVELS = 2**32 - 8
    PRIOR_IMAGES = 2**32 - 9


class SamplerStream(enum.IntEnum):
    """What draws from the key of a sample besides its loss, or the steps of its sampler."""

    INITIAL_NOISE = 2**32 - 1
    BEFORE_STEP = 2**32 - 2
    CONDITIONING_FRAME = 2**32 - 3


def seed_key(seed: int) -> Key[Array, ""]:
    """Make the key of any integer; for 0 to 2^32 - 1 it is jax.random.key(seed).

    A larger one folds in its other words of 32 bits, and a negative one folds in 0 at the end.
    """
    key, rest = jax.random.key(abs(seed) % 2**32), abs(seed) >> 32
    while rest:
        key, rest = jax.random.fold_in(key, np.uint32(rest % 2**32)), rest >> 32
    return jax.random.fold_in(key, np.uint32(0)) if seed < 0 else key


def stream_key(seed: int, stream: Stream) -> Key[Array, ""]:
    """Make the key of a reserved stream: fold_in(key(seed), stream)."""
    return jax.random.fold_in(jax.random.key(seed), np.uint32(stream))


def step_key(seed: int, step: Int[Array, ""]) -> Key[Array, ""]:
    """Make the key of a training step: fold_in(key(seed), step)."""
    return jax.random.fold_in(jax.random.key(seed), step)


def sample_keys(key: Key[Array, ""], positions: Int[Array, "b"]) -> Keys:
    """Make one key for each sample of a batch: fold_in(key, position), [b]."""
    return jax.vmap(jax.random.fold_in, (None, 0))(key, positions)


def fold_in_all(keys: Keys, number: int | Array) -> Keys:
    """Fold one number, of uint32 at most, into each key, [b]."""
    data = np.uint32(number) if isinstance(number, int) else number
    return jax.vmap(jax.random.fold_in, (0, None))(keys, data)


def noise_like(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Draw standard normal float32 noise, one array of `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)
