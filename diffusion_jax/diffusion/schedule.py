"""The noise schedule of discrete diffusion: betas, and every coefficient that follows from them.

Everything is computed in NumPy float64 and stored in float32: a cumulative product in float32 has
lost a digit after a thousand steps, and 1 - abar loses four where abar is near 1.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

PARAMETERIZATIONS = ("eps", "x0", "v")
MIN_VARIANCE = 1e-20  # where upstream clips a variance before its logarithm
# Stands for abar_T = 0 where it is divided by: sigma_T = sqrt(1 / abar - 1) is then 4096 (rounded).
ZERO_SNR_ABAR = 2.0**-24


class Schedule(NamedTuple):
    """Coefficients of q(x_t | x_0) and q(x_{t-1} | x_t, x_0), float32 [T], by the timestep t.

    With alpha_t = 1 - beta_t, `alphas_cumprod` is the product of alpha_0 ... alpha_t (abar_t) and
    `_prev` shifts it by one step, starting at 1. A pytree of arrays: pass it to jitted functions as
    an argument, and another schedule of the same length runs in the same program.
    """

    betas: Float[Array, "T"]
    alphas_cumprod: Float[Array, "T"]
    alphas_cumprod_prev: Float[Array, "T"]
    sqrt_alphas_cumprod: Float[Array, "T"]
    sqrt_one_minus_alphas_cumprod: Float[Array, "T"]
    log_one_minus_alphas_cumprod: Float[Array, "T"]
    sqrt_recip_alphas_cumprod: Float[Array, "T"]
    sqrt_recipm1_alphas_cumprod: Float[Array, "T"]
    posterior_variance: Float[Array, "T"]
    posterior_log_variance_clipped: Float[Array, "T"]
    posterior_mean_coef1: Float[Array, "T"]
    posterior_mean_coef2: Float[Array, "T"]
    lvlb_weights: Float[Array, "T"]

    @property
    def num_timesteps(self) -> int:
        """T, known from the shape and so static under jit."""
        return self.betas.shape[0]

    def __repr__(self) -> str:
        """Show the first and last betas and how many there are."""
        if not isinstance(self.betas, jax.Array) or isinstance(self.betas, Tracer):
            return f"Schedule(betas={self.betas!r}, ...)"
        first, last, abar = self.betas[0], self.betas[-1], self.alphas_cumprod[-1]
        return (
            f"Schedule({self.num_timesteps} timesteps, betas {first:.3g} to {last:.3g}, "
            f"alphas_cumprod down to {abar:.3g})"
        )


def make_schedule(
    name: str = "linear",
    num_timesteps: int = 1000,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
    given_betas: Sequence[float] | np.ndarray | None = None,
    v_posterior: float = 0.0,
    parameterization: str = "eps",
    rescale_zero_snr: bool = False,
) -> Schedule:
    """Compute a Schedule: abar_t = prod(1 - beta_s) and what follows from it.

    name: a row of BETA_SCHEDULES, see make_beta_schedule.
    given_betas: replaces name and num_timesteps when it is not None.
    v_posterior: variance of p(x_{t-1} | x_t) between the posterior's (0, "fixed small") and beta_t
      (1, "fixed large").
    parameterization: what the network predicts, eps | x0 | v; only `lvlb_weights` depend on it.
    rescale_zero_snr: let abar_T be 0, so that x_T is noise alone (see rescale_zero_terminal_snr).
      sqrt_recip_alphas_cumprod and sqrt_recipm1_alphas_cumprod would be infinite at T; there they
      are computed with abar = ZERO_SNR_ABAR and end at 4096, with which eps of a predicted x_0 is
      x_T to 1 / 4096.

    Raises ValueError for an unknown name, betas outside (0, 1), v_posterior outside [0, 1], fewer
    than one timestep, coefficients that float32 cannot hold, and for rescale_zero_snr with eps,
    from which no x_0 follows at abar = 0.
    Source: Ho et al. 2020, equations 4, 7 and 12; latent-diffusion, DDPM.register_schedule.
    """
    check_choice("parameterization", parameterization, PARAMETERIZATIONS)
    if rescale_zero_snr and parameterization == "eps":
        raise ValueError(
            "rescale_zero_snr = True with parameterization = 'eps': the noise says nothing of x_0 "
            "where abar = 0; choose v or x0"
        )
    if not 0.0 <= v_posterior <= 1.0:
        raise ValueError(f"v_posterior = {v_posterior!r} should lie in [0, 1]")
    if given_betas is None:
        betas = make_beta_schedule(
            name,
            num_timesteps,
            linear_start=linear_start,
            linear_end=linear_end,
            cosine_s=cosine_s,
        )
    else:
        betas = _check_betas("given_betas", np.asarray(given_betas, np.float64))
    if rescale_zero_snr:
        betas = rescale_zero_terminal_snr(betas)
    return _float32(_coefficients(betas, v_posterior, parameterization))


def make_beta_schedule(
    name: str,
    num_timesteps: int = 1000,
    *,
    linear_start: float = 1e-4,
    linear_end: float = 2e-2,
    cosine_s: float = 8e-3,
) -> np.ndarray:
    """Compute the betas of a named schedule: float64 [num_timesteps], each in (0, 1).

    linear: squares of a ramp of square roots (latent-diffusion's "linear", diffusers'
      "scaled_linear").
    sqrt_linear: the plain ramp from linear_start to linear_end, in spite of its name.
    sqrt: the square root of that ramp.
    cosine: abar = cos^2((t / T + s) / (1 + s) * pi / 2), betas at most 0.999 (Nichol and Dhariwal
      2021, equation 17).
    squaredcos_cap_v2: the same with s = 0.008, whatever cosine_s is.

    Raises ValueError naming the value and the choices.
    """
    check_choice("name", name, tuple(BETA_SCHEDULES))
    if num_timesteps < 1:
        raise ValueError(f"num_timesteps = {num_timesteps!r} should be at least 1")
    for argument, value in (("linear_start", linear_start), ("linear_end", linear_end)):
        if name in RAMPS and not 0.0 < value < 1.0:
            raise ValueError(f"{argument} = {value!r} should lie in (0, 1)")
    if name == "cosine" and not 0.0 <= cosine_s < np.inf:
        raise ValueError(f"cosine_s = {cosine_s!r} should be finite and not negative")
    betas = BETA_SCHEDULES[name](num_timesteps, linear_start, linear_end, cosine_s)
    return _check_betas(f"betas of {name!r} with num_timesteps = {num_timesteps}", betas)


def rescale_zero_terminal_snr(betas: np.ndarray) -> np.ndarray:
    """Stretch sqrt(abar) linearly so that it ends at 0 and starts where it did: betas float64 [T].

    The last beta is 1, so that x_T holds no signal. Raises ValueError for fewer than two betas.
    Source: Lin et al. 2024, Common Diffusion Noise Schedules and Sample Steps are Flawed,
    algorithm 1.
    """
    if betas.size < 2:
        raise ValueError(f"a schedule of {betas.size} timestep cannot start clean and end in noise")
    signal = np.sqrt(np.cumprod(1.0 - betas))
    signal = (signal - signal[-1]) * (signal[0] / (signal[0] - signal[-1]))
    return 1.0 - (signal / np.append(1.0, signal[:-1])) ** 2


def respace(schedule: Schedule, timesteps: np.ndarray) -> Schedule:
    """Make the Schedule that visits only some timesteps: beta'_i = 1 - abar_{t_i} / abar_{t_{i-1}}.

    timesteps: strictly increasing int [S], static. Entry i of the result belongs to timesteps[i],
      which is what the network should still be given; `lvlb_weights` keep the values of those
      timesteps. The schedule may be traced.

    Raises ValueError when the timesteps do not increase or leave the schedule.
    Source: Nichol and Dhariwal 2021, section 4; SpacedDiffusion of guided-diffusion.
    """
    timesteps = np.asarray(timesteps)
    last = schedule.num_timesteps - 1
    if timesteps.ndim != 1 or timesteps.size < 1 or np.any(np.diff(timesteps) <= 0):
        raise ValueError(f"timesteps = {timesteps} should be one strictly increasing list")
    if timesteps[0] < 0 or timesteps[-1] > last:
        raise ValueError(f"timesteps = {timesteps} should lie in [0, {last}]")
    if timesteps.size == schedule.num_timesteps:
        return schedule
    v_posterior = schedule.posterior_variance[0] / schedule.betas[0]
    kept = Schedule(*(values[timesteps] for values in schedule))
    previous = np.concatenate([[-1], timesteps[:-1]])
    betas = step_betas(schedule, timesteps, previous)
    signal_prev, sigma_prev = at_or_clean(schedule, previous)
    variance, coef1, coef2 = _posterior(
        betas,
        kept.sqrt_alphas_cumprod / signal_prev,
        signal_prev,
        kept.sqrt_one_minus_alphas_cumprod**2,
        sigma_prev**2,
        v_posterior,
    )
    return kept._replace(
        betas=betas,
        alphas_cumprod_prev=signal_prev**2,
        posterior_variance=variance,
        posterior_log_variance_clipped=jnp.log(jnp.maximum(variance, MIN_VARIANCE)),
        posterior_mean_coef1=coef1,
        posterior_mean_coef2=coef2,
    )


def step_betas(
    schedule: Schedule, timesteps: np.ndarray, previous: np.ndarray
) -> Float[Array, "S"]:
    """Compute the noise of the step `previous` -> `timesteps`: 1 - abar_t / abar_previous [S].

    Both int [S], static; -1 in `previous` stands for the clean image (abar = 1). float32.
    """
    signal, sigma = at_or_clean(schedule, timesteps)
    signal_prev, sigma_prev = at_or_clean(schedule, previous)
    # abar near 1 would lose its digits in the ratio, and a tiny abar would underflow unless rooted.
    from_noise = (sigma**2 - sigma_prev**2) / signal_prev**2
    from_signal = 1.0 - (signal / signal_prev) ** 2
    return jnp.where(signal**2 > 0.5, from_noise, from_signal)


def at_or_clean(
    schedule: Schedule, timesteps: np.ndarray
) -> tuple[Float[Array, "S"], Float[Array, "S"]]:
    """Look up (sqrt(abar), sqrt(1 - abar)) at int [S] timesteps; -1 is the clean image, (1, 0)."""
    signal = jnp.concatenate([jnp.ones(1), schedule.sqrt_alphas_cumprod])
    sigma = jnp.concatenate([jnp.zeros(1), schedule.sqrt_one_minus_alphas_cumprod])
    return signal[timesteps + 1], sigma[timesteps + 1]


def check_choice(argument: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError with the choices when the value is none of them."""
    if value not in choices:
        raise ValueError(f"{argument} = {value!r} is unknown; choose from {', '.join(choices)}")


def _linear(n: int, start: float, end: float, s: float) -> np.ndarray:
    return np.linspace(start**0.5, end**0.5, n) ** 2


def _sqrt_linear(n: int, start: float, end: float, s: float) -> np.ndarray:
    return np.linspace(start, end, n)


def _sqrt(n: int, start: float, end: float, s: float) -> np.ndarray:
    return np.linspace(start, end, n) ** 0.5


def _cosine(n: int, start: float, end: float, s: float) -> np.ndarray:
    t = np.arange(n + 1, dtype=np.float64) / n + s
    abar = np.cos(t / (1 + s) * np.pi / 2) ** 2
    return np.clip(1 - abar[1:] / abar[:-1], 0.0, 0.999)


def _squaredcos_cap_v2(n: int, start: float, end: float, s: float) -> np.ndarray:
    return _cosine(n, start, end, 8e-3)


RAMPS = ("linear", "sqrt_linear", "sqrt")
BETA_SCHEDULES: dict[str, Callable[[int, float, float, float], np.ndarray]] = {
    "linear": _linear,
    "cosine": _cosine,
    "sqrt_linear": _sqrt_linear,
    "sqrt": _sqrt,
    "squaredcos_cap_v2": _squaredcos_cap_v2,
}


def _coefficients(
    betas: np.ndarray, v_posterior: float, parameterization: str
) -> dict[str, np.ndarray]:
    alphas = 1.0 - betas
    abar = np.cumprod(alphas)
    abar_prev = np.append(1.0, abar[:-1])
    divisor = np.where(betas < 1.0, abar, ZERO_SNR_ABAR)
    # 0 / 0 and overflow are found by name when the result is checked.
    with np.errstate(all="ignore"):
        variance, coef1, coef2 = _posterior(
            betas, np.sqrt(alphas), np.sqrt(abar_prev), 1.0 - abar, 1.0 - abar_prev, v_posterior
        )
        return {
            "betas": betas,
            "alphas_cumprod": abar,
            "alphas_cumprod_prev": abar_prev,
            "sqrt_alphas_cumprod": np.sqrt(abar),
            "sqrt_one_minus_alphas_cumprod": np.sqrt(1.0 - abar),
            "log_one_minus_alphas_cumprod": np.log1p(-abar),
            "sqrt_recip_alphas_cumprod": np.sqrt(1.0 / divisor),
            "sqrt_recipm1_alphas_cumprod": np.sqrt(1.0 / divisor - 1.0),
            "posterior_variance": variance,
            "posterior_log_variance_clipped": np.log(np.maximum(variance, MIN_VARIANCE)),
            "posterior_mean_coef1": coef1,
            "posterior_mean_coef2": coef2,
            "lvlb_weights": _lvlb_weights(betas, abar, variance, parameterization),
        }


def _posterior(
    betas: Any, sqrt_alphas: Any, signal_prev: Any, noise: Any, noise_prev: Any, v_posterior: Any
) -> tuple[Any, Any, Any]:
    """Compute variance, coefficient of x_0 and of x_t of q(x_{t-1} | x_t, x_0), NumPy or JAX.

    signal = sqrt(abar) and noise = 1 - abar: float32 cannot compute one from the other when abar is
    near 1.
    """
    variance = (1.0 - v_posterior) * betas * noise_prev / noise + v_posterior * betas
    return variance, betas * signal_prev / noise, noise_prev * sqrt_alphas / noise


def _lvlb_weights(
    betas: np.ndarray, abar: np.ndarray, variance: np.ndarray, parameterization: str
) -> np.ndarray:
    if parameterization == "v":
        return np.ones_like(betas)
    if parameterization == "x0":
        # The variational bound has 2 * (1 - abar) below. Upstream wrote `2. * 1 - abar`, and models
        # were trained with that.
        weights = 0.5 * np.sqrt(abar) / (2.0 - abar)
    else:
        weights = betas**2 / (2.0 * variance * (1.0 - betas) * (1.0 - abar))
    if len(betas) > 1:
        weights[0] = weights[1]
    elif variance[0] == 0.0:
        # A single step has no neighbour to borrow from: take beta for the variance.
        weights[0] = betas[0] / (2.0 * (1.0 - betas[0]) * (1.0 - abar[0]))
    return weights


def _float32(values: dict[str, np.ndarray]) -> Schedule:
    with np.errstate(over="ignore"):
        stored = {name: value.astype(np.float32) for name, value in values.items()}
    for name, value in stored.items():
        bad = np.flatnonzero(~np.isfinite(value))
        if bad.size:
            raise ValueError(
                f"{name}[{bad[0]}] = {values[name][bad[0]]} does not fit float32: "
                f"alphas_cumprod falls to {values['alphas_cumprod'][-1]:.3g}; "
                "use smaller betas or fewer timesteps"
            )
    return Schedule(**{name: jnp.asarray(value) for name, value in stored.items()})


def _check_betas(source: str, betas: np.ndarray) -> np.ndarray:
    if betas.ndim != 1 or betas.size < 1:
        raise ValueError(
            f"{source} has the shape {betas.shape}; it should be one list of at least one beta"
        )
    bad = np.flatnonzero(~((betas > 0.0) & (betas < 1.0)))
    if bad.size:
        raise ValueError(
            f"{source}: entry {bad[0]} is {betas[bad[0]]}; every beta should lie in (0, 1)"
        )
    return betas
