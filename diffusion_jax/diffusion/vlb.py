"""The variational bound on the likelihood, in bits per dimension (Ho et al. 2020, equation 5)."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from diffusion_jax.diffusion.ddpm import (
    at,
    p_mean_variance,
    predict_noise_from_start,
    q_mean_variance,
    q_posterior,
    q_sample,
)
from diffusion_jax.diffusion.losses import sample_means
from diffusion_jax.diffusion.schedule import MIN_VARIANCE, Schedule, check_choice
from diffusion_jax.randomness import fold_in_all, noise_like
from diffusion_jax.types import Keys, PerSample, Predict, Timesteps

Sample = Float[Array, "b *shape"]
# A likelihood of x_0 needs a positive variance at t = 0, which "posterior" has not.
VLB_VARIANCES = ("fixed_small", "fixed_large", "learned_range")


class BitsPerDim(NamedTuple):
    """The bound [b] = prior + sum of the terms; terms and squared errors are [T b], by timestep."""

    total: Array
    prior: Array
    terms: Array
    x_start_mse: Array
    noise_mse: Array


def normal_kl(mean1: Array, logvar1: Array, mean2: Array, logvar2: Array) -> Array:
    """Compute KL(N(mean1, var1) || N(mean2, var2)) in nats, element by element.

    Arguments broadcast if they have equal ranks or are scalars.
    """
    ratio = jnp.exp(logvar1 - logvar2) + (mean1 - mean2) ** 2 * jnp.exp(-logvar2)
    return 0.5 * (ratio - 1.0 + logvar2 - logvar1)


def discretized_gaussian_log_likelihood(
    x: Sample, mean: Sample, log_scale: Array, *, levels: int = 256
) -> Float[Array, "b *shape"]:
    """Compute log P(level of x) in nats when a Gaussian falls into `levels` bins of [-1, 1].

    x holds the bins' centres, 2 k / (levels - 1) - 1; the outer bins reach to infinity. log_scale
    is the log standard deviation. Accurate in the tails, too, where the bin's probability is far
    below float32's resolution of 1. Raises ValueError for fewer than two levels.
    Source: Ho et al. 2020, equation 13.
    """
    if levels < 2:
        raise ValueError(f"levels = {levels!r} should be at least 2")
    half = 1.0 / (levels - 1)
    # By symmetry, both edges on the lower side, where the distribution function keeps its digits.
    distance = -jnp.abs(x - mean)
    upper = jax.scipy.stats.norm.logcdf((distance + half) * jnp.exp(-log_scale))
    lower = jax.scipy.stats.norm.logcdf((distance - half) * jnp.exp(-log_scale))
    inside = upper + jnp.log(-jnp.expm1(jnp.minimum(lower - upper, -1e-12)))
    low_end = jax.scipy.stats.norm.logcdf((x - mean + half) * jnp.exp(-log_scale))
    high_end = jax.scipy.stats.norm.logcdf((mean - x + half) * jnp.exp(-log_scale))
    edge = 1.0 - half
    return jnp.where(x < -edge, low_end, jnp.where(x > edge, high_end, inside))


def prior_bpd(schedule: Schedule, x_start: Sample) -> PerSample:
    """Compute KL(q(x_T | x_0) || N(0, 1)) in bits per dimension; no network enters."""
    t = jnp.full(x_start.shape[:1], schedule.num_timesteps - 1)
    mean, _, log_variance = q_mean_variance(schedule, x_start, t)
    zero = jnp.zeros(())
    return _bits(normal_kl(mean, log_variance, zero, zero))


def vlb_terms(
    schedule: Schedule,
    model_output: Float[Array, "b *out"],
    x_start: Sample,
    x_t: Sample,
    t: Timesteps,
    *,
    parameterization: str = "eps",
    clip_denoised: bool = True,
    variance: str = "fixed_small",
) -> tuple[PerSample, Array]:
    """Compute one term of the bound for each sample, in bits per dimension, and the predicted x_0.

    t > 0: KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0: -log p(x_0 | x_1) of x_start as
    8-bit levels in [-1, 1]. model_output is the network's at (x_t, t), with 2 c channels for
    variance = "learned_range". v_posterior changes p only.
    Raises ValueError for variance "posterior", which is no likelihood at t = 0, and unknown names.
    Source: Ho et al. 2020, equation 5; Nichol and Dhariwal 2021.
    """
    check_choice("variance", variance, VLB_VARIANCES)
    q_mean, *_ = q_posterior(schedule, x_start, x_t, t)
    q_log_variance = at(_log_variance_of_q(schedule), t, x_t)
    p = p_mean_variance(
        schedule, model_output, x_t, t, parameterization, clip_denoised, variance=variance
    )
    kl = _bits(normal_kl(q_mean, q_log_variance, p.mean, p.log_variance))
    log_scale = jnp.broadcast_to(0.5 * p.log_variance, x_start.shape)
    decoder = _bits(-discretized_gaussian_log_likelihood(x_start, p.mean, log_scale))
    return jnp.where(t == 0, decoder, kl), p.pred_x_start


def bits_per_dim(
    schedule: Schedule,
    predict: Predict,
    x_start: Sample,
    keys: Keys,
    *,
    parameterization: str = "eps",
    clip_denoised: bool = True,
    variance: str = "fixed_small",
) -> BitsPerDim:
    """Bound -log2 p(x_0) / dimensions from above: prior + every vlb_terms term, one scan over t.

    x_start: in [-1, 1], on 8-bit levels. One noise sample a timestep and image, from
    fold_in(keys[i], t). Raises ValueError as vlb_terms does. Source: Ho et al. 2020, equation 5.
    """

    def term(_, t):
        noise = noise_like(fold_in_all(keys, t), x_start.shape[1:])
        t = jnp.full(x_start.shape[:1], t)
        x_t = q_sample(schedule, x_start, t, noise)
        bits, pred_x_start = vlb_terms(
            schedule,
            predict(x_t, t),
            x_start,
            x_t,
            t,
            parameterization=parameterization,
            clip_denoised=clip_denoised,
            variance=variance,
        )
        pred_noise = predict_noise_from_start(schedule, x_t, t, pred_x_start)
        errors = (
            sample_means((pred_x_start - x_start) ** 2),
            sample_means((pred_noise - noise) ** 2),
        )
        return None, (bits, *errors)

    _, (terms, x_start_mse, noise_mse) = jax.lax.scan(
        term, None, jnp.arange(schedule.num_timesteps)
    )
    prior = prior_bpd(schedule, x_start)
    return BitsPerDim(prior + terms.sum(axis=0), prior, terms, x_start_mse, noise_mse)


def _log_variance_of_q(schedule: Schedule) -> Array:
    """Compute log(beta (1 - abar_prev) / (1 - abar)) [T], which v_posterior does not enter."""
    betas = schedule.betas
    variance = schedule.posterior_mean_coef2 * betas / jnp.sqrt(jnp.where(betas < 1, 1 - betas, 1))
    # Where abar is 0 (zero terminal SNR) the quotient above is 0 / 0.
    variance = jnp.where(betas < 1, variance, 1.0 - schedule.alphas_cumprod_prev)
    return jnp.log(jnp.maximum(variance, MIN_VARIANCE))


def _bits(nats: Array) -> Array:
    return sample_means(nats) / math.log(2.0)
