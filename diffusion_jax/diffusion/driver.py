"""The one loop that every sampler runs in: from noise to images in a single scan."""

from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.types import Keys, Predict, PyTree

# (x, coefficients of the step, keys [b]) -> x, applied before each step of a sampler.
BeforeStep: TypeAlias = Callable[[Array, PyTree, Keys], Array]

# No step has these numbers, so their noise is that of no step.
_INITIAL = np.uint32(2**32 - 1)
_BEFORE_STEP = np.uint32(2**32 - 2)


class Sampler(NamedTuple):
    """A way from noise to data as a pair of pure functions.

    init: x [b ...] -> memory, a pytree that the steps hand on.
    step: (predict, x, memory, coefficients of this step, keys [b]) -> (x, memory, predicted x_0).
    coefficients: a pytree of arrays with the leading axis num_steps, first step first. Its record
      has a field `t` in discrete time, the timestep of each step.
    """

    init: Callable[[Array], PyTree]
    step: Callable[..., tuple[Array, PyTree, Array]]
    coefficients: PyTree

    @property
    def num_steps(self) -> int:
        """How many steps, known from the shapes."""
        return jax.tree.leaves(self.coefficients)[0].shape[0]


class Samples(NamedTuple):
    """What `sample` returns: x [b ...], and the logged steps [n_log b ...] or None.

    x_log holds x after a step, x_start_log the x_0 that was predicted in it (progressive
    denoising); the last entry of x_log equals x.
    """

    x: Array
    x_log: Array | None
    x_start_log: Array | None


def sample(
    sampler: Sampler,
    predict: Predict,
    x_T: Float[Array, "b *shape"],
    keys: Keys,
    *,
    log_every: int | None = None,
    before_step: BeforeStep | None = None,
) -> Samples:
    """Run a sampler from x_T to x_0 in one lax.scan: x_{i+1} = step(x_i).

    x_T: any float dtype; the loop runs in float32 at least.
    keys: one a sample. Step i sees fold_in(key, i), so sample i depends on its own key, its own
      row of x_T and its own conditioning only.
    log_every: with r steps to go after a step, it is logged when r % log_every == 0, and so is the
      first (upstream's log_every_t). Memory grows with the logged steps, not with all of them.
    before_step: changes x before each step, for example `inpaint`.

    Raises ValueError when log_every is not positive.
    """
    num_steps = sampler.num_steps
    x = x_T.astype(jnp.promote_types(x_T.dtype, jnp.float32))
    slots = np.zeros(num_steps, np.int32)
    logs = None
    if log_every is not None:
        slots = log_slots(num_steps, log_every)
        empty = jnp.zeros((slots[-1] + 1, *x.shape), x.dtype)
        logs = (empty, empty)

    def advance(carry, inputs):
        x, memory, logs = carry
        i, slot, coefficients = inputs
        step_keys = _fold_in(keys, i)
        if before_step is not None:
            x = before_step(x, coefficients, _fold_in(step_keys, _BEFORE_STEP))
        x, memory, x_start = sampler.step(predict, x, memory, coefficients, step_keys)
        if logs is not None:
            # Every step writes into the slot of the next logged step, which so has the last word.
            logs = jax.tree.map(lambda log, value: log.at[slot].set(value), logs, (x, x_start))
        return (x, memory, logs), None

    steps = (np.arange(num_steps, dtype=np.uint32), slots, sampler.coefficients)
    (x, _, logs), _ = jax.lax.scan(advance, (x, sampler.init(x), logs), steps)
    return Samples(x, *(logs if logs is not None else (None, None)))


def log_slots(num_steps: int, log_every: int) -> np.ndarray:
    """Find where each step is logged: int32 [num_steps], the slot of the next logged step.

    Raises ValueError when log_every is not positive.
    """
    if log_every < 1:
        raise ValueError(f"log_every = {log_every!r} should be at least 1, or None for no log")
    remaining = np.arange(num_steps)[::-1]
    logged = remaining % log_every == 0
    logged[0] = True
    return (np.cumsum(logged) - logged).astype(np.int32)


def noise_like(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Draw standard normal float32 noise, one array of `shape` for each key."""
    return jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(keys)


def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Draw x_T ~ N(0, 1) [b, *shape] float32 from the keys that `sample` is then given."""
    return noise_like(_fold_in(keys, _INITIAL), shape)


def _fold_in(keys: Keys, number: Array | np.uint32) -> Keys:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, number)
