"""Samplers over noise levels: x = x_0 + sigma eps, dx/dsigma = (x - D(x, sigma)) / sigma.

Every factory takes sigmas, float64 [num_steps + 1], strictly decreasing to 0 (a grid of
discretization.py), and options; `predict(x, sigma [b])` is the denoiser D, the expected x_0. The
numbers of each step are computed in NumPy float64 and stored float32. Options that are numbers are
static: they decide what a step computes.
"""

import math
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.samplers.driver import Sampler, check_iterations, step_back
from diffusion_jax.diffusion.samplers.sigmas import edm
from diffusion_jax.types import Predict

Steps = TypeVar("Steps", bound=tuple)

# With x_0 ~ N(0, 1), x is proportional to sqrt(1 + sigma^2). A step of Heun's method from far above
# 1 down to sigma_next misses it by a share of sigma / (2 sigma_next^3), or sigma / 2 below 1: next
# to nothing on usual grids, and 37 times the deviation in 3 steps from the 4518 of zero terminal
# SNR. The longest step is longer than any from 80, and from 700 in more than a few steps.
LONGEST = 300.0


class ChurnedStep(NamedTuple):
    """From sigma up to sigma_hat by new noise, then down to sigma_next; each number [num_steps]."""

    sigma: Any
    sigma_hat: Any
    sigma_next: Any
    churn: Any  # standard deviation of the new noise


def euler(
    sigmas: np.ndarray,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Sampler:
    """Make Euler's method: x_next = x + (sigma_next - sigma) (x - D) / sigma. Order 1.

    s_churn: of new noise; before a step, sigma grows by the factor 1 + min(s_churn / num_steps,
      sqrt(2) - 1). 0 is the ODE, deterministic.
    s_tmin, s_tmax: the levels that grow, both ends included.
    s_noise: scales the new noise.

    Raises ValueError for sigmas that do not decrease to 0 and for negative options.
    Source: Karras et al. 2022 (EDM), algorithm 2 without its correction.
    """
    steps = _churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)

    def step(predict, x, memory, now: ChurnedStep, noise):
        if s_churn > 0.0:
            x = x + now.churn * noise
        x_start = denoise(predict, x, now.sigma_hat)
        return towards(x, x_start, now.sigma_next / now.sigma_hat), memory, x_start

    return make_sampler(step, steps, sigmas, stochastic=s_churn > 0.0)


def heun(
    sigmas: np.ndarray,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Sampler:
    """Make Heun's method: Euler's step, then again with the mean of the slopes at both ends.

    Order 2 for two network evaluations a step. The last step, to sigma = 0, is Euler's with one,
    and so is a step from sigma_hat > 300 max(sigma_next, 1), as from zero terminal SNR in a few
    steps: far above the data slopes change at the end of a step only, and their mean is worse.
    Options as for `euler`.

    Raises ValueError for sigmas that do not decrease to 0 and for negative options.
    Source: Karras et al. 2022 (EDM), algorithm 2.
    """
    steps = _churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)

    step = _heun_step(stochastic=s_churn > 0.0)
    return make_sampler(step, steps, sigmas, stochastic=s_churn > 0.0)


def _heun_step(*, stochastic: bool) -> Any:
    def step(predict, x, memory, now: ChurnedStep, noise):
        if stochastic:
            x = x + now.churn * noise
        x_start = denoise(predict, x, now.sigma_hat)
        guess = towards(x, x_start, now.sigma_next / now.sigma_hat)

        def correct():
            slope = (x - x_start) / now.sigma_hat
            slope_next = (guess - denoise(predict, guess, now.sigma_next)) / now.sigma_next
            return x + (now.sigma_next - now.sigma_hat) * 0.5 * (slope + slope_next)

        short = now.sigma_hat <= LONGEST * jnp.maximum(now.sigma_next, 1.0)
        x = jax.lax.cond((now.sigma_next > 0.0) & short, correct, lambda: guess)
        return x, memory, x_start

    return step


def restart(
    sigmas: np.ndarray,
    *,
    low: float = 0.1,
    high: float = 2.0,
    repeats: int = 1,
    restart_steps: int = 9,
    s_noise: float = 1.0,
) -> Sampler:
    """Make Restart: `heun`, which goes back up once it is near the level `low`, and down again.

    It goes up to `high` by new noise, which forgets the errors made above, and down in
    restart_steps steps on the grid of sigmas.edm, `repeats` times. All of these are steps of the
    sampler, which has num_steps + repeats * restart_steps of them.

    low: the restarts begin at the level of the grid that is nearest, but for 0.
    s_noise: scales the new noise.

    Raises ValueError for sigmas that do not decrease to 0 or have no level between the ends, a
    high that is not above that level, numbers below 1 and a negative s_noise.
    Source: Xu et al. 2023 (Restart Sampling), equation 2 and algorithm 1 with one interval.
    """
    check_not_negative(low=low, s_noise=s_noise)
    for name, value in (("repeats", repeats), ("restart_steps", restart_steps)):
        if value < 1:
            raise ValueError(f"{name} = {value!r} should be at least 1")
    sigma, sigma_next = ends_of_steps(sigmas)
    if len(sigma) < 2:
        raise ValueError("num_steps = 1 should be at least 2: restart begins between two steps")
    place = 1 + int(np.argmin(np.abs(sigma[1:] - low)))
    bottom = float(sigma[place])
    if not bottom < high < math.inf:
        raise ValueError(
            f"high = {high!r} should be finite and above {bottom:.6g}, the level of the grid that "
            f"is nearest to low = {low!r}; more steps have lower levels"
        )
    inner = edm(restart_steps + 1, sigma_min=bottom, sigma_max=high)[:-1]
    once = np.stack([[bottom, *inner[1:-1]], inner[:-1], inner[1:]])
    whole = np.stack([sigma, sigma, sigma_next])
    again = np.tile(once, repeats)
    rows = np.concatenate([whole[:, :place], again, whole[:, place:]], axis=1)
    churn = s_noise * np.sqrt(rows[1] ** 2 - rows[0] ** 2)
    step = _heun_step(stochastic=True)
    return make_sampler(
        step, ChurnedStep(rows[0], rows[1], rows[2], churn), sigmas, stochastic=True
    )


class InversionStep(NamedTuple):
    """One step up, from the level sigma (0 in the first step) to sigma_next; each [num_steps]."""

    sigma: Any
    sigma_next: Any


def euler_inversion(sigmas: np.ndarray, *, iterations: int = 1) -> Sampler:
    """Make the way back, data to noise: x_next = x + (sigma_next - sigma) (x - D) / sigma_next.

    sigmas: the grid of the sampler to invert, still decreasing. `sample` with x_T = the clean data
    returns x at the largest level, from which `euler` leads back to the data.

    iterations: how often x_next is computed. The first time D is the one at x, which makes an error
      of the first order in the step; each further time corrects it, see driver.step_back.

    Raises ValueError for sigmas that do not decrease to 0 and iterations below 1.
    Source: Song et al. 2021 (DDIM), equation 14; Pan et al. 2023 (AIDI) for the iterations.
    """
    check_iterations(iterations)
    sigma_next, sigma = (levels[::-1] for levels in ends_of_steps(sigmas))

    def step(predict, x, memory, now: InversionStep, noise):
        def euler_step(end: Array) -> tuple[Array, Array, Array]:
            x_start = denoise(predict, end, now.sigma_next)
            back = towards(end, x_start, now.sigma / now.sigma_next)
            return back, x_start, end + x - back

        slope = (1.0 + now.sigma * now.sigma_next) / (1.0 + now.sigma_next**2)
        x_next, x_start = step_back(euler_step, x, slope, iterations)
        return x_next, memory, x_start

    return Sampler(
        lambda x: (), step, _float32(InversionStep(sigma, sigma_next)), add_noise=_add_noise
    )


class AncestralStep(NamedTuple):
    """From sigma down to sigma_down without noise, then up by noise; each number [num_steps]."""

    sigma: Any
    sigma_down: Any
    up: Any  # standard deviation of the noise


def euler_ancestral(sigmas: np.ndarray, *, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Make Euler's method to sigma_down, then noise up to sigma_next; see ancestral_levels.

    eta: how much of the way is noise; 0 is `euler`. s_noise: scales that noise.

    Raises ValueError for sigmas that do not decrease to 0 and for negative options.
    Source: k-diffusion, sample_euler_ancestral; sgm, EulerAncestralSampler.
    """
    steps = _ancestral(sigmas, eta, s_noise)

    def step(predict, x, memory, now: AncestralStep, noise):
        x_start = denoise(predict, x, now.sigma)
        x = towards(x, x_start, now.sigma_down / now.sigma)
        if eta > 0.0:
            x = x + now.up * noise
        return x, memory, x_start

    return make_sampler(step, steps, sigmas, stochastic=eta > 0.0)


def dpmpp_2s_ancestral(sigmas: np.ndarray, *, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Make DPM-Solver++(2S) to sigma_down, then noise up to sigma_next; see ancestral_levels.

    Its step exponentiates: x_down = r x + (1 - r) D', with r = sigma_down / sigma and D' the
    denoised image at the geometric mean of both levels. Order 2 (of the ODE) for two network
    evaluations a step; the last step, to 0, takes one. Options as for `euler_ancestral`.

    Raises ValueError for sigmas that do not decrease to 0 and for negative options.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2; sgm, DPMPP2SAncestralSampler.
    """
    steps = _ancestral(sigmas, eta, s_noise)

    def step(predict, x, memory, now: AncestralStep, noise):
        x_start = denoise(predict, x, now.sigma)

        def look_ahead():
            middle = jnp.sqrt(now.sigma * now.sigma_down)
            return denoise(predict, towards(x, x_start, middle / now.sigma), middle)

        ahead = jax.lax.cond(now.sigma_down > 0.0, look_ahead, lambda: x_start)
        x = towards(x, ahead, now.sigma_down / now.sigma)
        if eta > 0.0:
            x = x + now.up * noise
        return x, memory, x_start

    return make_sampler(step, steps, sigmas, stochastic=eta > 0.0)


class SplitStep(NamedTuple):
    """One of two steps: to the middle of a step of the grid, or from its middle to its end.

    The first one is x_next = keep x + (1 - keep) D + up noise, and so is a second one where
    nothing is known of the first. Else the second one starts where the first did:
    x_next = keep_whole x_before + (1 - keep_whole) D + up_before noise_before + up_now noise.
    second is 1 in second steps and 0 in others; all fields are [num_steps].
    """

    sigma: Any
    keep: Any
    up: Any
    second: Any
    keep_whole: Any
    up_before: Any
    up_now: Any


def dpmpp_sde(sigmas: np.ndarray, *, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Make DPM-Solver++(2S) of the reverse SDE: noise in the middle of a step and at its end.

    x_end = r x + (1 - r) D' + noise, with r = sigma_down / sigma and D' the denoised image of the
    x that the SDE has at the geometric mean of both levels. Each evaluation is a step of the
    sampler, which has 2 num_steps - 1 of them; the last one, to 0, ends at D.

    eta: how much of the way is noise, see ancestral_levels; 1 is the SDE. s_noise: scales it.

    Both noises of a step are stretches of one Brownian motion, whose time is sigma.

    Raises ValueError for sigmas that do not decrease to 0, an eta that is not positive and a
    negative s_noise.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 1 with r = 1/2, and section 4.3;
    k-diffusion, sample_dpmpp_sde.
    """
    check_not_negative(s_noise=s_noise)
    if not eta > 0.0:
        raise ValueError(f"eta = {eta!r} should be positive; dpmpp_2s_ancestral has eta = 0")
    sigma, end = ends_of_steps(sigmas)
    middle = np.sqrt(sigma * end)
    down, up = ancestral_levels(sigma, middle, eta)
    down_whole, up_whole = ancestral_levels(sigma, end, eta)
    share = (sigma - middle)[:-1] / (sigma - end)[:-1]
    down_half, up_half = ancestral_levels(middle[:-1], end[:-1], eta)
    none, whole = np.zeros_like(sigma), up_whole[:-1]
    first = np.stack([sigma, down / sigma, up, none, none, none, none])
    second = np.stack(
        [
            middle[:-1],
            down_half / middle[:-1],
            up_half,
            np.ones_like(share),
            (down_whole / sigma)[:-1],
            np.sqrt(share) * whole,
            np.sqrt(1.0 - share) * whole,
        ]
    )
    rows = np.empty((7, 2 * len(sigma) - 1))
    rows[:, ::2], rows[:, 1::2] = first, second
    rows[[2, 5, 6]] *= s_noise

    def init(x: Array) -> Any:
        return jnp.zeros((), bool), x, x

    def step(predict, x, memory, now: SplitStep, noise):
        begun, x_before, noise_before = memory
        x_start = denoise(predict, x, now.sigma)
        plain = towards(x, x_start, now.keep) + now.up * noise
        both = now.up_before * noise_before + now.up_now * noise
        whole = towards(x_before, x_start, now.keep_whole) + both
        x_next = jnp.where(begun & (now.second > 0.0), whole, plain)
        return x_next, (jnp.ones_like(begun), x, noise), x_start

    return make_sampler(step, SplitStep(*rows), sigmas, init, stochastic=True)


def ancestral_levels(
    sigma: np.ndarray | float, sigma_next: np.ndarray | float, eta: float
) -> tuple[np.ndarray, np.ndarray]:
    """Split a step: sigma_up = eta sigma_next sqrt(1 - (sigma_next / sigma)^2), at most sigma_next.

    Returns: (sigma_down, sigma_up) float64, with sigma_down^2 + sigma_up^2 = sigma_next^2. eta = 1
    has the variance of q(x_next | x, x_0). Source: k-diffusion, get_ancestral_step.
    """
    sigma, sigma_next = np.asarray(sigma, np.float64), np.asarray(sigma_next, np.float64)
    up = np.minimum(sigma_next, eta * sigma_next * np.sqrt(1.0 - (sigma_next / sigma) ** 2))
    return np.asarray(np.sqrt(sigma_next**2 - up**2)), np.asarray(up)


def _ancestral(sigmas: np.ndarray, eta: float, s_noise: float) -> AncestralStep:
    check_not_negative(eta=eta, s_noise=s_noise)
    sigma, sigma_next = ends_of_steps(sigmas)
    down, up = ancestral_levels(sigma, sigma_next, eta)
    return AncestralStep(sigma, down, s_noise * up)


def _churned(
    sigmas: np.ndarray, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> ChurnedStep:
    check_not_negative(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    sigma, sigma_next = ends_of_steps(sigmas)
    growth = min(s_churn / len(sigma), 2.0**0.5 - 1.0)
    sigma_hat = sigma * (1.0 + growth * ((s_tmin <= sigma) & (sigma <= s_tmax)))
    return ChurnedStep(sigma, sigma_hat, sigma_next, s_noise * np.sqrt(sigma_hat**2 - sigma**2))


def ends_of_steps(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Check a grid and cut it into the two ends of each step, float64 [num_steps] both."""
    sigmas = np.asarray(sigmas, np.float64)
    if (
        sigmas.ndim != 1
        or sigmas.size < 2
        or not np.all(np.isfinite(sigmas))
        or not np.all(np.diff(sigmas) < 0.0)
        or sigmas[-1] != 0.0
    ):
        raise ValueError(
            f"sigmas = {sigmas} should be at least two finite numbers, strictly decreasing to 0"
        )
    return sigmas[:-1], sigmas[1:]


def check_not_negative(**options: float) -> None:
    """Raise ValueError for an option that is negative or no number."""
    for name, value in options.items():
        if not value >= 0.0:
            raise ValueError(f"{name} = {value!r} should not be negative")


def make_sampler(
    step: Any,
    steps: tuple,
    sigmas: np.ndarray,
    init: Any = lambda x: (),
    *,
    stochastic: bool = False,
) -> Sampler:
    """Make a Sampler of x = x_0 + sigma eps; one without noise is inverted as `euler` is."""
    back = None if stochastic else partial(euler_inversion, sigmas)
    return Sampler(init, step, _float32(steps), _start, _add_noise, stochastic, back)


def _float32(steps: Steps) -> Steps:
    return jax.tree.map(lambda values: jnp.asarray(values, jnp.float32), steps)


def _start(noise: Array, first: Any) -> Array:
    # The variance of unit data plus noise: for sigma much above the data it is sigma.
    return jnp.sqrt(1.0 + first.sigma**2) * noise


def _add_noise(x_start: Array, now: Any, noise: Array) -> Array:
    return x_start + now.sigma * noise


def denoise(predict: Predict, x: Array, sigma: Array) -> Array:
    """Compute D(x, sigma), all of the batch at one level, in the dtype of x."""
    return predict(x, jnp.full(x.shape[:1], sigma)).astype(x.dtype)


def towards(x: Array, x_start: Array, ratio: Array) -> Array:
    """Move x to x_start until `ratio` of the noise is left: Euler's step, exact at ratio 0."""
    return ratio * x + (1.0 - ratio) * x_start
