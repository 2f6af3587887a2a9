"""The bound on the likelihood against integrals and closed forms for Gaussian data."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm, vlb
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule
from diffusion_jax.randomness import noise_like

T = 30
OPTIONS = {"linear_start": 1e-3, "linear_end": 0.4}
SCHEDULE = make_schedule("linear", T, **OPTIONS)
BETAS = make_beta_schedule("linear", T, **OPTIONS)
ABAR = np.cumprod(1 - BETAS)
STD = 0.5


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def exact(x_t, t):
    """Predict x_0 perfectly for x_0 ~ N(0, STD^2)."""
    signal = ddpm.at(SCHEDULE.sqrt_alphas_cumprod, t, x_t)
    sigma = ddpm.at(SCHEDULE.sqrt_one_minus_alphas_cumprod, t, x_t)
    return signal * STD**2 / (signal**2 * STD**2 + sigma**2) * x_t


def test_normal_kl_is_the_integral():
    mean1, std1, mean2, std2 = 0.3, 0.7, -0.5, 1.9
    x = np.linspace(-12, 12, 200001)
    log1 = -((x - mean1) ** 2) / (2 * std1**2) - np.log(std1)
    log2 = -((x - mean2) ** 2) / (2 * std2**2) - np.log(std2)
    integral = (np.exp(log1) * (log1 - log2)).sum() * (x[1] - x[0]) / np.sqrt(2 * np.pi)
    arguments = (mean1, 2 * math.log(std1), mean2, 2 * math.log(std2))
    got = vlb.normal_kl(*(jnp.float32(value) for value in arguments))
    np.testing.assert_allclose(got, integral, rtol=1e-5)
    assert vlb.normal_kl(*(jnp.zeros(3),) * 4).tolist() == [0.0] * 3


def bin_probability(x, mean, scale, levels=256):
    """P(level of x) in Python floats, through erfc on the side of the tail."""
    half = 1 / (levels - 1)
    upper_tail = lambda z: 0.5 * math.erfc(z / math.sqrt(2))
    if x < -1 + half:
        return upper_tail(-(x + half - mean) / scale)
    if x > 1 - half:
        return upper_tail((x - half - mean) / scale)
    distance = abs(x - mean)
    return upper_tail((distance - half) / scale) - upper_tail((distance + half) / scale)


@pytest.mark.parametrize("scale", [0.002, 0.05, 1.0, 20.0])
def test_likelihood_of_levels(scale):
    k = np.array([0, 1, 100, 128, 200, 254, 255])
    x, mean = 2 * k / 255 - 1, np.array([-0.9, -0.95, -0.2, 0.0, 0.6, 1.0, 0.97])
    want = [bin_probability(a, m, scale) for a, m in zip(x, mean, strict=True)]
    arrays = (jnp.asarray(value, jnp.float32)[None] for value in (x, mean))
    got = vlb.discretized_gaussian_log_likelihood(*arrays, jnp.full((1, 7), math.log(scale)))
    seen = np.array(want) > 0
    assert seen.sum() >= 4
    np.testing.assert_allclose(got[0, seen], np.log(np.array(want)[seen]), rtol=2e-3, atol=1e-4)
    assert np.all(np.isfinite(got))


def test_probabilities_of_all_levels_sum_to_one():
    x = jnp.linspace(-1.0, 1.0, 256)[:, None]
    shape = jnp.zeros_like(x)
    logs = vlb.discretized_gaussian_log_likelihood(x, shape + 0.31, shape + math.log(0.08))
    np.testing.assert_allclose(jnp.exp(logs).sum(), 1.0, rtol=1e-4)


def test_likelihood_has_a_gradient_everywhere():
    x = jnp.linspace(-1.0, 1.0, 256)[:, None]

    def total(mean, log_scale):
        return vlb.discretized_gaussian_log_likelihood(x, mean, log_scale).sum()

    for log_scale in (-12.0, -3.0, 2.0):
        gradients = jax.grad(total, (0, 1))(jnp.full_like(x, 0.1), jnp.full_like(x, log_scale))
        assert all(np.all(np.isfinite(gradient)) for gradient in gradients)


def test_levels_below_two_are_refused():
    one = jnp.ones((1, 1))
    with pytest.raises(ValueError, match="levels = 1 should be at least 2"):
        vlb.discretized_gaussian_log_likelihood(one, one, one, levels=1)


def test_prior_is_the_kl_to_the_standard_normal():
    x_start = jnp.array([[0.5, -1.0], [1.0, 1.0]])
    variance = 1 - ABAR[-1]
    squares = ABAR[-1] * np.asarray(x_start, np.float64) ** 2
    want = 0.5 * (variance + squares - 1 - np.log(variance)).mean(axis=1) / math.log(2)
    np.testing.assert_allclose(vlb.prior_bpd(SCHEDULE, x_start), want, rtol=1e-4)


@pytest.mark.parametrize("t", [1, 10, T - 1])
@pytest.mark.parametrize("v_posterior", [0.0, 1.0])
def test_terms_of_gaussian_data_have_their_closed_form(t, v_posterior):
    """E KL = (coef1^2 Var(x_0 | x_t) + var_q) / (2 var_p) + ... over 40000 dimensions."""
    schedule = make_schedule("linear", T, v_posterior=v_posterior, **OPTIONS)
    x_start = STD * noise_like(keys_of(4), (10000,))
    steps = jnp.full((4,), t)
    x_t = ddpm.q_sample(schedule, x_start, steps, noise_like(keys_of(4, seed=1), (10000,)))
    a, a_prev = ABAR[t], ABAR[t - 1]
    coef1 = np.sqrt(a_prev) * BETAS[t] / (1 - a)
    spread = STD**2 * (1 - a) / (a * STD**2 + 1 - a)
    var_q = BETAS[t] * (1 - a_prev) / (1 - a)
    var_p = BETAS[t] if v_posterior else var_q
    want = 0.5 * ((var_q + coef1**2 * spread) / var_p - 1 + np.log(var_p / var_q)) / math.log(2)
    got, pred = vlb.vlb_terms(
        schedule,
        exact(x_t, steps),
        x_start,
        x_t,
        steps,
        parameterization="x0",
        clip_denoised=False,
    )
    np.testing.assert_allclose(got.mean(), want, rtol=0.03)
    np.testing.assert_array_equal(pred, exact(x_t, steps))


def test_term_at_timestep_0_is_the_decoder():
    levels = np.random.default_rng(0).integers(0, 256, (3, 50))
    x_start = jnp.asarray(levels / 127.5 - 1, jnp.float32)
    zero = jnp.zeros(3, jnp.int32)
    pred = jnp.clip(x_start + 0.01, -1.0, 1.0)
    got, _ = vlb.vlb_terms(SCHEDULE, pred, x_start, x_start, zero, parameterization="x0")
    scale = math.sqrt(BETAS[1] * (1 - ABAR[0]) / (1 - ABAR[1]))
    pairs = zip(np.ravel(x_start).tolist(), np.ravel(pred).tolist(), strict=True)
    logs = [math.log(bin_probability(x, mean, scale)) for x, mean in pairs]
    want = -np.array(logs).reshape(3, 50).mean(axis=1) / math.log(2)
    np.testing.assert_allclose(got, want, rtol=1e-3)


def test_bits_per_dim_sums_its_terms():
    x_start = jnp.clip(STD * noise_like(keys_of(3), (200,)), -1.0, 1.0)
    x_start = jnp.round((x_start + 1) * 127.5) / 127.5 - 1
    run = jax.jit(
        lambda schedule, keys: vlb.bits_per_dim(
            schedule, exact, x_start, keys, parameterization="x0"
        )
    )
    bits = run(SCHEDULE, keys_of(3))
    assert bits.terms.shape == bits.x_start_mse.shape == bits.noise_mse.shape == (T, 3)
    np.testing.assert_allclose(bits.total, bits.prior + bits.terms.sum(axis=0), rtol=1e-6)
    np.testing.assert_allclose(bits.prior, vlb.prior_bpd(SCHEDULE, x_start), rtol=1e-5)
    # Row t is the term of timestep t with the noise of fold_in(key, t).
    for t in (0, 17):
        noise = noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys_of(3), t), (200,))
        steps = jnp.full((3,), t)
        x_t = ddpm.q_sample(SCHEDULE, x_start, steps, noise)
        term, pred = vlb.vlb_terms(
            SCHEDULE, exact(x_t, steps), x_start, x_t, steps, parameterization="x0"
        )
        np.testing.assert_allclose(bits.terms[t], term, rtol=1e-4)
        squares = ((pred - x_start) ** 2).mean(axis=1)
        np.testing.assert_allclose(bits.x_start_mse[t], squares, rtol=1e-4)
    # Var(x_0 | x_t) grows with the noise towards Var(x_0).
    assert np.all(np.diff(np.asarray(bits.x_start_mse.mean(axis=1))[::5]) > 0)
    assert np.all(np.asarray(bits.total) > 0)


def test_many_steps_count_the_information_in_the_first_noise_level():
    """A perfect network on Gaussian data: prior and KL terms add up to I(x_0; x_t) at t = 0.

    That is log2(1 + snr Var(x_0)) / 2. Steps of equal log SNR lose (exp(step) - 1 - step) / 2 nats
    each, so the bound is a little above.
    """
    std, log_snr = 0.25, np.linspace(12.0, -8.0, 800)
    x_start = std * noise_like(keys_of(1), (4000,))
    abar = 1 / (1 + np.exp(-log_snr))
    schedule = make_schedule(given_betas=1 - abar / np.append(1.0, abar[:-1]))

    def predict(x_t, t):
        signal = ddpm.at(schedule.sqrt_alphas_cumprod, t, x_t)
        sigma = ddpm.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
        return signal * std**2 / (signal**2 * std**2 + sigma**2) * x_t

    bits = vlb.bits_per_dim(
        schedule,
        predict,
        x_start,
        keys_of(1, seed=2),
        parameterization="x0",
        clip_denoised=False,
    )
    information = 0.5 * math.log2(1 + math.exp(log_snr[0]) * std**2)
    got = float(bits.total[0] - bits.terms[0, 0])
    assert information < got < information + 0.15
    # Var(x_0 | x_t), and what it is as an error of the noise.
    snr = np.exp(log_snr)
    spread = std**2 / (1 + snr * std**2)
    np.testing.assert_allclose(bits.x_start_mse[:, 0], spread, rtol=5 * (2 / 4000) ** 0.5)
    np.testing.assert_allclose(bits.noise_mse[:, 0], snr * spread, rtol=5 * (2 / 4000) ** 0.5)


def test_a_variance_without_a_likelihood_is_refused():
    one = jnp.ones((1, 1))
    zero = jnp.zeros(1, jnp.int32)
    with pytest.raises(ValueError, match="variance = 'posterior' .* fixed_small, fixed_large"):
        vlb.vlb_terms(SCHEDULE, one, one, one, zero, variance="posterior")
