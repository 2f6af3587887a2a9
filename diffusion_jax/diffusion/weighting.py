"""How much each noise level counts: weights on the squared error of x_0, by sigma.

The error of x_0 is sigma times the error of eps and sigma / sqrt(sigma^2 + 1) times the error of v.
So a weight w on |x_0 error|^2 is the weight w sigma^2 on |eps error|^2, and the weight
w sigma^2 / (sigma^2 + 1) on |v error|^2. The signal-to-noise ratio of unit data is snr = sigma^-2.
"""

from collections.abc import Callable
from typing import TypeAlias

import jax.numpy as jnp
from jaxtyping import Array

# sigma [b], positive -> weight [b]
Weighting: TypeAlias = Callable[[Array], Array]


def unit() -> Weighting:
    """Weigh by 1: the plain error of x_0; sigma^2 on eps, sigma^2 / (sigma^2 + 1) on v."""
    return jnp.ones_like


def eps() -> Weighting:
    """Weigh by sigma^-2: the plain error of eps (Ho et al. 2020, eq. 14); 1 / (sigma^2 + 1) on v.

    Source: sgm, EpsWeighting.
    """
    return lambda sigma: sigma**-2


def v() -> Weighting:
    """Weigh by (sigma^2 + 1) / sigma^2: the plain error of v; sigma^2 + 1 on eps.

    Source: sgm, VWeighting; Salimans and Ho 2022, "SNR + 1".
    """
    return edm(sigma_data=1.0)


def edm(*, sigma_data: float = 0.5) -> Weighting:
    """Weigh by (sigma^2 + sigma_data^2) / (sigma sigma_data)^2 = 1 / c_out^2, the error of EDM's F.

    On eps it is (sigma / sigma_data)^2 + 1, on v that divided by sigma^2 + 1. Raises ValueError for
    a sigma_data that is not positive. Source: Karras et al. 2022, table 1; sgm, EDMWeighting.
    """
    if not sigma_data > 0.0:
        raise ValueError(f"sigma_data = {sigma_data!r} should be positive")
    return lambda sigma: sigma**-2 + sigma_data**-2


def min_snr(*, gamma: float = 5.0) -> Weighting:
    """Weigh by min(sigma^-2, gamma) = min(snr, gamma).

    On eps it is min(snr, gamma) / snr, on v min(snr, gamma) / (snr + 1), as in losses.ddpm_loss.
    Raises ValueError for a gamma that is not positive. Source: Hang et al. 2023, section 3.4.
    """
    _check_gamma(gamma)
    return lambda sigma: jnp.minimum(sigma**-2, gamma)


def soft_min_snr(*, gamma: float = 4.0) -> Weighting:
    """Weigh by 1 / (sigma^2 + 1 / gamma) = snr gamma / (snr + gamma), a smooth min(snr, gamma).

    On eps it is gamma / (snr + gamma), on v that times snr / (snr + 1). Raises ValueError for a
    gamma that is not positive. Source: Crowson et al. 2024 (HDiT).
    """
    _check_gamma(gamma)
    return lambda sigma: 1.0 / (sigma**2 + 1.0 / gamma)


def flow() -> Weighting:
    """Weigh by ((1 + sigma) / sigma)^2 = 1 / t^2, the plain error of the velocity eps - x_0.

    t = sigma / (1 + sigma) is the time of flow matching. On eps it is (1 + sigma)^2. Source: Esser
    et al. 2024, equation 12 with the weight 1 at every t, which then only sigma_sampling changes.
    """
    return lambda sigma: ((1.0 + sigma) / sigma) ** 2


# name -> factory; the options of a config are the factory's keywords
WEIGHTINGS: dict[str, Callable[..., Weighting]] = {
    "unit": unit,
    "eps": eps,
    "v": v,
    "edm": edm,
    "min_snr": min_snr,
    "soft_min_snr": soft_min_snr,
    "flow": flow,
}


def _check_gamma(gamma: float) -> None:
    if not gamma > 0.0:
        raise ValueError(f"gamma = {gamma!r} should be positive")
