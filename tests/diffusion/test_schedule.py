"""Schedules: upstream's golden numbers, identities of Gaussians, bad values, and no retracing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm
from diffusion_jax.diffusion.schedule import (
    BETA_SCHEDULES,
    Schedule,
    make_beta_schedule,
    make_schedule,
    rescale_zero_terminal_snr,
    respace,
)

# name, linear_start, linear_end; beta_0, beta_999, abar_499, abar_999 and the variational weights
# eps[0] = eps[1], eps[999], x0[1], x0[999], from running latent-diffusion's register_schedule.
GOLDEN = [
    (("linear", 1e-4, 2e-2), (1e-4, 0.02, 0.333188, 7.33412e-4), (0.513295, 0.0102117)),
    (("linear", 8.5e-4, 0.012), (8.5e-4, 0.012, 0.27767, 4.6601e-3), (0.503194, 0.00610165)),
    (("linear", 0.0015, 0.0195), (0.0015, 0.0195, 0.115844, 1.42304e-4), (0.503371, 0.00994535)),
    (("cosine", 1e-4, 2e-2), (4.12842e-5, 0.999, 0.493844, 2.42877e-9), (0.558856, 499.501)),
    (
        ("squaredcos_cap_v2", 1e-4, 2e-2),
        (4.12842e-5, 0.999, 0.493844, 2.42877e-9),
        (0.558856, 499.501),
    ),
    (("sqrt_linear", 1e-4, 2e-2), (1e-4, 0.02, 0.0785872, 4.03583e-5), (0.599672, 0.0102045)),
    (("sqrt", 1e-4, 2e-2), (0.01, 0.141421, 6.119e-16, 3.2e-44), (0.553602, 0.0823578)),
]
GOLDEN_X0 = {
    ("linear", 1e-4, 2e-2): (0.499848, 0.00677288),
    ("linear", 8.5e-4, 0.012): (0.498724, 0.0171061),
    ("linear", 0.0015, 0.0195): (0.497752, 0.00298249),
    ("cosine", 1e-4, 2e-2): (0.499934, 1.23206e-5),
    ("squaredcos_cap_v2", 1e-4, 2e-2): (0.499934, 1.23206e-5),
    ("sqrt_linear", 1e-4, 2e-2): (0.499835, 0.00158824),
}


@pytest.mark.parametrize(("arguments", "numbers", "weights"), GOLDEN)
def test_golden_numbers(arguments, numbers, weights):
    name, start, end = arguments
    schedule = make_schedule(name, linear_start=start, linear_end=end)
    abar = schedule.alphas_cumprod
    got = [schedule.betas[0], schedule.betas[999], abar[499]]
    np.testing.assert_allclose(got, numbers[:3], rtol=5e-5 if name == "sqrt" else 5e-6)
    # 3.2e-44 has two digits in float32's subnormals, and here in the inventory.
    np.testing.assert_allclose(
        np.asarray(abar)[999], numbers[3], rtol=3e-2 if name == "sqrt" else 1e-5
    )
    lvlb = schedule.lvlb_weights
    np.testing.assert_allclose([lvlb[0], lvlb[1], lvlb[999]], [weights[0], *weights], rtol=5e-6)


@pytest.mark.parametrize("arguments", GOLDEN_X0)
def test_golden_x0_weights_keep_upstreams_precedence(arguments):
    name, start, end = arguments
    lvlb = make_schedule(
        name, linear_start=start, linear_end=end, parameterization="x0"
    ).lvlb_weights
    np.testing.assert_allclose([lvlb[1], lvlb[999]], GOLDEN_X0[arguments], rtol=5e-6)
    assert lvlb[0] == lvlb[1]


def test_stable_diffusion_to_the_last_digit_of_float32():
    abar = make_schedule("linear", linear_start=0.00085, linear_end=0.012).alphas_cumprod
    assert np.float32(0.27766965045646763) == abar[499]
    assert np.float32(0.004660098513077238) == abar[999]


def test_v_weights_are_one():
    np.testing.assert_array_equal(make_schedule("cosine", parameterization="v").lvlb_weights, 1.0)


def test_fields_are_float32_vectors_of_length_t():
    schedule = make_schedule("cosine", num_timesteps=37)
    assert schedule.num_timesteps == 37
    assert Schedule._fields == (
        "betas",
        "alphas_cumprod",
        "alphas_cumprod_prev",
        "sqrt_alphas_cumprod",
        "sqrt_one_minus_alphas_cumprod",
        "log_one_minus_alphas_cumprod",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "lvlb_weights",
    )
    for name, values in zip(Schedule._fields, schedule, strict=True):
        assert (name, values.shape, values.dtype) == (name, (37,), jnp.float32)
        assert np.all(np.isfinite(values)), name


@pytest.mark.parametrize("name", BETA_SCHEDULES)
def test_coefficients_follow_from_betas(name):
    """Every field, written out once more in float64 from the definition."""
    betas = make_beta_schedule(name, 300)
    schedule = make_schedule(name, 300, v_posterior=0.3)
    alphas, abar = 1 - betas, np.cumprod(1 - betas)
    prev = np.array([1.0, *abar[:-1]])
    variance = 0.7 * betas * (1 - prev) / (1 - abar) + 0.3 * betas
    expected = {
        "betas": betas,
        "alphas_cumprod": abar,
        "alphas_cumprod_prev": prev,
        "sqrt_alphas_cumprod": abar**0.5,
        "sqrt_one_minus_alphas_cumprod": (1 - abar) ** 0.5,
        "log_one_minus_alphas_cumprod": np.log1p(-abar),
        "sqrt_recip_alphas_cumprod": abar**-0.5,
        "sqrt_recipm1_alphas_cumprod": ((1 - abar) / abar) ** 0.5,
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(variance),
        "posterior_mean_coef1": betas * prev**0.5 / (1 - abar),
        "posterior_mean_coef2": (1 - prev) * alphas**0.5 / (1 - abar),
    }
    for field, value in expected.items():
        np.testing.assert_allclose(getattr(schedule, field), value, rtol=2e-6, err_msg=field)
    weights = betas**2 / (2 * variance * alphas * (1 - abar))
    np.testing.assert_allclose(schedule.lvlb_weights[1:], weights[1:], rtol=2e-6)


@pytest.mark.parametrize("t", [1, 2, 57, 199])
def test_posterior_is_bayes_rule_on_a_grid(t):
    """q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0), summed in float64."""
    betas = make_beta_schedule("linear", 200, linear_end=0.05)
    schedule = make_schedule("linear", 200, linear_end=0.05)
    prev = np.prod(1 - betas[:t])
    x_start, x_t = 0.7, -0.4
    mean = float(
        schedule.posterior_mean_coef1[t] * x_start + schedule.posterior_mean_coef2[t] * x_t
    )
    std = float(schedule.posterior_variance[t]) ** 0.5
    grid = np.linspace(mean - 12 * std, mean + 12 * std, 20001)
    log_density = -((x_t - np.sqrt(1 - betas[t]) * grid) ** 2) / (2 * betas[t])
    log_density -= (grid - np.sqrt(prev) * x_start) ** 2 / (2 * (1 - prev))
    density = np.exp(log_density - log_density.max())
    density /= density.sum()
    brute_mean = (density * grid).sum()
    brute_std = np.sqrt((density * (grid - brute_mean) ** 2).sum())
    np.testing.assert_allclose(mean, brute_mean, atol=1e-5 * std + 1e-6)
    np.testing.assert_allclose(std, brute_std, rtol=2e-6)


def test_marginals_compose_step_by_step():
    """One q step after another reaches q(x_t | x_0): mean factor and variance, in float64."""
    betas = make_beta_schedule("linear", 100)
    schedule = make_schedule("linear", 100)
    factor, variance = 1.0, 0.0
    for t, beta in enumerate(betas):
        factor, variance = factor * np.sqrt(1 - beta), variance * (1 - beta) + beta
        np.testing.assert_allclose(schedule.sqrt_alphas_cumprod[t], factor, rtol=1e-6)
        np.testing.assert_allclose(
            schedule.sqrt_one_minus_alphas_cumprod[t] ** 2, variance, rtol=1e-6
        )


def test_v_posterior_moves_from_small_to_large():
    small, half, large = (make_schedule("linear", 50, v_posterior=v) for v in (0.0, 0.5, 1.0))
    np.testing.assert_array_equal(large.posterior_variance, large.betas)
    np.testing.assert_allclose(
        half.posterior_variance,
        0.5 * (small.posterior_variance + large.posterior_variance),
        rtol=1e-6,
    )
    assert small.posterior_variance[0] == 0.0
    np.testing.assert_allclose(small.posterior_log_variance_clipped[0], np.log(1e-20))


def test_given_betas_replace_the_name():
    betas = np.array([0.1, 0.2, 0.3])
    schedule = make_schedule("cosine", num_timesteps=1000, given_betas=betas)
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-7)
    np.testing.assert_allclose(schedule.alphas_cumprod, [0.9, 0.72, 0.504], rtol=1e-6)
    from_tuple = make_schedule(given_betas=(0.1, 0.2, 0.3))
    np.testing.assert_array_equal(from_tuple.betas, schedule.betas)


@pytest.mark.parametrize("parameterization", ["eps", "x0", "v"])
@pytest.mark.parametrize("v_posterior", [0.0, 1.0])
def test_a_single_timestep_is_finite(parameterization, v_posterior):
    schedule = make_schedule(
        given_betas=[0.3], parameterization=parameterization, v_posterior=v_posterior
    )
    for name, values in zip(Schedule._fields, schedule, strict=True):
        assert np.all(np.isfinite(values)), name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"name": "linaer"},
            "name = 'linaer'.*linear, cosine, sqrt_linear, sqrt, squaredcos_cap_v2",
        ),
        ({"parameterization": "mu"}, "parameterization = 'mu'.*eps, x0, v"),
        ({"num_timesteps": 0}, "num_timesteps = 0 .*at least 1"),
        ({"linear_start": -0.1}, r"linear_start = -0.1 .*\(0, 1\)"),
        ({"linear_end": 1.0}, r"linear_end = 1.0 .*\(0, 1\)"),
        ({"linear_end": float("nan")}, r"linear_end = nan .*\(0, 1\)"),
        ({"name": "cosine", "cosine_s": -0.1}, "cosine_s = -0.1 .*not negative"),
        ({"v_posterior": 1.5}, r"v_posterior = 1.5 .*\[0, 1\]"),
        ({"v_posterior": float("nan")}, r"v_posterior = nan .*\[0, 1\]"),
        (
            {"rescale_zero_snr": True},
            "rescale_zero_snr = True with parameterization = 'eps'.*v or x0",
        ),
        (
            {"rescale_zero_snr": True, "parameterization": "v", "num_timesteps": 1},
            "a schedule of 1 timestep",
        ),
        ({"given_betas": []}, r"given_betas has the shape \(0,\)"),
        ({"given_betas": np.ones((2, 2)) / 2}, r"given_betas has the shape \(2, 2\)"),
        ({"given_betas": [0.1, -0.1]}, r"given_betas: entry 1 is -0.1; .*\(0, 1\)"),
        ({"given_betas": [0.1, 1.0]}, "given_betas: entry 1 is 1.0"),
        ({"given_betas": [0.0, 0.1]}, "given_betas: entry 0 is 0.0"),
        ({"given_betas": [0.1, float("nan")]}, "given_betas: entry 1 is nan"),
        (
            {"given_betas": [0.9] * 200},
            r"sqrt_recip_alphas_cumprod\[\d+\] = .* does not fit float32",
        ),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(**options)


@pytest.mark.parametrize("parameterization", ["v", "x0"])
@pytest.mark.parametrize("name", ["linear", "cosine", "sqrt_linear"])
def test_zero_terminal_snr(name, parameterization):
    """sqrt(abar) is the old one moved down to end at 0 and scaled to start where it did."""
    schedule = make_schedule(
        name, 300, v_posterior=0.3, parameterization=parameterization, rescale_zero_snr=True
    )
    for field, values in zip(Schedule._fields, schedule, strict=True):
        assert np.all(np.isfinite(values)), field
    old = np.sqrt(np.cumprod(1 - make_beta_schedule(name, 300)))
    np.testing.assert_allclose(
        schedule.sqrt_alphas_cumprod,
        (old - old[-1]) * old[0] / (old[0] - old[-1]),
        rtol=1e-5,
        atol=1e-7,
    )
    assert schedule.sqrt_alphas_cumprod[-1] == 0.0 and schedule.betas[-1] == 1.0
    np.testing.assert_allclose(schedule.sqrt_alphas_cumprod[0], old[0], rtol=1e-6)
    # What would be infinite belongs to abar = 2^-24.
    np.testing.assert_allclose(schedule.sqrt_recip_alphas_cumprod[-1], 4096.0)
    np.testing.assert_allclose(schedule.sqrt_recipm1_alphas_cumprod[-1], 4096.0, rtol=1e-6)


def test_given_betas_are_rescaled_too():
    betas = rescale_zero_terminal_snr(np.array([0.1, 0.2, 0.3]))
    schedule = make_schedule(
        given_betas=[0.1, 0.2, 0.3], parameterization="v", rescale_zero_snr=True
    )
    np.testing.assert_allclose(schedule.betas, betas, rtol=1e-6)
    assert betas[0] == pytest.approx(0.1) and betas[-1] == 1.0


@pytest.mark.parametrize("parameterization", ["v", "x0"])
def test_at_zero_snr_x_is_noise_and_its_conversions_hold(parameterization):
    schedule = make_schedule("linear", 50, parameterization=parameterization, rescale_zero_snr=True)
    x_start, noise = jax.random.normal(jax.random.key(0), (2, 3, 5))
    t = jnp.full(3, 49)
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    np.testing.assert_array_equal(x_t, noise)
    output = {"v": ddpm.get_v(schedule, x_start, noise, t), "x0": x_start}[parameterization]
    got = ddpm.predict_start(schedule, output, x_t, t, parameterization)
    np.testing.assert_allclose(got, x_start, rtol=1e-6)
    got = ddpm.predict_noise(schedule, output, x_t, t, parameterization)
    np.testing.assert_allclose(got, noise, atol=4 / 4096)
    # The first ancestral step knows nothing of x_T: its mean is that of q(x_{T-1} | x_0).
    mean, variance, _ = ddpm.q_posterior(schedule, x_start, x_t, t)
    before, variance_before, _ = ddpm.q_mean_variance(schedule, x_start, t - 1)
    np.testing.assert_allclose(mean, before, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(variance, variance_before, rtol=1e-5)


def test_a_respaced_zero_snr_schedule_still_ends_in_noise():
    schedule = make_schedule("linear", 50, parameterization="v", rescale_zero_snr=True)
    few = respace(schedule, np.array([9, 29, 49]))
    assert few.betas[-1] == 1.0 and few.alphas_cumprod[-1] == 0.0
    for field, values in zip(Schedule._fields, few, strict=True):
        assert np.all(np.isfinite(values)), field


def test_swapping_the_schedule_does_not_retrace():
    traces = []

    @jax.jit
    def diffuse(schedule, x, t, noise):
        traces.append(schedule.num_timesteps)
        return ddpm.q_sample(schedule, x, t, noise)

    x, noise, t = jnp.ones((2, 3)), jnp.zeros((2, 3)), jnp.array([0, 9])
    first = diffuse(make_schedule("linear", 10), x, t, noise)
    second = diffuse(make_schedule("cosine", 10), x, t, noise)
    assert traces == [10]
    assert not np.allclose(first, second)
    diffuse(make_schedule("cosine", 12), x, t, noise)
    assert traces == [10, 12]


def test_vmap_over_schedules():
    schedules = jax.tree.map(
        lambda *fields: jnp.stack(fields), make_schedule("linear", 10), make_schedule("cosine", 10)
    )
    x, noise, t = jnp.ones((2, 3)), jnp.ones((2, 3)), jnp.array([1, 7])
    both = jax.vmap(ddpm.q_sample, in_axes=(0, None, None, None))(schedules, x, t, noise)
    for got, name in zip(both, ("linear", "cosine"), strict=True):
        np.testing.assert_allclose(
            got, ddpm.q_sample(make_schedule(name, 10), x, t, noise), rtol=1e-6
        )


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("v_posterior", [0.0, 0.4])
def test_respaced_equals_the_schedule_of_its_betas(name, v_posterior):
    """The traced float32 computation against make_schedule of betas worked out in float64."""
    timesteps = np.array([0, 1, 5, 40, 41, 99])
    abar = np.cumprod(1 - make_beta_schedule(name, 100))[timesteps]
    betas = 1 - abar / np.array([1.0, *abar[:-1]])
    expected = make_schedule(given_betas=betas, v_posterior=v_posterior)
    schedule = make_schedule(name, 100, v_posterior=v_posterior)
    got = jax.jit(lambda schedule: respace(schedule, timesteps))(schedule)
    for field in Schedule._fields[:-1]:
        want = getattr(expected, field)
        np.testing.assert_allclose(getattr(got, field), want, rtol=1e-4, err_msg=field)


def test_respaced_to_all_timesteps_is_the_schedule():
    schedule = make_schedule("linear", 10)
    assert respace(schedule, np.arange(10)) is schedule


@pytest.mark.parametrize("timesteps", [[], [3, 3], [5, 2], [-1, 2], [0, 10]])
def test_respace_refuses_lists_that_do_not_increase(timesteps):
    with pytest.raises(ValueError, match="timesteps = "):
        respace(make_schedule("linear", 10), np.array(timesteps, np.int64))


def test_its_repr_is_a_line():
    schedule = make_schedule("sqrt_linear", 1000, linear_start=1e-4, linear_end=0.02)
    text = "Schedule(1000 timesteps, betas 0.0001 to 0.02, alphas_cumprod down to 4.04e-05)"
    assert repr(schedule) == text
    assert repr(jax.tree.map(lambda a: a.shape, schedule)) == "Schedule(betas=(1000,), ...)"
    seen = []
    jax.eval_shape(lambda schedule: seen.append(repr(schedule)), schedule)
    assert seen[0].startswith("Schedule(betas=") and len(seen[0]) < 100
