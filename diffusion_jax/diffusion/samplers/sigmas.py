"""Which noise levels a sampler visits, and the table of levels of a discrete denoiser.

A discretization is a function (num_steps, *, options) -> sigmas, NumPy float64 [num_steps + 1]: the
levels from the largest down, then 0. sigma is the standard deviation of the noise on data at its
own scale (variance-exploding): sqrt((1 - abar) / abar) of a Schedule.
"""

import math
from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from diffusion_jax.diffusion.schedule import (
    ZERO_SNR_ABAR,
    Schedule,
    make_beta_schedule,
    rescale_zero_terminal_snr,
)

# The level of t = 1 in `flow`: t in float32 is then the number below 1.
FLOW_NOISE = 2.0**24
# num_steps -> sigmas, with its options bound
Discretization: TypeAlias = Callable[[int], np.ndarray]


def legacy_ddpm(
    num_steps: int,
    *,
    linear_start: float = 0.00085,
    linear_end: float = 0.012,
    num_timesteps: int = 1000,
) -> np.ndarray:
    """Visit the levels of a "linear" schedule, sigma = sqrt((1 - abar) / abar), evenly from T - 1.

    The timesteps are T - 1 - i (T - 1) / num_steps, rounded down: the last one is 0 only where
    num_steps = T (upstream's spacing).

    Raises ValueError for num_steps outside [1, num_timesteps] and betas outside (0, 1).
    Source: sgm, LegacyDDPMDiscretization; its defaults are Stable Diffusion's.
    """
    betas = make_beta_schedule(
        "linear", num_timesteps, linear_start=linear_start, linear_end=linear_end
    )
    return _visit(_sigmas(np.cumprod(1.0 - betas)), num_steps)


def zero_snr(
    num_steps: int,
    *,
    linear_start: float = 0.00085,
    linear_end: float = 0.012,
    num_timesteps: int = 1000,
    sigma_max: float = float(np.sqrt(1.0 / ZERO_SNR_ABAR - 1.0)),
) -> np.ndarray:
    """Visit the levels of `legacy_ddpm` after its schedule was stretched to abar_T = 0.

    sigma_max: takes the place of the infinite level of timestep T; 4096, which belongs to
      abar = 2^-24, is what make_schedule(rescale_zero_snr=True) has there, too.

    Raises ValueError as legacy_ddpm does, for num_timesteps below 2 and for a sigma_max that is not
    above the level before it.
    Source: Lin et al. 2024, algorithm 1.
    """
    betas = make_beta_schedule(
        "linear", num_timesteps, linear_start=linear_start, linear_end=linear_end
    )
    sigmas = _sigmas(np.cumprod(1.0 - rescale_zero_terminal_snr(betas))[:-1])
    if not sigmas[-1] < sigma_max < np.inf:
        raise ValueError(
            f"sigma_max = {sigma_max!r} should be finite and above the last level but one, "
            f"{sigmas[-1]:.6g}"
        )
    return _visit(np.append(sigmas, sigma_max), num_steps)


def edm(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Space sigma^(1 / rho) evenly from sigma_max to sigma_min.

    One step is sigma_max alone. Raises ValueError unless 0 < sigma_min < sigma_max, rho is positive
    and num_steps at least 1.
    Source: Karras et al. 2022, equation 5; sgm, EDMDiscretization.
    """
    _check_range(num_steps, sigma_min, sigma_max)
    if not 0.0 < rho < np.inf:
        raise ValueError(f"rho = {rho!r} should be positive and finite")
    ramp = np.linspace(sigma_max ** (1.0 / rho), sigma_min ** (1.0 / rho), num_steps)
    return np.append(ramp**rho, 0.0)


def karras(
    num_steps: int, *, sigma_min: float = 0.0292, sigma_max: float = 14.6146, rho: float = 7.0
) -> np.ndarray:
    """Space the range of a Stable Diffusion schedule as `edm` does (k-diffusion's "karras").

    `sigma_range` gives the range of another schedule. Raises ValueError as `edm` does.
    """
    return edm(num_steps, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def exponential(
    num_steps: int, *, sigma_min: float = 0.0292, sigma_max: float = 14.6146
) -> np.ndarray:
    """Space ln(sigma) evenly from sigma_max to sigma_min (k-diffusion's "exponential").

    One step is sigma_max alone. Raises ValueError unless 0 < sigma_min < sigma_max and num_steps is
    at least 1.
    """
    _check_range(num_steps, sigma_min, sigma_max)
    return np.append(np.geomspace(sigma_max, sigma_min, num_steps), 0.0)


def flow(num_steps: int, *, shift: float = 1.0, t_last: float | None = None) -> np.ndarray:
    """Space the time t = sigma / (1 + sigma) of flow matching evenly from 1, then shift it.

    A step of `euler` between two levels is Euler's step in t. t = 1, where sigma would be infinite,
    is sigma = 2^24: the next number below 1 in float32.

    shift: the factor on sigma, t -> shift t / (1 + (shift - 1) t); `shift_of_tokens` gives it for
      an image size. t_last: the last time before 0, not yet shifted; 1 / num_steps by default, so
      that the step to 0 is as long as the others.

    Raises ValueError for num_steps below 1, a shift that is not positive and a t_last outside
    (0, 1).
    Source: Esser et al. 2024 (Stable Diffusion 3), section 5.3.2.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps!r} should be at least 1")
    if not 0.0 < shift < np.inf:
        raise ValueError(f"shift = {shift!r} should be positive and finite")
    if t_last is not None and not 0.0 < t_last < 1.0:
        raise ValueError(f"t_last = {t_last!r} should lie between 0 and 1")
    t = np.linspace(1.0, 1.0 / num_steps if t_last is None else t_last, num_steps)
    sigmas = shift * t[1:] / (1.0 - t[1:])
    return np.concatenate([[FLOW_NOISE], sigmas, [0.0]])


def consistency(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> np.ndarray:
    """Take the levels of `edm` with one step more, and leave its last one, sigma_min, out.

    A consistency model changes nothing at sigma_min. One step is sigma_max alone, two are 80 and
    2.5. Raises ValueError as `edm` does.
    """
    return np.delete(edm(num_steps + 1, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho), -2)


def shift_of_tokens(
    tokens: int, *, low: tuple[int, float] = (256, 0.5), high: tuple[int, float] = (4096, 1.15)
) -> float:
    """Compute the shift of `flow` for an image of so many tokens: exp(mu), mu linear in tokens.

    tokens: latent pixels over the square of the patch size. low, high: (tokens, mu) of two points
    on the line; the defaults are the released values of FLUX.1.
    """
    (few, mu_few), (many, mu_many) = low, high
    return math.exp(mu_few + (mu_many - mu_few) * (tokens - few) / (many - few))


# name -> (num_steps, *, options) -> sigmas
DISCRETIZATIONS: dict[str, Callable[..., np.ndarray]] = {
    "legacy_ddpm": legacy_ddpm,
    "zero_snr": zero_snr,
    "edm": edm,
    "karras": karras,
    "exponential": exponential,
    "flow": flow,
    "consistency": consistency,
}


def from_schedule(schedule: Schedule, num_steps: int) -> np.ndarray:
    """Visit the levels of any Schedule, spaced as `legacy_ddpm` spaces a linear schedule.

    The schedule must not be traced. Where its abar_T is 0, sigma is 4096 (ZERO_SNR_ABAR). Raises
    ValueError for num_steps outside [1, T].
    """
    return _visit(np.asarray(schedule.sqrt_recipm1_alphas_cumprod, np.float64), num_steps)


def sigma_range(schedule: Schedule) -> tuple[float, float]:
    """Give (sigma_min, sigma_max) of a Schedule, for `karras` and `exponential`."""
    sigmas = np.asarray(schedule.sqrt_recipm1_alphas_cumprod, np.float64)
    return float(sigmas[0]), float(sigmas[-1])


def sigma_table(discretization: Discretization, num_idx: int = 1000) -> Float[Array, "N"]:
    """Make the ascending table of a discrete denoiser: float32 [num_idx], without the 0.

    Raises ValueError for a discretization whose levels do not descend strictly in float32.
    Source: sgm, DiscreteDenoiser (flip=True, do_append_zero=False).
    """
    table = discretization(num_idx)[:-1][::-1].astype(np.float32)
    bad = np.flatnonzero(~(np.diff(table, prepend=np.float32(0.0)) > 0.0))
    if bad.size:
        raise ValueError(
            f"level {bad[0]} of {num_idx} is {table[bad[0]]}; it should be positive and above the "
            "one before it in float32"
        )
    return jnp.asarray(table)


def _sigmas(abar: np.ndarray) -> np.ndarray:
    return np.sqrt((1.0 - abar) / abar)


def _visit(sigmas: np.ndarray, num_steps: int) -> np.ndarray:
    """Take num_steps of the ascending levels, evenly from the largest down, and append the 0."""
    total = len(sigmas)
    if not 1 <= num_steps <= total:
        raise ValueError(
            f"num_steps = {num_steps!r} should lie in [1, {total}], the timesteps of the schedule"
        )
    visited = np.arange(total)[::-1]
    if num_steps < total:
        visited = np.linspace(total - 1, 0, num_steps, endpoint=False).astype(int)
    return np.append(sigmas[visited], 0.0)


def _check_range(num_steps: int, sigma_min: float, sigma_max: float) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps = {num_steps!r} should be at least 1")
    if not 0.0 < sigma_min < sigma_max < np.inf:
        raise ValueError(
            f"sigma_min = {sigma_min!r} and sigma_max = {sigma_max!r} should be positive, finite "
            "and in this order"
        )
