"""Samplers over timesteps: x = sqrt(abar) x_0 + sqrt(1 - abar) eps, from t = T - 1 down to 0."""

from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.guidance import check_norm_threshold, norm_threshold
from diffusion_jax.diffusion.samplers.driver import Sampler, check_iterations, step_back
from diffusion_jax.diffusion.samplers.timesteps import Discretize, visited_timesteps
from diffusion_jax.diffusion.schedule import (
    Schedule,
    at_or_clean,
    check_choice,
    respace,
    step_betas,
)


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

    def step(predict, x, memory, now: DDIMStep, noise):
        t = jnp.full(x.shape[:1], now.t)
        output = predict(x, t)
        x_start = ddpm.predict_start(schedule, output, x, t, parameterization)
        eps = ddpm.predict_noise(schedule, output, x, t, parameterization)
        if clip_denoised:
            x_start = jnp.clip(x_start, -1.0, 1.0)
            if use_clipped_noise:
                eps = ddpm.predict_noise_from_start(schedule, x, t, x_start)
        x = now.signal_prev * x_start + now.direction * eps
        if eta > 0.0:
            x = x + temperature * now.sigma * noise
        return x, memory, x_start

    steps = _ddim_steps(schedule, visited, previous, eta)
    back = partial(
        ddim_inversion,
        schedule,
        num_steps,
        discretize=discretize,
        parameterization=parameterization,
    )
    return Sampler(
        lambda x: (),
        step,
        steps,
        add_noise=ddpm.diffuse(schedule),
        stochastic=eta > 0.0,
        inverse=None if eta > 0.0 else back,
    )


class DDIMInversionStep(NamedTuple):
    """One step up, from the level of signal_now and sigma_now to x = signal x_0 + sigma eps."""

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
    iterations: int = 1,
) -> Sampler:
    """Make the way back, data to noise: x_next = sqrt(abar_next) x_0 + sqrt(1 - abar_next) eps.

    `sample` with x_T = the clean data returns x_T, from which `ddim` with the same num_steps and
    discretize leads back to the data. The network is given the timestep at which a step ends, as on
    the way down (upstream's `encode` gives it the number of the step). Where ddim ends at timestep
    0, this begins there.

    iterations: how often x_next is computed. The first time eps is the one at x, which makes an
      error of the first order in the step; each further time corrects it, see driver.step_back.

    Raises ValueError for num_steps outside [1, T], iterations below 1 and unknown names.
    Source: Song et al. 2021 (DDIM), equation 14; Pan et al. 2023 (AIDI) for the iterations.
    """
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    check_iterations(iterations)
    visited, previous = visited_timesteps(schedule.num_timesteps, num_steps, discretize)

    def step(predict, x, memory, now: DDIMInversionStep, noise):
        t = jnp.full(x.shape[:1], now.t)

        def ddim_step(end: Array) -> tuple[Array, Array, Array]:
            output = predict(end, t)
            eps = ddpm.predict_noise(schedule, output, end, t, parameterization)
            guess = now.signal * (x - now.sigma_now * eps) / now.signal_now + now.sigma * eps
            x_start = ddpm.predict_start(schedule, output, end, t, parameterization)
            return now.signal_now * x_start + now.sigma_now * eps, x_start, guess

        slope = now.signal_now * now.signal + now.sigma_now * now.sigma
        x_next, x_start = step_back(ddim_step, x, slope, iterations)
        return x_next, memory, x_start

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


# Adams-Bashforth on an even grid: weights of this prediction, of the one before, ..., by how many
# of those before are known. With none, the first step looks ahead instead.
_WEIGHTS = np.array(
    [
        [1.0, 0.0, 0.0, 0.0],
        [3 / 2, -1 / 2, 0.0, 0.0],
        [23 / 12, -16 / 12, 5 / 12, 0.0],
        [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    ],
    np.float32,
)


class PLMSStep(NamedTuple):
    """One step from timestep t: x_prev = signal_prev x_0 + sigma_prev eps, each [num_steps].

    t_ahead is where the first step looks ahead: the timestep of the next step, and in the last
    step t itself.
    """

    t: Any
    t_ahead: Any
    signal_prev: Any
    sigma_prev: Any


def plms(
    schedule: Schedule,
    num_steps: int,
    *,
    eta: float = 0.0,
    discretize: Discretize = "uniform",
    parameterization: Literal["eps", "x0", "v"] = "eps",
    norm_limit: float | None = None,
) -> Sampler:
    """Make the PLMS sampler: DDIM's step with eps' = (55 eps - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24.

    eps_k is the prediction k steps before; while fewer are known the order is lower, and the first
    step (also of a segment) takes the mean of eps here and after a trial step: num_steps + 1
    network evaluations in all.

    eta: 0, the method is deterministic; there so that a config of the original loads.
    discretize: which timesteps are visited and where the last step ends, see visited_timesteps.
    norm_limit: hold the root mean square of the predicted x_0 below it, see
      guidance.norm_threshold (Stable Diffusion 2's dynamic_threshold); None leaves x_0 alone.

    Raises ValueError for eta other than 0, num_steps outside [1, T], norm_limit that is not
    positive, unknown names, and (unless the schedule is traced) where the first timestep visited
    has abar = 0: x_0 does not follow from eps there.
    Source: Liu et al. 2022 (PNDM), section 3.3; latent-diffusion, PLMSSampler.
    """
    if eta != 0.0:
        raise ValueError(f"eta = {eta!r} should be 0: PLMS is deterministic; ddim has an eta")
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    check_norm_threshold("norm_limit", norm_limit)
    visited, previous = visited_timesteps(schedule.num_timesteps, num_steps, discretize)
    visited, previous = visited[::-1], previous[::-1]
    _check_signal(schedule, int(visited[0]))
    ahead = np.append(visited[1:], visited[-1])
    steps = PLMSStep(jnp.asarray(visited), jnp.asarray(ahead), *at_or_clean(schedule, previous))

    def eps_at(predict, x: Array, t: Array) -> Array:
        t = jnp.full(x.shape[:1], t)
        eps = ddpm.predict_noise(schedule, predict(x, t), x, t, parameterization)
        return eps.astype(x.dtype)

    def move(x: Array, eps: Array, now: PLMSStep) -> tuple[Array, Array]:
        t = jnp.full(x.shape[:1], now.t)
        x_start = ddpm.predict_start_from_noise(schedule, x, t, eps)
        if norm_limit is not None:
            x_start = norm_threshold(x_start, norm_limit)
        return now.signal_prev * x_start + now.sigma_prev * eps, x_start

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((4, *x.shape), x.dtype)

    def step(predict, x, memory, now: PLMSStep, noise):
        known, before = memory
        eps = eps_at(predict, x, now.t)
        before = jnp.concatenate([eps[None], before[:-1]])

        def look_ahead():
            trial, _ = move(x, eps, now)
            return 0.5 * (eps + eps_at(predict, trial, now.t_ahead))

        def look_back():
            return jnp.tensordot(jnp.asarray(_WEIGHTS)[known], before, 1)

        x, x_start = move(x, jax.lax.cond(known == 0, look_ahead, look_back), now)
        return x, (jnp.minimum(known + 1, 3), before), x_start

    options: Any = {"discretize": discretize, "parameterization": parameterization}
    back = partial(ddim_inversion, schedule, num_steps, **options)
    return Sampler(init, step, steps, add_noise=ddpm.diffuse(schedule), inverse=back)


class DPMSolverStep(NamedTuple):
    """One step: x_next = keep x + gain x_0 + bend (x_0 - x_0 before), each number [num_steps]."""

    t: Array
    keep: Array
    gain: Array
    bend: Array


def dpm_solver(
    schedule: Schedule,
    num_steps: int,
    *,
    parameterization: Literal["eps", "x0", "v"] = "eps",
) -> Sampler:
    """Repeat DPMSolverSampler of stable-diffusion: DPM-Solver++(2M) on an even grid of timesteps.

    The num_steps + 1 timesteps go from T - 1 to 0, rounded to whole ones (there the network is
    given the fractions); the x that is returned has the little noise of timestep 0. The first step
    is of the first order, and so is the last one of fewer than 15. For less noise take dpmpp_2m,
    which ends at a denoised image.

    Raises ValueError for num_steps outside [1, T - 1] and unknown names.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; stable-diffusion, DPMSolverSampler.
    """
    check_choice("parameterization", parameterization, ("eps", "x0", "v"))
    T = schedule.num_timesteps
    if not 1 <= num_steps < T:
        raise ValueError(
            f"num_steps = {num_steps!r} should lie in [1, {T - 1}], one less than the timesteps of "
            "the schedule"
        )
    t = np.round(np.linspace(T - 1, 0, num_steps + 1)).astype(np.int32)
    signal, sigma = at_or_clean(schedule, t)
    keep = sigma[1:] / sigma[:-1]
    gain = signal[1:] - signal[:-1] * keep
    h = jnp.diff(jnp.log(signal) - jnp.log(sigma))
    bend = jnp.zeros_like(h).at[1:].set(0.5 * gain[1:] * h[1:] / h[:-1])
    if num_steps < 15:
        bend = bend.at[-1].set(0.0)

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((), bool), jnp.zeros_like(x)

    def step(predict, x, memory, now: DPMSolverStep, noise):
        begun, before = memory
        level = jnp.full(x.shape[:1], now.t)
        output = predict(x, level)
        x_start = ddpm.predict_start(schedule, output, x, level, parameterization).astype(x.dtype)
        bend = jnp.where(begun, now.bend, 0.0)
        x = now.keep * x + now.gain * x_start + bend * (x_start - before)
        return x, (jnp.ones_like(begun), x_start), x_start

    steps = DPMSolverStep(jnp.asarray(t[:-1]), keep, gain, bend)
    return Sampler(init, step, steps, add_noise=ddpm.diffuse(schedule))


def _check_signal(schedule: Schedule, t: int) -> None:
    signal = schedule.sqrt_alphas_cumprod
    if not isinstance(signal, Tracer) and float(signal[t]) == 0.0:
        raise ValueError(
            f"abar is 0 at timestep {t}, the first of plms, which goes from eps to x_0; take "
            "another discretize (uniform, leading), or ddim"
        )
