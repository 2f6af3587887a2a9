"""Noise levels for training: quantiles against SciPy-free closed forms, strata against counting."""

from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import sigma_sampling
from diffusion_jax.diffusion.samplers.sigmas import edm, legacy_ddpm, sigma_table
from diffusion_jax.diffusion.sigma_sampling import SIGMA_SAMPLINGS, quantiles

LAST = np.float32(1 - 2.0**-24)


def sample_keys(count, seed=0):
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


@pytest.mark.parametrize("name", SIGMA_SAMPLINGS)
def test_every_distribution_is_finite_positive_and_increasing(name):
    u = jnp.asarray([0.0, 1e-30, 2.0**-23, 0.25, 0.5, 0.75, 1 - 2.0**-23, LAST], jnp.float32)
    sigma = np.asarray(SIGMA_SAMPLINGS[name]()(u))
    assert sigma.dtype == np.float32 and sigma.shape == u.shape
    assert np.all(np.isfinite(sigma)) and np.all(sigma > 0) and np.all(np.diff(sigma) >= 0)


@pytest.mark.parametrize(("mean", "std"), [(-1.2, 1.2), (0.7, 1.6)])
def test_lognormal_quantiles(mean, std):
    u = np.array([2.0**-24, 0.001, 0.1, 0.5, 0.9, 0.999, LAST])
    sigma = sigma_sampling.lognormal(p_mean=mean, p_std=std)(jnp.asarray(u, jnp.float32))
    expected = [NormalDist(mean, std).inv_cdf(float(np.float32(value))) for value in u]
    np.testing.assert_allclose(np.log(sigma), expected, rtol=2e-5, atol=2e-5)


def test_discrete_draws_each_level_of_the_table_equally():
    table = np.asarray(sigma_table(legacy_ddpm))
    u = (np.arange(4000) + 0.5) / 4000
    sigma = sigma_sampling.discrete()(jnp.asarray(u, jnp.float32))
    np.testing.assert_array_equal(sigma, np.repeat(table, 4))
    few = sigma_sampling.discrete(edm, num_idx=3)(jnp.asarray([0.0, 0.34, LAST], jnp.float32))
    np.testing.assert_allclose(few, [0.002, 2.515219, 80], rtol=1e-5)


def test_uniform_is_even_in_its_space():
    u = jnp.asarray([0.0, 0.5, LAST], jnp.float32)
    log = sigma_sampling.uniform(sigma_min=0.01, sigma_max=100.0)(u)
    linear = sigma_sampling.uniform(sigma_min=0.01, sigma_max=100.0, space="linear")(u)
    np.testing.assert_allclose(log, [0.01, 1.0, 100.0], rtol=1e-5)
    np.testing.assert_allclose(linear, [0.01, 50.005, 100.0], rtol=1e-5)
    np.testing.assert_array_equal(sigma_sampling.zero()(u), np.float32(1e-5))


def test_independent_quantiles_are_uniform_and_follow_their_own_key():
    u = np.asarray(quantiles(sample_keys(4000)))
    counts = np.bincount((u * 10).astype(int), minlength=10)
    assert len(counts) == 10 and np.abs(counts - 400).max() < 5 * np.sqrt(400)
    np.testing.assert_array_equal(quantiles(sample_keys(4000)[7:9]), u[7:9])


@pytest.mark.parametrize("batch_size", [1, 7, 256])
def test_strata_are_covered_once_wherever_a_sample_lies(batch_size):
    order = jnp.asarray(np.random.default_rng(0).permutation(batch_size), jnp.int32)
    u = np.asarray(quantiles(sample_keys(batch_size)[order], order, batch_size), np.float64)
    np.testing.assert_array_equal(np.floor(u * batch_size), order)
    # Within its stratum, a sample lies where its own key says.
    inside = np.asarray(quantiles(sample_keys(batch_size)))[np.asarray(order)]
    np.testing.assert_allclose(u * batch_size - np.asarray(order), inside, atol=2e-5)


def test_rounding_never_leaves_the_stratum(monkeypatch):
    """The largest float32 below 1 is drawn in every stratum of a large batch."""
    count = 2**14
    monkeypatch.setattr(jax.random, "uniform", lambda key, shape, dtype: jnp.float32(1 - 2.0**-23))
    position = jnp.arange(count, dtype=jnp.int32)
    u = quantiles(sample_keys(count), position, count)
    assert float(u.max()) < 1.0
    np.testing.assert_array_equal(np.floor(np.asarray(u, np.float64) * count), position)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="batch_size = 4 should both be given"):
        quantiles(sample_keys(2), None, 4)
    with pytest.raises(ValueError, match="p_std = 0.0 should be positive"):
        sigma_sampling.lognormal(p_std=0.0)
    with pytest.raises(ValueError, match="sigma_min = 3.0 and sigma_max = 2.0"):
        sigma_sampling.uniform(sigma_min=3.0, sigma_max=2.0)
    with pytest.raises(ValueError, match=r"num_steps = 1001 .*\[1, 1000\]"):
        sigma_sampling.discrete(num_idx=1001)


def test_flow_times_are_logit_normal_or_even_and_shifted():
    """Quantiles of t = sigma / (1 + sigma); a shift moves t to shift t / (1 + (shift - 1) t)."""
    u = np.array([0.05, 0.3, 0.5, 0.9])

    def times(sigma_of):
        sigma = np.asarray(sigma_of(jnp.asarray(u, jnp.float32)), np.float64)
        return sigma / (1 + sigma)

    def shifted(t):
        return 3 * t / (1 + 2 * t)

    normal = np.array([NormalDist(0.5, 0.8).inv_cdf(value) for value in u])
    t = 1 / (1 + np.exp(-normal))
    given = {"mean": 0.5, "std": 0.8}
    np.testing.assert_allclose(times(sigma_sampling.logit_normal(**given)), t, rtol=1e-5)
    got = times(sigma_sampling.logit_normal(**given, shift=3.0))
    np.testing.assert_allclose(got, shifted(t), rtol=1e-5)
    np.testing.assert_allclose(times(sigma_sampling.uniform_time()), u, atol=1.01e-4)
    np.testing.assert_allclose(times(sigma_sampling.uniform_time(shift=3.0)), shifted(u), atol=3e-4)
    for wrong in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="shift = .* should be positive and finite"):
            sigma_sampling.uniform_time(shift=wrong)
        with pytest.raises(ValueError, match="shift = .* should be positive and finite"):
            sigma_sampling.logit_normal(shift=wrong)
