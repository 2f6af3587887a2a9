"""Samplers of models that are made for a few steps, from 1 to about 8.

Such a network knows where a whole path from noise ends, and not only the next small step. lcm and
tcd visit timesteps, as the samplers of by_timestep do; mean_flow and consistency visit noise
levels, as by_level.
"""

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.samplers.by_level import denoise, ends_of_steps, make_sampler, towards
from diffusion_jax.diffusion.samplers.driver import Sampler
from diffusion_jax.diffusion.schedule import Schedule, at_or_clean, check_choice


class LCMStep(NamedTuple):
    """One step: x_next = signal_next f(x, t) + sigma_next noise, each number [num_steps]."""

    t: Array
    signal_next: Array
    sigma_next: Array


def lcm(
    schedule: Schedule,
    num_steps: int,
    *,
    original_steps: int = 50,
    timestep_scaling: float = 10.0,
    parameterization: Literal["eps", "x0", "v"] = "eps",
) -> Sampler:
    """Make the sampler of latent consistency models: x_next = sqrt(abar') f + sqrt(1 - abar') eps.

    eps is new noise and abar' belongs to the next timestep.
    f(x, t) = c_skip x + c_out x_0 is the image where the ODE from x ends, which a network has to be
    distilled for; then 1 to 8 steps are enough. c_skip = 1 / (1 + 4 s^2), c_out^2 = 1 - c_skip and
    s = timestep_scaling t. The last step ends at f.

    original_steps: the timesteps that the model was distilled on, i floor(T / original_steps) - 1;
      num_steps of them are visited, evenly from the last one down.

    Raises ValueError unless 1 <= num_steps <= original_steps <= T, and for unknown names.
    Source: Luo et al. 2023 (LCM), algorithm 3 and appendix; diffusers, LCMScheduler.
    """
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    t = _distilled_timesteps(schedule.num_timesteps, num_steps, original_steps)
    following = at_or_clean(schedule, np.append(t[1:], -1))

    def step(predict, x, memory, now: LCMStep, noise):
        level = jnp.full(x.shape[:1], now.t)
        output = predict(x, level)
        x_start = ddpm.predict_start(schedule, output, x, level, parameterization)
        c_skip = 1.0 / (1.0 + 4.0 * (timestep_scaling * now.t) ** 2)
        image = c_skip * x + jnp.sqrt(1.0 - c_skip) * x_start
        return now.signal_next * image + now.sigma_next * noise, memory, image

    return Sampler(
        lambda x: (),
        step,
        LCMStep(jnp.asarray(t), *following),
        add_noise=ddpm.diffuse(schedule),
        stochastic=True,
    )


class TCDStep(NamedTuple):
    """One step: x_next = keep (signal x_0 + sigma eps) + fresh noise, each number [num_steps]."""

    t: Array
    signal: Array
    sigma: Array
    keep: Array
    fresh: Array


def tcd(
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float = 0.3,
    original_steps: int = 50,
    parameterization: Literal["eps", "x0", "v"] = "eps",
) -> Sampler:
    """Make the sampler of trajectory consistency distillation: down to s by DDIM, up by new noise.

    A step ends at the next timestep t'. It first goes along the ODE to
    s = floor((1 - eta) t'), which the network has to be distilled for, and adds the noise that
    leads from s up to t'. The last step ends at timestep 0, without new noise.

    eta: the gamma of the paper. 0 is deterministic, 1 draws all noise anew, as `lcm` does; more
      steps want a larger one.
    original_steps: the timesteps that the model was distilled on, as in `lcm`.

    Raises ValueError for eta outside [0, 1], unless 1 <= num_steps <= original_steps <= T, and for
    unknown names.
    Source: Zheng et al. 2024 (TCD), algorithm 4; diffusers, TCDScheduler.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta = {eta!r} should lie in [0, 1]")
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    t = _distilled_timesteps(schedule.num_timesteps, num_steps, original_steps)
    following = np.append(t[1:], 0)
    lower = np.floor((1.0 - eta) * following).astype(np.int32)
    signal, sigma = at_or_clean(schedule, lower)
    keep = at_or_clean(schedule, following)[0] / signal

    def step(predict, x, memory, now: TCDStep, noise):
        level = jnp.full(x.shape[:1], now.t)
        output = predict(x, level)
        x_start = ddpm.predict_start(schedule, output, x, level, parameterization)
        eps = ddpm.predict_noise(schedule, output, x, level, parameterization)
        x = now.keep * (now.signal * x_start + now.sigma * eps)
        if eta > 0.0:
            x = x + now.fresh * noise
        return x, memory, x_start

    return Sampler(
        lambda x: (),
        step,
        TCDStep(jnp.asarray(t), signal, sigma, keep, jnp.sqrt(jnp.maximum(1.0 - keep**2, 0.0))),
        add_noise=ddpm.diffuse(schedule),
        stochastic=eta > 0.0,
    )


class MeanFlowStep(NamedTuple):
    """One step from sigma to sigma_next, each number [num_steps]."""

    sigma: Any
    sigma_next: Any


def mean_flow(sigmas: np.ndarray) -> Sampler:
    """Make the sampler of MeanFlow: Euler's step with the mean velocity of the whole step.

    Its `predict` has a third argument, the level where the step ends: predict(x, sigma, sigma_next)
    is x_0 where the path ends if it goes on with that mean velocity. In the time t = sigma / (1 +
    sigma) of flow matching a step is z_r = z_t - (t - r) u(z_t, t, r).

    Raises ValueError for sigmas that do not decrease to 0.
    Source: Geng et al. 2025, equation 12.
    """
    sigma, sigma_next = ends_of_steps(sigmas)

    def step(predict, x, memory, now: MeanFlowStep, noise):
        level, end = (jnp.full(x.shape[:1], number) for number in now)
        x_start = predict(x, level, end).astype(x.dtype)
        return towards(x, x_start, now.sigma_next / now.sigma), memory, x_start

    return make_sampler(step, MeanFlowStep(sigma, sigma_next), sigmas)._replace(inverse=None)


class ConsistencyStep(NamedTuple):
    """One step: x_next = f(x, sigma) + sigma_next noise, each number [num_steps]."""

    sigma: Any
    sigma_next: Any


def consistency(sigmas: np.ndarray) -> Sampler:
    """Make the sampler of consistency models: x_next = f(x, sigma) + sigma_next eps, eps new noise.

    f, the denoiser of such a model, gives the image where the path of x ends. Raises ValueError for
    sigmas that do not decrease to 0. Source: Song et al. 2023, algorithm 1.
    """

    def step(predict, x, memory, now: ConsistencyStep, noise):
        image = denoise(predict, x, now.sigma)
        return image + now.sigma_next * noise, memory, image

    return make_sampler(step, ConsistencyStep(*ends_of_steps(sigmas)), sigmas, stochastic=True)


def _distilled_timesteps(num_timesteps: int, num_steps: int, original_steps: int) -> np.ndarray:
    """Choose num_steps of the timesteps that a model was distilled on, largest first."""
    if not 1 <= original_steps <= num_timesteps:
        raise ValueError(f"original_steps = {original_steps!r} should lie in [1, {num_timesteps}]")
    if not 1 <= num_steps <= original_steps:
        raise ValueError(
            f"num_steps = {num_steps!r} should lie in [1, {original_steps}], the original_steps"
        )
    known = np.arange(original_steps, 0, -1) * (num_timesteps // original_steps) - 1
    return known[np.arange(num_steps) * original_steps // num_steps].astype(np.int32)
