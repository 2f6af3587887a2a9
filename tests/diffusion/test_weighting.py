"""Weights against what they mean for eps, v and F, and against the weights of the DDPM loss."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import losses, weighting
from diffusion_jax.diffusion.preconditioning import SCALINGS
from diffusion_jax.diffusion.schedule import make_schedule
from diffusion_jax.diffusion.weighting import WEIGHTINGS

SIGMAS = np.array([1e-5, 0.002, 0.3, 0.5, 1.0, 7.0, 80.0, 4096.0])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("unit", np.ones(8)),
        ("eps", SIGMAS**-2),
        ("v", (SIGMAS**2 + 1) / SIGMAS**2),
        ("edm", (SIGMAS**2 + 0.25) / (0.5 * SIGMAS) ** 2),
        ("min_snr", np.minimum(SIGMAS**-2, 5.0)),
        ("soft_min_snr", 4 * SIGMAS**-2 / (SIGMAS**-2 + 4)),
        ("flow", (SIGMAS / (1 + SIGMAS)) ** -2),
    ],
)
def test_formulas(name, expected):
    weight = WEIGHTINGS[name]()(jnp.asarray(SIGMAS, jnp.float32))
    assert weight.shape == (8,) and weight.dtype == jnp.float32
    np.testing.assert_allclose(weight, expected, rtol=2e-6)


@pytest.mark.parametrize(
    ("name", "options"), [("eps", {}), ("v", {}), ("edm", {"sigma_data": 2}), ("flow", {})]
)
def test_a_scalings_own_weighting_is_the_plain_error_of_its_output(name, options):
    """|x_0 error| = c_out |F error|, so the weight is 1 / c_out^2."""
    options = {key: float(value) for key, value in options.items()}
    sigma = jnp.asarray(SIGMAS, jnp.float32)
    c_out = SCALINGS[name](**options)(sigma).c_out
    weight = WEIGHTINGS[name](**options)(sigma)
    np.testing.assert_allclose(weight * c_out**2, 1.0, rtol=1e-5)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_min_snr_is_that_of_the_ddpm_loss(parameterization):
    schedule = make_schedule("linear", 40, linear_end=0.2)
    t = jnp.arange(40)
    sigma = schedule.sqrt_recipm1_alphas_cumprod
    c_out = SCALINGS[parameterization]()(sigma).c_out
    expected = losses.min_snr_weights(schedule, t, 3.0, parameterization)
    weight = weighting.min_snr(gamma=3.0)(sigma)
    assert (weight == 3.0).any() and (weight < 3.0).any()
    np.testing.assert_allclose(weight * c_out**2, expected, rtol=1e-5)


def test_soft_min_snr_has_the_limits_of_min_snr():
    sigma = jnp.asarray([1e-4, 1e4], jnp.float32)
    np.testing.assert_allclose(
        weighting.soft_min_snr(gamma=7.0)(sigma), weighting.min_snr(gamma=7.0)(sigma), rtol=1e-5
    )
    at_the_corner = weighting.soft_min_snr(gamma=7.0)(jnp.asarray([7.0**-0.5]))
    np.testing.assert_allclose(at_the_corner, 3.5, rtol=1e-5)


@pytest.mark.parametrize("name", ["min_snr", "soft_min_snr"])
def test_bad_values_are_named(name):
    with pytest.raises(ValueError, match="gamma = 0.0 should be positive"):
        WEIGHTINGS[name](gamma=0.0)
    with pytest.raises(ValueError, match="sigma_data = -1.0 should be positive"):
        weighting.edm(sigma_data=-1.0)
