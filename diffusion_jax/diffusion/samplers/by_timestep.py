"""Samplers as (init, step) pairs for the driver; which timesteps they visit is a table of names."""

from collections.abc import Callable
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.ddpm import inpaint
from diffusion_jax.diffusion.samplers.driver import (
    Sampler,
    Samples,
    img2img,
    initial_noise,
    sample,
    segment,
    start_from_image,
    start_from_noise,
)
from diffusion_jax.diffusion.schedule import (
    Schedule,
    at_or_clean,
    check_choice,
    respace,
    step_betas,
)
from diffusion_jax.randomness import noise_like

__all__ = [
    "DISCRETIZATIONS",
    "Sampler",
    "Samples",
    "ddim",
    "ddim_inversion",
    "ddpm_ancestral",
    "img2img",
    "initial_noise",
    "inpaint",
    "sample",
    "segment",
    "start_from_image",
    "start_from_noise",
    "visited_timesteps",
]

# Wherever a config chooses, so that a wrong name is found before anything runs.
Discretize = Literal["uniform", "quad", "leading", "trailing", "linspace"]


def ddpm_ancestral(
    schedule: Schedule,
    num_steps: int,
    *,
    discretize: Discretize = "linspace",
    parameterization: Literal["eps", "x0", "v"] = "eps",
    clip_denoised: bool = True,
    variance: Literal["posterior", "fixed_small", "fixed_large", "learned_range"] = "posterior",
    temperature: float | Float[Array, ""] | Float[Array, "S"] = 1.0,
) -> Sampler:
    """Make the sampler of DDPM, x_{t-1} ~ p(x_{t-1} | x_t), on all or some of the timesteps.

    num_steps: how many timesteps are visited; fewer than the schedule's run on a respaced one.
    discretize: which, see visited_timesteps; num_steps = T is every timestep whatever it says.
    temperature: of the noise; a number, or one for each visited timestep, smallest first.
    Ends at the clean image (abar = 1). The rest is as in ddpm.p_mean_variance.

    Raises ValueError for num_steps outside [1, T] and unknown names.
    Source: Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021, section 4, for fewer steps.
    """
    visited, _ = visited_timesteps(schedule.num_timesteps, num_steps, discretize)
    return ddpm.ancestral(
        respace(schedule, visited),
        timesteps=visited,
        parameterization=parameterization,
        clip_denoised=clip_denoised,
        variance=variance,
        temperature=temperature,
    )


class DDIMStep(NamedTuple):
    """One step: x_prev = signal_prev x_0 + direction eps + sigma noise, each number [num_steps]."""

    t: Array
    signal_prev: Array
    direction: Array
    sigma: Array


def ddim(
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    discretize: Discretize = "uniform",
    parameterization: Literal["eps", "x0", "v"] = "eps",
    clip_denoised: bool = False,
    use_clipped_noise: bool = True,
    temperature: float = 1.0,
) -> Sampler:
    """Make the DDIM sampler: x_prev = sqrt(abar_prev) x_0 + sqrt(1 - abar_prev - sigma^2) eps + ...

    eta: sigma = eta sqrt((1 - abar_prev) / (1 - abar) (1 - abar / abar_prev)); 0 is deterministic,
      1 has the posterior's variance (DDPM).
    discretize: which timesteps are visited and where the last step ends, see visited_timesteps.
    clip_denoised: clip the predicted x_0 to [-1, 1]; for pixels, not for latents. Upstream's DDIM
      never clips.
    use_clipped_noise: after clipping, eps is the one that leads from the clipped x_0 to x_t
      (guided-diffusion); otherwise the network's own (diffusers).
    temperature: scales the noise of eta > 0.

    Raises ValueError for num_steps outside [1, T], eta outside [0, 1] and unknown names.
    Source: Song et al. 2021 (DDIM), equations 12 and 16.
    """
    if not 0.0 <= eta <= 1.0:
        raise ValueError(f"eta = {eta!r} should lie in [0, 1]")
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    visited, previous = visited_timesteps(schedule.num_timesteps, num_steps, discretize)

    def step(predict, x, memory, now: DDIMStep, keys):
        t = jnp.full(x.shape[:1], now.t)
        output = predict(x, t)
        x_start = ddpm.predict_start(schedule, output, x, t, parameterization)
        noise = ddpm.predict_noise(schedule, output, x, t, parameterization)
        if clip_denoised:
            x_start = jnp.clip(x_start, -1.0, 1.0)
            if use_clipped_noise:
                noise = ddpm.predict_noise_from_start(schedule, x, t, x_start)
        x = now.signal_prev * x_start + now.direction * noise
        if eta > 0.0:
            x = x + temperature * now.sigma * noise_like(keys, x.shape[1:])
        return x, memory, x_start

    steps = _ddim_steps(schedule, visited, previous, eta)
    return Sampler(lambda x: (), step, steps, add_noise=ddpm.diffuse(schedule))


class DDIMInversionStep(NamedTuple):
    """One step up: x = signal x_0 + sigma eps, from the level of signal_now and sigma_now."""

    t: Array
    signal_now: Array
    sigma_now: Array
    signal: Array
    sigma: Array


def ddim_inversion(
    schedule: Schedule,
    num_steps: int,
    *,
    discretize: Discretize = "uniform",
    parameterization: Literal["eps", "x0", "v"] = "eps",
) -> Sampler:
    """Make the way back, data to noise: x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next) eps.

    `sample` with x_T = the clean data returns x_T, from which `ddim` with the same num_steps and
    discretize leads back to the data, but for an error of the first order in the step. The network
    is told the timestep where a step ends, as on the way down (upstream's `encode` tells it the
    number of the step); what it predicts is turned into eps at that timestep. Where ddim ends at
    timestep 0, this begins there.

    Raises ValueError for num_steps outside [1, T] and unknown names.
    Source: Song et al. 2021 (DDIM), section 4.3, equation 14.
    """
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    visited, previous = visited_timesteps(schedule.num_timesteps, num_steps, discretize)

    def step(predict, x, memory, now: DDIMInversionStep, keys):
        t = jnp.full(x.shape[:1], now.t)
        noise = ddpm.predict_noise(schedule, predict(x, t), x, t, parameterization)
        x_start = (x - now.sigma_now * noise) / now.signal_now
        return now.signal * x_start + now.sigma * noise, memory, x_start

    def add_noise(x_start, now: DDIMInversionStep, noise):
        return now.signal_now * x_start + now.sigma_now * noise

    levels = (*at_or_clean(schedule, previous), *at_or_clean(schedule, visited))
    steps = DDIMInversionStep(jnp.asarray(visited), *levels)
    return Sampler(lambda x: (), step, steps, add_noise=add_noise)


def _ddim_steps(
    schedule: Schedule, visited: np.ndarray, previous: np.ndarray, eta: float
) -> DDIMStep:
    """Compute the numbers of each step, first step first (the largest timestep)."""
    visited, previous = visited[::-1], previous[::-1]
    noise_level = schedule.sqrt_one_minus_alphas_cumprod[visited]
    signal_prev, noise_level_prev = at_or_clean(schedule, previous)
    sigma = eta * noise_level_prev / noise_level * jnp.sqrt(step_betas(schedule, visited, previous))
    # Rounding may leave less than nothing when eta = 1.
    direction = jnp.sqrt(jnp.maximum(noise_level_prev**2 - sigma**2, 0.0))
    return DDIMStep(jnp.asarray(visited), signal_prev, direction, sigma)


def visited_timesteps(
    num_timesteps: int, num_steps: int, discretize: str
) -> tuple[np.ndarray, np.ndarray]:
    """Choose num_steps of T timesteps, and where the step from each of them ends.

    Returns: (visited, previous), int32 [num_steps], smallest first. visited increases strictly;
      previous[i] is visited[i - 1], and previous[0] is 0 or, for the clean image, -1.
    discretize:
      uniform: floor(i T / S) + 1, upstream's "uniform" where S divides T; ends at timestep 0.
        Upstream takes more than S steps where S does not divide T and leaves the schedule for
        S = T, where this visits 0 ... T - 1 and ends clean.
      quad: squares of an even grid up to 0.8 T, plus 1, as upstream; ends at timestep 0. Where
        upstream would visit a timestep twice, the next free one is taken.
      leading: i floor(T / S), the even grid from 0; ends clean (diffusers).
      trailing: the even grid of spacing T / S that ends at T - 1; ends clean (Lin et al. 2023).
      linspace: S points from 0 to T - 1, both included, rounded; one step is T - 1; ends clean.

    Raises ValueError for num_steps outside [1, T] and for an unknown name.
    """
    check_choice("discretize", discretize, tuple(DISCRETIZATIONS))
    if not 1 <= num_steps <= num_timesteps:
        raise ValueError(
            f"num_steps = {num_steps!r} should lie in [1, {num_timesteps}], "
            "the timesteps of the schedule"
        )
    if num_steps == num_timesteps:
        visited = np.arange(num_timesteps, dtype=np.int32)
    else:
        visited = DISCRETIZATIONS[discretize](num_timesteps, num_steps).astype(np.int32)
    stops_short = discretize in ("uniform", "quad") and visited[0] > 0
    previous = np.concatenate([[0 if stops_short else -1], visited[:-1]]).astype(np.int32)
    return visited, previous


def _uniform(T: int, S: int) -> np.ndarray:
    return np.arange(S) * T // S + 1


def _quad(T: int, S: int) -> np.ndarray:
    visited = (np.linspace(0.0, np.sqrt(0.8 * T), S) ** 2).astype(np.int64) + 1
    offset = np.arange(S)
    # Push repeated timesteps up to the next free one, and keep room for those above.
    return np.minimum(np.maximum.accumulate(visited - offset) + offset, T - S + offset)


def _leading(T: int, S: int) -> np.ndarray:
    return np.arange(S) * (T // S)


def _trailing(T: int, S: int) -> np.ndarray:
    return np.round(np.arange(1, S + 1) * (T / S)) - 1


def _linspace(T: int, S: int) -> np.ndarray:
    return np.round(np.linspace(T - 1, 0, S))[::-1]


# (num_timesteps, num_steps) -> timesteps, smallest first
DISCRETIZATIONS: dict[str, Callable[[int, int], np.ndarray]] = {
    "uniform": _uniform,
    "quad": _quad,
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
}
