"""Samplers over noise levels: x = x_0 + sigma eps, dx/dsigma = (x - D(x, sigma)) / sigma.

Every factory takes sigmas, float64 [num_steps + 1], strictly decreasing to 0 (a grid of
discretization.py), and options; `predict(x, sigma [b])` is the denoiser D, the expected x_0. The
numbers of each step are computed in NumPy float64 and stored float32. Options that are numbers are
static: they decide what a step computes.
"""

import math
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.samplers.driver import Sampler, check_iterations
from diffusion_jax.diffusion.schedule import check_choice
from diffusion_jax.types import Predict

Steps = TypeVar("Steps", bound=tuple)


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
        x_start = _denoise(predict, x, now.sigma_hat)
        return _towards(x, x_start, now.sigma_next / now.sigma_hat), memory, x_start

    return _sampler(step, steps, sigmas, stochastic=s_churn > 0.0)


def heun(
    sigmas: np.ndarray,
    *,
    s_churn: float = 0.0,
    s_tmin: float = 0.0,
    s_tmax: float = math.inf,
    s_noise: float = 1.0,
) -> Sampler:
    """Make Heun's method: Euler's step, then again with the mean of the slopes at both ends.

    Order 2 for two network evaluations a step; the last step, to sigma = 0, is Euler's with one.
    Options as for `euler`.

    Raises ValueError for sigmas that do not decrease to 0 and for negative options.
    Source: Karras et al. 2022 (EDM), algorithm 2.
    """
    steps = _churned(sigmas, s_churn, s_tmin, s_tmax, s_noise)

    def step(predict, x, memory, now: ChurnedStep, noise):
        if s_churn > 0.0:
            x = x + now.churn * noise
        x_start = _denoise(predict, x, now.sigma_hat)
        guess = _towards(x, x_start, now.sigma_next / now.sigma_hat)

        def correct():
            slope = (x - x_start) / now.sigma_hat
            slope_next = (guess - _denoise(predict, guess, now.sigma_next)) / now.sigma_next
            return x + (now.sigma_next - now.sigma_hat) * 0.5 * (slope + slope_next)

        x = jax.lax.cond(now.sigma_next > 0.0, correct, lambda: guess)
        return x, memory, x_start

    return _sampler(step, steps, sigmas, stochastic=s_churn > 0.0)


class InversionStep(NamedTuple):
    """One step up, from the level sigma (0 in the first step) to sigma_next; each [num_steps]."""

    sigma: Any
    sigma_next: Any


def euler_inversion(sigmas: np.ndarray, *, iterations: int = 1) -> Sampler:
    """Make the way back, data to noise: x_next = x + (sigma_next - sigma) (x - D) / sigma_next.

    sigmas: the grid of the sampler to invert, still decreasing. `sample` with x_T = the clean data
    returns x at the largest level, from which `euler` leads back to the data.

    iterations: how often x_next is computed. The first time D is the one at x, which makes an error
      of the first order in the step. Each further time is a Newton step towards the x_next from
      which Euler's step leads to x, with the slope that Euler's step has on N(0, 1) data.

    Raises ValueError for sigmas that do not decrease to 0 and iterations below 1.
    Source: Song et al. 2021 (DDIM), equation 14; Pan et al. 2023 (AIDI) for the iterations.
    """
    check_iterations(iterations)
    sigma_next, sigma = (levels[::-1] for levels in _pairs(sigmas))

    def step(predict, x, memory, now: InversionStep, noise):
        def improve(i: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
            end, _ = found
            x_start = _denoise(predict, end, now.sigma_next)
            miss = x - _towards(end, x_start, now.sigma / now.sigma_next)
            slope = (1.0 + now.sigma * now.sigma_next) / (1.0 + now.sigma_next**2)
            return end + miss / jnp.where(i == 0, 1.0, slope), x_start

        x_next, x_start = jax.lax.fori_loop(0, iterations, improve, (x, x))
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
        x_start = _denoise(predict, x, now.sigma)
        x = _towards(x, x_start, now.sigma_down / now.sigma)
        if eta > 0.0:
            x = x + now.up * noise
        return x, memory, x_start

    return _sampler(step, steps, sigmas, stochastic=eta > 0.0)


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
        x_start = _denoise(predict, x, now.sigma)

        def look_ahead():
            middle = jnp.sqrt(now.sigma * now.sigma_down)
            return _denoise(predict, _towards(x, x_start, middle / now.sigma), middle)

        ahead = jax.lax.cond(now.sigma_down > 0.0, look_ahead, lambda: x_start)
        x = _towards(x, ahead, now.sigma_down / now.sigma)
        if eta > 0.0:
            x = x + now.up * noise
        return x, memory, x_start

    return _sampler(step, steps, sigmas, stochastic=eta > 0.0)


class MultistepStep(NamedTuple):
    """One step: x_next = keep x + gain D + bend (D - D_before) + up eps; each [num_steps]."""

    sigma: Any
    keep: Any
    gain: Any
    bend: Any
    up: Any


def dpmpp_2m(sigmas: np.ndarray) -> Sampler:
    """Make DPM-Solver++(2M): order 2 from the denoised image of the step before; deterministic.

    x_next = r x + (1 - r) (D + h / (2 h_before) (D - D_before)), with r = sigma_next / sigma and
    h = -log r. Its first step, and the last one to 0, are of the first order.

    Raises ValueError for sigmas that do not decrease to 0.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; sgm, DPMPP2MSampler.
    """
    return _multistep(sigmas, eta=0.0, s_noise=1.0, solver_type="midpoint")


def dpmpp_2m_sde(
    sigmas: np.ndarray,
    *,
    eta: float = 1.0,
    s_noise: float = 1.0,
    solver_type: Literal["midpoint", "heun"] = "midpoint",
) -> Sampler:
    """Make SDE-DPM-Solver++(2M): dpmpp_2m of the reverse SDE, with new noise in each step.

    eta: 1 is the SDE of Song et al. 2021, 0 the ODE (for midpoint, that is dpmpp_2m).
    s_noise: scales the noise.
    solver_type: how the difference of two denoised images enters, midpoint (1/2) or heun.

    Raises ValueError for sigmas that do not decrease to 0, negative options and unknown names.
    Source: Lu et al. 2022 (DPM-Solver++), section 4.3; k-diffusion, sample_dpmpp_2m_sde.
    """
    check_choice("solver_type", solver_type, ("midpoint", "heun"))
    return _multistep(sigmas, eta=eta, s_noise=s_noise, solver_type=solver_type)


def _multistep(sigmas: np.ndarray, *, eta: float, s_noise: float, solver_type: str) -> Sampler:
    _check_not_negative(eta=eta, s_noise=s_noise)
    sigma, sigma_next = _pairs(sigmas)
    ratio = sigma_next / sigma
    keep = ratio ** (1.0 + eta)
    h = -np.log(ratio[:-1])  # infinite in the last step, which is of the first order
    share = 0.5 * (1.0 - keep[:-1])
    if solver_type == "heun":
        share = 1.0 - (1.0 - keep[:-1]) / ((1.0 + eta) * h)
    bend = np.zeros_like(sigma)
    bend[1:-1] = share[1:] * h[1:] / h[:-1]
    up = s_noise * sigma_next * np.sqrt(1.0 - ratio ** (2.0 * eta))

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((), bool), jnp.zeros_like(x)

    def step(predict, x, memory, now: MultistepStep, noise):
        begun, before = memory
        x_start = _denoise(predict, x, now.sigma)
        bend = jnp.where(begun, now.bend, 0.0)
        x = now.keep * x + now.gain * x_start + bend * (x_start - before)
        if eta > 0.0:
            x = x + now.up * noise
        return x, (jnp.ones_like(begun), x_start), x_start

    steps = MultistepStep(sigma, keep, 1.0 - keep, bend, up)
    return _sampler(step, steps, sigmas, init, stochastic=eta > 0.0)


class LMSStep(NamedTuple):
    """One step: x_next = x + sum_j weights[k, j] d_j, where k slopes d of before are known.

    weights [num_steps, order, order]; d_0 is the slope of this step, d_1 of the step before.
    """

    sigma: Any
    weights: Any


def lms(sigmas: np.ndarray, *, order: int = 4) -> Sampler:
    """Make the linear multistep method: integrate the polynomial through the last `order` slopes.

    Adams-Bashforth on uneven levels; one network evaluation a step, deterministic. The first steps
    know fewer slopes and have the order of their number.

    Raises ValueError for sigmas that do not decrease to 0 and an order below 1.
    Source: k-diffusion, sample_lms; the integrals are exact here and numerical there.
    """
    if order < 1:
        raise ValueError(f"order = {order!r} should be at least 1")
    sigma, _ = _pairs(sigmas)
    levels = np.asarray(sigmas, np.float64)
    weights = np.zeros((len(sigma), order, order))
    for i in range(len(sigma)):
        for known in range(min(i + 1, order)):
            weights[i, known, : known + 1] = _adams_bashforth(levels[: i + 2], known + 1)

    def init(x: Array) -> tuple[Array, Array]:
        return jnp.zeros((), jnp.int32), jnp.zeros((order, *x.shape), x.dtype)

    def step(predict, x, memory, now: LMSStep, noise):
        known, slopes = memory
        x_start = _denoise(predict, x, now.sigma)
        slope = (x - x_start) / now.sigma
        slopes = jnp.concatenate([slope[None], slopes[:-1]])
        x = x + jnp.tensordot(now.weights[known], slopes, 1)
        return x, (jnp.minimum(known + 1, order - 1), slopes), x_start

    return _sampler(step, LMSStep(sigma, weights), sigmas, init)


def _adams_bashforth(levels: np.ndarray, count: int) -> np.ndarray:
    """Integrate Lagrange's polynomials over the last interval of levels, the newest first.

    Each is 1 at one of the `count` levels before the interval's end and 0 at the others. The
    integrals are the weights that are exact for every polynomial of a degree below `count`.
    """
    start, width = levels[-2], levels[-1] - levels[-2]
    nodes = (levels[-1 - count : -1][::-1] - start) / width
    degrees = np.arange(count)
    return width * np.linalg.solve(nodes[None, :] ** degrees[:, None], 1.0 / (degrees + 1.0))


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
    _check_not_negative(eta=eta, s_noise=s_noise)
    sigma, sigma_next = _pairs(sigmas)
    down, up = ancestral_levels(sigma, sigma_next, eta)
    return AncestralStep(sigma, down, s_noise * up)


def _churned(
    sigmas: np.ndarray, s_churn: float, s_tmin: float, s_tmax: float, s_noise: float
) -> ChurnedStep:
    _check_not_negative(s_churn=s_churn, s_tmin=s_tmin, s_tmax=s_tmax, s_noise=s_noise)
    sigma, sigma_next = _pairs(sigmas)
    growth = min(s_churn / len(sigma), 2.0**0.5 - 1.0)
    sigma_hat = sigma * (1.0 + growth * ((s_tmin <= sigma) & (sigma <= s_tmax)))
    return ChurnedStep(sigma, sigma_hat, sigma_next, s_noise * np.sqrt(sigma_hat**2 - sigma**2))


def _pairs(sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
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


def _check_not_negative(**options: float) -> None:
    for name, value in options.items():
        if not value >= 0.0:
            raise ValueError(f"{name} = {value!r} should not be negative")


def _sampler(
    step: Any,
    steps: tuple,
    sigmas: np.ndarray,
    init: Any = lambda x: (),
    *,
    stochastic: bool = False,
) -> Sampler:
    back = None if stochastic else partial(euler_inversion, sigmas)
    return Sampler(init, step, _float32(steps), _start, _add_noise, stochastic, back)


def _float32(steps: Steps) -> Steps:
    return jax.tree.map(lambda values: jnp.asarray(values, jnp.float32), steps)


def _start(noise: Array, first: Any) -> Array:
    # The variance of unit data plus noise: for sigma much above the data it is sigma.
    return jnp.sqrt(1.0 + first.sigma**2) * noise


def _add_noise(x_start: Array, now: Any, noise: Array) -> Array:
    return x_start + now.sigma * noise


def _denoise(predict: Predict, x: Array, sigma: Array) -> Array:
    return predict(x, jnp.full(x.shape[:1], sigma)).astype(x.dtype)


def _towards(x: Array, x_start: Array, ratio: Array) -> Array:
    """Move x to x_start until `ratio` of the noise is left: Euler's step, exact at ratio 0."""
    return ratio * x + (1.0 - ratio) * x_start
