"""Noise levels for training, as inverse distribution functions: sigma = F^-1(u), u uniform.

A factory takes the options and returns (u [b] in [0, 1)) -> sigma [b], float32. Where u comes from,
independent draws or strata of the global batch, is a matter of `quantiles`.
"""

from collections.abc import Callable
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from diffusion_jax.diffusion.samplers.sigmas import Discretization, legacy_ddpm, sigma_table
from diffusion_jax.types import Keys, PerSample

# u [b] in [0, 1) -> sigma [b]
SigmaOf: TypeAlias = Callable[[Array], Array]

_BELOW_ONE = np.float32(1.0 - 2.0**-24)


def discrete(discretization: Discretization = legacy_ddpm, *, num_idx: int = 1000) -> SigmaOf:
    """Draw the num_idx levels of a discretization with equal probability, the 0 left out.

    The levels come from the table that the discrete denoiser uses (`sigma_table`), so that nothing
    is snapped. Raises ValueError as sigma_table does. Source: sgm, DiscreteSampling.
    """
    table = np.asarray(sigma_table(discretization, num_idx))

    def sigma_of(u: Array) -> Array:
        # u * num_idx may round up to num_idx.
        index = jnp.minimum((u * num_idx).astype(jnp.int32), num_idx - 1)
        return jnp.asarray(table)[index]

    return sigma_of


def lognormal(*, p_mean: float = -1.2, p_std: float = 1.2) -> SigmaOf:
    """Draw ln(sigma) ~ N(p_mean, p_std^2).

    u is kept in [2^-24, 1 - 2^-24], so that u = 0 gives ln(sigma) = p_mean - 5.3 p_std. Raises
    ValueError for a p_std that is not positive.
    Source: Karras et al. 2022, table 1; sgm, EDMSampling. SVD trains with 0.7 and 1.6.
    """
    if not p_std > 0.0:
        raise ValueError(f"p_std = {p_std!r} should be positive")

    def sigma_of(u: Array) -> Array:
        z = jax.scipy.special.ndtri(jnp.clip(u, 2.0**-24, _BELOW_ONE))
        return jnp.exp(p_mean + p_std * z)

    return sigma_of


def uniform(
    *, sigma_min: float = 0.002, sigma_max: float = 80.0, space: Literal["log", "linear"] = "log"
) -> SigmaOf:
    """Draw ln(sigma) (space "log") or sigma ("linear") evenly between sigma_min and sigma_max.

    Raises ValueError unless 0 < sigma_min < sigma_max, and for another space.
    """
    if not 0.0 < sigma_min < sigma_max < np.inf:
        raise ValueError(
            f"sigma_min = {sigma_min!r} and sigma_max = {sigma_max!r} should be positive, finite "
            "and in this order"
        )
    if space == "linear":
        return lambda u: sigma_min + (sigma_max - sigma_min) * u
    if space == "log":
        low, span = np.log(sigma_min), np.log(sigma_max / sigma_min)
        return lambda u: jnp.exp(low + span * u)
    raise ValueError(f"space = {space!r} is unknown; choose from log, linear")


def logit_normal(*, mean: float = 0.0, std: float = 1.0, shift: float = 1.0) -> SigmaOf:
    """Draw the time t of flow matching from a logit-normal, then shift it towards the noise.

    t = sigma / (1 + sigma), so logit(t) = ln(sigma) ~ N(mean + ln(shift), std^2): it is `lognormal`
    with another name for each number. shift: the factor on sigma, t -> shift t / (1 + (shift - 1)
    t); 3 is for 1024 x 1024 pixels.

    Raises ValueError for a std or shift that is not positive.
    Source: Esser et al. 2024 (Stable Diffusion 3), sections 3.1 and 5.3.2.
    """
    if not std > 0.0:
        raise ValueError(f"std = {std!r} should be positive")
    return lognormal(p_mean=mean + _log_of_shift(shift), p_std=std)


def uniform_time(*, shift: float = 1.0) -> SigmaOf:
    """Draw the time t of flow matching evenly from [0.0001, 1), then shift it towards the noise.

    sigma = shift t / (1 - t). Nearer to t = 0 the weight 1 / t^2 would multiply rounding errors.
    Raises ValueError for a shift that is not positive.
    Source: Lipman et al. 2023, equation 23; Esser et al. 2024, section 5.3.2, for the shift.
    """
    factor = np.exp(_log_of_shift(shift))

    def sigma_of(u: Array) -> Array:
        t = jnp.clip(1e-4 + (1.0 - 1e-4) * u, 1e-4, _BELOW_ONE)
        return factor * t / (1.0 - t)

    return sigma_of


def _log_of_shift(shift: float) -> float:
    if not 0.0 < shift < np.inf:
        raise ValueError(f"shift = {shift!r} should be positive and finite")
    return float(np.log(shift))


def zero() -> SigmaOf:
    """Give every sample sigma = 1e-5, almost no noise (sgm, ZeroSampler)."""
    return lambda u: jnp.full_like(u, 1e-5)


# name -> factory; `discrete` takes its discretization beside its options
SIGMA_SAMPLINGS: dict[str, Callable[..., SigmaOf]] = {
    "discrete": discrete,
    "lognormal": lognormal,
    "uniform": uniform,
    "logit_normal": logit_normal,
    "uniform_time": uniform_time,
    "zero": zero,
}


def quantiles(
    keys: Keys, position: Int[Array, "b"] | None = None, batch_size: int | None = None
) -> PerSample:
    """Draw u in [0, 1): independent, or one in each stratum, u_i = (position_i + U_i) / batch_size.

    keys: U_i depends on keys[i] alone.
    position: place of the sample in the global batch of batch_size. So it is the same stratum
      whatever device, host or micro-batch the sample lies on, and the global batch covers each of
      them once.

    Returns float32 [b]. Raises ValueError when only one of position and batch_size is given.
    Source: Kingma et al. 2021 (VDM), appendix I.1, a low-discrepancy sampler; with strata instead
    of one common shift.
    """
    if (position is None) != (batch_size is None):
        raise ValueError(
            f"position = {position} and batch_size = {batch_size} should both be given, or neither"
        )
    u = jax.vmap(lambda key: jax.random.uniform(key, (), jnp.float32))(keys)
    if position is None or batch_size is None:
        return u
    start = position.astype(jnp.float32)
    # In float32 the sum may round up to the next stratum.
    inside = jnp.minimum(start + u, jnp.nextafter(start + 1.0, start))
    return jnp.minimum(inside / batch_size, _BELOW_ONE)
