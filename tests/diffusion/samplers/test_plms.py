"""PLMS against its order of convergence, its formula in float64, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.samplers import driver, plms, visited_timesteps
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule

MEAN, STD = 0.4, 0.6
RAMP = {"linear_start": 0.00085, "linear_end": 0.012}


def exact(schedule, parameterization="eps"):
    """A perfect network for x_0 ~ N(MEAN, STD^2)."""

    def predict(x_t, t):
        signal = ddpm.at(schedule.sqrt_alphas_cumprod, t, x_t)
        sigma = ddpm.at(schedule.sqrt_one_minus_alphas_cumprod, t, x_t)
        centred = (x_t - signal * MEAN) / (signal**2 * STD**2 + sigma**2)
        x_start, noise = MEAN + signal * STD**2 * centred, sigma * centred
        v = signal * noise - sigma * x_start
        return {"eps": noise, "x0": x_start, "v": v}[parameterization]

    return predict


def keys_of(count):
    return jax.random.split(jax.random.key(0), count)


def run(sampler, predict, x):
    return jax.jit(lambda x: driver.sample(sampler, predict, x, keys_of(len(x))))(x)


def test_order_of_convergence_to_the_ode():
    """Two, down to a third of the schedule; nearer to 0, sigma grows as a square root of t, and for
    the whole way 40 steps have the order 1.2, with an eighth of DDIM's error."""
    schedule = make_schedule("linear", 4000, linear_start=0.0002, linear_end=0.003)
    abar = np.cumprod(1 - make_beta_schedule("linear", 4000, linear_start=0.0002, linear_end=0.003))
    x, counts, errors = np.linspace(-2.5, 2.5, 7), [40, 80, 160], []
    for count in counts:
        sampler = driver.segment(plms(schedule, count), 0, count * 7 // 10 - 1)
        begin, end = int(sampler.coefficients.t[0]), 1201
        assert int(sampler.coefficients.t[-1]) == end + 4000 // count
        got = run(sampler, exact(schedule), jnp.asarray(x, jnp.float32)).x
        std = np.sqrt(abar * STD**2 + 1 - abar)
        ratio = std[end] / std[begin]
        want = np.sqrt(abar[end]) * MEAN + ratio * (x - np.sqrt(abar[begin]) * MEAN)
        errors.append(np.abs(np.asarray(got) - want).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert 1.8 < slope < 2.2, (slope, errors)
    assert errors[-1] < 5e-5, errors


@pytest.mark.parametrize("first", [0, 3])
def test_steps_are_those_of_the_paper(first):
    """In float64 with a network that is no denoiser; a segment starts as a whole run does."""
    total, count = 60, 9
    schedule = make_schedule("linear", total, linear_end=0.1)
    abar = np.cumprod(1 - make_beta_schedule("linear", total, linear_end=0.1))
    visited, previous = (v[::-1] for v in visited_timesteps(total, count, "uniform"))
    network = lambda x, t: 0.3 * x + 0.01 * t
    x = x_T = np.array([[0.5, -1.0]])

    def move(x, eps, t, s):
        x_start = (x - np.sqrt(1 - abar[t]) * eps) / np.sqrt(abar[t])
        return np.sqrt(abar[s]) * x_start + np.sqrt(1 - abar[s]) * eps

    old = []
    for i in range(first, count):
        t, s = visited[i], previous[i]
        eps = network(x, t)
        if not old:
            ahead = network(move(x, eps, t, s), visited[i + 1])
            used = (eps + ahead) / 2
        elif len(old) == 1:
            used = (3 * eps - old[-1]) / 2
        elif len(old) == 2:
            used = (23 * eps - 16 * old[-1] + 5 * old[-2]) / 12
        else:
            used = (55 * eps - 59 * old[-1] + 37 * old[-2] - 9 * old[-3]) / 24
        old.append(eps)
        x = move(x, used, t, s)
    sampler = driver.segment(plms(schedule, count), first, count)
    got = run(sampler, lambda x, t: network(x, t[:, None]), jnp.asarray(x_T, jnp.float32)).x
    np.testing.assert_allclose(got, x, rtol=2e-5)


def test_one_step_looks_ahead_at_its_own_timestep():
    schedule = make_schedule("linear", 20, linear_end=0.2)
    assert plms(schedule, 1).coefficients.t_ahead.tolist() == [1]
    steps = plms(schedule, 4).coefficients
    assert steps.t.tolist() == [16, 11, 6, 1] and steps.t_ahead.tolist() == [11, 6, 1, 1]


@pytest.mark.parametrize("parameterization", ["x0", "v"])
def test_all_parameterizations_are_one_sampler(parameterization):
    schedule = make_schedule("linear", 100, linear_end=0.1)
    x = jnp.linspace(-2.0, 2.0, 5)
    want = run(plms(schedule, 10), exact(schedule), x).x
    sampler = plms(schedule, 10, parameterization=parameterization)
    got = run(sampler, exact(schedule, parameterization), x).x
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_norm_limit_bounds_the_predicted_image():
    schedule = make_schedule("linear", 100, linear_end=0.1)
    x = jnp.full((2, 8), 3.0)
    network = lambda x, t: 0.1 * x
    free = driver.sample(plms(schedule, 5), network, x, keys_of(2), log_every=1)
    held = driver.sample(plms(schedule, 5, norm_limit=0.5), network, x, keys_of(2), log_every=1)
    assert free.x_start_log.min() > 2.0
    np.testing.assert_allclose(held.x_start_log[:2], 0.5, rtol=1e-5)
    assert 0.3 < held.x_start_log.min() and held.x_start_log.max() < 0.50001


def test_predictions_in_half_precision_run_in_float32():
    schedule = make_schedule("linear", 10)
    half = lambda x, t: (0.1 * x).astype(jnp.bfloat16)
    samples = driver.sample(plms(schedule, 4), half, jnp.ones((2, 3), jnp.bfloat16), keys_of(2))
    assert samples.x.dtype == jnp.float32


def test_inpainting_and_images_use_the_schedule():
    schedule = make_schedule("linear", 100, linear_end=0.1)
    part = driver.segment(plms(schedule, 10), 6, 10)
    image, noise = jnp.full((1, 2), 0.8), jnp.array([[1.0, -1.0]])
    got = driver.start_from_image(part, image, noise)
    t = np.array([int(part.coefficients.t[0])])
    np.testing.assert_allclose(got, ddpm.q_sample(schedule, image, jnp.asarray(t), noise))
    np.testing.assert_array_equal(driver.start_from_noise(part, noise), noise)


def test_wrong_options_are_refused():
    schedule = make_schedule("linear", 10)
    with pytest.raises(ValueError, match="eta = 0.5 should be 0"):
        plms(schedule, 5, eta=0.5)
    with pytest.raises(ValueError, match=r"num_steps = 11 should lie in \[1, 10\]"):
        plms(schedule, 11)
    with pytest.raises(ValueError, match="norm_limit = -1.0 should be positive"):
        plms(schedule, 5, norm_limit=-1.0)
    zero_snr = make_schedule("linear", 10, parameterization="v", rescale_zero_snr=True)
    plms(zero_snr, 5, parameterization="v", discretize="leading")
    with pytest.raises(ValueError, match="abar is 0 at timestep 9, the first of plms"):
        plms(zero_snr, 5, parameterization="v", discretize="trailing")
