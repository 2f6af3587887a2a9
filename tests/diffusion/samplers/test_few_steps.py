"""Samplers of few steps on data for which the end of every path is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import samplers
from diffusion_jax.diffusion.samplers import sigmas
from diffusion_jax.diffusion.schedule import make_schedule


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("num_steps", [1, 2, 4, 8])
def test_lcm_draws_the_data_of_an_exact_consistency_model(num_steps):
    """f maps x_t ~ N(a MEAN, a^2 STD^2 + s^2) to N(MEAN, STD^2), so every step draws the data."""
    mean, std, schedule = 0.4, 0.6, make_schedule("linear")

    def consistent(x, t):
        abar = schedule.alphas_cumprod[t][:, None]
        return mean + std * (x - jnp.sqrt(abar) * mean) / jnp.sqrt(abar * std**2 + 1 - abar)

    sampler = samplers.lcm(schedule, num_steps, parameterization="x0")
    visited = np.asarray(sampler.coefficients.t)
    np.testing.assert_array_equal(visited, 999 - 20 * (np.arange(num_steps) * 50 // num_steps))
    keys = keys_of(20000)
    x_T = jnp.sqrt(schedule.alphas_cumprod[-1]) * mean + samplers.initial_noise(keys, (1,))
    x = np.asarray(samplers.sample(sampler, consistent, x_T, keys).x)
    np.testing.assert_allclose(x.mean(), mean, atol=5 * std / 20000**0.5)
    np.testing.assert_allclose(x.std(), std, rtol=5 / (2 * 20000) ** 0.5)
    # With one step, the noise of the start alone decides.
    np.testing.assert_array_equal(num_steps == 1, np.ptp(np.asarray(
        samplers.sample(sampler, consistent, jnp.ones((9, 1)), keys_of(9)).x)) == 0.0)  # fmt: skip


@pytest.mark.parametrize("num_steps", [1, 4, 8])
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_tcd_keeps_the_noise_of_the_last_timestep(num_steps, eta):
    """All data are one number, so that x_t - a_t POINT is s_t times N(0, 1) on every path."""
    point, schedule = 0.4, make_schedule("linear")
    signal, sigma = schedule.sqrt_alphas_cumprod, schedule.sqrt_one_minus_alphas_cumprod
    predict = lambda x, t: (x - signal[t][:, None] * point) / sigma[t][:, None]
    sampler = samplers.tcd(schedule, num_steps, eta=eta)
    assert sampler.stochastic == (eta > 0.0)
    keys = keys_of(20000)
    noise = samplers.initial_noise(keys, (1,))
    x_T = signal[-1] * point + sigma[-1] * noise
    x = np.asarray(samplers.sample(sampler, predict, x_T, keys).x)
    left = (x - float(signal[0]) * point) / float(sigma[0])
    np.testing.assert_allclose([left.mean(), left.std()], [0.0, 1.0], atol=0.035)
    abar, t = np.asarray(schedule.alphas_cumprod, np.float64), 999 - 20 * np.arange(50)
    after = t[np.arange(num_steps) * 50 // num_steps][1:]
    lower = np.floor((1.0 - eta) * after).astype(int)
    share = np.sqrt(abar[after] / abar[lower] * (1 - abar[lower]) / (1 - abar[after]))
    shared = np.corrcoef(left[:, 0], noise[:, 0])[0, 1]  # how much of the first noise is left
    np.testing.assert_allclose(shared, np.prod(share), atol=0.03)


def test_wrong_options_are_refused():
    schedule = make_schedule("linear", 100)
    for make in (samplers.lcm, samplers.tcd):
        with pytest.raises(ValueError, match=r"num_steps = 51 should lie in \[1, 50\]"):
            make(schedule, 51)
        with pytest.raises(ValueError, match=r"original_steps = 200 should lie in \[1, 100\]"):
            make(schedule, 5, original_steps=200)
    with pytest.raises(ValueError, match=r"eta = 1.5 should lie in \[0, 1\]"):
        samplers.tcd(schedule, 4, eta=1.5)


MEAN, STD = 0.4, 0.6


def spread(sigma):
    """Standard deviation of x = x_0 + sigma eps."""
    return jnp.sqrt(STD**2 + sigma**2)[:, None]


def check_gaussian(sampler, predict):
    keys = keys_of(20000)
    x_T = samplers.start_from_noise(sampler, samplers.initial_noise(keys, (1,)))
    x = np.asarray(samplers.sample(sampler, predict, x_T, keys).x)
    np.testing.assert_allclose([x.mean(), x.std()], [MEAN, STD], atol=0.02)
    return x, x_T


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_mean_flow_follows_the_path_exactly_in_any_number_of_steps(num_steps):
    """x stays as many deviations from MEAN; D is where the straight line of a step meets 0."""

    def predict(x, sigma, end):
        after = MEAN + spread(end) / spread(sigma) * (x - MEAN)
        ratio = (end / sigma)[:, None]
        return (after - ratio * x) / (1.0 - ratio)

    sampler = samplers.mean_flow(sigmas.edm(num_steps))
    x, x_T = check_gaussian(sampler, predict)
    wanted = MEAN + STD / (80.0**2 + STD**2) ** 0.5 * (np.asarray(x_T) - MEAN)
    np.testing.assert_allclose(x, wanted, atol=1e-4)
    with pytest.raises(ValueError, match="the sampler has no way back"):
        samplers.inverse(sampler)


@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_consistency_draws_the_data_of_an_exact_model(num_steps):
    grid = sigmas.consistency(num_steps)
    assert len(grid) == num_steps + 1 and grid[-2] > 0.02
    np.testing.assert_allclose(grid[:-1], sigmas.edm(num_steps + 1)[:-2])
    check_gaussian(
        samplers.consistency(grid),
        lambda x, sigma: MEAN + STD / spread(sigma) * (x - MEAN),
    )
