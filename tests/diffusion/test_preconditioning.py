"""Denoisers against float64 formulas and brute force; one algebra for all that networks predict."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion import ddpm, preconditioning
from diffusion_jax.diffusion.preconditioning import SCALINGS, denoiser, nearest
from diffusion_jax.diffusion.samplers.sigmas import legacy_ddpm, sigma_table, zero_snr
from diffusion_jax.diffusion.schedule import make_schedule

SIGMAS = np.array([1e-4, 0.02, 0.5, 1.0, 14.6, 80.0, 4096.0])

# (c_skip, c_out, c_in, c_noise) as the papers write them
FORMULAS = {
    "eps": lambda s: (1.0, -s, 1 / np.sqrt(s**2 + 1), s),
    "v": lambda s: (1 / (s**2 + 1), -s / np.sqrt(s**2 + 1), 1 / np.sqrt(s**2 + 1), s),
    "x0": lambda s: (0.0, 1.0, 1 / np.sqrt(s**2 + 1), s),
    "edm": lambda s: (
        0.25 / (s**2 + 0.25),
        s * 0.5 / np.sqrt(s**2 + 0.25),
        1 / np.sqrt(0.25 + s**2),
        np.log(s) / 4,
    ),
    "v_edm": lambda s: (
        1 / (s**2 + 1),
        -s / np.sqrt(s**2 + 1),
        1 / np.sqrt(s**2 + 1),
        np.log(s) / 4,
    ),
    "flow": lambda s: (1 / (1 + s), -s / (1 + s), 1 / (1 + s), 1000 * s / (1 + s)),
    "consistency": lambda s: (
        0.25 / ((s - 0.002) ** 2 + 0.25),
        (s - 0.002) * 0.5 / np.sqrt(0.25 + s**2),
        1 / np.sqrt(0.25 + s**2),
        np.log(s) / 4,
    ),
}


def draws(shape, count=2, dtype: Any = np.float32):
    values = np.random.default_rng(0).standard_normal((count, *shape))
    return [jnp.asarray(value, dtype) for value in values]


@pytest.mark.parametrize("name", SCALINGS)
def test_coefficients(name):
    got = SCALINGS[name]()(jnp.asarray(SIGMAS, jnp.float32))
    for field, value, expected in zip(got._fields, got, FORMULAS[name](SIGMAS), strict=True):
        assert value.shape == SIGMAS.shape and value.dtype == jnp.float32
        np.testing.assert_allclose(value, np.broadcast_to(expected, 7), rtol=2e-6, err_msg=field)


@pytest.mark.parametrize("name", ["v", "edm"])
def test_the_largest_levels_do_not_overflow(name):
    """Upstream's "sqrt" schedule reaches sigma = 5.6e21, whose square float32 cannot hold."""
    c = SCALINGS[name]()(jnp.asarray([5.6e21], jnp.float32))
    np.testing.assert_allclose(c.c_in, 1 / 5.6e21, rtol=1e-6)
    np.testing.assert_allclose(c.c_out, {"v": -1.0, "edm": 0.5}[name], rtol=1e-6)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_edm_keeps_the_input_and_the_target_at_unit_variance(sigma_data):
    c = SCALINGS["edm"](sigma_data=sigma_data)(jnp.asarray(SIGMAS, jnp.float32))
    total = SIGMAS**2 + sigma_data**2
    np.testing.assert_allclose(np.asarray(c.c_in, np.float64) ** 2 * total, 1.0, rtol=1e-5)
    # Var[(x_0 - c_skip (x_0 + sigma eps)) / c_out]
    c_skip, c_out = np.asarray(c.c_skip, np.float64), np.asarray(c.c_out, np.float64)
    variance = ((1 - c_skip) ** 2 * sigma_data**2 + (c_skip * SIGMAS) ** 2) / c_out**2
    # 1 - c_skip cancels at the smallest sigmas, where it hardly counts
    np.testing.assert_allclose(variance[1:], 1.0, rtol=1e-4)


@pytest.mark.parametrize("name", SCALINGS)
def test_the_continuous_denoiser_is_karras_equation_7(name):
    x, weights = draws((7, 2, 3, 1))
    seen = {}

    def apply(x, c_noise, conditioning):
        seen.update(x=x, c_noise=c_noise)
        return jnp.tanh(x * weights) + conditioning["vector"][:, None, None, None]

    conditioning = {"vector": jnp.arange(7.0)}
    got = denoiser(apply, SCALINGS[name]())(x, jnp.asarray(SIGMAS, jnp.float32), conditioning)
    c_skip, c_out, c_in, c_noise = (
        np.broadcast_to(c, 7).reshape(7, 1, 1, 1) for c in FORMULAS[name](SIGMAS)
    )
    output = np.tanh(c_in * np.asarray(x) * np.asarray(weights))
    output = output + np.arange(7.0).reshape(7, 1, 1, 1)
    np.testing.assert_allclose(got, c_skip * np.asarray(x) + c_out * output, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(seen["c_noise"], c_noise.ravel(), rtol=2e-6)
    np.testing.assert_allclose(seen["x"], c_in * np.asarray(x), rtol=2e-6)


def upstream(scaling, x, sigma, table, quantize_c_noise):
    """sgm's DiscreteDenoiser, brute force in float64: what the network is given, and D."""
    index = np.abs(np.asarray(sigma)[:, None] - table[None]).argmin(axis=1)
    c_skip, c_out, c_in, c_noise = (np.broadcast_to(c, len(x)) for c in scaling(table[index]))
    if quantize_c_noise:
        c_noise = np.abs(c_noise[:, None] - table[None]).argmin(axis=1)
    output = np.sin(c_in[:, None] * x) + 0.001 * c_noise[:, None]
    return c_noise, c_skip[:, None] * x + c_out[:, None] * output


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize("quantize_c_noise", [True, False])
def test_the_discrete_denoiser_snaps_in_upstreams_order(name, quantize_c_noise):
    table = sigma_table(legacy_ddpm)
    sigma = jnp.asarray([0.001, 0.03, 0.0353, 1.0, 5.02, 14.6, 99.0], jnp.float32)
    (x,) = draws((7, 5), 1)
    seen = {}

    def apply(x, c_noise, conditioning):
        seen.update(c_noise=c_noise)
        return jnp.sin(x) + 0.001 * c_noise.astype(jnp.float32)[:, None]

    denoise = denoiser(apply, SCALINGS[name](), table, quantize_c_noise=quantize_c_noise)
    c_noise, expected = upstream(
        FORMULAS[name],
        np.asarray(x, np.float64),
        np.asarray(sigma, np.float64),
        np.asarray(table, np.float64),
        quantize_c_noise,
    )
    np.testing.assert_allclose(denoise(x, sigma, {}), expected, rtol=1e-4, atol=1e-5)
    if quantize_c_noise:
        assert seen["c_noise"].dtype == jnp.int32
        np.testing.assert_array_equal(seen["c_noise"], c_noise)
    else:
        np.testing.assert_allclose(seen["c_noise"], c_noise, rtol=2e-6)


def test_edm_looks_a_quarter_of_the_logarithm_up_among_the_sigmas():
    """Upstream's quirk: with EDM's c_noise, timesteps 0, 500 and 999 are seen as 0, 15 and 240."""
    table = sigma_table(legacy_ddpm)
    seen = {}

    def spy(x, c_noise, conditioning):
        seen.update(c_noise=c_noise)
        return x

    for name, expected in (("eps", [0, 500, 999]), ("edm", [0, 15, 240])):
        sigma = table[jnp.asarray([0, 500, 999])]
        denoiser(spy, SCALINGS[name](), table)(jnp.ones((3, 1)), sigma, {})
        np.testing.assert_array_equal(seen["c_noise"], expected)


@pytest.mark.parametrize("make", [legacy_ddpm, zero_snr])
def test_nearest_is_argmin_in_float64(make):
    table = np.asarray(sigma_table(make), np.float64)
    rng = np.random.default_rng(1)
    middles = (table[1:] + table[:-1]) / 2
    values = np.concatenate(
        [table, middles, middles * (1 + 1e-6), middles * (1 - 1e-6), rng.uniform(0, 20, 500)]
    )
    values = values.astype(np.float32)
    got = jax.jit(nearest)(jnp.asarray(values), jnp.asarray(table, jnp.float32))
    expected = np.abs(values.astype(np.float64)[:, None] - table[None]).argmin(axis=1)
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(
    ("values", "table", "expected"),
    [
        ([1.5, 2.5, 3.0, 0.0], [1.0, 2.0, 3.0], [0, 1, 2, 0]),  # ties take the first
        ([1e12, -1e12, jnp.inf, 0.0], [1.0, 1.0001, 1.0002], [2, 0, 2, 0]),  # equal differences
        ([0.0, 7.0], [3.0], [0, 0]),
        ([0.0, 0.6, 0.5], [0.0, 1.0], [0, 1, 0]),
    ],
)
def test_nearest_at_the_edges(values, table, expected):
    got = nearest(jnp.asarray(values, jnp.float32), jnp.asarray(table, jnp.float32))
    np.testing.assert_array_equal(got, expected)


def test_swapping_the_table_does_not_retrace():
    traces = []

    @jax.jit
    def run(table, x, sigma):
        traces.append(1)
        return denoiser(lambda x, t, c: jnp.sin(x), SCALINGS["v"](), table)(x, sigma, {})

    x, sigma = jnp.ones((2, 3)), jnp.array([0.5, 3.0])
    first = run(sigma_table(legacy_ddpm, 10), x, sigma)
    second = run(sigma_table(zero_snr, 10), x, sigma)
    assert traces == [1]
    assert not np.allclose(first, second)


def test_half_precision_is_scaled_in_float32():
    x = jnp.full((2, 3), 1.0, jnp.bfloat16)
    sigma = jnp.array([0.01, 10.0], jnp.bfloat16)
    got = denoiser(lambda x, t, c: x.astype(jnp.bfloat16), SCALINGS["edm"]())(x, sigma, {})
    assert got.dtype == jnp.float32
    c_skip, c_out, c_in, _ = FORMULAS["edm"](np.asarray(sigma, np.float64))
    expected = (c_skip + c_out * np.asarray(jnp.asarray(c_in, jnp.bfloat16), np.float64))[:, None]
    np.testing.assert_allclose(got, np.broadcast_to(expected, (2, 3)), rtol=1e-5)


def test_errors_name_what_is_wrong():
    with pytest.raises(ValueError, match="sigma_data = 0.0 should be positive"):
        SCALINGS["edm"](sigma_data=0.0)
    denoise = denoiser(lambda x, t, c: x[..., :1], SCALINGS["eps"]())
    with pytest.raises(ValueError, match=r"output has the shape \(2, 1\).* \(2, 3\)"):
        denoise(jnp.ones((2, 3)), jnp.ones(2), {})
    denoise = denoiser(lambda x, t, c: x, SCALINGS["eps"](), around="concat")
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 1\); it should be like x, \(2, 3, 4, 4, 3\)"):
        denoise(jnp.ones((2, 3, 4, 4, 3)), jnp.ones(2), {"concat": jnp.ones((2, 4, 4, 1))})


@pytest.mark.parametrize("table", [None, jnp.asarray([0.5, 3.0, 10.0])])
def test_what_is_denoised_around_a_frame_is_the_difference_to_it(table):
    """Of differences that are normal, the best denoiser shrinks them alone: F = 0 is that one."""
    (clip,), (frame,) = draws((2, 5, 4, 4, 3), 1), draws((2, 4, 4, 3), 1)
    sigma, seen = jnp.array([0.5, 3.0]), []
    nothing = lambda x, c_noise, conditioning: seen.append(x) or jnp.zeros_like(x)
    denoise = denoiser(nothing, SCALINGS["edm"](sigma_data=0.2), table, around="concat")
    got = denoise(clip, sigma, {"concat": frame})
    away = np.asarray(clip, np.float64) - np.asarray(frame, np.float64)[:, None]
    s2 = np.asarray(sigma, np.float64)[:, None, None, None, None] ** 2
    expected = np.asarray(frame)[:, None] + 0.04 / (s2 + 0.04) * away
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[0], away / np.sqrt(s2 + 0.04), rtol=1e-5)
    every = np.broadcast_to(np.asarray(frame)[:, None], clip.shape)
    np.testing.assert_array_equal(denoise(clip, sigma, {"concat": jnp.asarray(every)}), got)


def algebra():
    """float64 [7 4]: x_0, eps, x and sigma of variance-exploding coordinates."""
    x_start, noise = draws((7, 4), dtype=np.float64)
    sigma = jnp.asarray(SIGMAS, jnp.float64)
    return x_start, noise, x_start + sigma[:, None] * noise, sigma


@pytest.mark.parametrize("name", SCALINGS)
def test_what_a_network_of_any_scaling_predicts_there_and_back(name):
    with jax.enable_x64(True):
        x_start, noise, x, sigma = algebra()
        output = preconditioning.output_from_start(SCALINGS[name](), x_start, x, sigma)
        back = preconditioning.start_from_output(SCALINGS[name](), output, x, sigma)
        assert output.dtype == jnp.float64
        np.testing.assert_allclose(back, x_start, rtol=1e-9, atol=1e-9)
        s = np.asarray(sigma)[:, None]
        root = np.sqrt(s**2 + 1)
        velocity = (noise - s * x_start) / root
        expected = {
            "eps": noise,
            "x0": x_start,
            "v": velocity,
            "v_edm": velocity,
            # The target of Karras et al., equation 8, written with x_0 and eps.
            "edm": (s * x_start - 0.25 * noise) / (0.5 * np.sqrt(s**2 + 0.25)),
            "flow": noise - x_start,
            "consistency": (x_start - 0.25 / ((s - 0.002) ** 2 + 0.25) * (x_start + s * noise))
            * np.sqrt(s**2 + 0.25)
            / (0.5 * (s - 0.002)),
        }[name]
        np.testing.assert_allclose(output, expected, rtol=1e-6, atol=1e-6)


def test_conversions_agree_with_those_of_a_schedule():
    """x = x_t / sqrt(abar), sigma = sqrt(1 / abar - 1): eps, v and x_0 are the same numbers."""
    schedule = make_schedule("linear", 20, linear_end=0.3)
    t = jnp.array([0, 3, 11, 19])
    x_start, noise = draws((4, 5))
    x_t = ddpm.q_sample(schedule, x_start, t, noise)
    sigma = schedule.sqrt_recipm1_alphas_cumprod[t]
    x = schedule.sqrt_recip_alphas_cumprod[t][:, None] * x_t
    close: dict[str, Any] = dict(rtol=1e-3, atol=1e-4)
    for name, scaling in (("noise", SCALINGS["eps"]()), ("v", SCALINGS["v"]())):
        value = noise if name == "noise" else ddpm.get_v(schedule, x_start, noise, t)
        there = preconditioning.output_from_start(scaling, x_start, x, sigma)
        np.testing.assert_allclose(there, value, **close)
        expected = getattr(ddpm, f"predict_start_from_{name}")(schedule, x_t, t, value)
        back = preconditioning.start_from_output(scaling, value, x, sigma)
        np.testing.assert_allclose(back, expected, **close)


def test_flow_scaling_is_the_straight_line_between_data_and_noise():
    """x_t = (1 - t) x_0 + t eps has the velocity eps - x_0, and the denoiser then finds x_0."""
    x_0, eps = draws((5, 3))
    t = jnp.linspace(0.1, 0.9, 5)
    seen = []

    def velocity(x, c_noise, conditioning):
        seen.append((x, c_noise))
        return eps[..., None] - x_0[..., None]

    sigma = t / (1 - t)
    x = (x_0 + sigma[:, None] * eps)[..., None]
    denoised = denoiser(velocity, preconditioning.flow())(x, sigma, {})
    ((x_t, c_noise),) = seen
    line = (1 - t[:, None]) * x_0 + t[:, None] * eps
    np.testing.assert_allclose(x_t[..., 0], line, atol=1e-6)
    np.testing.assert_allclose(c_noise, 1000 * t, rtol=1e-6)
    np.testing.assert_allclose(denoised[..., 0], x_0, atol=1e-6)
