"""Samplers over noise levels that remember what the network predicted in the steps before.

Each draws a polynomial in lambda = -log(sigma) through its last predictions and integrates it over
the step; only `lms` draws it in sigma. The rest is as in by_level.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from diffusion_jax.diffusion.samplers.by_level import (
    check_not_negative,
    denoise,
    ends_of_steps,
    make_sampler,
)
from diffusion_jax.diffusion.samplers.driver import Sampler
from diffusion_jax.diffusion.schedule import check_choice

# (where the predictions were made, the newest first, with 0 and 1 for the two ends of the step;
# the width c of the step) -> weights of the predictions
Weigh = Callable[[np.ndarray, float], np.ndarray]


class MultistepStep(NamedTuple):
    """One step: x_next = keep x + sum_j weights[known, j] F_j + up eps.

    F_0 is the prediction of this step and F_j the one j steps before; `known` counts those before.
    weights is [num_steps, order, order], the other fields are [num_steps].
    """

    sigma: Any
    keep: Any
    weights: Any
    up: Any


def dpmpp_2m(sigmas: np.ndarray) -> Sampler:
    """Make DPM-Solver++(2M): order 2 from the denoised image of the step before; deterministic.

    x_next = r x + (1 - r) (D + h / (2 h_before) (D - D_before)), with r = sigma_next / sigma and
    h = -log r. Its first step, and the last one to 0, are of the first order.

    Raises ValueError for sigmas that do not decrease to 0.
    Source: Lu et al. 2022 (DPM-Solver++), algorithm 2; sgm, DPMPP2MSampler.
    """
    return _of_images(sigmas, _midpoint, order=2)


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
    weigh = _midpoint if solver_type == "midpoint" else exponential_weights
    return _of_images(sigmas, weigh, order=2, eta=eta, s_noise=s_noise)


def dpmpp_3m_sde(sigmas: np.ndarray, *, eta: float = 1.0, s_noise: float = 1.0) -> Sampler:
    """Make DPM-Solver++(3M) of the reverse SDE: a parabola through three denoised images.

    x_next = e^(-c) x + int_0^1 c e^(-c (1 - u)) D(u) du + noise, with c = (1 + eta) h and
    h = log(sigma / sigma_next). The first and the last two steps are of lower orders. k-diffusion
    weighs the second difference by half of its integral, and is of the second order for eta = 0.

    eta, s_noise: as for dpmpp_2m_sde.

    Raises ValueError for sigmas that do not decrease to 0 and for negative options.
    Source: Lu et al. 2022 (DPM-Solver++), section 4.3, with a polynomial of degree 2;
    k-diffusion, sample_dpmpp_3m_sde.
    """
    return _of_images(sigmas, exponential_weights, order=3, eta=eta, s_noise=s_noise)


def _of_images(
    sigmas: np.ndarray, weigh: Weigh, *, order: int, eta: float = 0.0, s_noise: float = 1.0
) -> Sampler:
    """Solve the SDE of eta with a polynomial through the last `order` denoised images."""
    check_not_negative(eta=eta, s_noise=s_noise)
    sigma, sigma_next = ends_of_steps(sigmas)
    ratio = sigma_next / sigma
    weights = _table(sigmas, order, lambda places, h: weigh(places, (1.0 + eta) * h), last=1.0)
    up = s_noise * sigma_next * np.sqrt(1.0 - ratio ** (2.0 * eta))
    steps = MultistepStep(sigma, ratio ** (1.0 + eta), weights, up)
    return _multistep(sigmas, steps, stochastic=eta > 0.0)


def lms(sigmas: np.ndarray, *, order: int = 4) -> Sampler:
    """Make the linear multistep method: integrate the polynomial through the last `order` slopes.

    Adams-Bashforth on uneven levels; one network evaluation a step, deterministic. The first steps
    know fewer slopes and have the order of their number.

    Raises ValueError for sigmas that do not decrease to 0 and an order below 1.
    Source: k-diffusion, sample_lms; the integrals are exact here and numerical there.
    """
    _check_order(order)
    sigma, _ = ends_of_steps(sigmas)
    levels = np.asarray(sigmas, np.float64)
    weights = np.zeros((len(sigma), order, order))
    for i in range(len(sigma)):
        for known in range(min(i + 1, order)):
            weights[i, known, : known + 1] = _adams_bashforth(levels[: i + 2], known + 1)
    return _of_slopes(sigmas, weights)


def deis(sigmas: np.ndarray, *, order: int = 3) -> Sampler:
    """Make DEIS: integrate over sigma the polynomial in log(sigma) through the last slopes.

    The slope is the predicted noise, (x - D) / sigma. One network evaluation a step,
    deterministic. The first and the last steps know, or take, fewer slopes; the last one is
    Euler's, to D.

    order: how many slopes; 1 is `euler`.

    Raises ValueError for sigmas that do not decrease to 0 and an order below 1.
    Source: Zhang and Chen 2023 (DEIS), equation 15 (tAB-DEIS), with log(sigma) for the time t.
    """
    _check_order(order)
    sigma, sigma_next = ends_of_steps(sigmas)
    weights = _table(sigmas, order, lambda places, h: exponential_weights(places, -h))
    weights *= sigma_next[:, None, None]
    weights[-1, :, 0] = -sigma[-1]
    return _of_slopes(sigmas, weights)


def _of_slopes(sigmas: np.ndarray, weights: np.ndarray) -> Sampler:
    sigma, _ = ends_of_steps(sigmas)
    steps = MultistepStep(sigma, np.ones_like(sigma), weights, np.zeros_like(sigma))
    return _multistep(sigmas, steps, slopes=True)


def _multistep(
    sigmas: np.ndarray, steps: MultistepStep, *, slopes: bool = False, stochastic: bool = False
) -> Sampler:
    order = steps.weights.shape[-1]

    def init(x: Array) -> tuple[Array, tuple[Array, ...]]:
        return jnp.zeros((), jnp.int32), (jnp.zeros_like(x),) * (order - 1)

    def step(predict, x, memory, now: MultistepStep, noise):
        known, before = memory
        x_start = denoise(predict, x, now.sigma)
        newest = (x - x_start) / now.sigma if slopes else x_start
        predictions = (newest, *before)
        x = now.keep * x + _combine(now.weights[known], predictions)
        if stochastic:
            x = x + now.up * noise
        return x, (jnp.minimum(known + 1, order - 1), predictions[:-1]), x_start

    return make_sampler(step, steps, sigmas, init, stochastic=stochastic)


class UniPCStep(NamedTuple):
    """One step: x is corrected to x_c, and from there goes to x_next.

    x_c = keep_c x_before + sum_j correct[known, j] D_j, where x_before is the x_c of the step
    before, and x_next = keep x_c + sum_j weights[known, j] D_j. D_0 is the denoised image of this
    step and D_j the one j steps before; `known` counts those before. correct is
    [num_steps, order + 1, order + 1], weights [num_steps, order + 1, order].
    """

    sigma: Any
    keep: Any
    weights: Any
    keep_c: Any
    correct: Any


def unipc(sigmas: np.ndarray, *, order: int = 2) -> Sampler:
    """Make UniPC: predict with `order` denoised images, then correct with one more; deterministic.

    The correction of a step takes the denoised image at its end, which the next step needs
    anyway: one network evaluation a step, and the order of convergence is order + 1. The first
    steps know fewer images, and the last ones take fewer; the last x is not corrected.

    order: 2 for guided sampling, 3 without.

    Raises ValueError for sigmas that do not decrease to 0 and an order below 1.
    Source: Zhao et al. 2023 (UniPC), algorithms 5 to 8 with B(h) = e^h - 1.
    """
    _check_order(order)
    sigma, sigma_next = ends_of_steps(sigmas)
    count, levels = len(sigma), -np.log(sigma)
    keep = sigma_next / sigma
    weights = np.zeros((count, order + 1, order))
    weights[:, :order] = _table(sigmas, order, _predicting, last=1.0)
    weights[:, order] = weights[:, order - 1]
    correct = np.zeros((count, order + 1, order + 1))
    for i in range(1, count):
        h = levels[i] - levels[i - 1]
        for known in range(1, min(i, order) + 1):
            used = min(known, count - i + 1)  # as many as the prediction of that step
            places = (levels[i - used : i + 1][::-1] - levels[i - 1]) / h
            correct[i, known, : used + 1] = _correcting(places, h)

    def init(x: Array) -> Any:
        return jnp.zeros((), jnp.int32), x, (jnp.zeros_like(x),) * order

    def step(predict, x, memory, now: UniPCStep, noise):
        known, x_before, before = memory
        x_start = denoise(predict, x, now.sigma)
        images = (x_start, *before)
        corrected = now.keep_c * x_before + _combine(now.correct[known], images)
        x = jnp.where(known > 0, corrected, x)
        x_next = now.keep * x + _combine(now.weights[known], images[:-1])
        return x_next, (jnp.minimum(known + 1, order), x, images[:-1]), x_start

    steps = UniPCStep(sigma, keep, weights, np.append(0.0, keep[:-1]), correct)
    return make_sampler(step, steps, sigmas, init)


def exponential_weights(places: np.ndarray, c: float) -> np.ndarray:
    """Integrate Lagrange's polynomials: w_j = int_0^1 c e^(-c (1 - u)) L_j(u) du.

    L_j is 1 at places[j] and 0 at the other places; a step goes from u = 0 to u = 1. The weights
    are exact for predictions that are polynomials in u of a degree below their number.
    """
    nodes, gauss = _gauss_legendre()
    u = 0.5 * (nodes + 1.0)
    density = 0.5 * gauss * c * np.exp(-c * (1.0 - u))
    degrees = np.arange(len(places))[:, None]
    return np.linalg.solve(places[None, :] ** degrees, u[None, :] ** degrees @ density)


@functools.cache
def _gauss_legendre() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of a quadrature over [-1, 1], which take longer than what they are for."""
    return np.polynomial.legendre.leggauss(64)


def _midpoint(places: np.ndarray, c: float) -> np.ndarray:
    """Weigh two predictions by the value that their line has in the middle of the step."""
    gain = -math.expm1(-c)
    if len(places) == 1:
        return np.array([gain])
    bend = 0.5 * gain / (places[0] - places[1])
    return np.array([gain + bend, -bend])


def _predicting(places: np.ndarray, h: float) -> np.ndarray:
    return (_midpoint if len(places) == 2 else exponential_weights)(places, h)


def _correcting(places: np.ndarray, h: float) -> np.ndarray:
    if len(places) == 2:  # the images at both ends, one half each
        return np.full(2, -0.5 * math.expm1(-h))
    return exponential_weights(places, h)


def _table(sigmas: np.ndarray, order: int, weigh: Weigh, last: float = 0.0) -> np.ndarray:
    """Tabulate the weights of each step by how many predictions are known: MultistepStep.weights.

    weigh: (places, h) -> weights, where h is the step in lambda. A step takes no more predictions
    than steps remain, and the last step takes one, whose weight is `last`.
    """
    sigma, _ = ends_of_steps(sigmas)
    levels, count = -np.log(sigma), len(sigma)
    weights = np.zeros((count, order, order))
    weights[-1, :, 0] = last
    for i in range(count - 1):
        h = levels[i + 1] - levels[i]
        for known in range(min(i + 1, order)):
            used = min(known + 1, count - i)
            places = (levels[i - used + 1 : i + 1][::-1] - levels[i]) / h
            weights[i, known, :used] = weigh(places, h)
    return weights


def _combine(weights: Array, predictions: Sequence[Array]) -> Array:
    # Not a product of matrices, which some devices compute in lower precision.
    return sum((weights[j] * value for j, value in enumerate(predictions)), jnp.float32(0.0))


def _adams_bashforth(levels: np.ndarray, count: int) -> np.ndarray:
    """Integrate Lagrange's polynomials over the last interval of levels, the newest first.

    Each is 1 at one of the `count` levels before the interval's end and 0 at the others. The
    integrals are the weights that are exact for every polynomial of a degree below `count`.
    """
    start, width = levels[-2], levels[-1] - levels[-2]
    nodes = (levels[-1 - count : -1][::-1] - start) / width
    degrees = np.arange(count)
    return width * np.linalg.solve(nodes[None, :] ** degrees[:, None], 1.0 / (degrees + 1.0))


def _check_order(order: int) -> None:
    if order < 1:
        raise ValueError(f"order = {order!r} should be at least 1")
