"""Samplers over noise levels on Gaussian data, where D, the ODE and the moments are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import by_level as ss
from diffusion_jax.diffusion.samplers import driver

MEAN, STD = 0.4, 0.6
LOW, HIGH = 0.05, 20.0
DETERMINISTIC = {
    "euler": ss.euler,
    "heun": ss.heun,
    "euler_ancestral": partial(ss.euler_ancestral, eta=0.0),
    "dpmpp_2s_ancestral": partial(ss.dpmpp_2s_ancestral, eta=0.0),
    "dpmpp_2m": ss.dpmpp_2m,
    "dpmpp_2m_sde": partial(ss.dpmpp_2m_sde, eta=0.0, solver_type="heun"),
    "lms": ss.lms,
}
STOCHASTIC = {
    "euler": partial(ss.euler, s_churn=20.0),
    "heun": partial(ss.heun, s_churn=20.0, s_tmin=0.1, s_tmax=10.0),
    "euler_ancestral": ss.euler_ancestral,
    "dpmpp_2s_ancestral": ss.dpmpp_2s_ancestral,
    "dpmpp_2m_sde": ss.dpmpp_2m_sde,
    "dpmpp_2m_sde, heun": partial(ss.dpmpp_2m_sde, solver_type="heun", eta=0.7),
}
ALL = STOCHASTIC | {"lms": ss.lms, "dpmpp_2m": ss.dpmpp_2m}


def grid(num_steps, low=LOW, high=HIGH, rho=7.0):
    ramp = np.linspace(0.0, 1.0, num_steps)
    ends = high ** (1 / rho), low ** (1 / rho)
    return np.append((ends[0] + ramp * (ends[1] - ends[0])) ** rho, 0.0)


def exact(x, sigma):
    """The denoiser of N(MEAN, STD^2)."""
    share = STD**2 / (STD**2 + sigma**2)
    return MEAN + share.reshape(-1, *(1,) * (x.ndim - 1)) * (x - MEAN)


def bent(x, sigma):
    """No Gaussian's denoiser, so that every evaluation counts."""
    return jnp.tanh(x) / (1.0 + sigma.reshape(-1, *(1,) * (x.ndim - 1)))


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def run(sampler, predict, x, keys):
    return jax.jit(lambda x, keys: driver.sample(sampler, predict, x, keys))(x, keys)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("euler_ancestral", 1),
        ("dpmpp_2s_ancestral", 2),
        ("dpmpp_2m", 2),
        ("dpmpp_2m_sde", 2),
        ("lms", 3.7),
    ],
)
def test_order_of_convergence_to_the_ode(name, order):
    """From sigma 20 down to 0.05; lms starts with an Euler step, whose error is small at 20."""
    counts = [32, 64, 128] if name != "lms" else [32, 64]
    x = np.linspace(-50.0, 50.0, 7)
    want = MEAN + (x - MEAN) * np.sqrt((STD**2 + LOW**2) / (STD**2 + HIGH**2))
    errors = []
    for count in counts:
        sampler = driver.segment(DETERMINISTIC[name](grid(count + 1)), 0, count)
        got = run(sampler, exact, jnp.asarray(x, jnp.float32), keys_of(7)).x
        errors.append(np.abs(np.asarray(got) - want).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert abs(slope - order) < 0.2, (slope, errors)
    assert errors[-1] < 0.03


def test_inversion_leads_to_the_noise_of_the_ode_and_back():
    """With order one; iterated, it is the exact inverse of Euler's steps, however few."""
    x0 = np.linspace(-1.5, 2.5, 7)
    want = MEAN + (x0 - MEAN) * np.sqrt(STD**2 + HIGH**2) / STD
    errors, counts = [], [64, 128, 256]
    for count in counts:
        sigmas = grid(count)
        x_T = run(ss.euler_inversion(sigmas), exact, jnp.asarray(x0, jnp.float32), keys_of(7)).x
        back = run(ss.euler(sigmas), exact, x_T, keys_of(7)).x
        errors.append([np.abs(x_T - want).max() / HIGH, np.abs(back - x0).max()])
    slopes = np.diff(np.log2(np.array(errors)), axis=0)
    assert np.all((slopes < -0.75) & (slopes > -1.3)), (slopes, errors)
    assert max(errors[-1]) < 0.2
    x_T = run(ss.euler_inversion(grid(8), iterations=60), exact, jnp.asarray(x0, jnp.float32),
              keys_of(7)).x  # fmt: skip
    back = run(ss.euler(grid(8)), exact, x_T, keys_of(7)).x
    np.testing.assert_allclose(back, x0, atol=1e-4)


@pytest.mark.parametrize("name", STOCHASTIC)
def test_noisy_samplers_draw_from_the_data(name):
    """20000 samples, 60 steps: mean and standard deviation of the data, to a discretization error
    of 1.5 % and five standard errors."""
    sigmas = grid(60, low=0.01)
    sampler = STOCHASTIC[name](sigmas)
    keys = keys_of(20000)
    x = driver.start_from_noise(sampler, driver.initial_noise(keys, (1,)))
    x = np.asarray(run(sampler, exact, x, keys).x)
    np.testing.assert_allclose(x.mean(), MEAN, atol=5 * STD / 20000**0.5 + 0.01 * STD)
    # Those of the first order leave a bias of about 1 / num_steps: theirs is the chain's deviation.
    want, bias = (chain_std(name, sigmas), 0.0) if name.startswith("euler") else (STD, 0.015)
    np.testing.assert_allclose(x.std(), want, rtol=5 / (2 * 20000) ** 0.5 + bias)
    np.testing.assert_allclose(want, STD, rtol=0.1)
    skew = ((x - x.mean()) ** 3).mean() / x.std() ** 3
    assert abs(skew) < 5 * (6 / 20000) ** 0.5


def chain_std(name, sigmas):
    """Follow the variance of x through steps that are affine in it, with Gaussian noise."""
    variance = 1 + sigmas[0] ** 2
    for now, after in zip(sigmas[:-1], sigmas[1:], strict=True):
        start, end, up = now, after, 0.0
        if name == "euler":
            start = now * (1 + min(20 / 60, 2**0.5 - 1))
            variance += start**2 - now**2
        else:
            up = after * np.sqrt(1 - after**2 / now**2)
            end = np.sqrt(after**2 - up**2)
        slope = 1 + (end - start) * (1 - STD**2 / (STD**2 + start**2)) / start
        variance = slope**2 * variance + up**2
    return variance**0.5


def test_ancestral_step_of_sgm():
    down, up = ss.ancestral_levels(14.6, 10.0, 1.0)
    np.testing.assert_allclose([down, up], [6.8493, 7.2861], atol=5e-5)
    assert [float(v) for v in ss.ancestral_levels(14.6, 10.0, 0.0)] == [10.0, 0.0]
    assert [float(v) for v in ss.ancestral_levels(14.6, 0.0, 1.0)] == [0.0, 0.0]
    # Never more noise than there should be in all.
    assert [float(v) for v in ss.ancestral_levels(14.6, 10.0, 9.0)] == [0.0, 10.0]


@pytest.mark.parametrize("name", ALL)
def test_the_last_step_ends_at_the_denoised_image(name):
    """Of the level before; for lms along the slopes before it, so not exactly."""
    sampler = ALL[name](grid(5))
    got = run(driver.segment(sampler, 4, 5), bent, jnp.full((2, 3), 0.7), keys_of(2))
    if name in ("euler", "heun"):  # the churned x is denoised
        assert np.all(np.isfinite(got.x))
    else:
        want = bent(jnp.full((2, 3), 0.7), jnp.full(2, LOW))
        np.testing.assert_allclose(got.x, want, rtol=1e-5)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_lms_weights_integrate_polynomials(order):
    """Exactly, up to the degree order - 1, on every interval of an uneven grid."""
    sigmas = grid(9, low=0.002, high=80.0)
    weights = np.asarray(ss.lms(sigmas, order=order).coefficients.weights, np.float64)
    for i in range(len(sigmas) - 1):
        for known in range(min(i + 1, order)):
            for degree in range(known + 1):
                slopes = sigmas[i - known : i + 1][::-1] ** degree
                ends = sigmas[[i + 1, i]] ** (degree + 1) / (degree + 1)
                got = weights[i, known, : known + 1] @ slopes
                scale = np.abs(weights[i, known, : known + 1]) @ slopes
                np.testing.assert_allclose(got, ends[0] - ends[1], atol=1e-6 * scale)
    assert not weights[:, -1, order:].any()


@pytest.mark.parametrize("name", ALL)
def test_a_batch_of_one_draws_the_same_sample(name):
    sampler = ALL[name](grid(6))

    @jax.jit
    def draw(keys):
        x = driver.start_from_noise(sampler, driver.initial_noise(keys, (2, 2, 1)))
        return driver.sample(sampler, bent, x, keys).x

    keys = keys_of(5)
    together = np.asarray(draw(keys))
    np.testing.assert_allclose(draw(keys[3:4])[0], together[3], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.mark.parametrize("name", ALL)
def test_two_segments_are_one_run(name):
    """With the noise of the whole; samplers with memory only begin it anew."""
    sampler, keys = ALL[name](grid(24)), keys_of(3)
    x = driver.start_from_noise(sampler, driver.initial_noise(keys, (4,)))
    parts = [driver.segment(sampler, 0, 10), driver.segment(sampler, 10, 24)]
    assert [part.num_steps for part in parts] == [10, 14]
    whole = run(sampler, exact, x, keys).x
    first = run(parts[0], exact, x, keys).x
    assert np.abs(first).max() > 1.5
    both = run(parts[1], exact, first, keys).x
    if name.startswith(("dpmpp_2m", "lms")):
        assert 1e-5 < np.abs(np.asarray(both - whole)).max() < 0.05
    else:
        np.testing.assert_allclose(both, whole, atol=1e-5)


def test_dpmpp_2m_restarts_with_a_first_order_step():
    """A segment takes the very steps of the formula on its own levels."""
    sigmas = grid(6)
    part = driver.segment(ss.dpmpp_2m(sigmas), 2, 5)
    x = x_ours = np.array([[0.3, -2.0]])
    before, h_before = None, None
    for i in range(2, 5):
        now, after = sigmas[i], sigmas[i + 1]
        denoised = np.tanh(x) / (1 + now)
        h = np.log(now / after)
        use = denoised
        if before is not None:
            use = denoised + h / (2 * h_before) * (denoised - before)
        x = after / now * x - np.expm1(-h) * use
        before, h_before = denoised, h
    got = run(part, bent, jnp.asarray(x_ours, jnp.float32), keys_of(1)).x
    np.testing.assert_allclose(got, x, rtol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_predictions_in_half_precision_run_in_float32(name):
    half = lambda x, sigma: bent(x, sigma).astype(jnp.bfloat16)
    x = jnp.ones((2, 3), jnp.bfloat16)
    samples = driver.sample(ALL[name](grid(3)), half, x, keys_of(2), log_every=1)
    assert samples.x.dtype == samples.x_start_log.dtype == jnp.float32
    assert np.all(np.isfinite(samples.x))


def test_sde_without_noise_is_dpmpp_2m():
    sigmas, x = grid(8), jnp.linspace(-9.0, 9.0, 5)
    want = run(ss.dpmpp_2m(sigmas), bent, x, keys_of(5)).x
    got = run(ss.dpmpp_2m_sde(sigmas, eta=0.0), bent, x, keys_of(5)).x
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_churn_is_that_of_edm():
    """sigma grows by at most sqrt(2), within [s_tmin, s_tmax], by noise of the missing variance."""
    sigmas = grid(10)
    steps = ss.euler(sigmas, s_churn=4.0, s_tmin=0.1, s_tmax=5.0, s_noise=1.1).coefficients
    inside = (sigmas[:-1] >= 0.1) & (sigmas[:-1] <= 5.0)
    assert inside.any() and not inside.all()
    np.testing.assert_allclose(steps.sigma_hat / steps.sigma, np.where(inside, 1.4, 1.0), rtol=1e-6)
    want = 1.1 * sigmas[:-1] * np.sqrt(1.4**2 - 1) * inside
    np.testing.assert_allclose(steps.churn, want, rtol=1e-5)
    most = ss.heun(sigmas, s_churn=99.0).coefficients
    np.testing.assert_allclose(most.sigma_hat / most.sigma, 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("sigma", [0.5, 14.6, 4096.0])
def test_start_and_image_have_the_level_of_the_first_step(sigma):
    sampler = driver.segment(ss.euler(np.array([9999.0, sigma, 0.1, 0.0])), 1, 3)
    noise, image = jnp.array([[1.0, -2.0]]), jnp.array([[0.3, 0.4]])
    got = driver.start_from_noise(sampler, noise)
    np.testing.assert_allclose(got, np.sqrt(1 + sigma**2) * noise, rtol=1e-6)
    got = driver.start_from_image(sampler, image, noise)
    np.testing.assert_allclose(got, image + sigma * noise, rtol=1e-6)


def test_image_to_image_stays_near_the_image():
    """Weak strength keeps the image, full strength forgets it."""
    keys, image = keys_of(64), jnp.full((64, 16), 0.9)
    noise = driver.initial_noise(keys, (16,))
    distances = []
    for strength in (0.2, 0.6, 1.0):
        first = 30 - driver.steps_of_strength(30, strength)
        part = driver.segment(ss.euler(grid(30)), first, 30)
        x = driver.start_from_image(part, image, noise)
        x = np.asarray(run(part, exact, x, keys).x)
        distances.append(np.sqrt(((x - 0.9) ** 2).mean()))
    assert distances[0] < 0.2 and distances[0] < distances[1] - 0.1 < distances[2]
    np.testing.assert_allclose(distances[2], np.sqrt(0.5**2 + STD**2), rtol=0.1)


def test_inpainting_keeps_what_the_mask_says():
    image, mask = jnp.full((40, 10), 1.3), jnp.arange(10)[None] < 4
    keys, sampler = keys_of(40), ss.heun(grid(30, low=0.01))
    before = driver.inpaint(sampler.add_noise, image, mask.astype(jnp.float32))
    x = driver.start_from_noise(sampler, driver.initial_noise(keys, (10,)))
    x = np.asarray(driver.sample(sampler, exact, x, keys, before_step=before).x)
    np.testing.assert_allclose(x[:, :4], 1.3, atol=0.06)
    np.testing.assert_allclose(x[:, 4:].mean(), MEAN, atol=0.2)


@pytest.mark.parametrize(
    "sigmas",
    [[1.0], [2.0, 1.0], [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], [np.inf, 1.0, 0.0], [np.nan, 0.0]],
)
def test_sigmas_must_decrease_to_zero(sigmas):
    for factory in ALL.values():
        with pytest.raises(ValueError, match="strictly decreasing to 0"):
            factory(np.array(sigmas))


def test_wrong_options_are_refused():
    sigmas = grid(3)
    with pytest.raises(ValueError, match="s_churn = -1.0 should not be negative"):
        ss.euler(sigmas, s_churn=-1.0)
    with pytest.raises(ValueError, match="eta = -0.5 should not be negative"):
        ss.euler_ancestral(sigmas, eta=-0.5)
    with pytest.raises(ValueError, match="s_noise = nan should not be negative"):
        ss.dpmpp_2m_sde(sigmas, s_noise=float("nan"))
    with pytest.raises(ValueError, match="order = 0 should be at least 1"):
        ss.lms(sigmas, order=0)


def test_the_second_evaluation_is_spared_in_the_last_step():
    """And nowhere is the network evaluated at sigma = 0."""
    for factory, count in ((ss.heun, 2), (ss.dpmpp_2s_ancestral, 2), (ss.lms, 1), (ss.euler, 1)):
        seen = []

        def spy(x, sigma, seen=seen):
            jax.debug.callback(lambda s: seen.append(float(s)), sigma[0])
            return bent(x, sigma)

        jax.block_until_ready(run(factory(grid(4)), spy, jnp.ones((1, 2)), keys_of(1)).x)
        jax.effects_barrier()
        assert len(seen) == 4 * count - (count - 1) and min(seen) > 0.0, factory
