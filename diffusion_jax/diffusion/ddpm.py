"""Denoising diffusion in discrete time: q(x_t | x_0), what networks predict, and p(x_{t-1} | x_t).

Every function takes the Schedule first; t is int [b] with values in [0, T), and arrays are [b ...]
of any rank. Half-precision arrays meet float32 coefficients, so every result is float32 at least.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.samplers import driver
from diffusion_jax.diffusion.samplers.driver import AddNoise, Sampler, Samples, sample
from diffusion_jax.diffusion.schedule import Schedule, check_choice
from diffusion_jax.types import Keys, Predict, Timesteps

Sample = Float[Array, "b *shape"]


class PMeanVariance(NamedTuple):
    """The Gaussian p(x_{t-1} | x_t) and the x_0 behind it, like x_t.

    Variances are [b 1 ...] unless they are learned.
    """

    mean: Array
    variance: Array
    log_variance: Array
    pred_x_start: Array


def at(coefficient: Float[Array, "T"], t: Timesteps, x: Array) -> Array:
    """Look up one coefficient a sample, shaped [b 1 ...] to multiply x."""
    return expand(coefficient[t], x)


def expand(values: Array, x: Array) -> Array:
    """Reshape [b] to [b 1 ...] with as many axes as x."""
    return values.reshape(values.shape + (1,) * (x.ndim - 1))


def q_mean_variance(
    schedule: Schedule, x_start: Sample, t: Timesteps
) -> tuple[Array, Array, Array]:
    """Compute mean, variance and log variance of q(x_t | x_0) = N(sqrt(abar) x_0, 1 - abar).

    Variances are [b 1 ...]. Source: Ho et al. 2020, equation 4.
    """
    sigma = at(schedule.sqrt_one_minus_alphas_cumprod, t, x_start)
    log_variance = at(schedule.log_one_minus_alphas_cumprod, t, x_start)
    return at(schedule.sqrt_alphas_cumprod, t, x_start) * x_start, sigma**2, log_variance


def q_sample(
    schedule: Schedule, x_start: Sample, t: Timesteps, noise: Sample
) -> Float[Array, "b *shape"]:
    """Diffuse: x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps (Ho et al. 2020, eq. 4)."""
    signal = at(schedule.sqrt_alphas_cumprod, t, x_start) * x_start
    return signal + at(schedule.sqrt_one_minus_alphas_cumprod, t, x_start) * noise


def q_posterior(
    schedule: Schedule, x_start: Sample, x_t: Sample, t: Timesteps
) -> tuple[Array, Array, Array]:
    """Compute mean, variance and clipped log variance of q(x_{t-1} | x_t, x_0).

    The variance is interpolated towards beta_t by the schedule's v_posterior. At t = 0 it is 0 (for
    v_posterior = 0) and its logarithm is log(1e-20).
    Source: Ho et al. 2020, equation 7.
    """
    mean = (
        at(schedule.posterior_mean_coef1, t, x_t) * x_start
        + at(schedule.posterior_mean_coef2, t, x_t) * x_t
    )
    variance = at(schedule.posterior_variance, t, x_t)
    return mean, variance, at(schedule.posterior_log_variance_clipped, t, x_t)


def predict_start_from_noise(schedule: Schedule, x_t: Sample, t: Timesteps, noise: Sample) -> Array:
    """Solve for x_0 = x_t / sqrt(abar) - sqrt(1 / abar - 1) eps."""
    scaled = at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return scaled - at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t) * noise


def predict_noise_from_start(
    schedule: Schedule, x_t: Sample, t: Timesteps, x_start: Sample
) -> Array:
    """Solve for eps = (x_t / sqrt(abar) - x_0) / sqrt(1 / abar - 1)."""
    scaled = at(schedule.sqrt_recip_alphas_cumprod, t, x_t) * x_t
    return (scaled - x_start) / at(schedule.sqrt_recipm1_alphas_cumprod, t, x_t)


def get_v(schedule: Schedule, x_start: Sample, noise: Sample, t: Timesteps) -> Array:
    """Compute v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022, appendix D)."""
    rotated = at(schedule.sqrt_alphas_cumprod, t, x_start) * noise
    return rotated - at(schedule.sqrt_one_minus_alphas_cumprod, t, x_start) * x_start


def predict_start_from_v(schedule: Schedule, x_t: Sample, t: Timesteps, v: Sample) -> Array:
    """Rotate back to x_0 = sqrt(abar) x_t - sqrt(1 - abar) v."""
    rotated = at(schedule.sqrt_alphas_cumprod, t, x_t) * x_t
    return rotated - at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t) * v


def predict_noise_from_v(schedule: Schedule, x_t: Sample, t: Timesteps, v: Sample) -> Array:
    """Rotate back to eps = sqrt(abar) v + sqrt(1 - abar) x_t."""
    rotated = at(schedule.sqrt_alphas_cumprod, t, x_t) * v
    return rotated + at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t) * x_t


def predict_start(
    schedule: Schedule, model_output: Sample, x_t: Sample, t: Timesteps, parameterization: str
) -> Array:
    """Compute x_0 from what the network predicts: eps | x0 | v; ValueError for other names."""
    check_choice("parameterization", parameterization, tuple(_START))
    return _START[parameterization](schedule, x_t, t, model_output)


def predict_noise(
    schedule: Schedule, model_output: Sample, x_t: Sample, t: Timesteps, parameterization: str
) -> Array:
    """Compute eps from what the network predicts: eps | x0 | v; ValueError for other names."""
    check_choice("parameterization", parameterization, tuple(_NOISE))
    return _NOISE[parameterization](schedule, x_t, t, model_output)


# (schedule, x_t, t, model output) -> x_0 or eps
_START: dict[str, Callable[..., Array]] = {
    "eps": predict_start_from_noise,
    "x0": lambda schedule, x_t, t, x_start: x_start,
    "v": predict_start_from_v,
}
_NOISE: dict[str, Callable[..., Array]] = {
    "eps": lambda schedule, x_t, t, noise: noise,
    "x0": predict_noise_from_start,
    "v": predict_noise_from_v,
}


def p_mean_variance(
    schedule: Schedule,
    model_output: Float[Array, "b *out"],
    x_t: Sample,
    t: Timesteps,
    parameterization: str = "eps",
    clip_denoised: bool = True,
    *,
    variance: str = "posterior",
) -> PMeanVariance:
    """Compute p(x_{t-1} | x_t): the posterior of eq. 7 (Ho et al. 2020) at the predicted x_0.

    model_output: like x_t, or with twice the channels for learned_range.
    clip_denoised: clip the predicted x_0 to [-1, 1].
    variance: a row of VARIANCES:
      posterior: the schedule's own, between fixed small and beta_t by its v_posterior;
      fixed_small: the same, but at t = 0 it has the value of t = 1, where a likelihood is wanted;
      fixed_large: beta_t, but at t = 0 fixed_small (guided-diffusion's convention);
      learned_range: the second half of the channels, in [-1, 1], interpolates between the
        logarithms of fixed_small and beta_t (Nichol and Dhariwal 2021, equation 15).

    Raises ValueError for an unknown parameterization or variance, and for channels that do not fit.
    """
    check_choice("variance", variance, VARIANCES)
    factor = 2 if variance == "learned_range" else 1
    expected = (*x_t.shape[:-1], factor * x_t.shape[-1])
    if model_output.shape != expected:
        raise ValueError(
            f"model_output has the shape {model_output.shape}; it should be {expected} for "
            f"x_t {x_t.shape} and variance = {variance!r}"
        )
    fraction = None
    if variance == "learned_range":
        model_output, range_values = jnp.split(model_output, 2, axis=-1)
        fraction = 0.5 * (range_values.astype(jnp.float32) + 1.0)
    x_start = predict_start(schedule, model_output, x_t, t, parameterization)
    if clip_denoised:
        x_start = jnp.clip(x_start, -1.0, 1.0)
    mean, *_ = q_posterior(schedule, x_start, x_t, t)
    values, logs = _variance(schedule, x_t, t, variance, fraction)
    return PMeanVariance(mean, values, logs, x_start)


VARIANCES = ("posterior", "fixed_small", "fixed_large", "learned_range")


def _variance(
    schedule: Schedule, x_t: Array, t: Array, variance: str, fraction: Array | None
) -> tuple[Array, Array]:
    posterior = schedule.posterior_variance
    if variance == "posterior":
        return at(posterior, t, x_t), at(schedule.posterior_log_variance_clipped, t, x_t)
    # At t = 0 the posterior is a point; the next entry stands in (beta when there is no next one).
    first = posterior[1:2] if schedule.num_timesteps > 1 else schedule.betas
    if variance == "fixed_large":
        values = at(jnp.concatenate([first, schedule.betas[1:]]), t, x_t)
        return values, jnp.log(values)
    low = jnp.log(at(jnp.concatenate([first, posterior[1:]]), t, x_t))
    if fraction is None:
        return jnp.exp(low), low
    logs = fraction * jnp.log(at(schedule.betas, t, x_t)) + (1.0 - fraction) * low
    return jnp.exp(logs), logs


def p_sample(
    schedule: Schedule,
    predict: Predict,
    x_t: Sample,
    t: Timesteps,
    noise: Sample,
    *,
    parameterization: str = "eps",
    clip_denoised: bool = True,
    variance: str = "posterior",
    temperature: float | Float[Array, ""] = 1.0,
) -> tuple[Array, Array]:
    """Draw x_{t-1} = mean + [t > 0] temperature exp(log_variance / 2) noise.

    predict: (x_t, t) -> model output. noise: N(0, 1), like x_t.
    Returns: (x_{t-1}, predicted x_0), both like x_t. Raises ValueError as p_mean_variance does.
    Source: Ho et al. 2020, algorithm 2.
    """
    p = p_mean_variance(
        schedule,
        predict(x_t, t),
        x_t,
        t,
        parameterization,
        clip_denoised,
        variance=variance,
    )
    std = temperature * jnp.exp(0.5 * p.log_variance) * expand(t > 0, x_t)
    return p.mean + std * noise, p.pred_x_start


class AncestralStep(NamedTuple):
    """What differs between steps: row of the schedule, timestep of the network, temperature."""

    index: Array
    t: Array
    temperature: Array


def ancestral(
    schedule: Schedule,
    *,
    num_steps: int | None = None,
    timesteps: np.ndarray | None = None,
    parameterization: str = "eps",
    clip_denoised: bool = True,
    variance: str = "posterior",
    temperature: float | Float[Array, ""] | Float[Array, "S"] = 1.0,
) -> Sampler:
    """Make the Sampler that draws from p(x_{t-1} | x_t) down to t = 0.

    num_steps: start at t = num_steps - 1; None is all of the schedule.
    timesteps: int [T], the timestep that the network gets at each t of a respaced schedule.
    temperature: scales the noise; a number, or one for each t < num_steps.

    Raises ValueError for num_steps outside [1, T], a temperature of another length and unknown
    names.
    Source: Ho et al. 2020, algorithm 2.
    """
    total = schedule.num_timesteps
    num_steps = total if num_steps is None else num_steps
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps = {num_steps!r} should lie in [1, {total}]")
    check_choice("parameterization", parameterization, tuple(_START))
    check_choice("variance", variance, VARIANCES)
    index = np.arange(num_steps, dtype=np.int32)[::-1]
    shown_t = index if timesteps is None else np.asarray(timesteps, np.int32)[index]
    coefficients = AncestralStep(
        jnp.asarray(index), jnp.asarray(shown_t), _per_step(temperature, num_steps)[index]
    )

    def step(predict, x, memory, now: AncestralStep, noise):
        x, x_start = p_sample(
            schedule,
            lambda x, index: predict(x, jnp.full_like(index, now.t)),
            x,
            jnp.full(x.shape[:1], now.index),
            noise,
            parameterization=parameterization,
            clip_denoised=clip_denoised,
            variance=variance,
            temperature=now.temperature,
        )
        return x, memory, x_start

    def add_noise(x_start, now: AncestralStep, noise):
        return q_sample(schedule, x_start, jnp.full(x_start.shape[:1], now.index), noise)

    return Sampler(lambda x: (), step, coefficients, add_noise=add_noise, stochastic=True)


def p_sample_loop(
    schedule: Schedule,
    predict: Predict,
    x_T: Sample,
    keys: Keys,
    *,
    start_T: int | None = None,
    log_every_t: int | None = None,
    mask: Float[Array, "*mask"] | None = None,
    x0: Sample | None = None,
    temperature: float | Float[Array, ""] | Float[Array, "S"] = 1.0,
    parameterization: str = "eps",
    clip_denoised: bool = True,
    variance: str = "posterior",
) -> Samples:
    """Draw x_0 by p_sample at t = T - 1 ... 0, one scan (Ho et al. 2020, algorithm 2).

    x_T: noise, or x_t at t = start_T - 1 when start_T shortens the way (capped at T, as upstream).
    log_every_t: log where t % log_every_t == 0 and at the first step; Samples.x_start_log is the
      progressive denoising.
    mask, x0: keep x0 where the mask is 1, see driver.inpaint.
    temperature: of the noise; a number, or entry t for each t.

    Raises ValueError for a mask without x0, start_T or log_every_t below 1, and unknown names.
    """
    if (mask is None) != (x0 is None):
        raise ValueError("inpainting needs mask and x0; only one of them was given")
    total = schedule.num_timesteps
    sampler = ancestral(
        schedule,
        num_steps=total if start_T is None else min(start_T, total),
        parameterization=parameterization,
        clip_denoised=clip_denoised,
        variance=variance,
        temperature=temperature,
    )
    before = None
    if mask is not None and x0 is not None:
        before = driver.inpaint(sampler.add_noise, x0, mask)
    return sample(sampler, predict, x_T, keys, log_every=log_every_t, before_step=before)


def diffuse(schedule: Schedule) -> AddNoise:
    """Make the add_noise of a sampler whose coefficients have `t`: q_sample at its timestep."""

    def add_noise(x_start: Array, coefficients: Any, noise: Array) -> Array:
        return q_sample(schedule, x_start, jnp.full(x_start.shape[:1], coefficients.t), noise)

    return add_noise


def _per_step(temperature: Any, num_steps: int) -> Array:
    values = jnp.asarray(temperature, jnp.float32)
    if values.shape not in ((), (num_steps,)):
        raise ValueError(
            f"temperature has the shape {values.shape}; it should be a number or ({num_steps},)"
        )
    return jnp.broadcast_to(values, (num_steps,))
