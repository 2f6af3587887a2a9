"""Sampling grids: upstream's golden numbers, shapes of every row, and the zero terminal SNR."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_jax.diffusion.samplers import sigmas as discretization
from diffusion_jax.diffusion.samplers.sigmas import DISCRETIZATIONS, from_schedule, sigma_table
from diffusion_jax.diffusion.schedule import make_schedule

# num_steps: first levels, last levels; from running sgm's LegacyDDPMDiscretization
GOLDEN = {
    1: ([14.614641, 0], [14.614641, 0]),
    4: ([14.614641, 4.081729, 1.612886], [0.693205, 0]),
    10: ([14.614641, 8.302803, 5.087763, 3.321083], [0.829859, 0.569285, 0.341674, 0]),
    20: ([14.614641], [0.453819, 0.341674, 0.223003, 0]),
    50: ([14.614641, 12.966321, 11.542771, 10.309402], [0.24822, 0.196303, 0.134451, 0]),
    1000: ([14.614641, 14.526276, 14.438569, 14.351515], [0.05068, 0.041314, 0.029167, 0]),
}


@pytest.mark.parametrize("num_steps", GOLDEN)
def test_golden_legacy_ddpm(num_steps):
    sigmas = discretization.legacy_ddpm(num_steps)
    first, last = GOLDEN[num_steps]
    np.testing.assert_allclose(sigmas[: len(first)], first, atol=6e-7)
    np.testing.assert_allclose(sigmas[-len(last) :], last, atol=6e-7)


def test_golden_edm():
    expected = [80, 17.52783, 2.515219, 0.169753, 0.002, 0]
    np.testing.assert_allclose(discretization.edm(5), expected, rtol=3e-6)
    np.testing.assert_array_equal(discretization.edm(1), [80, 0])


@pytest.mark.parametrize("num_steps", [1, 2, 37, 1000])
@pytest.mark.parametrize("name", DISCRETIZATIONS)
def test_every_grid_descends_from_its_largest_level_to_zero(name, num_steps):
    sigmas = DISCRETIZATIONS[name](num_steps)
    assert sigmas.shape == (num_steps + 1,) and sigmas.dtype == np.float64
    assert sigmas[-1] == 0.0 and np.all(np.diff(sigmas) < 0) and np.all(np.isfinite(sigmas))
    largest = {"edm": 80.0, "consistency": 80.0, "zero_snr": (2**24 - 1) ** 0.5, "flow": 2.0**24}
    np.testing.assert_allclose(sigmas[0], largest[name] if name in largest else 14.6146, rtol=3e-6)


def test_karras_and_exponential_are_even_in_their_own_scale():
    options = dict(sigma_min=0.01, sigma_max=30.0)
    karras = discretization.karras(9, rho=5.0, **options)[:-1]
    exponential = discretization.exponential(9, **options)[:-1]
    for sigmas, scaled in ((karras, karras**0.2), (exponential, np.log(exponential))):
        np.testing.assert_allclose(sigmas[[0, -1]], [30.0, 0.01], rtol=1e-12)
        np.testing.assert_allclose(np.diff(scaled), np.diff(scaled).mean(), rtol=1e-9)


def test_a_schedule_gives_its_own_levels():
    schedule = make_schedule("linear", linear_start=0.00085, linear_end=0.012)
    for num_steps in (7, 1000):
        np.testing.assert_allclose(
            from_schedule(schedule, num_steps), discretization.legacy_ddpm(num_steps), rtol=1e-6
        )
    low, high = discretization.sigma_range(schedule)
    np.testing.assert_allclose([low, high], [0.02916716, 14.6146412], rtol=1e-6)
    abar = np.asarray(make_schedule("cosine", 10).alphas_cumprod, np.float64)
    got = from_schedule(make_schedule("cosine", 10), 10)
    np.testing.assert_allclose(got[:-1][::-1], np.sqrt((1 - abar) / abar), rtol=1e-5)


def test_zero_snr_is_the_stretched_schedule_up_to_its_cap():
    """Lin et al.: sqrt(abar') = a (sqrt(abar) - sqrt(abar_T)) keeps abar_0, ends at 0."""
    sigmas = discretization.zero_snr(1000)[:-1][::-1]
    root = 1 / np.sqrt(1 + discretization.legacy_ddpm(1000)[:-1][::-1] ** 2)
    stretched = (root - root[-1]) * root[0] / (root[0] - root[-1])
    np.testing.assert_allclose(1 / np.sqrt(1 + sigmas[:-1] ** 2), stretched[:-1], rtol=1e-9)
    assert stretched[-1] == 0.0
    assert discretization.zero_snr(20, sigma_max=1e5)[0] == 1e5
    schedule = make_schedule(
        "linear",
        linear_start=0.00085,
        linear_end=0.012,
        parameterization="v",
        rescale_zero_snr=True,
    )
    for num_steps in (20, 1000):
        np.testing.assert_allclose(
            from_schedule(schedule, num_steps), discretization.zero_snr(num_steps), rtol=1e-6
        )


def test_the_table_of_a_discrete_denoiser_ascends_without_zero():
    table = sigma_table(discretization.legacy_ddpm)
    assert table.shape == (1000,) and table.dtype == jnp.float32
    np.testing.assert_allclose(table[jnp.array([0, 1, 999])], [0.029167, 0.041314, 14.614641], 2e-5)
    np.testing.assert_array_equal(
        sigma_table(lambda n: discretization.edm(n, rho=5.0), 7),
        discretization.edm(7, rho=5.0)[6::-1].astype(np.float32),
    )


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: discretization.legacy_ddpm(1001), r"num_steps = 1001 .*\[1, 1000\]"),
        (lambda: discretization.legacy_ddpm(0), r"num_steps = 0 .*\[1, 1000\]"),
        (lambda: discretization.edm(0), "num_steps = 0 .*at least 1"),
        (lambda: discretization.edm(3, sigma_min=0.0), "sigma_min = 0.0 and sigma_max = 80.0"),
        (lambda: discretization.karras(3, sigma_max=0.01), "sigma_min = 0.0292 .*in this order"),
        (lambda: discretization.edm(3, rho=0.0), "rho = 0.0 .*positive"),
        (lambda: discretization.exponential(3, sigma_min=-1.0), "sigma_min = -1.0"),
        (lambda: discretization.zero_snr(3, sigma_max=80.0), "sigma_max = 80.0 .*2254.24"),
        (lambda: discretization.zero_snr(3, sigma_max=np.inf), "sigma_max = inf .*finite"),
        (lambda: discretization.zero_snr(1, num_timesteps=1), "1 timestep"),
        (lambda: from_schedule(make_schedule("linear", 10), 11), r"num_steps = 11 .*\[1, 10\]"),
        (
            lambda: sigma_table(lambda n: discretization.edm(n, sigma_max=0.0020001), 9999),
            "should be positive and above",
        ),
    ],
)
def test_bad_values_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_flow_spaces_time_evenly_and_shifts_it():
    """t = sigma / (1 + sigma) is 1, 3/4, 1/2, 1/4, 0; a shift multiplies sigma."""
    t = np.array([1, 0.75, 0.5, 0.25, 0])
    for shift in (1.0, 3.0):
        levels = discretization.flow(4, shift=shift)
        np.testing.assert_allclose(
            levels / (1 + levels), shift * t / (1 + (shift - 1) * t), atol=1e-7
        )
    np.testing.assert_allclose(discretization.flow(3, t_last=0.5)[1:], [3, 1, 0])
    np.testing.assert_array_equal(discretization.flow(1), [2.0**24, 0])
    # The released values of FLUX.1: exp(0.5) at 256 tokens, exp(1.15) at 4096.
    for tokens, mu in ((256, 0.5), (4096, 1.15), (2176, 0.825)):
        np.testing.assert_allclose(discretization.shift_of_tokens(tokens), np.exp(mu), rtol=1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps = 0 should be at least 1"),
        ({"num_steps": 4, "shift": 0.0}, "shift = 0.0 should be positive and finite"),
        ({"num_steps": 4, "t_last": 1.0}, "t_last = 1.0 should lie between 0 and 1"),
    ],
)
def test_flow_refuses(options, message):
    with pytest.raises(ValueError, match=message):
        discretization.flow(**options)
