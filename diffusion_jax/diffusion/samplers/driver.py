"""The one loop that every sampler runs in: from noise to images in a single scan."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Float

from diffusion_jax.diffusion.samplers.watching import ask
from diffusion_jax.randomness import SamplerStream, fold_in_all, noise_like
from diffusion_jax.types import Keys, PyTree

# (x, coefficients of the step, keys [b]) -> x, applied before each step of a sampler.
BeforeStep: TypeAlias = Callable[[Array, PyTree, Keys], Array]
# (x_0 [b ...], coefficients of a step, unit noise [b ...]) -> x at the start of that step.
AddNoise: TypeAlias = Callable[[Array, PyTree, Array], Array]


def _unit_noise(noise: Array, coefficients: PyTree) -> Array:
    return noise


def _cannot_add_noise(x_start: Array, coefficients: PyTree, noise: Array) -> Array:
    raise ValueError("sampler.add_noise is not set; it should noise an image to a step's level")


class Sampler(NamedTuple):
    """A way from noise to data as a pair of pure functions, init and step.

    init: x [b ...] -> memory, a pytree that each step hands to the next one.
    step: (predict, x, memory, coefficients of this step, noise) -> (x, memory, predicted x_0).
      noise is N(0, 1) like x, or None for a sampler that is not stochastic.
    coefficients: a pytree of arrays with the leading axis num_steps, first step first. Its record
      has the field `t` (the timestep of each step; x is sqrt(abar) x_0 + sqrt(1 - abar) eps) or
      the field `sigma` (the noise level; x is x_0 + sigma eps).
    start: (unit noise [b ...], coefficients of the first step) -> x_T; by default the noise itself.
    add_noise: (x_0, coefficients of a step, unit noise) -> a draw from q(x | x_0) at the level
      where that step starts.
    stochastic: whether the steps use noise.
    inverse: (iterations=) -> the Sampler of the way back, see `inverse`; None where there is none.
    first_step: the number of the first step, which is not 0 in a `segment`; step i takes its noise
      from fold_in(key, first_step + i).
    """

    init: Callable[[Array], PyTree]
    step: Callable[..., tuple[Array, PyTree, Array]]
    coefficients: PyTree
    start: Callable[[Array, PyTree], Array] = _unit_noise
    add_noise: AddNoise = _cannot_add_noise
    stochastic: bool = False
    inverse: Callable[..., "Sampler"] | None = None
    first_step: int = 0

    @property
    def num_steps(self) -> int:
        """How many steps there are; known from the shapes."""
        return jax.tree.leaves(self.coefficients)[0].shape[0]


class Samples(NamedTuple):
    """What `sample` returns: x [b ...], and the logged steps [n_log b ...] or None.

    x_log holds x after each logged step, x_start_log the x_0 that was predicted in it (progressive
    denoising); the last entry of x_log equals x.
    """

    x: Array
    x_log: Array | None
    x_start_log: Array | None


def sample(
    sampler: Sampler,
    predict: Callable[..., Array],
    x_T: Float[Array, "b *shape"],
    keys: Keys,
    *,
    step_noise: Float[Array, "S b *shape"] | None = None,
    per_step: PyTree = None,
    log_every: int | None = None,
    before_step: BeforeStep | None = None,
    watched: bool = False,
) -> Samples:
    """Run a sampler from x_T to x_0 in one lax.scan: x_{i+1} = step(x_i).

    predict: (x [b ...], t or sigma [b]) -> what the sampler asks for.
    x_T: any float dtype; the loop runs in float32 at least.
    keys: one a sample. Step i draws from fold_in(key, i), counted in the whole sampler when this
      one is a segment. So sample i depends on keys[i], x_T[i] and its own conditioning only.
    step_noise: N(0, 1) noise of each step, in place of what the keys would give.
    per_step: a pytree of arrays [num_steps ...], for example guidance scales. When it is given,
      predict is called with one more argument at the end: the row of the step.
    log_every: with r steps to go after a step, it is logged when r % log_every == 0, and so is the
      first (upstream's log_every_t). Memory grows with the logged steps, not with all of them.
    before_step: changes x before each step, for example `inpaint`.
    watched: ask the watcher of `watching.watch` before each step whether to go on.

    Raises ValueError when log_every is not positive, or step_noise or per_step has other lengths.
    """
    num_steps = sampler.num_steps
    x = x_T.astype(jnp.promote_types(x_T.dtype, jnp.float32))
    if step_noise is not None and step_noise.shape != (num_steps, *x.shape):
        raise ValueError(
            f"step_noise has the shape {step_noise.shape}; it should be {(num_steps, *x.shape)}"
        )
    slots = np.zeros(num_steps, np.int32)
    logs = None
    if log_every is not None:
        slots = log_slots(num_steps, log_every)
        empty = jnp.zeros((slots[-1] + 1, *x.shape), x.dtype)
        logs = (empty, empty)

    def advance(carry, inputs):
        x, memory, logs = carry
        i, slot, coefficients, noise, row = inputs
        keys_i = fold_in_all(keys, i)
        if before_step is not None:
            x = before_step(x, coefficients, fold_in_all(keys_i, SamplerStream.BEFORE_STEP))
        if noise is None and sampler.stochastic:
            noise = noise_like(keys_i, x.shape[1:])
        predict_i = predict if row is None else lambda *args: predict(*args, row)
        x, memory, x_start = sampler.step(predict_i, x, memory, coefficients, noise)
        if logs is not None:
            # Every step writes into the slot of the next logged step, which so has the last word.
            logs = jax.tree.map(lambda log, value: log.at[slot].set(value), logs, (x, x_start))
        return (x, memory, logs), None

    numbers = np.arange(num_steps, dtype=np.uint32) + np.uint32(sampler.first_step)
    steps = (numbers, slots, sampler.coefficients, step_noise, per_step)
    start = (x, sampler.init(x), logs)
    if watched:
        while_watched = _while_watched(advance, sampler)
        ((x, _, logs), _), _ = jax.lax.scan(while_watched, (start, True), steps)
    else:
        (x, _, logs), _ = jax.lax.scan(advance, start, steps)
    return Samples(x, *(logs if logs is not None else (None, None)))


def _while_watched(advance: Callable[..., Any], sampler: Sampler) -> Callable[..., Any]:
    def asked(carry, inputs):
        inner, go_on = carry
        counted = (inputs[0] - sampler.first_step, sampler.num_steps)
        answer = io_callback(ask, jax.ShapeDtypeStruct((), np.bool_), *counted, ordered=True)
        go_on = go_on & answer
        inner = jax.lax.cond(go_on, lambda c: advance(c, inputs)[0], lambda c: c, inner)
        return (inner, go_on), None

    return asked


def segment(sampler: Sampler, first: int, last: int) -> Sampler:
    """Take the steps [first, last) of a sampler, as a Sampler of its own.

    Starts at the level of step `first`: with the x that the steps before it left (a refiner takes
    over from a base model), or an image noised to it (`start_from_image`). Its steps draw the noise
    that they draw in the whole. A sampler with memory begins it anew: its first steps have a
    lower order, as the first steps of a whole run do.

    Raises ValueError unless 0 <= first < last <= num_steps.
    """
    if not 0 <= first < last <= sampler.num_steps:
        raise ValueError(
            f"the steps [{first}, {last}) should be at least one of the sampler's "
            f"{sampler.num_steps}"
        )
    rows = jax.tree.map(lambda values: values[first:last], sampler.coefficients)
    total = sampler.num_steps

    def back(iterations: int) -> Sampler:
        return segment(inverse(sampler, iterations), total - last, total - first)

    return sampler._replace(
        coefficients=rows,
        first_step=sampler.first_step + first,
        inverse=None if sampler.inverse is None else back,
    )


def inverse(sampler: Sampler, iterations: int = 1) -> Sampler:
    """Make the way back of a deterministic sampler: from data to the x_T that leads to it.

    iterations: how often each step is computed; more of them invert it more exactly, see
      ddim_inversion and euler_inversion, which this is.

    Raises ValueError for iterations below 1, for a sampler that draws noise in its steps, from
    which no single x_T leads to an image, and for dpm_solver.
    """
    if sampler.inverse is None:
        why = "has no way back"
        if sampler.stochastic:
            why = "draws noise in every step, so that no x_T leads to an image"
        raise ValueError(
            f"the sampler {why}; use a deterministic one (ddim with eta = 0, plms, dpmpp_2m, euler "
            "without churn)"
        )
    return sampler.inverse(iterations=iterations)


def steps_of_strength(num_steps: int, strength: float) -> int:
    """Count the last steps that image-to-image takes: max(floor(strength (num_steps + 1)) - 1, 1).

    Of the num_steps + 1 noise levels, 0 among them, floor(strength (num_steps + 1)) are kept, so
    that a strength of 1 takes every step (Img2ImgDiscretizationWrapper of sgm, which for a small
    strength keeps the level 0 alone and returns the image; here one step is taken).

    Raises ValueError for a strength outside (0, 1].
    """
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength = {strength!r} should lie in (0, 1]")
    return max(int(strength * (num_steps + 1)) - 1, 1)


def start_from_noise(sampler: Sampler, noise: Float[Array, "b *shape"]) -> Float[Array, "b *shape"]:
    """Scale unit noise to the x_T of a sampler: noise, or sqrt(1 + sigma^2) noise."""
    return sampler.start(noise, first_row(sampler))


def start_from_image(
    sampler: Sampler, x_start: Float[Array, "b *shape"], noise: Float[Array, "b *shape"]
) -> Float[Array, "b *shape"]:
    """Draw x from q(x | x_0) at the level where a sampler's first step begins."""
    return sampler.add_noise(x_start, first_row(sampler), noise)


def first_row(sampler: Sampler) -> PyTree:
    """Take the coefficients of the first step."""
    return jax.tree.map(lambda values: values[0], sampler.coefficients)


def inpaint(
    add_noise: AddNoise, x0: Float[Array, "b *shape"], mask: Float[Array, "*mask"]
) -> BeforeStep:
    """Keep an image: x = mask q_sample(x_0) + (1 - mask) x before each step.

    add_noise: the sampler's. x0 [b ...] in [-1, 1]; mask like x0 or with axes of length 1, 1
    where x0 is kept. After the last step the kept part is the network's reconstruction of x0; put
    x0 back where it must be exact. (Upstream's DDIM does so too; its DDPM loop mixes after the
    step, with the noise of the step before.)
    Raises ValueError for a mask whose shape does not fit.
    """
    fits = len(mask.shape) == len(x0.shape) and all(
        m in (1, n) for m, n in zip(mask.shape, x0.shape, strict=True)
    )
    if not fits:
        raise ValueError(f"mask has the shape {mask.shape}; it should be {x0.shape} or 1 in places")

    def before_step(x: Array, coefficients: PyTree, keys: Keys) -> Array:
        kept = add_noise(x0, coefficients, noise_like(keys, x0.shape[1:]))
        return mask * kept + (1.0 - mask) * x

    return before_step


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


def step_back(
    step: Callable[[Array], tuple[Array, Array, Array]],
    x: Float[Array, "b *shape"],
    slope: Array,
    iterations: int,
) -> tuple[Float[Array, "b *shape"], Float[Array, "b *shape"]]:
    """Find the end from which a step leads to x, by the secant method: (end, predicted x_0).

    step: end -> (x to which the step from there leads, predicted x_0, a guess of the end).
    slope: d x / d end on N(0, 1) data. iterations: evaluations of `step`. The first one, at x,
    gives the guess; each later one a correction miss / slope, where each sample has the slope
    that its last two evaluations show, but no less than a quarter of `slope`.
    Source: Barzilai and Borwein 1988, the first of their step sizes.
    """

    def dot(a: Array, b: Array) -> Array:
        return jnp.sum(a * b, tuple(range(1, x.ndim)), keepdims=True)

    def improve(i: Array, found: tuple[Array, ...]) -> tuple[Array, ...]:
        end, _, end_before, miss_before = found
        back, x_start, guess = step(end)
        miss, moved = x - back, end - end_before
        length = dot(moved, moved)
        # A move that is mostly rounding shows nothing.
        shown = dot(moved, miss_before - miss) / jnp.where(length > 0.0, length, 1.0)
        shown = jnp.where(length > 1e-10 * dot(end, end), jnp.maximum(shown, slope / 4), slope)
        return jnp.where(i == 0, guess, end + miss / shown), x_start, end, miss

    end, x_start, _, _ = jax.lax.fori_loop(0, iterations, improve, (x, x, x, x))
    return end, x_start


def check_iterations(iterations: int) -> None:
    """Raise ValueError unless an inversion computes each step at least once."""
    if iterations < 1:
        raise ValueError(f"iterations = {iterations!r} should be at least 1")


def initial_noise(keys: Keys, shape: tuple[int, ...]) -> Float[Array, "b *shape"]:
    """Draw x_T ~ N(0, 1) [b, *shape] float32 from the keys that `sample` is then given."""
    return noise_like(fold_in_all(keys, SamplerStream.INITIAL_NOISE), shape)
