"""q, p and the conversions between what networks predict, against Gaussians worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.schedule import make_beta_schedule, make_schedule
from diffusion_jax.randomness import noise_like

T = 100
SCHEDULE = make_schedule("linear", T)
BETAS = make_beta_schedule("linear", T)
ABAR = np.cumprod(1 - BETAS)


def draws(*shape, count=2, seed=0):
    values = np.random.default_rng(seed).standard_normal((count, *shape)).astype(np.float32)
    return [jnp.asarray(value) for value in values]


def keys_of(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@settings(deadline=None, max_examples=40)
@given(
    t=st.integers(0, T - 1),
    seed=st.integers(0, 2**16),
    name=st.sampled_from(["linear", "cosine", "sqrt_linear"]),
)
def test_conversions_round_trip(t, seed, name):
    """x_0, eps and v from each other at x_t: each way gives back what x_t was made from."""
    schedule = make_schedule(name, T)
    x_start, noise = draws(2, 3, seed=seed)
    t = jnp.full((2,), t, jnp.int32)
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    v = ddpm.get_v(schedule, x_start, noise, t)
    # float32 loses the digits of what x_t hardly contains: 1 / signal of x_0, 1 / sigma of eps.
    signal = float(schedule.sqrt_alphas_cumprod[t[0]])
    sigma = float(schedule.sqrt_one_minus_alphas_cumprod[t[0]])
    to_start, to_noise, close = 1e-6 / signal, 1e-6 / sigma, 1e-5
    start_from_noise = ddpm.predict_start_from_noise(schedule, x_t, t, noise)
    noise_from_start = ddpm.predict_noise_from_start(schedule, x_t, t, x_start)
    np.testing.assert_allclose(start_from_noise, x_start, atol=close + to_start)
    np.testing.assert_allclose(noise_from_start, noise, atol=close + to_noise)
    np.testing.assert_allclose(ddpm.predict_start_from_v(schedule, x_t, t, v), x_start, atol=close)
    np.testing.assert_allclose(ddpm.predict_noise_from_v(schedule, x_t, t, v), noise, atol=close)


def test_q_sample_has_the_moments_of_the_chain():
    """20000 draws of q(x_t | x_{t-1}) one after another against q(x_t | x_0), mean and variance."""
    rng = np.random.default_rng(0)
    x = np.full(20000, 1.5)
    for t in range(40):
        x = np.sqrt(1 - BETAS[t]) * x + np.sqrt(BETAS[t]) * rng.standard_normal(x.shape)
    t = jnp.full((1,), 39, jnp.int32)
    mean, variance, log_variance = ddpm.q_mean_variance(SCHEDULE, jnp.full((1, 1), 1.5), t)
    np.testing.assert_allclose(x.mean(), mean[0, 0], atol=5 * x.std() / 20000**0.5)
    np.testing.assert_allclose(x.var(), variance[0, 0], rtol=5 * (2 / 20000) ** 0.5)
    np.testing.assert_allclose(log_variance, jnp.log(variance), rtol=1e-5)


def test_q_sample_is_mean_plus_standard_deviation():
    x_start, noise = draws(3, 2, 2, 1)
    t = jnp.array([0, 50, T - 1], jnp.int32)
    mean, variance, _ = ddpm.q_mean_variance(SCHEDULE, x_start, t)
    assert variance.shape == (3, 1, 1, 1)
    got = ddpm.q_sample(SCHEDULE, x_start, t, noise)
    np.testing.assert_allclose(got, mean + jnp.sqrt(variance) * noise, atol=1e-6)
    abar = ABAR[np.asarray(t)].reshape(3, 1, 1, 1)
    want = np.sqrt(abar) * np.asarray(x_start) + np.sqrt(1 - abar) * np.asarray(noise)
    np.testing.assert_allclose(got, want, atol=1e-6)


@pytest.mark.parametrize("t", [1, 30, T - 1])
def test_q_posterior_is_the_conditional_gaussian(t):
    """From the joint covariance of (x_{t-1}, x_t) given x_0, in float64."""
    x_start, x_t = draws(4, 3)
    a_prev, alpha = ABAR[t - 1], 1 - BETAS[t]
    covariance, total = (1 - a_prev) * np.sqrt(alpha), 1 - ABAR[t]
    residual = np.asarray(x_t) - np.sqrt(ABAR[t]) * np.asarray(x_start)
    want = np.sqrt(a_prev) * np.asarray(x_start) + covariance / total * residual
    mean, variance, log_variance = ddpm.q_posterior(SCHEDULE, x_start, x_t, jnp.full((4,), t))
    np.testing.assert_allclose(mean, want, atol=2e-6)
    np.testing.assert_allclose(variance, (1 - a_prev) - covariance**2 / total, rtol=1e-4)
    np.testing.assert_allclose(log_variance, np.log(np.asarray(variance)), rtol=1e-5)


def test_at_timestep_0_the_posterior_is_x_start():
    x_start, x_t = draws(2, 3)
    mean, variance, _ = ddpm.q_posterior(SCHEDULE, x_start, x_t, jnp.zeros(2, jnp.int32))
    np.testing.assert_allclose(mean, x_start, rtol=1e-6)
    np.testing.assert_array_equal(variance, 0.0)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
def test_p_mean_variance_is_the_posterior_at_the_prediction(parameterization):
    x_start, noise = draws(3, 4)
    x_start = jnp.clip(x_start, -1.0, 1.0)
    t = jnp.array([0, 40, 70], jnp.int32)
    x_t = ddpm.q_sample(SCHEDULE, x_start, t, noise)
    output = {"eps": noise, "x0": x_start, "v": ddpm.get_v(SCHEDULE, x_start, noise, t)}
    p = ddpm.p_mean_variance(SCHEDULE, output[parameterization], x_t, t, parameterization)
    mean, variance, log_variance = ddpm.q_posterior(SCHEDULE, x_start, x_t, t)
    np.testing.assert_allclose(p.pred_x_start, x_start, atol=1e-5)
    np.testing.assert_allclose(p.mean, mean, atol=1e-5)
    np.testing.assert_array_equal(p.variance, variance)
    np.testing.assert_array_equal(p.log_variance, log_variance)


def test_clipping_is_of_the_predicted_image():
    x_t = jnp.array([[3.0], [-3.0], [0.2]])
    t = jnp.array([5, 5, 5], jnp.int32)
    free = ddpm.p_mean_variance(SCHEDULE, x_t, x_t, t, "x0", clip_denoised=False)
    clipped = ddpm.p_mean_variance(SCHEDULE, x_t, x_t, t, "x0")
    np.testing.assert_array_equal(free.pred_x_start, x_t)
    np.testing.assert_allclose(clipped.pred_x_start[:, 0], [1.0, -1.0, 0.2])
    want, *_ = ddpm.q_posterior(SCHEDULE, jnp.clip(x_t, -1.0, 1.0), x_t, t)
    np.testing.assert_array_equal(clipped.mean, want)


def test_variances():
    t = jnp.array([0, 1, 60], jnp.int32)
    x_t, output = draws(3, 2, 2, 4)
    small = BETAS[1:] * (1 - ABAR[:-1]) / (1 - ABAR[1:])
    expected = {
        "posterior": [0.0, small[0], small[59]],
        "fixed_small": [small[0], small[0], small[59]],
        "fixed_large": [small[0], BETAS[1], BETAS[60]],
    }
    for name, values in expected.items():
        p = ddpm.p_mean_variance(SCHEDULE, output, x_t, t, variance=name)
        np.testing.assert_allclose(p.variance[:, 0, 0, 0], values, rtol=1e-5, err_msg=name)
        logs = np.log(np.maximum(values, 1e-20))
        np.testing.assert_allclose(p.log_variance[:, 0, 0, 0], logs, rtol=1e-5, err_msg=name)
    large = make_schedule("linear", T, v_posterior=1.0)
    p = ddpm.p_mean_variance(large, output, x_t, t)
    np.testing.assert_allclose(p.variance[:, 0, 0, 0], BETAS[[0, 1, 60]], rtol=1e-6)
    half = make_schedule("linear", T, v_posterior=0.5)
    p = ddpm.p_mean_variance(half, output, x_t, t)
    np.testing.assert_allclose(p.variance[2, 0, 0, 0], (small[59] + BETAS[60]) / 2, rtol=1e-5)


def test_learned_range_interpolates_logarithms():
    t = jnp.array([0, 60], jnp.int32)
    x_t, noise = draws(2, 3, 3, 2)
    ends = {-1.0: "fixed_small", 1.0: None, 0.0: None}
    logs = {}
    for value in ends:
        output = jnp.concatenate([noise, jnp.full_like(noise, value)], axis=-1)
        p = ddpm.p_mean_variance(SCHEDULE, output, x_t, t, variance="learned_range")
        assert p.variance.shape == x_t.shape
        np.testing.assert_allclose(jnp.log(p.variance), p.log_variance, rtol=1e-4)
        logs[value] = np.asarray(p.log_variance)[:, 0, 0, 0]
    small = ddpm.p_mean_variance(SCHEDULE, noise, x_t, t, variance="fixed_small")
    np.testing.assert_allclose(logs[-1.0], small.log_variance[:, 0, 0, 0], rtol=1e-5)
    np.testing.assert_allclose(logs[1.0], np.log(BETAS[[0, 60]]), rtol=1e-5)
    np.testing.assert_allclose(logs[0.0], (logs[-1.0] + logs[1.0]) / 2, rtol=1e-5)
    np.testing.assert_allclose(p.mean, small.mean, rtol=1e-6)


def test_wrong_names_and_channels_are_refused():
    x_t, output = draws(2, 3, 3, 2)
    t = jnp.zeros(2, jnp.int32)
    with pytest.raises(
        ValueError, match="parameterization = 'mu' is unknown; choose from eps, x0, v"
    ):
        ddpm.p_mean_variance(SCHEDULE, output, x_t, t, "mu")
    with pytest.raises(
        ValueError, match="variance = 'large' .* posterior, fixed_small, fixed_large"
    ):
        ddpm.p_mean_variance(SCHEDULE, output, x_t, t, variance="large")
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3, 2\); it should be \(2, 3, 3, 4\)"):
        ddpm.p_mean_variance(SCHEDULE, output, x_t, t, variance="learned_range")
    both = jnp.concatenate([output, output], axis=-1)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 3, 4\); it should be \(2, 3, 3, 2\)"):
        ddpm.p_mean_variance(SCHEDULE, both, x_t, t)


def test_p_sample_adds_noise_except_at_timestep_0():
    """Also where the variance at t = 0 is not 0."""
    x_t, output = draws(2, 5)
    t = jnp.array([0, 30], jnp.int32)
    predict = lambda x, t: output
    p = ddpm.p_mean_variance(SCHEDULE, output, x_t, t, variance="fixed_large")
    noise = noise_like(keys_of(2), (5,))
    x, x_start = ddpm.p_sample(
        SCHEDULE, predict, x_t, t, noise, variance="fixed_large", temperature=0.5
    )
    np.testing.assert_array_equal(x_start, p.pred_x_start)
    np.testing.assert_allclose(x[0], p.mean[0], rtol=1e-6)
    want = p.mean[1] + 0.5 * jnp.sqrt(p.variance[1]) * noise[1]
    np.testing.assert_allclose(x[1], want, rtol=1e-5)


def shrink(x, t):
    return 0.2 * x


def test_loop_is_p_sample_from_the_last_timestep_to_0():
    schedule = make_schedule("linear", 8, linear_end=0.3)
    keys, x_T = keys_of(2), draws(2, 3)[0]
    temperature = jnp.linspace(0.0, 1.4, 8)
    x = x_T
    logged, starts = {}, {}
    for i, t in enumerate(reversed(range(8))):
        noise = noise_like(jax.vmap(jax.random.fold_in, (0, None))(keys, i), (3,))
        x, start = ddpm.p_sample(
            schedule, shrink, x, jnp.full((2,), t), noise, temperature=temperature[t]
        )
        logged[t], starts[t] = x, start
    samples = ddpm.p_sample_loop(
        schedule, shrink, x_T, keys, log_every_t=3, temperature=temperature
    )
    np.testing.assert_allclose(samples.x, x, atol=1e-5)
    assert samples.x_log.shape == (4, 2, 3)
    for row, t in enumerate((7, 6, 3, 0)):  # t % 3 == 0 or first
        np.testing.assert_allclose(samples.x_log[row], logged[t], atol=1e-5)
        np.testing.assert_allclose(samples.x_start_log[row], starts[t], atol=1e-5)


def test_loop_starts_at_start_t():
    schedule = make_schedule("linear", 8, linear_end=0.3)
    seen = []

    def spy(x, t):
        jax.debug.callback(lambda t: seen.append(t.tolist()), t)
        return shrink(x, t)

    ddpm.p_sample_loop(schedule, spy, jnp.ones((2, 3)), keys_of(2), start_T=3)
    jax.effects_barrier()
    assert sorted(seen, reverse=True) == [[2, 2], [1, 1], [0, 0]]
    whole, capped = (
        ddpm.p_sample_loop(schedule, shrink, jnp.ones((2, 3)), keys_of(2), start_T=start)
        for start in (None, 99)
    )
    np.testing.assert_array_equal(whole.x, capped.x)


def test_loop_inpaints_before_each_step():
    schedule = make_schedule("linear", 30, linear_end=0.3)
    x0 = jnp.full((2, 4), 0.5)
    mask = jnp.array([[1.0, 1.0, 0.0, 0.0]])
    samples = ddpm.p_sample_loop(
        schedule,
        lambda x, t: x,
        draws(2, 4)[0],
        keys_of(2),
        mask=mask,
        x0=x0,
        parameterization="x0",
    )
    # The identity as a network keeps the noise of q(x_0 | x_0), sqrt(beta_0) = 0.01.
    np.testing.assert_allclose(samples.x[:, :2], 0.5, atol=0.05)
    assert np.abs(np.asarray(samples.x[:, 2:]) - 0.5).max() > 0.1
    samples = ddpm.p_sample_loop(
        schedule,
        lambda x, t: x0,
        draws(2, 4)[0],
        keys_of(2),
        mask=mask,
        x0=x0,
        parameterization="x0",
    )
    np.testing.assert_allclose(samples.x, x0, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask": jnp.ones((2, 3))}, "needs mask and x0"),
        ({"x0": jnp.ones((2, 3))}, "needs mask and x0"),
        ({"start_T": 0}, r"num_steps = 0 should lie in \[1, 8\]"),
        ({"log_every_t": 0}, "log_every = 0 should be at least 1"),
        ({"temperature": jnp.ones(5)}, r"temperature has the shape \(5,\); .*\(8,\)"),
    ],
)
def test_loop_refuses_what_does_not_fit(options, message):
    schedule = make_schedule("linear", 8)
    with pytest.raises(ValueError, match=message):
        ddpm.p_sample_loop(schedule, shrink, jnp.ones((2, 3)), keys_of(2), **options)


def test_half_precision_meets_float32_coefficients():
    """Inputs in bfloat16 give what their values give in float32, not a rounded result."""
    x_start, noise = (a.astype(jnp.bfloat16) for a in draws(2, 16))
    t = jnp.array([0, 99], jnp.int32)
    got = ddpm.q_sample(SCHEDULE, x_start, t, noise)
    want = ddpm.q_sample(SCHEDULE, x_start.astype(jnp.float32), t, noise.astype(jnp.float32))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)
    p = ddpm.p_mean_variance(SCHEDULE, noise, x_start, t)
    assert {value.dtype for value in p} == {jnp.dtype("float32")}


def test_functions_work_under_jit_and_vmap():
    """vmap over single samples gives the rows of the batch."""
    x_start, noise = draws(4, 3)
    t = jnp.array([0, 1, 50, 99], jnp.int32)

    def one(x, t, noise):
        x, t, noise = x[None], t[None], noise[None]
        x_t = ddpm.q_sample(SCHEDULE, x, t, noise)
        return ddpm.p_mean_variance(SCHEDULE, noise, x_t, t).mean[0]

    x_t = ddpm.q_sample(SCHEDULE, x_start, t, noise)
    want = ddpm.p_mean_variance(SCHEDULE, noise, x_t, t).mean
    np.testing.assert_allclose(jax.jit(jax.vmap(one))(x_start, t, noise), want, atol=1e-6)


def test_video_and_vectors_have_the_same_formula():
    flat, noise = draws(2, 24)
    t = jnp.array([3, 80], jnp.int32)
    want = ddpm.q_sample(SCHEDULE, flat, t, noise)
    shape = (2, 2, 3, 2, 2)
    video = ddpm.q_sample(SCHEDULE, flat.reshape(shape), t, noise.reshape(shape))
    np.testing.assert_array_equal(video.reshape(2, 24), want)
