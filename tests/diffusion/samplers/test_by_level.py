"""Samplers over noise levels on Gaussian data, where D, the ODE and the moments are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.gaussian import HIGH, LOW, MEAN, STD, bent, exact, grid, keys_of, run

from diffusion_jax.diffusion import samplers as ss
from diffusion_jax.diffusion.preconditioning import denoiser, flow
from diffusion_jax.diffusion.samplers import driver
from diffusion_jax.diffusion.samplers import sigmas as discretization
from diffusion_jax.diffusion.samplers.by_level import ancestral_levels
from diffusion_jax.diffusion.samplers.sigmas import zero_snr

DETERMINISTIC = {
    "euler": ss.euler,
    "heun": ss.heun,
    "euler_ancestral": partial(ss.euler_ancestral, eta=0.0),
    "dpmpp_2s_ancestral": partial(ss.dpmpp_2s_ancestral, eta=0.0),
    "dpmpp_2m": ss.dpmpp_2m,
    "dpmpp_2m_sde": partial(ss.dpmpp_2m_sde, eta=0.0, solver_type="heun"),
    "dpmpp_3m_sde": partial(ss.dpmpp_3m_sde, eta=0.0),
    "lms": ss.lms,
    "deis": ss.deis,
    "deis, order 2": partial(ss.deis, order=2),
    "unipc": ss.unipc,
    "unipc, order 1": partial(ss.unipc, order=1),
    "unipc, order 3": partial(ss.unipc, order=3),
}
STOCHASTIC = {
    "euler": partial(ss.euler, s_churn=20.0),
    "heun": partial(ss.heun, s_churn=20.0, s_tmin=0.1, s_tmax=10.0),
    "euler_ancestral": ss.euler_ancestral,
    "dpmpp_2s_ancestral": ss.dpmpp_2s_ancestral,
    "dpmpp_2m_sde": ss.dpmpp_2m_sde,
    "dpmpp_2m_sde, heun": partial(ss.dpmpp_2m_sde, solver_type="heun", eta=0.7),
    "dpmpp_3m_sde": ss.dpmpp_3m_sde,
    "dpmpp_sde": ss.dpmpp_sde,
    "restart": partial(ss.restart, repeats=2, high=1.5),
}
ALL = STOCHASTIC | {name: getattr(ss, name) for name in ("lms", "dpmpp_2m", "deis", "unipc")}


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("euler", 1),
        ("heun", 2),
        ("euler_ancestral", 1),
        ("dpmpp_2s_ancestral", 2),
        ("dpmpp_2m", 2),
        ("dpmpp_2m_sde", 2),
        ("dpmpp_3m_sde", 3),
        ("lms", 3.7),
        ("deis", 3),
        ("deis, order 2", 2),
        ("unipc", 3),
        ("unipc, order 1", 2),
        ("unipc, order 3", 4),
    ],
)
def test_order_of_convergence_to_the_ode(name, order):
    """From sigma 20 down to 0.05; lms starts with an Euler step, whose error is small at 20.

    Two more levels follow, before which some samplers take no step of a lower order.
    """
    counts = [32, 64, 128] if order <= 2 else [64, 128] if order == 3 else [32, 64]
    x = np.linspace(-50.0, 50.0, 7)
    want = MEAN + (x - MEAN) * np.sqrt((STD**2 + LOW**2) / (STD**2 + HIGH**2))
    errors = []
    for count in counts:
        sigmas = np.array([*grid(count + 1)[:-1], 0.8 * LOW, 0.6 * LOW, 0.0])
        sampler = driver.segment(DETERMINISTIC[name](sigmas), 0, count)
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


@pytest.mark.parametrize("num_steps", [2, 3, 5, 10, 30])
def test_heun_from_far_above_the_data_is_no_worse_than_euler(num_steps):
    """On a grid whose first level is 4096; with two steps it drew 37 times the deviation."""
    sigmas, errors = zero_snr(num_steps), {}
    want = STD * jnp.linspace(-2.0, 2.0, 5)
    for make in (ss.heun, ss.euler):
        x = driver.start_from_noise(make(sigmas), jnp.linspace(-2.0, 2.0, 5))
        x = run(make(sigmas), exact, x, keys_of(5)).x
        np.testing.assert_allclose(x.mean(), MEAN, atol=0.01)
        errors[make] = abs(np.std(x) / np.std(want) - 1)
    assert errors[ss.heun] <= errors[ss.euler] + 1e-3
    if num_steps >= 5:
        assert errors[ss.heun] < 0.7 * errors[ss.euler]


@pytest.mark.parametrize(
    ("levels", "corrected"),
    [((80.0, 0.4), True), ((4518.0, 16.0), True), ((4518.0, 15.0), False), ((301.0, 0.4), False)],
)
def test_heun_corrects_the_steps_whose_mean_slope_is_the_better_guess(levels, corrected):
    """The rule by which data of unit variance are told from the noise above them."""
    sigma, after = levels
    slope = lambda x, level: (x - np.tanh(x) / (1 + level)) / level
    guess = 0.7 + (after - sigma) * slope(0.7, sigma)
    mean = 0.5 * (slope(0.7, sigma) + slope(guess, after))
    want = 0.7 + (after - sigma) * mean if corrected else guess
    part = driver.segment(ss.heun(np.array([sigma, after, 0.0])), 0, 1)
    got = run(part, bent, jnp.full((1, 1), 0.7), keys_of(1)).x
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-3)


def bent_samples(sampler, noise):
    """Two samples of `bent` from -9 to 9, with the noise of every step given in float64."""
    x, given = jnp.linspace(-9, 9, 6).reshape(2, 3), jnp.asarray(noise, jnp.float32)
    return driver.sample(sampler, bent, x, keys_of(2), step_noise=given).x


def test_restart_goes_up_by_noise_and_down_again():
    """By a formula in float64: Heun's steps on the listed levels, with the noise of the caller."""
    sigmas = grid(6, low=0.02, high=10.0)
    options = dict(low=0.3, high=1.8, repeats=2, restart_steps=3)
    sampler = ss.restart(sigmas, **options)
    place = int(np.argmin(np.abs(sigmas[1:-1] - 0.3))) + 1
    ramp = np.linspace(1.8 ** (1 / 7), sigmas[place] ** (1 / 7), 4) ** 7
    visited = [*sigmas[: place + 1], *ramp, *ramp, *sigmas[place + 1 :]]
    noise = np.random.default_rng(0).standard_normal((sampler.num_steps, 2, 3))
    x, row = np.linspace(-9, 9, 6).reshape(2, 3), 0
    for now, after in zip(visited[:-1], visited[1:], strict=True):
        if after > now:
            x = x + np.sqrt(after**2 - now**2) * noise[row]
            continue
        slope = (x - np.tanh(x) / (1 + now)) / now
        guess = x + (after - now) * slope
        if after > 0:
            slope = 0.5 * (slope + (guess - np.tanh(guess) / (1 + after)) / after)
        x, row = x + (after - now) * slope, row + 1
    assert row == sampler.num_steps == 6 + 2 * 3
    np.testing.assert_allclose(bent_samples(sampler, noise), x, rtol=1e-4, atol=1e-5)


def test_restart_forgets_an_error_made_above():
    """What Euler's coarse steps leave is halved by a restart over the levels of the data."""
    wrong = lambda x, sigma: exact(x, sigma) + 0.3 * (sigma.reshape(-1, 1) > 2.5)
    keys, sigmas = keys_of(4000), grid(40)
    x = driver.start_from_noise(ss.heun(sigmas), driver.initial_noise(keys, (4,)))
    plain = run(ss.heun(sigmas), wrong, x, keys).x.mean() - MEAN
    again = run(ss.restart(sigmas, low=0.1, high=2.4, repeats=3), wrong, x, keys).x.mean() - MEAN
    assert plain > 0.03 and abs(again) < 0.4 * plain


def test_dpmpp_sde_by_its_formula():
    """In float64; the noise of the whole step is joined from both of its halves."""
    sigmas = grid(4, high=9.0)
    sampler = ss.dpmpp_sde(sigmas, eta=0.8, s_noise=1.1)
    assert sampler.num_steps == 7
    noise = np.random.default_rng(0).standard_normal((7, 2, 3))
    x = np.linspace(-9, 9, 6).reshape(2, 3)
    image = lambda x, sigma: np.tanh(x) / (1 + sigma)
    move = lambda x, image, ratio: ratio * x + (1 - ratio) * image
    for i in range(3):
        now, after = sigmas[i], sigmas[i + 1]
        middle = np.sqrt(now * after)
        down, up = ancestral_levels(now, middle, 0.8)
        ahead = move(x, image(x, now), down / now) + 1.1 * up * noise[2 * i]
        down, up = ancestral_levels(now, after, 0.8)
        share = (now - middle) / (now - after)
        joined = np.sqrt(share) * noise[2 * i] + np.sqrt(1 - share) * noise[2 * i + 1]
        x = move(x, image(ahead, middle), down / now) + 1.1 * up * joined
    want = image(x, sigmas[3])
    np.testing.assert_allclose(bent_samples(sampler, noise), want, rtol=1e-4, atol=1e-5)


def test_dpmpp_sde_begins_anew_in_the_middle_of_a_step():
    part = driver.segment(ss.dpmpp_sde(np.array([9.0, 1.0, 0.0]), eta=1.0), 1, 2)
    noise = jnp.full((1, 1, 1), 0.5)
    got = driver.sample(part, bent, jnp.full((1, 1), 0.7), keys_of(1), step_noise=noise).x
    down, up = ancestral_levels(3.0, 1.0, 1.0)
    want = down / 3 * 0.7 + (1 - down / 3) * np.tanh(0.7) / 4 + up * 0.5
    np.testing.assert_allclose(got[0, 0], want, rtol=1e-5)


def test_ancestral_step_of_sgm():
    down, up = ancestral_levels(14.6, 10.0, 1.0)
    np.testing.assert_allclose([down, up], [6.8493, 7.2861], atol=5e-5)
    assert [float(v) for v in ancestral_levels(14.6, 10.0, 0.0)] == [10.0, 0.0]
    assert [float(v) for v in ancestral_levels(14.6, 0.0, 1.0)] == [0.0, 0.0]
    # Never more noise than there should be in all.
    assert [float(v) for v in ancestral_levels(14.6, 10.0, 9.0)] == [0.0, 10.0]


@pytest.mark.parametrize("name", ALL)
def test_the_last_step_ends_at_the_denoised_image(name):
    """Of the level before; for lms along the slopes before it, so not exactly."""
    sampler = ALL[name](grid(5))
    last = driver.segment(sampler, sampler.num_steps - 1, sampler.num_steps)
    got = run(last, bent, jnp.full((2, 3), 0.7), keys_of(2))
    if name in ("euler", "heun"):  # the churned x is denoised
        assert np.all(np.isfinite(got.x))
    else:
        want = bent(jnp.full((2, 3), 0.7), jnp.full(2, LOW))
        np.testing.assert_allclose(got.x, want, rtol=1e-5)


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
    count = sampler.num_steps
    parts = [driver.segment(sampler, 0, 10), driver.segment(sampler, 10, count)]
    assert [part.num_steps for part in parts] == [10, count - 10]
    whole = run(sampler, exact, x, keys).x
    first = run(parts[0], exact, x, keys).x
    assert np.abs(first).max() > 1.5
    both = run(parts[1], exact, first, keys).x
    if name.startswith(("dpmpp_2m", "dpmpp_3m", "lms", "deis", "unipc")):
        assert 1e-5 < np.abs(np.asarray(both - whole)).max() < 0.05
    else:
        np.testing.assert_allclose(both, whole, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_predictions_in_half_precision_run_in_float32(name):
    half = lambda x, sigma: bent(x, sigma).astype(jnp.bfloat16)
    x = jnp.ones((2, 3), jnp.bfloat16)
    samples = driver.sample(ALL[name](grid(3)), half, x, keys_of(2), log_every=1)
    assert samples.x.dtype == samples.x_start_log.dtype == jnp.float32
    assert np.all(np.isfinite(samples.x))


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
    for factory in (ss.lms, ss.deis, ss.unipc):
        with pytest.raises(ValueError, match="order = 0 should be at least 1"):
            factory(sigmas, order=0)
    with pytest.raises(ValueError, match=r"eta = 0.0 should be positive; dpmpp_2s_ancestral has"):
        ss.dpmpp_sde(sigmas, eta=0.0)
    with pytest.raises(ValueError, match="restart_steps = 0 should be at least 1"):
        ss.restart(sigmas, restart_steps=0)
    with pytest.raises(ValueError, match=r"high = 0\.04 should be finite and above 0\.05"):
        ss.restart(sigmas, high=0.04)
    with pytest.raises(ValueError, match="num_steps = 1 should be at least 2"):
        ss.restart(np.array([1.0, 0.0]))


def test_the_second_evaluation_is_spared_in_the_last_step():
    """And nowhere is the network evaluated at sigma = 0."""
    for factory, count in (
        (ss.heun, 2),
        (ss.dpmpp_2s_ancestral, 2),
        (ss.dpmpp_sde, 2),
        (ss.lms, 1),
        (ss.euler, 1),
        (ss.unipc, 1),
    ):
        seen = []

        def spy(x, sigma, seen=seen):
            jax.debug.callback(lambda s: seen.append(float(s)), sigma[0])
            return bent(x, sigma)

        # Eight short steps: heun spares it in long ones, too.
        jax.block_until_ready(run(factory(grid(8)), spy, jnp.ones((1, 2)), keys_of(1)).x)
        jax.effects_barrier()
        assert len(seen) == 8 * count - (count - 1) and min(seen) > 0.0, factory


def test_euler_on_flow_levels_is_euler_in_time():
    """The same as x_next = x_t + (t_next - t) F(x_t, t) in float64, from pure noise at t = 1."""

    def velocity(x, thousand_t, conditioning, xp=jnp):
        return 0.7 * x + xp.sin(2.0 * x + 0.004 * thousand_t.reshape(-1, 1))

    levels = discretization.flow(7, shift=2.0)
    noise = np.random.default_rng(0).standard_normal((3, 5)).astype(np.float32)
    predict = denoiser(velocity, flow())
    sampler = ss.euler(levels)
    x_T = driver.start_from_noise(sampler, jnp.asarray(noise))
    got = driver.sample(sampler, lambda x, sigma: predict(x, sigma, {}), x_T, keys_of(3)).x

    x, times = noise.astype(np.float64), 2 * np.linspace(1, 0, 8) / (1 + np.linspace(1, 0, 8))
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        x = x + (t_next - t) * velocity(x, np.full(3, 1000 * t), None, np)
    np.testing.assert_allclose(got, x, rtol=2e-6, atol=2e-6)
