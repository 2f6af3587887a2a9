"""Diagonal Gaussians: against scipy's densities, Monte Carlo, and identities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_jax.models.first_stage import regularizers

MOMENTS = jax.random.normal(jax.random.key(0), (3, 4, 5, 8))
OTHER = 0.5 * jax.random.normal(jax.random.key(1), (3, 4, 5, 8))


def test_moments_are_mean_and_clipped_log_variance():
    moments = MOMENTS.at[0, 0, 0, 4].set(99.0).at[0, 0, 0, 5].set(-99.0)
    gaussian = regularizers.diagonal_gaussian(moments)
    np.testing.assert_array_equal(gaussian.mean, moments[..., :4])
    np.testing.assert_array_equal(gaussian.logvar[0, 0, 0, :2], [20.0, -30.0])
    np.testing.assert_array_equal(gaussian.logvar[1], moments[1, ..., 4:])
    np.testing.assert_array_equal(regularizers.mode(gaussian), gaussian.mean)
    low = regularizers.diagonal_gaussian(moments.astype(jnp.bfloat16))
    assert low.mean.dtype == low.logvar.dtype == jnp.float32


def test_density_is_scipys():
    gaussian = regularizers.diagonal_gaussian(MOMENTS)
    value = OTHER[..., :4]
    scale = np.exp(0.5 * np.asarray(gaussian.logvar, np.float64))
    expected = -stats.norm.logpdf(value, gaussian.mean, scale).sum((1, 2, 3))
    np.testing.assert_allclose(regularizers.nll(gaussian, value), expected, rtol=1e-5)


def test_kl_is_the_mean_difference_of_log_densities():
    """E_p[log p - log q] by Gauss-Hermite quadrature, which is exact for quadratics."""
    p, q = (regularizers.diagonal_gaussian(moments) for moments in (MOMENTS, OTHER))
    standard = regularizers.DiagonalGaussian(jnp.zeros_like(p.mean), jnp.zeros_like(p.mean))
    nodes, weights = np.polynomial.hermite_e.hermegauss(5)
    mean, scale = np.asarray(p.mean), np.exp(0.5 * np.asarray(p.logvar))

    def expected(other):
        total = 0.0
        for node, weight in zip(nodes, weights / weights.sum(), strict=True):
            x = mean + scale * node
            other_scale = np.exp(0.5 * np.asarray(other.logvar))
            difference = stats.norm.logpdf(x, mean, scale) - stats.norm.logpdf(
                x, np.asarray(other.mean), other_scale
            )
            total = total + weight * difference.sum((1, 2, 3))
        return total

    np.testing.assert_allclose(regularizers.kl(p, q), expected(q), rtol=1e-5)
    np.testing.assert_allclose(regularizers.kl(p), expected(standard), rtol=1e-5)
    np.testing.assert_allclose(regularizers.kl(p, p), 0.0, atol=1e-6)


def test_samples_have_the_moments():
    gaussian = regularizers.DiagonalGaussian(
        jnp.full((4, 200, 200, 1), 3.0), jnp.full((4, 200, 200, 1), jnp.log(0.25))
    )
    drawn = regularizers.sample(gaussian, jax.random.normal(jax.random.key(2), (4, 200, 200, 1)))
    np.testing.assert_allclose(drawn.mean((1, 2, 3)), 3.0, atol=0.015)
    np.testing.assert_allclose(drawn.std((1, 2, 3)), 0.5, atol=0.01)


def test_regularizers_return_the_latent_and_what_the_loss_may_weigh():
    z, log = regularizers.gaussian_regularizer(MOMENTS)
    np.testing.assert_array_equal(z, MOMENTS[..., :4])
    kl = regularizers.kl(regularizers.diagonal_gaussian(MOMENTS))
    np.testing.assert_allclose(log["kl_loss"], kl, rtol=1e-6)
    noise = OTHER[..., :4]
    drawn, _ = regularizers.gaussian_regularizer(MOMENTS, noise)
    std = np.exp(np.asarray(MOMENTS[..., 4:], np.float64) / 2)
    np.testing.assert_allclose(drawn, MOMENTS[..., :4] + std * noise, rtol=1e-5, atol=1e-6)
    z, log = regularizers.identity_regularizer(MOMENTS, noise)
    assert z is MOMENTS and log == {}


def test_odd_moments_are_named():
    with pytest.raises(ValueError, match="moments have 3 channels"):
        regularizers.diagonal_gaussian(jnp.ones((1, 2, 2, 3)))
