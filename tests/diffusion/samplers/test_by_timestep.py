"""Samplers on Gaussian data, where the answers are known."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm, samplers
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule

MEAN, STD = 0.4, 0.6
NAMES = ("uniform", "quad", "leading", "trailing", "linspace")


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


def draw(make, schedule, predictor, x_T, keys):
    """Run the sampler make(schedule), compiled as one program."""

    @jax.jit
    def run(schedule, x_T, keys):
        return samplers.sample(make(schedule), predictor(schedule), x_T, keys)

    return run(schedule, x_T, keys)


def marginal(abar):
    return np.sqrt(abar) * MEAN, np.sqrt(abar * STD**2 + 1 - abar)


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def test_eta_outside_its_range_is_refused():
    with pytest.raises(ValueError, match=r"eta = 1.5 should lie in \[0, 1\]"):
        samplers.ddim(make_schedule("linear", 10), 5, eta=1.5)


def ddim_errors(steps, total=4096, **options):
    """Largest distance from the exact solution of the probability-flow ODE, for each step count."""
    scale = 1000 / total
    ramp = {"linear_start": 1e-4 * scale, "linear_end": 2e-2 * scale}
    schedule = make_schedule("linear", total, **ramp)
    abar = np.cumprod(1 - make_beta_schedule("linear", total, **ramp))
    x_T = np.linspace(-2.5, 2.5, 7)
    errors = []
    for count in steps:
        make = partial(samplers.ddim, num_steps=count, **options)
        visited, previous = samplers.visited_timesteps(
            total, count, options["discretize"] if "discretize" in options else "uniform"
        )
        got = draw(make, schedule, exact, jnp.asarray(x_T, jnp.float32), keys_of(7))
        mean, std = marginal(abar[visited[-1]])
        end_mean, end_std = marginal(1.0 if previous[0] < 0 else abar[previous[0]])
        solution = end_mean + end_std * (x_T - mean) / std
        errors.append(np.abs(np.asarray(got.x) - solution).max())
    return np.array(errors)


@pytest.mark.parametrize("discretize", ["uniform", "trailing", "linspace"])
def test_ddim_converges_to_the_ode_with_order_one(discretize):
    steps = [16, 32, 64, 128, 256]
    errors = ddim_errors(steps, discretize=discretize)
    slope = np.polyfit(np.log(steps), np.log(errors), 1)[0]
    assert -1.2 < slope < -0.8, (slope, errors)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("eta", [0.0, 0.7])
def test_ddim_is_one_sampler_in_all_parameterizations(parameterization, eta):
    schedule = make_schedule("linear", 200, linear_end=0.1)
    x_T = samplers.initial_noise(keys_of(4), (3,))

    def run(name):
        make = partial(samplers.ddim, num_steps=20, eta=eta, parameterization=name)
        predictor = partial(exact, parameterization=name)
        return draw(make, schedule, predictor, x_T, keys_of(4, seed=1)).x

    np.testing.assert_allclose(run(parameterization), run("eps"), atol=2e-5)


@pytest.mark.parametrize("discretize", NAMES)
def test_ddim_takes_the_step_of_equation_12(discretize):
    """One step after another in float64, with a network that is no denoiser, in S steps of T."""
    total, count, eta = 37, 9, 0.6
    schedule = make_schedule("linear", total, linear_end=0.2)
    abar = np.cumprod(1 - make_beta_schedule("linear", total, linear_end=0.2))
    visited, previous = samplers.visited_timesteps(total, count, discretize)
    keys, x_T = keys_of(2), np.array([[0.5, -1.0], [2.0, 0.1]])
    x = x_T
    for i, (t, s) in enumerate(zip(visited[::-1], previous[::-1], strict=True)):
        a, a_prev = abar[t], 1.0 if s < 0 else abar[s]
        eps = 0.3 * x + 0.01 * t
        sigma = eta * np.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
        step_keys = [jax.random.fold_in(key, i) for key in keys]
        noise = np.stack([jax.random.normal(key, (2,)) for key in step_keys])
        x_start = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = np.sqrt(a_prev) * x_start + np.sqrt(1 - a_prev - sigma**2) * eps + 1.5 * sigma * noise

    def predict(x, t):
        return 0.3 * x + 0.01 * t[:, None]

    options = {"eta": eta, "discretize": discretize, "temperature": 1.5}
    make = partial(samplers.ddim, num_steps=count, **options)
    got = draw(make, schedule, lambda schedule: predict, jnp.asarray(x_T, jnp.float32), keys)
    np.testing.assert_allclose(got.x, x, rtol=2e-5, atol=2e-5)


def test_ddim_with_eta_1_is_ddpm():
    """On all timesteps both draw from the posterior, with the same noise."""
    schedule = make_schedule("linear", 60, linear_end=0.3)
    x_T = samplers.initial_noise(keys_of(5), (4,))
    runs = [
        draw(make, schedule, exact, x_T, keys_of(5)).x
        for make in (
            partial(samplers.ddim, num_steps=60, eta=1.0),
            partial(samplers.ddpm_ancestral, num_steps=60, clip_denoised=False),
        )
    ]
    np.testing.assert_allclose(*runs, atol=2e-5)


@pytest.mark.parametrize("discretize", ["leading", "trailing", "linspace"])
def test_respaced_ancestral_is_ddim_with_eta_1(discretize):
    schedule = make_schedule("cosine", 60)
    x_T = samplers.initial_noise(keys_of(5), (4,))
    options = {"discretize": discretize, "clip_denoised": True}
    runs = [
        draw(make, schedule, exact, x_T, keys_of(5)).x
        for make in (
            partial(samplers.ddim, num_steps=13, eta=1.0, **options),
            partial(samplers.ddpm_ancestral, num_steps=13, **options),
        )
    ]
    np.testing.assert_allclose(*runs, atol=1e-4)


@pytest.mark.parametrize("variance", ["posterior", "fixed_small", "fixed_large"])
@pytest.mark.parametrize("num_steps", [200, 50])
def test_ancestral_samples_have_the_moments_of_the_chain(variance, num_steps):
    """20000 samples against the mean and variance of the linear chain, and those of the data."""
    schedule = make_schedule("linear", 200, linear_end=0.1)
    make = partial(
        samplers.ddpm_ancestral, num_steps=num_steps, variance=variance, clip_denoised=False
    )
    abar = np.cumprod(1 - make_beta_schedule("linear", 200, linear_end=0.1))
    visited, _ = samplers.visited_timesteps(200, num_steps, "linspace")
    abar = abar[visited]
    mean, square = 0.0, 1.0
    for i in range(num_steps - 1, -1, -1):
        a, a_prev = abar[i], abar[i - 1] if i else 1.0
        beta = 1 - a / a_prev
        small = beta * (1 - a_prev) / (1 - a)
        gain = np.sqrt(a) * STD**2 / (a * STD**2 + 1 - a)
        coef1, coef2 = np.sqrt(a_prev) * beta / (1 - a), (1 - a_prev) * np.sqrt(1 - beta) / (1 - a)
        slope = coef1 * gain + coef2
        mean = slope * mean + coef1 * (1 - gain * np.sqrt(a)) * MEAN
        square = slope**2 * square + (i > 0) * (beta if variance == "fixed_large" else small)
    keys = keys_of(20000)
    x_T = samplers.initial_noise(keys, (1,))
    x = np.asarray(draw(make, schedule, exact, x_T, keys).x)
    np.testing.assert_allclose(x.mean(), mean, atol=5 * STD / 20000**0.5)
    np.testing.assert_allclose(x.std(), square**0.5, rtol=5 / (2 * 20000) ** 0.5)
    np.testing.assert_allclose([mean, square**0.5], [MEAN, STD], atol=6 / num_steps)


@pytest.mark.parametrize("eta", [None, 0.0, 0.8])
def test_batches_of_one_and_of_eight_draw_the_same_samples(eta):
    schedule = make_schedule("linear", 20, linear_end=0.3)
    make = samplers.ddpm_ancestral if eta is None else partial(samplers.ddim, eta=eta)

    @jax.jit
    def run(schedule, keys):
        x_T = samplers.initial_noise(keys, (4, 4, 1))
        return samplers.sample(make(schedule, 7), exact(schedule), x_T, keys).x

    keys = keys_of(8)
    together = run(schedule, keys)
    for i in (0, 3, 7):
        np.testing.assert_allclose(run(schedule, keys[i : i + 1])[0], together[i], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 0.1


def test_clipped_ddim_derives_its_noise_from_the_clipped_image():
    schedule = make_schedule("linear", 10, linear_end=0.3)
    x = jnp.full((1, 1), 3.0)
    sampler = samplers.ddim(schedule, 10, clip_denoised=True)
    raw = samplers.ddim(schedule, 10, clip_denoised=True, use_clipped_noise=False)
    predict = lambda x, t: 0.2 * x
    row = jax.tree.map(lambda values: values[0], sampler.coefficients)
    t = jnp.array([9])
    x_start = ddpm.predict_start_from_noise(schedule, x, t, 0.2 * x)
    assert float(x_start[0, 0]) > 1.0
    noise = ddpm.predict_noise_from_start(schedule, x, t, jnp.ones((1, 1)))
    clipped, _, start = sampler.step(predict, x, (), row, None)
    kept, *_ = raw.step(predict, x, (), row, None)
    assert float(start[0, 0]) == 1.0
    np.testing.assert_allclose(clipped, row.signal_prev + row.direction * noise, rtol=1e-6)
    np.testing.assert_allclose(kept, row.signal_prev + row.direction * 0.6, rtol=1e-6)
    unclipped, _, start = samplers.ddim(schedule, 10).step(predict, x, (), row, None)
    np.testing.assert_allclose(start, x_start, rtol=1e-6)
    np.testing.assert_allclose(
        unclipped, row.signal_prev * x_start + row.direction * 0.6, rtol=1e-6
    )


@pytest.mark.parametrize("make", [samplers.ddim, samplers.ddpm_ancestral])
def test_another_schedule_does_not_retrace(make):
    traces = []

    @jax.jit
    def run(schedule, x_T, keys):
        traces.append(None)
        return samplers.sample(make(schedule, 5), exact(schedule), x_T, keys).x

    x_T = jnp.ones((2, 3))
    first = run(make_schedule("linear", 20, linear_end=0.2), x_T, keys_of(2))
    second = run(make_schedule("cosine", 20), x_T, keys_of(2))
    assert len(traces) == 1
    assert not np.allclose(first, second)


@pytest.mark.parametrize("name", ["linear", "sqrt", "cosine"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_extreme_schedules_stay_finite(name, eta):
    """sqrt: abar falls below the smallest float32; cosine: betas of 0.999."""
    schedule = make_schedule(name)
    x_T = samplers.initial_noise(keys_of(2), (3,))
    constant = lambda schedule: lambda x, t: jnp.full_like(x, 0.1)
    for make in (
        partial(samplers.ddim, num_steps=40, eta=eta, parameterization="x0"),
        partial(samplers.ddpm_ancestral, num_steps=40, parameterization="x0"),
    ):
        assert np.all(np.isfinite(draw(make, schedule, constant, x_T, keys_of(2)).x))


def test_inpainting_keeps_what_the_mask_says():
    """The kept half follows q(x_t | x_0) at each step and ends at x_0; the rest is free."""
    schedule = make_schedule("linear", 100, linear_end=0.1)
    x0 = jnp.full((3, 4, 4, 1), 0.9)
    mask = jnp.concatenate([jnp.ones((1, 4, 2, 1)), jnp.zeros((1, 4, 2, 1))], axis=2)
    seen = []

    def record(x, coefficients, keys):
        x = samplers.inpaint(ddpm.diffuse(schedule), x0, mask)(x, coefficients, keys)
        jax.debug.callback(lambda t, x: seen.append((int(t), np.asarray(x))), coefficients.t, x)
        return x

    keys = keys_of(3)
    x_T = samplers.initial_noise(keys, (4, 4, 1))
    sampler = samplers.ddim(schedule, 50)
    samples = samplers.sample(sampler, exact(schedule), x_T, keys, before_step=record)
    jax.effects_barrier()
    assert len(seen) == 50
    for t, x in seen:
        signal = float(schedule.sqrt_alphas_cumprod[t])
        sigma = float(schedule.sqrt_one_minus_alphas_cumprod[t])
        residual = (x[:, :, :2] - signal * 0.9) / sigma
        assert abs(residual.mean()) < 5 / 24**0.5 and 0.3 < residual.std() < 1.8
    assert np.abs(np.asarray(samples.x)[:, :, :2] - 0.9).max() < 0.1
    assert np.asarray(samples.x)[:, :, 2:].std() > 0.3


def test_a_mask_that_does_not_fit_is_refused():
    schedule = make_schedule("linear", 10)
    with pytest.raises(ValueError, match=r"mask has the shape \(2, 3, 4, 1\); it should be"):
        samplers.inpaint(ddpm.diffuse(schedule), jnp.ones((2, 4, 4, 1)), jnp.ones((2, 3, 4, 1)))


@pytest.mark.parametrize("discretize", NAMES)
def test_inversion_tells_the_network_where_its_steps_end(discretize):
    """The same timesteps as the way down, mirrored, and levels that join."""
    schedule = make_schedule("linear", 50, linear_end=0.1)
    up = samplers.ddim_inversion(schedule, 7, discretize=discretize).coefficients
    down = samplers.ddim(schedule, 7, discretize=discretize).coefficients
    np.testing.assert_array_equal(up.t, down.t[::-1])
    np.testing.assert_array_equal(up.signal_now, down.signal_prev[::-1])
    np.testing.assert_array_equal(up.signal_now[1:], up.signal[:-1])
    np.testing.assert_allclose(up.sigma, schedule.sqrt_one_minus_alphas_cumprod[up.t])


@pytest.mark.parametrize("parameterization", ["eps", "v", "x0"])
def test_inversion_leads_to_the_noise_of_the_ode_and_back(parameterization):
    """With order one: its error, and that of the way back, halve with twice the steps."""
    total, ramp = 2048, {"linear_start": 5e-5, "linear_end": 1e-2}
    schedule = make_schedule("linear", total, **ramp)
    abar = np.cumprod(1 - make_beta_schedule("linear", total, **ramp))
    x0 = jnp.linspace(-1.5, 2.5, 7)
    predictor = partial(exact, parameterization=parameterization)
    errors = []
    for count in (32, 64, 128):
        options = {"num_steps": count, "parameterization": parameterization}
        up = partial(samplers.ddim_inversion, discretize="trailing", **options)
        down = partial(samplers.ddim, discretize="trailing", **options)
        x_T = draw(up, schedule, predictor, x0, keys_of(7)).x
        back = draw(down, schedule, predictor, x_T, keys_of(7)).x
        mean, std = marginal(abar[-1])
        want = mean + std * (np.asarray(x0) - MEAN) / STD
        errors.append([np.abs(x_T - want).max(), np.abs(back - x0).max()])
    slopes = np.diff(np.log2(np.array(errors)), axis=0)
    assert np.all((slopes < -0.75) & (slopes > -1.3)), (slopes, errors)
    assert max(errors[-1]) < 0.1


@pytest.mark.parametrize("discretize", ["trailing", "uniform"])
def test_an_iterated_inversion_leads_back_to_rounding(discretize):
    """Secants end at the exact inverse of ddim's steps, however few; on Gaussian data at once."""
    schedule, x0 = make_schedule("linear", 100, linear_end=0.2), jnp.linspace(-1.5, 2.5, 7)
    options, errors = {"num_steps": 8, "discretize": discretize}, []
    for iterations in (1, 3, 40):
        up = partial(samplers.ddim_inversion, iterations=iterations, **options)
        x_T = draw(up, schedule, exact, x0, keys_of(7)).x
        back = draw(partial(samplers.ddim, **options), schedule, exact, x_T, keys_of(7)).x
        errors.append(float(np.abs(back - x0).max()))
    assert errors[0] > 0.2 and max(errors[1:]) < 5e-5, errors
    with pytest.raises(ValueError, match="iterations = 0 should be at least 1"):
        samplers.ddim_inversion(schedule, 8, iterations=0)


@pytest.mark.parametrize("make", [samplers.ddim, samplers.ddpm_ancestral])
def test_discrete_samplers_noise_images_by_the_schedule(make):
    """x_T is unit noise; the last half begins at q(x_t | x_0) of its first timestep."""
    schedule = make_schedule("linear", 100, linear_end=0.1)
    part = samplers.segment(make(schedule, 10, discretize="leading"), 5, 10)
    assert part.coefficients.t.tolist() == [40, 30, 20, 10, 0]
    image, noise = jnp.full((2, 3), 0.8), samplers.initial_noise(keys_of(2), (3,))
    got = samplers.start_from_image(part, image, noise)
    want = ddpm.q_sample(schedule, image, jnp.array([40, 40]), noise)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    np.testing.assert_array_equal(samplers.start_from_noise(part, noise), noise)


@pytest.mark.parametrize("eta", [None, 0.0, 0.8])
def test_two_segments_of_discrete_samplers_are_one_run(eta):
    schedule = make_schedule("linear", 20, linear_end=0.3)
    make = samplers.ddpm_ancestral if eta is None else partial(samplers.ddim, eta=eta)
    x_T, keys = samplers.initial_noise(keys_of(3), (4,)), keys_of(3)
    whole = draw(partial(make, num_steps=10), schedule, exact, x_T, keys).x
    x = x_T
    for ends in ((0, 4), (4, 10)):
        part = lambda schedule, ends=ends: samplers.segment(make(schedule, 10), *ends)
        x = draw(part, schedule, exact, x, keys).x
    np.testing.assert_allclose(x, whole, atol=1e-6)


def test_ddim_on_the_spacing_of_latent_diffusion_takes_its_steps():
    """31 steps for 30, each as DDIM's formula has it, in float64."""
    schedule = make_schedule("linear")
    sampler = samplers.ddim(schedule, 30, discretize="uniform_ldm")
    assert sampler.num_steps == 31
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    x, t = np.linspace(-1.5, 2.0, 4), np.arange(1, 1001, 33)
    for now, after in zip(t[::-1], [*t[::-1][1:], 0], strict=True):
        eps = np.tanh(x)
        x_start = (x - np.sqrt(1 - abar[now]) * eps) / np.sqrt(abar[now])
        x = np.sqrt(abar[after]) * x_start + np.sqrt(1 - abar[after]) * eps
    predict = lambda x, t: jnp.tanh(x)
    got = samplers.sample(sampler, predict, jnp.linspace(-1.5, 2.0, 4), keys_of(4)).x
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_steps", [10, 20])
def test_dpm_solver_follows_its_equations(num_steps):
    """Algorithm 2 in float64 on an even grid of timesteps down to 0, in lambda = log(a / s)."""
    schedule = make_schedule("linear")
    sampler = samplers.dpm_solver(schedule, num_steps)
    t = np.round(np.linspace(999, 0, num_steps + 1)).astype(int)
    assert sampler.coefficients.t.tolist() == t[:-1].tolist()
    abar = np.asarray(schedule.alphas_cumprod, np.float64)
    a, s = np.sqrt(abar[t]), np.sqrt(1 - abar[t])
    h = np.diff(np.log(a / s))
    x, before = np.linspace(-1.5, 2.0, 4), None
    for i in range(num_steps):
        x_start = (x - s[i] * np.tanh(x)) / a[i]
        first = i == 0 or (i == num_steps - 1 and num_steps < 15)
        use = x_start if first else x_start + h[i] / (2 * h[i - 1]) * (x_start - before)
        x = s[i + 1] / s[i] * x - a[i + 1] * np.expm1(-h[i]) * use
        before = x_start
    predict = lambda x, t: jnp.tanh(x)
    got = samplers.sample(sampler, predict, jnp.linspace(-1.5, 2.0, 4), keys_of(4)).x
    np.testing.assert_allclose(got, x, rtol=1e-3, atol=1e-3)


def test_wrong_numbers_of_steps_are_refused():
    schedule = make_schedule("linear", 100)
    with pytest.raises(ValueError, match=r"num_steps = 100 should lie in \[1, 99\]"):
        samplers.dpm_solver(schedule, 100)
    with pytest.raises(ValueError, match="the sampler has no way back; use a deterministic one"):
        samplers.inverse(samplers.dpm_solver(schedule, 9))
